"""What is asked of a model, what the answer should be, and how answers are counted (Sec. 4; App. E, F, H).

    python benchmarks.py refs "refs(unc).p" refs.json          RefCOCO's pickle, made JSON once
    python benchmarks.py keywords llava_instruct_80k.json      left and right in training conversations (Tab. 14)

A task (`TASKS`) makes its questions out of annotated images; a benchmark (`BENCHMARKS`) reads them from its original
public files. Either has the judgement of one item and the figures of all. Nothing here runs a model: `evaluate.py` does.
"""

import argparse
import csv
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import scores
from checkpoint import require_file, some, write_json
from clip_vit import has_image, image_size
from coords import fault, iou
from data import (
    LOC_PROMPTS,
    REV_PROMPTS,
    SIDE_ANSWERS,
    SIDE_PROMPTS,
    article,
    box_from_xywh,
    box_problem,
    find_clips,
    leaves,
    loc_question,
    read_instances,
)
from scores import SHORT
from video import PlainPickle, is_clip, naming


def paper_rows(names, *rows):
    """Rows of a table of the paper: [(model, {metric: percent})]."""
    return [(model, dict(zip(names, values, strict=True))) for model, *values in rows]


SIX = ("across", "across left", "across right", "along", "along above", "along below")
FIVE = ("accuracy", "precision", "recall", "F1", "says yes")
JUDGED, ACCURACY, METEOR = ("judge accuracy",), ("accuracy",), ("METEOR 1.5",)
PAPER_ROWS = {  # the paper's models beside each other, percent, by the metrics' names here
    "spatial": paper_rows(  # Tab. 4: direct, in context
        (*SIX, *(f"icl {name}" for name in SIX)),
        ("BLIP-2", 45.5, 86.1, 4.74, 49.2, 50.4, 48.6, 14.7, 17.8, 11.6, 15.8, 16.5, 15.2),
        ("LLaVA", 55.1, 84.5, 36.5, 58.9, 57.8, 59.3, 55.1, 84.7, 36.4, 58.2, 57.7, 58.5),
        ("LocVLM-B", 69.5, 79.7, 59.2, 65.4, 64.2, 65.9, 76.5, 90.4, 61.5, 74.1, 73.5, 74.4),
    ),
    "gqa": paper_rows(  # Tab. 5; * tuned on VQA data
        ("exact match",),
        ("LLaVA-v1", 44.7),
        ("LocVLM-B", 47.3),
        ("LLaVA-v1.5", 48.7),
        ("LocVLM-L", 50.2),
        ("LLaVA-v1.5 *", 62.0),
        ("LocVLM-L *", 63.5),
    ),
    "vqa": paper_rows(
        ("accuracy", "accuracy on test"),
        ("LLaVA-v1", 49.8, 49.3),
        ("LocVLM-B", 50.3, 50.8),
        ("LLaVA-v1.5", 55.7, 55.3),
        ("LocVLM-L", 55.9, 56.2),
        ("LLaVA-v1.5 *", 78.1, 78.4),
        ("LocVLM-L *", 78.2, 78.6),
    ),
    "activitynet-qa": paper_rows(  # Tab. 6, 7
        JUDGED,
        ("LLaVA-v1, one frame", 28.7),
        ("LLaVA-v1.5, one frame", 31.5),
        ("LocVLM-B, one frame", 29.2),
        ("LocVLM-L, one frame", 32.1),
        ("Video-ChatGPT", 35.2),
        ("LocVLM-Vid-B", 37.4),
        ("LocVLM-Vid-B+", 38.2),
    ),
    "msrvtt-qa": paper_rows(JUDGED, ("Video-ChatGPT", 49.3), ("LocVLM-Vid-B", 51.2)),
    "msvd-qa": paper_rows(JUDGED, ("Video-ChatGPT", 64.9), ("LocVLM-Vid-B", 66.1)),
    "tgif-qa": paper_rows(JUDGED, ("Video-ChatGPT", 51.4), ("LocVLM-Vid-B", 51.8)),
    "hal": paper_rows(  # Tab. 8
        ACCURACY,
        ("Shikra", 86.2),
        ("LLaVA", 61.9),
        ("LocVLM-B", 88.3),
        ("Video-ChatGPT, Hal-Act", 50.6),
        ("LocVLM-Vid-B, Hal-Act", 68.7),
        ("LocVLM-Vid-B+, Hal-Act", 72.4),
    ),
    "hal-ade": paper_rows(ACCURACY, ("Shikra", 58.7), ("LLaVA", 53.8), ("LocVLM-B", 75.2)),
    "pope": paper_rows(  # Tab. 9
        FIVE,
        ("LLaVA, random", 50.4, 50.2, 99.1, 66.6, 98.8),
        ("LocVLM-B, random", 87.9, 83.6, 93.9, 88.5, 56.2),
        ("LLaVA, popular", 49.9, 49.9, 99.3, 66.4, 99.4),
        ("LocVLM-B, popular", 86.0, 79.7, 93.9, 86.3, 58.9),
        ("LLaVA, adversarial", 49.7, 49.9, 99.1, 66.3, 99.4),
        ("LocVLM-B, adversarial", 78.8, 76.6, 93.7, 84.3, 61.7),
    ),
    "refcoco": paper_rows(  # Tab. 10; * tuned on the sets' training split
        METEOR,
        ("LLaVA, RefCOCO testB", 4.23),
        ("LLaVA, RefCOCO+ testB", 7.26),
        ("LLaVA, RefCOCOg val", 10.6),
        ("LLaVA, RefCOCOg test", 10.3),
        ("LocVLM-B, RefCOCO testB", 11.0),
        ("LocVLM-B, RefCOCO+ testB", 11.1),
        ("LocVLM-B, RefCOCOg val", 20.6),
        ("LocVLM-B, RefCOCOg test", 20.7),
        ("LLaVA *, RefCOCO testB", 8.43),
        ("LLaVA *, RefCOCO+ testB", 8.73),
        ("LLaVA *, RefCOCOg val", 13.5),
        ("LLaVA *, RefCOCOg test", 13.5),
        ("LocVLM-B *, RefCOCO testB", 14.6),
        ("LocVLM-B *, RefCOCO+ testB", 15.2),
        ("LocVLM-B *, RefCOCOg val", 26.0),
        ("LocVLM-B *, RefCOCOg test", 26.2),
    ),
}
PAPER = {  # LocVLM-B's figures alone: {task: {metric: percent}}
    task: {name: value for model, figures in rows if model == "LocVLM-B" for name, value in figures.items()}
    for task, rows in PAPER_ROWS.items()
    if "LocVLM-B" in dict(rows)
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
    correct: bool | float | None = None  # a score 0..1 where the metric is graded, None where it only counts in whole
    boxes_px: list = field(default_factory=list)  # what the answer locates, original pixels
    mirrored: bool = False  # asked about the image mirrored left to right; boxes are then in the mirrored image


def item_of(record, name, question, truth):
    """A question about an annotated image."""
    return Item(f"{record.id}:{name}", record.image, record.size, question, truth)


def mirrored(item):
    """The same question about the image mirrored left to right: the other side is right, the boxes are mirrored with it."""
    width = item.size[0]
    truth = item.truth | {
        "word": OPPOSITE[item.truth["word"]],
        "boxes_px": [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in item.truth["boxes_px"]],
    }
    return replace(item, id=f"{item.id}:mirrored", truth=truth, boxes_px=[], mirrored=True)


# ----- the tasks: items from records, and the judgement of one item


def locpred_items(records, wording, rng):
    """LocPred for every object that is alone of its category."""
    return [
        item_of(r, o.name, loc_question(o.name, wording, rng), {"name": o.name, "box_px": o.box_px})
        for r in records
        for o in r.objects
        if wording.can_place(o.box_px, r.size)
    ]


def located(item, wording):
    """The first place that an answer names, as a list of one box_px or none; of a point, the box two pixels around it."""
    if wording.location == "box":
        return wording.fmt.decode_boxes(item.answer, item.size)[:1]
    points_px = wording.fmt.decode_points(item.answer, item.size)[:1]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in points_px]


def judge_locpred(item, wording):
    """Right if the first box reaches IoU 0.5 with the truth; for points, if the first one lies in the true box."""
    item.boxes_px, box_px = located(item, wording), item.truth["box_px"]
    if wording.location == "point":
        (x1, y1, x2, y2), points_px = box_px, wording.fmt.decode_points(item.answer, item.size)[:1]
        item.correct = any(x1 <= x <= x2 and y1 <= y <= y2 for x, y in points_px)
    else:
        item.truth["iou"] = iou(item.boxes_px[0], box_px) if item.boxes_px else 0.0
        item.correct = item.truth["iou"] >= 0.5


def locpred_metrics(items):
    """Points have no IoU and no extent: of those, "acc@0.5" counts what lies in the true box, and two figures are none."""
    found = [item for item in items if item.boxes_px and "iou" in item.truth]
    return {
        "acc@0.5": mean(item.correct for item in items),
        "mean IoU": mean(item.truth["iou"] for item in items if "iou" in item.truth),
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
    item.boxes_px = located(item, wording)
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


def halves(record, axis, strict=False):
    """Sort an image's unique objects into its two halves, by the paper's rule: no centre in the central 20 %.

    axis 0: left and right; 1: above and below. strict: the whole box in its half as well, the paper's other wording.
    """
    sides, middle = ([], []), record.size[axis] / 2
    for o in record.objects:
        low, high = o.box_px[axis], o.box_px[axis + 2]
        centre = (low + high) / 2 / record.size[axis]
        if centre <= 0.4 and not (strict and high > middle):
            sides[0].append(o)
        elif centre >= 0.6 and not (strict and low < middle):
            sides[1].append(o)
    return sides


def spatial_triplets(records, rng, axis, strict=False):
    """COCO-Spatial (App. E): images with three objects, each alone of its category, in two opposite `halves`.

    Gives (record, obj_1, obj_2, obj_3, side of obj_1): obj_1 lies on one side, obj_2 and obj_3 on the other. One triplet
    an image, drawn at random.
    """
    words = (("left", "right"), ("above", "below"))[axis]
    for record in records:
        sides = halves(record, axis, strict)
        choices = [side for side in (0, 1) if sides[side] and len(sides[1 - side]) >= 2]
        if choices:
            side = rng.choice(choices)
            yield record, rng.choice(sides[side]), *rng.sample(sides[1 - side], 2), words[side]


ICL_PROMPT = "Q: {question} A: {answer} Q: {question} A: {answer} Q: {question}"


def spatial_items(records, wording, rng):
    """Direct and in-context questions (App. E). In context, `verbatim` has the paper's examples, which answer about the
    other object than was asked for; `consistent` has them answer what was asked, in random order. A direct question about
    left and right is also asked of the mirrored image."""
    items = []
    for axis, name in enumerate(("across", "along")):
        ask = SIDE_PROMPTS[name]
        for record, a, b, c, side in spatial_triplets(records, rng, axis):
            other = OPPOSITE[side]

            def question(first, second, ask=ask):
                return ask.format(obj_1=f"the {first.name}", obj_2=f"the {second.name}")

            def answer(first, second, side):  # where the first lies, seen from the second
                return SIDE_ANSWERS[side].format(obj_2=f"The {first.name}", obj_1=f"the {second.name}")

            whole = any(spatial_triplets([record], random.Random(0), axis, strict=True))  # whichever it draws
            # where obj_2 lies, seen from obj_1
            direct = item_of(
                record,
                f"{name}:direct",
                question(a, b),
                {"setting": name, "word": other, "boxes_px": [a.box_px, b.box_px], "whole_boxes": whole},
            )
            items.append(direct)
            if name == "across":
                items.append(mirrored(direct))
                items[-1].truth["setting"] = "across mirrored"
            examples = [
                f"Q: {question(a, b)} A: {answer(b, a, other)}",
                f"Q: {question(b, a)} A: {answer(a, b, side)}",
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
                    f"Q: {question(a, b)} A: {answer(a, b, side)}",
                    f"Q: {question(b, a)} A: {answer(b, a, other)}",
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
    """Right if the word is in the answer (the paper's rule); `strict`: and its opposite is not. `said`: the one it names."""
    words, word = set(re.findall(r"[a-z]+", item.answer.lower())), item.truth["word"]
    item.correct = word in words
    item.truth["strict"] = item.correct and OPPOSITE[word] not in words
    item.truth["opposite"] = OPPOSITE[word] in words
    named = [side for side in (word, OPPOSITE[word]) if side in words]
    item.truth["said"] = named[0] if len(named) == 1 else None


def flip_consistency(items):
    """The share of questions whose answers about an image and about its mirror image name one side each, and opposite ones."""
    said = {item.id: item.truth["said"] for item in items}
    pairs = [(said[item.id], item.id.removesuffix(":mirrored")) for item in items if item.mirrored]
    return mean(side is not None and said[other] == OPPOSITE[side] for side, other in pairs if other in said)


def spatial_metrics(items):
    metrics = {}
    for setting in dict.fromkeys(item.truth["setting"] for item in items):
        here = [item for item in items if item.truth["setting"] == setting]
        metrics[setting] = mean(item.correct for item in here)
        words = sorted({item.truth["word"] for item in here})
        by_word = [mean(item.correct for item in here if item.truth["word"] == word) for word in words]
        metrics |= {f"{setting} {word}": share for word, share in zip(words, by_word, strict=True)}
        metrics[f"{setting} macro"] = mean(by_word)  # the words are not asked for equally often
        metrics[f"{setting} strict"] = mean(item.truth["strict"] for item in here)
        metrics[f"{setting} neither word"] = mean(not item.correct and not item.truth["opposite"] for item in here)
        if setting == "icl verbatim":  # read as its own examples answer: about obj_3
            metrics["icl verbatim, as its examples answer"] = mean(item.truth["opposite"] for item in here)
        metrics[f"{setting} questions"] = len(here)
        if setting in SIDE_PROMPTS:
            metrics[f"{setting} questions, whole in their halves"] = sum(i.truth["whole_boxes"] for i in here)
    if any(item.mirrored for item in items):
        metrics["across flip consistency"] = flip_consistency(items)
    return metrics


HAL_PROMPT = "Is there {a/an object} in the {image/video}?"


def ask_presence(name, medium="image"):
    return f"Is there {article(name)} in the {medium}?"


def hal_items(records, wording, rng):
    """Hal-COCO: is there a ...? for two categories present in an image and two that are not (one and one where there is one).

    Hal-Act is the same of clips, called videos where wording.medium is "video".
    """
    items = []
    for r in records:
        medium = "video" if wording.medium == "video" and r.image and is_clip(r.image) else "image"
        count = min(2, len(r.present), len(r.absent))
        for label, names in (("yes", rng.sample(r.present, count)), ("no", rng.sample(r.absent, count))):
            items += [item_of(r, name, ask_presence(name, medium), {"label": label, "name": name}) for name in names]
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
    "spatial": Task(spatial_items, judge_spatial, spatial_metrics, (*SIDE_PROMPTS.values(), ICL_PROMPT)),
    "hal": Task(hal_items, judge_hal, hal_metrics, (HAL_PROMPT,)),
}


# ----- benchmarks: items from their original files


def read_rows(path, expected):
    """Read a benchmark's file: JSON, or JSON lines, whatever it is named. A single row is a list of one."""
    path = require_file(path, expected)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        alone = isinstance(content, dict) and not {"question_id", "expression"}.isdisjoint(content)
        return [content] if alone else content
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); expected {expected}; check the file") from None
    except json.JSONDecodeError:
        rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is neither JSON nor JSON lines (line {number}: {error}); expected {expected}; was its download "
                "cut short?"
            ) from None
    return rows


def keyed(rows, path, key, needs, expected):
    """Give rows by their id as text; refuse another schema, and an id that comes twice. needs: {key: its type}"""
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{path} holds {f'a JSON {type(rows).__name__}' if rows else 'nothing'}; expected {expected}; check it"
        )
    found = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in needs.items()):
            raise ValueError(
                f"{path}: row {index} is {str(row)[:120]}; expected {expected}: rows with {', '.join(needs)}; is this "
                "another file?"
            )
        if str(row[key]) in found:
            raise ValueError(f"{path} has {key} {row[key]} twice; expected each once; are two files in one?")
        found[str(row[key])] = row
    return found


def listed(content, key, path, expected):
    """Give the list under a key of a file's content."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path} has no list {key!r}; expected {expected}; is this another file?")
    return content[key]


def joined(questions, answers, path, answers_path):
    """Say of each question what its answer is, by id; refuse where one has none. Gives also how many answers are left over."""
    lacking = [name for name in questions if name not in answers]
    if lacking:
        raise ValueError(
            f"{answers_path} has no answer to {len(lacking)} of the {len(questions)} questions of {path} ({some(lacking)}); "
            "expected one for each, by id; do the two files belong together?"
        )
    return {name: answers[name] for name in questions}, len(answers) - len(questions)


def find_image(images, *names):
    """Find an image in a folder or a zip under the first of its names that is there, else give the path of the first name."""
    if any(leaves(name) for name in names):
        raise ValueError(f"{names[0]} leads out of {images}; expected a name inside it; correct the file that says so")
    paths = [Path(images) / name for name in names]
    return next((path for path in paths if has_image(path)), paths[0])


def coco_names(file_name, folder):
    """The names that a COCO image goes by on disk: as it is called, in its year's folder, or with its number alone (2017)."""
    number = re.search(r"\d{12}\.jpg$", file_name)
    return file_name, f"{folder}/{file_name}", number[0] if number else file_name


def require_images(paths, source, images):
    """Refuse where an image or clip that the file `source` asks about is not in the folder or zip `images`."""
    paths = dict.fromkeys(path for path in paths if path)
    missing = [path.name for path in paths if not (path.exists() if is_clip(path) else has_image(path))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} images of {source} are not in {images} ({some(missing)}); expected all of "
            "them, in that folder or zip; check it, or complete the download"
        )


def asked_of(items, source, images):
    """Give a reader's items; refuse where there is nothing to ask, or an image is missing."""
    if not items:
        raise ValueError(f"{source} gives no question; expected some; is this the right file, or split?")
    require_images((item.image for item in items), source, images)
    return items


def asked_short(question, short):
    """A question with LLaVA-1.5's request for a short answer behind it, or without."""
    return question.removesuffix(SHORT) + SHORT * short


# ----- GQA

GQA_FILE = "GQA's {testdev,val,...}_balanced_questions.json"


def gqa_rows(content, path):
    """GQA's questions by id, from the content of an official file."""
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path} is no dictionary of questions; expected {GQA_FILE}; is it LLaVA's form? It holds no answers"
        )
    rows = [row | {"question_id": name} if isinstance(row, dict) else row for name, row in content.items()]
    return keyed(rows, path, "question_id", {"question": str, "answer": str, "imageId": str}, GQA_FILE)


def read_gqa(questions, answers, images, short=False):
    """GQA: its official file, or LLaVA's JSON lines of the same questions, which need the official file for the answers.

    Only balanced questions count, as in the official evaluation: 12,578 of testdev.
    """
    content, left_out, items = read_rows(questions, GQA_FILE), Counter(), []
    if isinstance(content, dict):
        rows = gqa_rows(content, questions)
        asked = {name: (row["question"], f"{row['imageId']}.jpg") for name, row in rows.items()}
        truth = gqa_rows(read_rows(answers, GQA_FILE), answers) if answers else rows
    else:
        needs = {"question_id": str | int, "image": str, "text": str}
        rows = keyed(content, questions, "question_id", needs, "LLaVA's llava_gqa_testdev_balanced.jsonl")
        asked = {name: (row["text"], row["image"]) for name, row in rows.items()}
        if answers is None:
            raise ValueError(f"{questions} holds no answers; expected them in {GQA_FILE}; give it as --answers")
        truth = gqa_rows(read_rows(answers, GQA_FILE), answers)
    truth, left_over = joined(asked, truth, questions, answers)
    for name, (text, image) in asked.items():
        if not truth[name].get("isBalanced", True):
            left_out["questions that are not balanced"] += 1
            continue
        path = find_image(images, image, f"images/{image}", f"{Path(image).stem}.png")  # the last: the shapes world's
        items.append(Item(name, path, None, asked_short(text, short), {"answer": truth[name]["answer"]}))
    left_out.update({"answers to questions that are not asked": left_over} if left_over else {})
    return asked_of(items, questions, images), left_out


def judge_gqa(item, wording):
    """Right if the answer, in lower case without its full stop, is the truth (LLaVA's way); `contains`: if that is in it."""
    item.correct = item.answer.strip().rstrip(".").lower() == item.truth["answer"]
    item.truth["contains"] = item.correct or scores.contains(item.answer, item.truth["answer"])


def exact_metrics(items):
    """Exact match and contains, over all and, where questions have a type, over each."""
    metrics = {"exact match": mean(i.correct for i in items), "contains": mean(i.truth["contains"] for i in items)}
    for kind in sorted({item.truth["type"] for item in items if "type" in item.truth}):
        here = [item for item in items if item.truth["type"] == kind]
        metrics[f"exact match, {kind}"] = mean(item.correct for item in here)
        metrics[f"contains, {kind}"] = mean(item.truth["contains"] for item in here)
    return metrics | {"questions": len(items)}


def gqa_submission(items):
    return [{"questionId": item.id, "prediction": item.answer.strip().rstrip(".").lower()} for item in items]


# ----- VQAv2

VQA_QUESTIONS = "VQAv2's v2_OpenEnded_mscoco_*_questions.json"
VQA_ANSWERS = "VQAv2's v2_mscoco_*_annotations.json"


def read_vqa(questions, answers, images, short=False):
    """VQAv2: questions, and ten annotators' answers to them; without those (the test splits) only a submission is made."""
    content, left_out, items = read_rows(questions, VQA_QUESTIONS), Counter(), []
    needs = {"question_id": int, "image_id": int, "question": str}
    rows = keyed(listed(content, "questions", questions, VQA_QUESTIONS), questions, "question_id", needs, VQA_QUESTIONS)
    split = str(content.get("data_subtype", "val2014")).replace("-dev", "")  # test-dev2015 asks about test2015's images
    truth = {}
    if answers is not None:
        told = listed(read_rows(answers, VQA_ANSWERS), "annotations", answers, VQA_ANSWERS)
        needs = {"question_id": int, "answers": list, "answer_type": str, "question_type": str}
        truth, left_over = joined(rows, keyed(told, answers, "question_id", needs, VQA_ANSWERS), questions, answers)
        left_out.update({"annotations of questions that are not asked": left_over} if left_over else {})
    for name, row in rows.items():
        known = {"question_id": row["question_id"]}
        if truth:
            said = [a.get("answer") if isinstance(a, dict) else None for a in truth[name]["answers"]]
            if not said or not all(isinstance(text, str) for text in said):
                raise ValueError(
                    f"{answers}: question {name} has answers {said}; expected a text of each annotator; check the file"
                )
            known |= {
                "answers": said,
                "answer_type": truth[name]["answer_type"],
                "question_type": truth[name]["question_type"],
            }
        path = find_image(images, *coco_names(f"COCO_{split}_{row['image_id']:012d}.jpg", split))
        items.append(Item(name, path, None, asked_short(row["question"], short), known))
    return asked_of(items, questions, images), left_out


def judge_vqa(item, wording):
    """Score an answer by the ten annotators'; `contains` and `normalised` are the same of other readings of the answer."""
    if "answers" in item.truth:
        item.correct, item.truth["contains"] = scores.vqa_scores(item.answer, item.truth["answers"])
        item.truth["normalised"] = scores.vqa_scores(scores.vqa_normal(item.answer), item.truth["answers"])[0]


def vqa_metrics(items):
    """The official figures: over all, of each answer type and question type.

    The official score normalises no answer where all annotators agree: there "Yes." is not "yes". "normalised first"
    normalises every answer, by the official rules, before it is scored.
    """
    scored = [item for item in items if item.correct is not None]
    if not scored:
        return {"questions without annotations": len(items)}
    metrics = {
        "accuracy": mean(item.correct for item in scored),
        "accuracy, normalised first": mean(item.truth["normalised"] for item in scored),
        "contains": mean(item.truth["contains"] for item in scored),
    }
    for key in ("answer_type", "question_type"):
        for kind in sorted({item.truth[key] for item in scored}):
            metrics[f"{key.replace('_', ' ')} {kind}"] = mean(i.correct for i in scored if i.truth[key] == kind)
    return metrics | {"questions": len(scored)}


def vqa_submission(items):
    """EvalAI's format, every question in it; normalised, since the server compares to the letter where annotators agree."""
    return [{"question_id": i.truth["question_id"], "answer": scores.vqa_normal(i.answer)} for i in items]


# ----- questions about videos

VIDEO_FILE = (
    "[{video_name, question, question_id}] (ActivityNet-QA), [{id, video_id, question, answer}] or TGIF-QA's table"
)
ACTIVITYNET_TYPES = ("motion", "spatial relationship", "temporal relationship")
ACTIVITYNET_TYPES += ("yes/no", "color", "object", "location", "number", "other")
TGIF_TYPES = ("object", "number", "color", "location")


def read_table(path):
    """Read TGIF-QA's table, tabs between columns, as rows of the other schemas."""
    require_file(path, "TGIF-QA's *_frameqa_question.csv")
    with naming(path, UnicodeDecodeError, csv.Error), open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    needs = {"vid_id": str, "gif_name": str, "question": str, "answer": str}
    rows = keyed(rows, path, "vid_id", needs, "TGIF-QA's *_frameqa_question.csv, tabs between its columns")
    return {name: row | {"video_name": row["gif_name"]} for name, row in rows.items()}


def read_video_qa(questions, answers, images, short=False, types=(), prefix=""):
    """Questions about clips, of any of the four sets: {id: row}s joined, and each clip found under one of its names.

    prefix  before the number that stands for a clip: vid1451.avi (MSVD), video7010.mp4 (MSRVTT). A youtube_mapping.txt
            beside the questions says by which other names MSVD's are kept.
    Video-LLaVA's repacked files have ActivityNet-QA's schema for all four. Questions about clips that are not there are
    left out and counted; where none is there, it is refused.
    """
    if Path(questions).suffix == ".csv":
        rows = truth = read_table(questions)
    else:
        content = read_rows(questions, VIDEO_FILE)
        first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
        if "video_id" in first and "question_id" not in first:
            needs = {"id": str | int, "video_id": str | int, "question": str, "answer": str}
            rows = truth = keyed(content, questions, "id", needs, VIDEO_FILE)
            rows = {
                name: row | {"video_name": row.get("video") or f"{prefix}{row['video_id']}"}
                for name, row in rows.items()
            }
        else:
            needs = {"question_id": str | int, "video_name": str, "question": str}
            rows = truth = keyed(content, questions, "question_id", needs, VIDEO_FILE)
            if answers is None:
                raise ValueError(
                    f"{questions} holds no answers; expected [{{answer, type, question_id}}]; give it as --answers"
                )
    left_out = Counter()
    if answers is not None:
        needs = {"question_id": str | int, "answer": str | int}
        told = keyed(read_rows(answers, "test_a.json"), answers, "question_id", needs, "[{answer, type, question_id}]")
        truth, left_over = joined(rows, told, questions, answers)
        left_out.update({"answers to questions that are not asked": left_over} if left_over else {})
    clips, mapping = find_clips(images), Path(questions).with_name("youtube_mapping.txt")
    lines = [line.split() for line in mapping.read_text(encoding="utf-8").splitlines()] if mapping.is_file() else []
    other = {line[1]: line[0] for line in lines if len(line) == 2}
    items, missing = [], {}
    for name, row in rows.items():
        clip = row["video_name"]
        path = next((clips[key] for key in (clip, f"v_{clip}", other.get(clip)) if key in clips), None)
        if path is None:
            missing[clip] = missing.get(clip, 0) + 1
            continue
        known = {"answer": str(truth[name]["answer"])}
        if types and str(truth[name].get("type", "")).isdecimal():
            number = int(truth[name]["type"])
            known["type"] = types[number] if number < len(types) else f"type {number}"
        items.append(Item(name, path, None, asked_short(row["question"], short), known))
    if not items:
        raise FileNotFoundError(
            f"none of the {len(missing)} clips of {questions} is in {images} ({some(list(missing))}); expected each under that "
            "name, as a file or a folder of frames; check the folder"
        )
    if missing:
        left_out[f"questions about {len(missing)} clips that are not in {images} ({some(list(missing))})"] = sum(
            missing.values()
        )
    return items, left_out


def judge_video_qa(item, wording):
    """Right if the answer is the truth but for case and punctuation; the paper's figures are a language model's judgement."""
    item.correct = scores.same_words(item.answer, item.truth["answer"])
    item.truth["contains"] = item.correct or scores.contains(item.answer, item.truth["answer"])


# ----- POPE

POPE_VERSIONS = {3000: "the present files", 2910: "the old random file, LLaVA's"}


def read_pope(questions, answers, images):
    """POPE, of which the files are JSON lines or arrays; the questions are the file's, to the letter."""
    needs = {"question_id": int | str, "image": str, "text": str, "label": str}
    rows = keyed(read_rows(questions, "a file of POPE"), questions, "question_id", needs, "a file of POPE")
    items = []
    for name, row in rows.items():
        if row["label"] not in ("yes", "no"):
            raise ValueError(
                f"{questions}: question {name} has label {row['label']!r}; expected yes or no; check the file"
            )
        path = find_image(images, *coco_names(row["image"], "val2014"))
        items.append(Item(name, path, None, row["text"], {"label": row["label"]}))
    return asked_of(items, questions, images), Counter()


def pope_metrics(items):
    """The five figures, how often an answer says neither word, and which released version this is, told by its count."""
    neither = mean(not {"yes", "no", "not"} & set(scores.spaced(item.answer).split()) for item in items)
    version = POPE_VERSIONS.get(len(items), "as many as in neither released version")
    return hal_metrics(items) | {"neither yes nor no": neither, f"questions ({version})": len(items)}


# ----- RefCOCO, RefCOCO+, RefCOCOg: descriptions of a box, and boxes for descriptions

REFS_FILE = (
    "refs(unc).p with instances.json, what `benchmarks.py refs` made of them, Shikra's JSON lines, "
    "or MDETR's finetune_*.json"
)


def ref(name, file_name, size, split, bbox, sentences):
    """One referred object. size: (width, height), or None; bbox: COCO's (x, y, w, h) in pixels; sentences: (id, text) pairs."""
    if size is not None and not (len(size) == 2 and min(size) > 0):
        raise ValueError(f"size {size}")
    return {
        "ref_id": name,
        "file_name": str(file_name),
        "size": size,
        "split": split,
        "bbox": bbox,
        "sentences": sentences,
    }


def read_pickle(path, instances):
    """RefCOCO's own files: the pickle, of which nothing but lists, dicts, texts and numbers is built, and COCO's boxes."""
    with naming(require_file(path, "RefCOCO's refs(unc).p"), Exception), open(path, "rb") as file:
        content = PlainPickle(file, encoding="latin1").load()  # Python 2 wrote it
    needs = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    rows = keyed(content, path, "ref_id", needs, "RefCOCO's refs(unc).p")
    instances = Path(instances) if instances else Path(path).with_name("instances.json")
    coco = read_instances(instances)
    sizes = {i["id"]: (i["file_name"], (i["width"], i["height"])) for i in coco["images"]}
    boxes = {a["id"]: a.get("bbox") for a in coco["annotations"]}
    refs = []
    for name, row in rows.items():
        if row["image_id"] not in sizes or row["ann_id"] not in boxes:
            raise ValueError(
                f"{instances} lacks image {row['image_id']} or annotation {row['ann_id']} of ref {name}; expected every one that "
                f"{path} names; are they of one release?"
            )
        try:
            sentences = [(str(s["sent_id"]), s["sent"]) for s in row["sentences"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: ref {name} has sentences {str(row['sentences'])[:120]}; expected sent_id and sent; check it"
            ) from None
        refs.append(ref(name, *sizes[row["image_id"]], row["split"], boxes[row["ann_id"]], sentences))
    return refs


def read_refs(path, instances):
    """Read referred objects from any of REFS_FILE, or from MAttNet's sample of detections: list of `ref`."""
    if Path(path).suffix in (".p", ".pkl", ".pickle"):
        return read_pickle(path, instances)
    content = read_rows(path, REFS_FILE)
    if isinstance(content, dict) and "predictions" in content:
        raise ValueError(
            f"{path} holds a model's descriptions, not what was referred to; expected {REFS_FILE}; give one of those"
        )
    ours, grouped = {}, {}  # sentences about one box belong together
    if isinstance(content, dict) and "refs" in content:
        needs = {"ref_id": str, "file_name": str, "bbox": list, "sentences": list, "split": str | None}
        ours = keyed(content["refs"], path, "ref_id", needs, REFS_FILE)
    try:
        if ours:
            return [
                ref(
                    name,
                    row["file_name"],
                    row.get("size"),
                    row.get("split"),
                    row["bbox"],
                    [(str(number), text) for number, text in row["sentences"]],
                )
                for name, row in ours.items()
            ]
        for index, (file_name, size, bbox, sentence) in enumerate(sentences_of(content)):
            key = (file_name, *bbox)
            one = grouped.setdefault(key, ref(str(len(grouped)), file_name, size, None, bbox, []))
            one["sentences"].append((str(index), sentence))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: a row is amiss ({error!r}); expected {REFS_FILE}; is this another file?") from None
    return list(grouped.values())


def sentences_of(content):
    """Give (file name, size or None, bbox, sentence) of each row of a file that knows no refs."""
    if isinstance(content, dict):  # MDETR's: an image of its own for each sentence
        boxes = {a["image_id"]: a["bbox"] for a in content["annotations"]}
        for image in content["images"]:
            yield image["file_name"], (image["width"], image["height"]), boxes[image["id"]], image["caption"]
    for row in content if isinstance(content, list) else ():
        if "expression" in row:  # Shikra's: corners
            x1, y1, x2, y2 = row["bbox"]
            size = (row["width"], row["height"]) if "width" in row else None
            yield row["img_path"], size, [x1, y1, x2 - x1, y2 - y1], row["expression"]
        else:  # MAttNet's, whose file names end in a number of their own
            yield re.sub(r"_\d+(?=\.\w+$)", "", row["pred_boxes_img_id"][0]), None, row["gt_box"], row["sent"]


def convert_refs(path, out, instances=None):
    """Write RefCOCO's pickle with its boxes as JSON that `read_refs` reads, so that the pickle is read once: count of refs."""
    refs = read_pickle(path, instances)
    write_json(out, {"refs": refs})
    return len(refs)


def refs_of(questions, answers, images, split):
    """The refs of a split whose box is one: [(ref, image path, size, box_px)], and a Counter of those left out."""
    refs, left_out, found = read_refs(questions, answers), Counter(), []
    splits = Counter(one["split"] for one in refs)
    if split is None and len(splits) > 1 or split is not None and split not in splits:
        told = ", ".join(f"{name} ({count})" for name, count in splits.items())
        raise ValueError(
            f"split {split} of {questions}, which has {told}; expected one of them; the paper takes testB, and val and test "
            "of RefCOCOg"
        )
    for one in refs:
        if split is None or one["split"] == split:
            path = find_image(images, *coco_names(one["file_name"], "train2014"))
            found.append((one, path))
    require_images((path for _, path in found), questions, images)  # their sizes are read below
    boxed = []
    for one, path in found:
        size = tuple(one["size"] or image_size(path))
        if problem := box_problem(one["bbox"], size):
            left_out[f"refs where the box {problem.split(' of size')[0]}"] += 1
        elif not one["sentences"] or not all(isinstance(text, str) for _, text in one["sentences"]):
            left_out["refs without a sentence"] += 1
        else:
            x1, y1, x2, y2 = box_from_xywh(one["bbox"])
            boxed.append((one, path, size, (x1, y1, min(x2, size[0]), min(y2, size[1]))))
    return boxed, left_out


def read_refcoco(questions, answers, images, split=None, *, wording, seed=0):
    """Region description (Tab. 10): RevLoc's question about each referred box, worded by `wording`; its sentences are the truth.

    Which of the three questions is asked is a function of (seed, ref). Boxes that a crop does not show are left out.
    Refuses where METEOR could not be computed.
    """
    scores.require_meteor()
    boxed, left_out = refs_of(questions, answers, images, split)
    items = []
    for one, path, size, box_px in boxed:
        if not wording.can_place(box_px, size):
            left_out["refs that the model's square does not show"] += 1
            continue
        prompt = random.Random(f"{seed} {one['ref_id']}").choice(REV_PROMPTS)
        truth = {"sentences": [text for _, text in one["sentences"]], "box_px": box_px}
        items.append(Item(one["ref_id"], path, size, prompt.format(loc=wording.place(box_px, size)), truth))
    return asked_of(items, questions, images), left_out


def judge_refcoco(item, wording):
    """A description only counts in whole, see `refcoco_metrics`."""
    item.correct, item.boxes_px = None, []


def refcoco_metrics(items):
    """METEOR 1.5 of all answers, a ref's sentences their references; and of what follows "There is a", our own wording."""
    told, said = {item.id: item.truth["sentences"] for item in items}, {item.id: item.answer for item in items}
    bare = {name: re.sub(r"^\s*there is an? ", "", answer, flags=re.IGNORECASE) for name, answer in said.items()}
    whole, without = scores.meteor([said, bare], told)
    return {
        "METEOR 1.5": whole,
        'METEOR 1.5 without "There is a"': without,
        "refs (meteor-1.5.jar and PTB tokens of pycocoevalcap)": len(items),
        "sentences": sum(map(len, told.values())),
        "empty answers": sum(not answer.strip() for answer in said.values()),
    }


def refcoco_submission(items):
    """The format of RefCOCO's own evaluation of descriptions."""
    return {"predictions": [{"sent": i.answer, "ref_id": int(i.id) if i.id.isdecimal() else i.id} for i in items]}


def read_rec(questions, answers, images, split=None, *, wording, seed=0):
    """Referring expression comprehension: LocPred's question with every sentence of every ref; acc@0.5 in original pixels."""
    boxed, left_out = refs_of(questions, answers, images, split)
    items = [
        Item(
            name,
            path,
            size,
            loc_question(text, wording, random.Random(f"{seed} {name}")),
            {"name": text, "box_px": box_px},
        )
        for one, path, size, box_px in boxed
        for name, text in one["sentences"]
    ]
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise ValueError(f"{questions} has sentences {some(twice)} twice; expected each id once; are two files in one?")
    return asked_of(items, questions, images), left_out


# ----- the authors' COCO-Spatial

RELEASED_PROMPT = "Which side of the {obj_1} is the {obj_2}?"  # of the released code; App. E words it otherwise


def read_coco_spatial(questions, answers, images):
    """The released coco_spatial.json: where is the right object of each pair, in the image and in its mirror image?

    Its rule is not the paper's: pairs that do not overlap from left to right, in images of val2014. In the image the answer
    is always right, so each is asked of the mirror image too, where it is left.
    """
    content = read_rows(questions, "the authors' coco_spatial.json")
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise ValueError(
            f"{questions} has no dictionary 'data'; expected the authors' coco_spatial.json; is it COCO's own file?"
        )
    expected = "the authors' coco_spatial.json"
    categories = keyed(
        listed(content, "categories", questions, expected), questions, "id", {"id": int, "name": str}, expected
    )
    names = {c["id"]: c["name"] for c in categories.values()}
    items, left_out = [], Counter()
    for image_id, entry in data.items():
        try:
            size, file_name = (int(entry["width"]), int(entry["height"])), str(entry["file_name"])
            objects = entry["annotations"]
            called = [names[o["category_id"]] for o in objects]
            pairs = [(left, right) for left, right in entry.get("good_pairs") or ()]
            [objects[place] for pair in pairs for place in pair]
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{questions}: image {image_id} is amiss ({error!r}); expected file_name, width, height, annotations and "
                "good_pairs that point into them; check the file"
            ) from None
        left_out.update({"images without pairs": 1} if not pairs else {})
        path = find_image(images, *coco_names(file_name, "val2014")) if pairs else None
        for left, right in pairs:
            bboxes = [objects[place].get("bbox") for place in (left, right)]
            if problem := box_problem(bboxes[0], size) or box_problem(bboxes[1], size):
                left_out[f"pairs where a box {problem.split(' of size')[0]}"] += 1
                continue
            boxes_px = [box_from_xywh(bbox) for bbox in bboxes]
            if called.count(called[left]) > 1 or called.count(called[right]) > 1:
                left_out["pairs of a category that the image has twice"] += 1
            elif boxes_px[0][2] >= boxes_px[1][0]:
                left_out["pairs that are not left and right of each other"] += 1
            else:
                question = RELEASED_PROMPT.format(obj_1=called[left], obj_2=called[right])
                truth = {"word": "right", "boxes_px": boxes_px}
                items.append(Item(f"{image_id}:{left}-{right}", path, size, question, truth))
                items.append(mirrored(items[-1]))
    return asked_of(items, questions, images), left_out


def coco_spatial_metrics(items):
    metrics = {"accuracy": mean(item.correct for item in items)}
    for name, word in (("right (the image)", "right"), ("left (its mirror image)", "left")):
        metrics[name] = mean(item.correct for item in items if item.truth["word"] == word)
    return metrics | {
        "flip consistency": flip_consistency(items),
        "strict": mean(item.truth["strict"] for item in items),
        "neither word": mean(not item.correct and not item.truth["opposite"] for item in items),
        "questions": len(items),
    }


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


# ----- the benchmarks


@dataclass(frozen=True)
class Benchmark:
    """What one public benchmark needs. Every reader refuses, before anything is asked, what is missing or of another schema."""

    read: Callable  # (questions, answers or None, images, **options) -> (items, Counter of what was left out and why)
    judge: Callable  # (item, wording): sets item.correct, and item.boxes_px where an answer locates
    metrics: Callable  # items -> {name: share or count}
    prompts: tuple = ()
    files: str = ""  # what --questions and --answers are
    submission: Callable | None = None  # items -> what its own server or script takes, to be written as JSON
    options: tuple = ()  # the keywords that read takes beside its three files


def video_benchmark(files, types=(), prefix=""):
    read = partial(read_video_qa, types=types, prefix=prefix)
    return Benchmark(read, judge_video_qa, exact_metrics, ("{question}",), files, options=("short",))


QA_FILES = "questions: val_qa.json, [{id, video_id, question, answer}], or test_q.json with answers: test_a.json (Video-LLaVA's)"
REF_OPTIONS = ("split", "wording", "seed")
BENCHMARKS = {
    "gqa": Benchmark(
        read_gqa,
        judge_gqa,
        exact_metrics,
        ("{question}",),
        "questions: testdev_balanced_questions.json; or LLaVA's .jsonl, and answers: testdev_balanced_questions.json",
        gqa_submission,
        ("short",),
    ),
    "vqa": Benchmark(
        read_vqa,
        judge_vqa,
        vqa_metrics,
        ("{question}",),
        "questions: v2_OpenEnded_mscoco_val2014_questions.json; answers: v2_mscoco_val2014_annotations.json, none for test",
        vqa_submission,
        ("short",),
    ),
    "activitynet-qa": video_benchmark("questions: test_q.json; answers: test_a.json", ACTIVITYNET_TYPES),
    "msrvtt-qa": video_benchmark(QA_FILES, prefix="video"),
    "msvd-qa": video_benchmark(QA_FILES, prefix="vid"),
    "tgif-qa": video_benchmark(
        "questions: Test_frameqa_question.csv; or test_q.json with answers: test_a.json", TGIF_TYPES
    ),
    "pope": Benchmark(
        read_pope, judge_hal, pope_metrics, (HAL_PROMPT,), "questions: coco_pope_{random,popular,adversarial}.json"
    ),
    "refcoco": Benchmark(
        read_refcoco,
        judge_refcoco,
        refcoco_metrics,
        REV_PROMPTS,
        f"questions: {REFS_FILE}; answers: instances.json, if it is not beside the pickle",
        refcoco_submission,
        REF_OPTIONS,
    ),
    "rec": Benchmark(
        read_rec,
        judge_locpred,
        locpred_metrics,
        LOC_PROMPTS,
        f"questions: {REFS_FILE}; answers: instances.json, if it is not beside the pickle",
        None,
        REF_OPTIONS,
    ),
    "coco-spatial": Benchmark(
        read_coco_spatial,
        judge_spatial,
        coco_spatial_metrics,
        (RELEASED_PROMPT,),
        "questions: the authors' coco_spatial.json",
    ),
    "hal-ade": Benchmark(
        read_hal_ade,
        judge_hal,
        hal_metrics,
        (HAL_PROMPT,),
        "questions: ADEChallengeData2016/objectInfo150.txt, its masks beside it in annotations/validation",
        None,
        ("seed",),
    ),
}


# ----- left and right in training conversations (App. F)

PHRASES = ("{}", "the {}", "{} side", "to the {}")


def read_talk(path):
    """Read conversations as lists of texts, one a turn: LLaVA's JSON, or its JSON lines of instruction and output."""
    rows, talks = read_rows(path, "LLaVA's conversations"), []
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            if "conversations" in row:
                talks.append([turn["value"] for turn in row["conversations"]])
            else:
                talks.append([row["instruction"], row["output"]])
            if not all(isinstance(text, str) for text in talks[-1]):
                raise TypeError
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: row {index} is {str(row)[:120]}; expected conversations, or instruction and output; convert it"
            ) from None
    return talks


def keywords(talks):
    """Count the paper's phrases (Tab. 14): {phrase: (conversations that have it, share of conversations, of turns)}.

    talks  conversations, each a list of its questions and answers
    Whole words, in any case. Sec. 4.2 parts the same counts by question and answer turns (0.37 % and 1.13 % for left and
    right), App. F by conversations (2.02 % and 6.25 %): both are given.
    """
    texts, turns = ["\n".join(talk).lower() for talk in talks], sum(map(len, talks))
    table = {}
    for phrase in PHRASES:
        for side in ("left", "right"):
            said = phrase.format(side)
            count = sum(bool(re.search(rf"\b{said}\b", text)) for text in texts)
            table[said] = (
                count,
                count / len(texts) if texts else math.nan,
                count / turns if turns else math.nan,
            )
    return table


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("refs", help="make RefCOCO's pickle JSON, with its boxes")
    sub.add_argument("pickle", help="refs(unc).p, refs(umd).p")
    sub.add_argument("out", help="JSON to write")
    sub.add_argument("--instances", help="instances.json (default: beside the pickle)")
    sub = commands.add_parser("keywords", help="count left and right in conversations")
    sub.add_argument("file", help="LLaVA-format JSON")
    args = parser.parse_args(argv)
    if args.command == "refs":
        print(f"{args.out}: {convert_refs(args.pickle, args.out, args.instances)} refs")
        return
    talks = read_talk(args.file)
    print(f"{args.file}: {len(talks)} conversations, {sum(map(len, talks))} turns")
    print(f"{'phrase':16}{'conversations':>14}{'% of them':>12}{'% of turns':>12}")
    for phrase, (count, of_talks, of_turns) in keywords(talks).items():
        print(f"{phrase:16}{count:14d}{100 * of_talks:12.2f}{100 * of_turns:12.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmarks.py: {error}")
