"""POPE (Tab. 9): is there a ... in the image? Yes and no, about COCO's val2014.

Files      coco_pope_{random,popular,adversarial}.json (JSON lines or an array), from github.com/RUCAIBox/POPE, output/coco: the
           present ones, or those before August 2023, LLaVA's; or POPE's questions about GQA's images, output/seem/gqa; or
           lmms-lab's .parquet, with images (test-*.parquet holds all three: --split adversarial)
Questions  {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in ...?", "label": "yes"}
Score      accuracy, precision, recall, F1 and share of yes (evaluate.says_no), and the mean F1 of the files beside each other
Run        python -m tasks pope runs/b2 --questions coco_pope_adversarial.json --images val2014 --with-blind
    >>> item = Item("1", None, None, "Is there a snowboard in the image?", {"label": "yes"}, "There is not.")
    >>> judge_hal(item, None); item.correct
    False
"""

import re

from evaluate import HAL_PROMPT, Item, Task, hal_metrics, judge_hal, mean, paper_rows
from formats.annotations import coco_id
from formats.eval_folder import shown
from tasks.files import Rows, find_image, keys_of, of_split, read_rows
from tasks.hal_ade import COCO_NAMES
from tasks.words import add_short, spaced

ROWS = Rows("a file of POPE", {"question_id": int | str, "image": str, "text": str, "label": str})


def read_pope(args, wording):
    content, items = read_rows(args.questions, ROWS.file), []
    if "category" in keys_of(content):  # lmms-lab's
        content = of_split(content, "category", args)
        content = [row | {"text": row.get("question"), "label": row.get("answer")} for row in content]
    elif args.split:
        raise ValueError(f"{args.questions} has no splits; leave out --split")
    for name, row in ROWS.read(args.questions, content).items():
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"{args.questions}: question {name} has label {row['label']!r}, neither yes nor no")
        path, question = find_image(args.images, row["image"], "val2014"), add_short(row["text"], args.short)
        items.append(Item(name, path, None, question, {"label": row["label"]}))
    return items, {}


def is_about_coco(items):
    """Return True for COCO's images and objects. output/seem/aokvqa asks about other objects in COCO's images."""
    asked = {found[1] for item in items if (found := re.match(r"Is there an? (.+) in the ", item.question))}
    return None not in (coco_id(item.image) for item in items) and asked <= {*COCO_NAMES}


def release_of(items):
    """Name the release that questions are of. The older one has fewer random questions, and misspells some texts."""
    if not is_about_coco(items):
        other = f"about other {'objects' if coco_id(items[0].image) else 'images'} than COCO's"
        return "about GQA's images" if all(item.image.stem.isdecimal() for item in items) else other
    if len(items) == 2910 or len(items) == 3000 and any("imange" in item.question for item in items):
        return "the older files, LLaVA's"
    return "the present files" if len(items) == 3000 else "as many as in no release"


def pope_metrics(items):
    neither = mean(not {"yes", "no", "not"} & set(spaced(item.answer).split()) for item in items)
    return hal_metrics(items) | {"neither yes nor no": neither, f"questions ({release_of(items)})": len(items)}


def mean_f1(results, folder):
    f1 = [result["metrics"]["F1"] for result in results]
    keys = ("weights_sha256", "decoding", "dtype", "short", "images")
    other = [key for key in keys if any(result.get(key) != results[0].get(key) for result in results)]
    other += ["releases"] * (len({name for result in results for name in result["metrics"] if name.startswith("questions (")}) > 1)
    notes = [f"not comparable: the files differ in {', '.join(other)}"] * bool(other)
    notes += ["some have the same questions"] * (len({result.get("questions_sha256") for result in results}) < len(results))
    note = f" ({'; '.join(notes)})" if notes else ""
    return f"  mean F1 of the {len(f1)} files of POPE in {folder}: {shown(mean(f1))}{note}\n" if len(f1) > 1 else ""


FILES = "questions: coco_pope_{random,popular,adversarial}.json, or lmms-lab's .parquet"
TASKS = {"pope": Task(read_pope, judge_hal, pope_metrics, (HAL_PROMPT,), FILES, ("short", "split"), paper_rows("pope"),
                      has_paper=is_about_coco, summary=mean_f1)}
