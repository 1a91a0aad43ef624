"""TODO tasks.hal_ade."""

import csv
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from evaluate import Item, ask_presence
from formats.clips import naming
from formats.files import require_file, some
from tasks.files import asked_of, find_image

# ----- Hal-ADE

COCO_NAMES = (
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter,
bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase,
frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
""".strip()
    .replace(",\n", ", ")
    .split(", ")
)
# of one kind with one of COCO's
COCO_KINDS = {"motorbike", "armchair", "bag", "animal", "food", "computer", "van", "ship"}


def overlaps_coco(names):
    """Say whether an object's names overlap COCO's: one of them, or its last word, is a name of COCO's or a name's last word.

    >>> overlaps_coco(["sofa", "couch"]), overlaps_coco(["coffee table"]), overlaps_coco(["sky"])
    (True, True, False)
    """
    taken = {*COCO_NAMES, *(name.split()[-1] for name in COCO_NAMES), *COCO_KINDS}
    return any(name in taken or name.split()[-1] in taken for name in names)


def read_hal_ade(questions, answers, images, seed=0):
    """Hal-ADE (Sec. 4.5): is there a ...? for two objects in an image of ADE20K and two that are not, none of them COCO's.

    questions  ADEChallengeData2016/objectInfo150.txt (or .csv); beside it annotations/validation/*.png, of 0 (nothing) to 150
    images     ADEChallengeData2016/images/validation
    Which objects is a function of (seed, image). What shares a name with an object that is there is not asked for as absent.
    """
    expected = "ADEChallengeData2016/objectInfo150.txt"
    with naming(require_file(questions, expected), UnicodeDecodeError):
        text = Path(questions).read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text else ",")
    try:
        called = {int(row["Idx"]): [n.strip() for n in re.split("[,;]", row["Name"]) if n.strip()] for row in rows}
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
        called = {}
    if not called or not all(called.values()):
        raise ValueError(
            f"{questions} lists no objects; expected {expected}, with columns Idx and Name; check the file"
        )
    folder = Path(questions).parent / "annotations/validation"
    masks = sorted(folder.glob("*.png"))
    if not masks:
        raise FileNotFoundError(
            f"no masks in {folder}; expected ADE_val_*.png, beside {questions}; unpack the whole archive"
        )
    ours, left_out, items = {number for number, names in called.items() if not overlaps_coco(names)}, Counter(), []
    for mask in masks:
        pixels = np.asarray(open_mask(mask))
        found = set(np.unique(pixels).tolist()) - {0}
        if pixels.ndim != 2 or found - called.keys():
            raise ValueError(
                f"{mask} has shape {pixels.shape} and values {some(sorted(map(str, found)))}; expected one number a pixel, "
                f"those of {questions}; is it of the full ADE20K?"
            )
        present = sorted(found & ours)
        taken = {name for number in found for name in called[number]}
        absent = sorted(number for number in ours - found if not taken & set(called[number]))
        count, rng = min(2, len(present), len(absent)), random.Random(f"{seed} {mask.stem}")
        left_out.update({} if count else {"images with no such object": 1})
        path = find_image(images, f"{mask.stem}.jpg")
        for label, numbers in (("yes", present), ("no", absent)):
            for name in [called[number][0] for number in rng.sample(numbers, count)]:
                items.append(
                    Item(f"{mask.stem}:{label}:{name}", path, None, ask_presence(name), {"label": label, "name": name})
                )
    return asked_of(items, questions, images), left_out


def open_mask(path):
    """Open a PNG whose pixels are numbers, not colours."""
    with naming(path, OSError, SyntaxError), Image.open(path) as image:
        image.load()
        return image
