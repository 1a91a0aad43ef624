"""POPE (Tab. 9): is there a ... in the image? Yes and no, about COCO's val2014.

Files      coco_pope_{random,popular,adversarial}.json (JSON lines or an array), from github.com/RUCAIBox/POPE, output/coco
Questions  the file's own text: {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
           "text": "Is there a snowboard in the image?", "label": "yes"}
Score      accuracy, precision, recall, F1 and share of yes. An answer is no if its first sentence holds No, no or not, else
           yes. As in LLaVA, the mean F1 is printed once several files have results beside each other

    python -m tasks pope runs/b2 --questions coco_pope_adversarial.json --images val2014 --with-blind

    >>> item = Item("1", None, None, "Is there a snowboard in the image?", {"label": "yes"}, "There is not.")
    >>> judge_hal(item, None); item.correct
    False
"""

from collections import Counter

from evaluate import HAL_PROMPT, Item, Task, hal_metrics, judge_hal, mean, paper_rows
from formats.eval_folder import shown
from tasks.files import coco_names, find_image, read_rows, rows_by_id
from tasks.words import spaced

FIVE = ("accuracy", "precision", "recall", "F1", "says yes")
VERSIONS = {3000: "the present files", 2910: "the old random file, LLaVA's"}


def read_pope(args, wording):
    needs = {"question_id": int | str, "image": str, "text": str, "label": str}
    rows = rows_by_id(read_rows(args.questions, "a file of POPE"), args.questions, "question_id", needs, "a file of POPE")
    items = []
    for name, row in rows.items():
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"{args.questions}: question {name} has label {row['label']!r}, neither yes nor no")
        path = find_image(args.images, *coco_names(row["image"], "val2014"))
        items.append(Item(name, path, None, row["text"], {"label": row["label"]}))
    return items, Counter()


def pope_metrics(items):
    """Count the five figures and answers with neither word, and name the released version by its number of questions."""
    neither = mean(not {"yes", "no", "not"} & set(spaced(item.answer).split()) for item in items)
    version = VERSIONS.get(len(items), "as many as in neither released version")
    return hal_metrics(items) | {"neither yes nor no": neither, f"questions ({version})": len(items)}


def mean_f1(results, folder):
    f1 = [result["metrics"]["F1"] for result in results]
    return f"  mean F1 of the {len(f1)} files of POPE in {folder}: {shown(mean(f1))}\n" if len(f1) > 1 else ""


TASKS = {
    "pope": Task(
        read_pope, judge_hal, pope_metrics, (HAL_PROMPT,),
        "questions: coco_pope_{random,popular,adversarial}.json", summary=mean_f1,
        paper=paper_rows(
            FIVE,
            ("LLaVA, random", 50.4, 50.2, 99.1, 66.6, 98.8),
            ("LocVLM-B, random", 87.9, 83.6, 93.9, 88.5, 56.2),
            ("LLaVA, popular", 49.9, 49.9, 99.3, 66.4, 99.4),
            ("LocVLM-B, popular", 86.0, 79.7, 93.9, 86.3, 58.9),
            ("LLaVA, adversarial", 49.7, 49.9, 99.1, 66.3, 99.4),
            ("LocVLM-B, adversarial", 78.8, 76.6, 93.7, 84.3, 61.7),
        ),
    )
}  # fmt: skip
