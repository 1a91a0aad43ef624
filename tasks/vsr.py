"""VSR: does a caption name the right relation of two objects? Yes and no, about COCO's train2017 and val2017.

Files      test.jsonl of the random split (2,195 captions) or the zero-shot split (1,222), from github.com/cambridgeltl/
           visual-spatial-reasoning, data/splits. Images in one folder, or in train2017 and val2017 under it
Questions  {"image": "000000119360.jpg", "caption": "The cat is behind the laptop.", "label": 1, "relation": "behind"}, asked
           as "Is the cat behind the laptop?"; the few with another verb as "Is it true that the car contains the cat?"
Score      accuracy, by POPE's reading of an answer (evaluate.says_no), also balanced over right and wrong captions, by the
           authors' seven groups and by relation; beside it chance, people and models, from VSR's own paper
Run        python -m tasks vsr runs/b2 --questions zeroshot/test.jsonl --images trainval2017 --with-blind
    >>> item = Item("0", None, None, ask("The cat is behind the laptop."), {"label": "yes"}, "No, it is in front of it.")
    >>> judge_hal(item, None); item.question, item.correct
    ('Is the cat behind the laptop?', False)
"""

import re
from pathlib import Path

from evaluate import Item, Task, hal_metrics, judge_hal, mean, paper_rows
from formats.files import read_json
from tasks.files import FOLDER, Rows, find_image, read_rows
from tasks.words import add_short

ROWS = Rows("VSR's test.jsonl", {"image": str, "caption": str, "label": int, "relation": str})
PROMPTS = ("Is {the object} {relation} {the other object}?", "Is it true that {caption}?")
GROUPS = read_json(FOLDER / "vsr_groups.json")  # the authors'; "among" stands in two, and their script counts it in the last
GROUP_OF = {relation: group for group, relations in GROUPS.items() for relation in relations}


def ask(caption):
    text = caption.strip().rstrip(".")
    text = text[:1].lower() + text[1:]
    found = re.match(r"(the .+?) is (.+)", text)
    return f"Is {found[1]} {found[2]}?" if found else f"Is it true that {text}?"


def read_vsr(args, wording):
    content, items = read_rows(args.questions, ROWS.file), []
    rows = dict(enumerate(content)) if isinstance(content, list) else content  # they have no ids
    for name, row in ROWS.read(args.questions, rows).items():
        if row["label"] not in (0, 1):
            raise ValueError(f"{args.questions}: caption {name} has label {row['label']!r}, neither 0 nor 1")
        path = find_image(args.images, row["image"], Path(str(row.get("image_link") or "train2017/_")).parent.name)
        relation, label = row["relation"], "yes" if row["label"] else "no"
        truth = {"label": label, "relation": relation, "group": GROUP_OF.get(relation, "none of the seven")}
        items.append(Item(name, path, None, add_short(ask(row["caption"]), args.short), truth))
    return items, {}


def vsr_metrics(items):
    kinds = sorted({(key, item.truth[key]) for item in items for key in ("label", "group", "relation")})
    shares = {(key, kind): mean(i.correct for i in items if i.truth[key] == kind) for key, kind in kinds}
    metrics = {"accuracy, balanced": mean(share for (key, _), share in shares.items() if key == "label")}
    metrics["captions that are right"] = mean(item.truth["label"] == "yes" for item in items)
    metrics |= {f"{key} {kind}": share for (key, kind), share in shares.items() if key != "label"}
    return hal_metrics(items) | metrics | {"questions": len(items)}


FILES = "questions: test.jsonl of one of its splits"
TASKS = {"vsr": Task(read_vsr, judge_hal, vsr_metrics, PROMPTS, FILES, ("short",), paper_rows("vsr"))}
