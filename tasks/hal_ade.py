"""Hal-ADE (Sec. 4.5, Tab. 8): is there a ... in the image? About ADE20K's objects that are not COCO's.

Files      ADEChallengeData2016/objectInfo150.txt (or .csv), and beside it annotations/validation/*.png, whose pixels are object
           numbers from 0 (nothing) to 150; images/validation. From sceneparsing.csail.mit.edu
Questions  "Is there a screen door in the image?" for two objects in the image and two that are not and share no name with
           one that is. Seed and image fix the draw. An object with a COCO name, or whose last word is one, is skipped
Score      accuracy, by POPE's reading of an answer (evaluate.says_no)
Run        python -m tasks hal-ade runs/b2 --questions ADE/objectInfo150.txt --images ADE/images/validation
    >>> item = Item("ADE_val_1:no:sky", None, None, ask_presence("sky"), {"label": "no", "name": "sky"}, "No.")
    >>> judge_hal(item, None); item.question, item.correct
    ('Is there a sky in the image?', True)
"""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from evaluate import HAL_PROMPT, Item, Task, ask_presence, hal_metrics, judge_hal, paper_rows
from formats.files import naming, some
from formats.images import is_hidden
from tasks.files import FOLDER, Rows, find_image

OBJECTS = Rows("ADEChallengeData2016/objectInfo150.txt", {"Idx": str, "Name": str})
COCO_NAMES = (FOLDER / "coco_names.txt").read_text("utf-8").splitlines()  # COCO's names, then (from "motorbike" on) synonyms
TAKEN = {*COCO_NAMES, *(name.split()[-1] for name in COCO_NAMES)}  # "hot dog" and "dog"


def read_hal_ade(args, wording):
    rows, folder = OBJECTS.read(args.questions), Path(args.questions).parent / "annotations/validation"
    with naming(args.questions, ValueError):
        names = {int(number): [n.strip() for n in re.split("[,;]", row["Name"]) if n.strip()] for number, row in rows.items()}
    ours = {n for n in names if names[n] and not any({name, name.split()[-1]} & TAKEN for name in names[n])}
    masks, skipped, items = sorted(p for p in folder.glob("*.png") if not is_hidden(p.name)), Counter(), []
    if not masks:
        raise FileNotFoundError(f"no masks ADE_val_*.png in {folder}; unpack the whole archive")
    for mask in masks:
        with naming(mask, OSError, SyntaxError), Image.open(mask) as image:
            pixels = np.asarray(image)
        numbers = set(np.unique(pixels).tolist()) - {0}
        if pixels.ndim != 2 or numbers - names.keys():
            found = f"shape {pixels.shape} and values {some(sorted(map(str, numbers)))}"
            raise ValueError(f"{mask} has {found}, not one number of objectInfo150 per pixel; is it the full ADE20K's?")
        present, taken = sorted(numbers & ours), {name for number in numbers for name in names[number]}
        absent = sorted(number for number in ours - numbers if not taken & set(names[number]))
        count, rng = min(2, len(present), len(absent)), random.Random(f"{args.seed} {mask.stem}")
        if not count:
            skipped["images with no such object"] += 1
        path = find_image(args.images, f"{mask.stem}.jpg")
        for label, choices in (("yes", present), ("no", absent)):
            for name in [names[number][0] for number in rng.sample(choices, count)]:
                truth = {"label": label, "name": name}
                items.append(Item(f"{mask.stem}:{label}:{name}", path, None, ask_presence(name), truth))
    return items, skipped


FILES = "questions: ADEChallengeData2016/objectInfo150.txt, its masks beside it in annotations/validation"
TASKS = {"hal-ade": Task(read_hal_ade, judge_hal, hal_metrics, (HAL_PROMPT,), FILES, paper=paper_rows("hal-ade"))}
