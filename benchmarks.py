"""What is asked of a model, what the answer should be, and how answers are counted (Sec. 4; App. E, H).

A task is four things: items out of records (questions with their truth), the judgement of one item, the figures of all of
them, and the prompts it asks with. Nothing here runs a model: `evaluate.py` does.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coords import fault, iou
from data import LOC_PROMPTS, REV_PROMPTS, SIDE_PROMPTS, article, loc_question

PAPER = {  # LocVLM-B, percent
    "spatial": {
        "across": 69.5,
        "across left": 79.7,
        "across right": 59.2,
        "along": 65.4,
        "along above": 64.2,
        "along below": 65.9,
        "icl across": 76.5,
        "icl along": 74.1,
    },
    "hal": {"accuracy": 88.3},
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass
class Item:
    """One question about one image or clip, what the answer should be, and what it was. Everything but the path is JSON."""

    id: str  # unique within a task: answers are joined by it
    image: Path | None  # image file, member of a zip, or clip
    size: tuple | None  # (width, height) of the image where boxes are asked or drawn, else None
    question: str
    truth: dict
    answer: str = ""
    correct: bool | None = None
    boxes_px: list = field(default_factory=list)  # what the answer locates, original pixels
    mirrored: bool = False  # the picture is flipped left to right when it is loaded


def item_of(record, name, question, truth):
    """A question about an annotated image."""
    return Item(f"{record.id}:{name}", record.image, record.size, question, truth)


# ----- the tasks: items from records, and the judgement of one item


def locpred_items(records, wording, rng):
    """LocPred for every object that is alone of its category."""
    return [
        item_of(r, o.name, loc_question(o.name, wording, rng), {"name": o.name, "box_px": o.box_px})
        for r in records
        for o in r.objects
        if wording.can_place(o.box_px, r.size)
    ]


def judge_locpred(item, wording):
    """Right if the first box reaches IoU 0.5 with the truth; for points, if the first one lies in the true box."""
    box_px = item.truth["box_px"]
    if wording.location == "point":
        points_px = wording.fmt.decode_points(item.answer, item.size)
        item.boxes_px = [(x - 2, y - 2, x + 2, y + 2) for x, y in points_px[:1]]
        item.correct = (
            bool(points_px) and box_px[0] <= points_px[0][0] <= box_px[2] and box_px[1] <= points_px[0][1] <= box_px[3]
        )
    else:
        item.boxes_px = wording.fmt.decode_boxes(item.answer, item.size)[:1]
        item.truth["iou"] = iou(item.boxes_px[0], box_px) if item.boxes_px else 0.0
        item.correct = item.truth["iou"] >= 0.5


def locpred_metrics(items):
    found = [item for item in items if item.boxes_px]
    return {
        "acc@0.5": mean(item.correct for item in items),
        "mean IoU": mean(item.truth.get("iou", 0.0) for item in items),
        "no box": mean(not item.boxes_px for item in items),
        "box outside image": mean(bool(fault(item.boxes_px[0], item.size)) for item in found),
    }


def negpred_items(records, wording, rng):
    """NegPred: as many absent categories as there are unique objects, at least one an image."""
    return [
        item_of(r, name, loc_question(name, wording, rng), {"name": name})
        for r in records
        for name in rng.sample(r.absent, min(len(r.absent), max(1, len(r.objects))))
    ]


def judge_negpred(item, wording):
    item.boxes_px = wording.fmt.decode_boxes(item.answer, item.size)[:1]
    item.correct = "no such object" in item.answer.lower()


def negpred_metrics(items):
    return {"accuracy": mean(item.correct for item in items), "gave a box": mean(bool(item.boxes_px) for item in items)}


def revloc_items(records, wording, rng):
    """RevLoc for every object that is alone of its category. What may be named: every category of the data."""
    return [
        item_of(
            r,
            o.name,
            rng.choice(REV_PROMPTS).format(loc=wording.place(o.box_px, r.size)),
            {"name": o.name, "box_px": o.box_px, "names": sorted(r.present + r.absent)},
        )
        for r in records
        for o in r.objects
        if wording.can_place(o.box_px, r.size)
    ]


def first_named(text, names):
    """Give the category that a text names first, the longest where several start there; None if it names none.

    >>> first_named("There is a wine glass on the table", ["glass", "table", "wine glass"])
    'wine glass'
    """
    found = [
        (match.start(), -len(name), name)
        for name in names
        if (match := re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE))
    ]
    return min(found)[2] if found else None


def judge_revloc(item, wording):
    item.truth["named"] = first_named(item.answer, item.truth["names"])
    item.correct = item.truth["named"] == item.truth["name"]


def revloc_metrics(items):
    return {
        "name accuracy": mean(item.correct for item in items),
        "named nothing": mean(item.truth["named"] is None for item in items),
    }


def spatial_triplets(records, rng, axis):
    """COCO-Spatial (App. E): images with three objects, each alone of its category, whose centres avoid the central 20 %.

    axis 0: left and right halves; 1: above and below. Gives (record, obj_1, obj_2, obj_3, side of obj_1): obj_1 lies on
    one side, obj_2 and obj_3 on the other. One triplet an image, drawn at random.
    """
    words = (("left", "right"), ("above", "below"))[axis]
    for record in records:
        centres = [((o.box_px[axis] + o.box_px[axis + 2]) / 2 / record.size[axis], o) for o in record.objects]
        halves = [[o for c, o in centres if c <= 0.4], [o for c, o in centres if c >= 0.6]]
        choices = [side for side in (0, 1) if halves[side] and len(halves[1 - side]) >= 2]
        if choices:
            side = rng.choice(choices)
            yield record, rng.choice(halves[side]), *rng.sample(halves[1 - side], 2), words[side]


def spatial_items(records, wording, rng):
    """Direct and in-context questions (App. E). In context, `verbatim` has the paper's examples, which answer about the
    other object than was asked for; `consistent` has them answer what was asked, in random order."""
    items = []
    for axis, name in enumerate(("across", "along")):
        ask = SIDE_PROMPTS[name]
        says = "The {} is located to the {} of the {}." if name == "across" else "The {} is located {} the {}."
        for record, a, b, c, side in spatial_triplets(records, rng, axis):
            other = OPPOSITE[side]

            def question(first, second, ask=ask):
                return ask.format(obj_1=f"the {first.name}", obj_2=f"the {second.name}")

            # where obj_2 lies, seen from obj_1
            items.append(
                item_of(
                    record,
                    f"{name}:direct",
                    question(a, b),
                    {"setting": name, "word": other, "boxes_px": [a.box_px, b.box_px]},
                )
            )
            examples = [
                f"Q: {question(a, b)} A: {says.format(b.name, other, a.name)}",
                f"Q: {question(b, a)} A: {says.format(a.name, side, b.name)}",
            ]
            rng.shuffle(examples)
            final = f"Q: {question(c, a)}"
            items.append(
                item_of(
                    record,
                    f"{name}:icl",
                    " ".join([*examples, final]),
                    {"setting": f"icl {name}", "word": side, "boxes_px": [c.box_px, a.box_px]},
                )
            )
            if name == "across":
                examples = [
                    f"Q: {question(a, b)} A: {says.format(a.name, side, b.name)}",
                    f"Q: {question(b, a)} A: {says.format(b.name, other, a.name)}",
                ]
                items.append(
                    item_of(
                        record,
                        f"{name}:icl verbatim",
                        " ".join([*examples, final]),
                        {"setting": "icl verbatim", "word": side, "boxes_px": [c.box_px, a.box_px]},
                    )
                )
    return items


def judge_spatial(item, wording):
    """Right if the word is in the answer (the paper's rule); `strict`: and its opposite is not."""
    words = set(re.findall(r"[a-z]+", item.answer.lower()))
    item.correct = item.truth["word"] in words
    item.truth["strict"] = item.correct and OPPOSITE[item.truth["word"]] not in words
    item.truth["opposite"] = OPPOSITE[item.truth["word"]] in words


def spatial_metrics(items):
    metrics = {}
    for setting in dict.fromkeys(item.truth["setting"] for item in items):
        here = [item for item in items if item.truth["setting"] == setting]
        metrics[setting] = mean(item.correct for item in here)
        for word in sorted({item.truth["word"] for item in here}):
            metrics[f"{setting} {word}"] = mean(item.correct for item in here if item.truth["word"] == word)
        metrics[f"{setting} strict"] = mean(item.truth["strict"] for item in here)
        metrics[f"{setting} neither word"] = mean(not item.correct and not item.truth["opposite"] for item in here)
        if setting == "icl verbatim":  # read as its own examples answer: about obj_3
            metrics["icl verbatim, as its examples answer"] = mean(item.truth["opposite"] for item in here)
        metrics[f"{setting} questions"] = len(here)
    return metrics


def hal_items(records, wording, rng):
    """Hal-COCO: is there a ...? for two categories present in an image and two that are not (one and one where there is one)."""
    items = []
    for r in records:
        count = min(2, len(r.present), len(r.absent))
        for label, names in (("yes", rng.sample(r.present, count)), ("no", rng.sample(r.absent, count))):
            items += [
                item_of(r, name, f"Is there {article(name)} in the image?", {"label": label, "name": name})
                for name in names
            ]
    return items


def says_no(answer):
    """POPE's reading of an answer: no if its first sentence holds No, no or not; else yes, even where it is empty.

    >>> says_no("No, there is none."), says_no("There is not. Yes"), says_no("Yes. No doubt"), says_no("")
    (True, True, False, False)
    """
    return bool({"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")))


def judge_hal(item, wording):
    item.correct = says_no(item.answer) == (item.truth["label"] == "no")


def hal_metrics(items):
    """Accuracy, precision, recall, F1 and yes ratio, all from one confusion matrix."""
    count = Counter((item.truth["label"], not says_no(item.answer)) for item in items)
    tp, fp, fn = count["yes", True], count["no", True], count["yes", False]
    return {
        "accuracy": mean(item.correct for item in items),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "F1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "says yes": (tp + fp) / len(items) if items else 0.0,
    }


@dataclass(frozen=True)
class Task:
    """What one measure needs."""

    items: Callable  # (records, wording, rng) -> items
    judge: Callable  # (item, wording): sets item.correct, and item.boxes_px where an answer locates
    metrics: Callable  # items -> {name: share or count}
    prompts: tuple = ()


TASKS = {
    "locpred": Task(locpred_items, judge_locpred, locpred_metrics, LOC_PROMPTS),
    "negpred": Task(negpred_items, judge_negpred, negpred_metrics, LOC_PROMPTS),
    "revloc": Task(revloc_items, judge_revloc, revloc_metrics, REV_PROMPTS),
    "spatial": Task(spatial_items, judge_spatial, spatial_metrics, tuple(SIDE_PROMPTS.values())),
    "hal": Task(hal_items, judge_hal, hal_metrics, ("Is there {a/an object} in the image?",)),
}


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark: how its own files are read, and its answers counted."""

    read: Callable  # (questions, answers or None, images, **options) -> (items, {reason: count left out})
    judge: Callable  # (item, wording): sets item.correct
    metrics: Callable  # items -> {name: share or count}
    prompts: tuple = ()
    files: str = ""
    submission: Callable | None = None  # items -> JSON in the official format


BENCHMARKS = {}


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan
