"""From an annotated image to token ids and labels.

    python data.py show --coco instances.json --images FOLDER     examples as the model will read them
    python data.py check --coco instances.json --images FOLDER    what is missing, unreadable or wrong, before training
    python data.py overlap --data FILE@IMAGES pope.json ...       how many images to train on are in benchmarks

A `Record` keeps what is known of an image or a clip: its objects with box_px, absent categories, captions, conversations. Text
is written only when an example is drawn, so the representation, the objectives and the wording are flags of a run.
One row holds the image once and k question/answer segments behind it (`|` marks what carries loss):

    <s> A chat between ... questions. USER: <image>     the prefix, shared
      \\n Localize the object described cup in terms of (x1,y1,x2,y2) bbox? ASSISTANT: |It is located at (4, 52, 13, 63)</s>|
      \\n What is at location (60, 2, 90, 41) in image? ASSISTANT: |There is a dog.</s>|

Segments see the prefix and themselves, not each other (`model.packed_mask`): k separate rows, at the price of one image.
"""

import argparse
import json
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import video
from checkpoint import read_json, require_file, some
from clip_vit import CLIPVisionConfig, open_image, preprocess
from coords import KINDS, CoordFormat, fault
from llama import Tokenizer

IMAGE_ID = -200  # stands in input_ids for each patch of an image (LLaVA's choice: no vocabulary has it)
IGNORE = -100  # label of a token without loss

# App. B of the paper, to the letter: "the the" is theirs
LOC_PROMPTS = (
    "Where is the object described {category} located in image in terms of {repr}?",
    "What is the location of object described {category} in terms of {repr}?",
    "Localize the object described {category} in terms of {repr}?",
    "Provide a {repr} for the the object described {category}?",
    "Generate a {repr} for the the object described {category}?",
)
REV_PROMPTS = (
    "Describe the object located at {loc}?",
    "Provide a caption for object at {loc}?",
    "What is at location {loc} in image?",
)
REPR = {"box": "(x1,y1,x2,y2) bbox", "point": "(cx,cy) point"}
LOC_ANSWER = "It is located at {loc}"
NEG_ANSWER = "There is no such object in the image"
REV_ANSWER = "There is a {category}."
OBJECTIVES = ("loc", "neg", "rev")
# App. E; it gives no wording for above and below, so that one is ours
SIDE_PROMPTS = {
    "across": "Which side of {obj_1} is {obj_2} located?",
    "along": "Is {obj_2} located above or below {obj_1}?",
}
SIDE_ANSWERS = {
    side: "{obj_2} is located " + words + " {obj_1}."
    for side, words in {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
    }.items()
}

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna v1


def article(words):
    """'a dog', 'an orange': by the first letter."""
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".npy")
STATIC, STATIC_SIDE = 5, 224  # pixels from the mean on each axis, of a square (App. D; which pixels, it does not say)
# what files must hold: lists, and the keys of their rows
CLIP_KEYS = {
    "videos": {"id", "file_name", "width", "height", "frames"},
    "annotations": {"video_id", "frame", "category_id"},
    "categories": {"id", "name"},
}
COCO_KEYS = {
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"image_id", "category_id"},
    "categories": {"id", "name"},
}
CAPTION_KEYS = {"images": COCO_KEYS["images"], "annotations": {"image_id", "caption"}}


# ----- records


@dataclass(frozen=True)
class Object:
    """One annotated object. `description` is a pseudo-caption of the form '{name} that is ...', or None."""

    name: str
    box_px: tuple
    description: str | None = None


@dataclass(frozen=True)
class Record:
    """What is known of one image; all boxes in its own pixels. Without an image: a conversation in text alone."""

    id: str
    image: Path | None
    size: tuple  # (width, height); (0, 0) where no file says it
    objects: tuple = ()  # those whose category occurs once: the paper's unique-instance filter (Sec. 3.3)
    present: tuple = ()  # every category annotated in the image
    absent: tuple = ()  # every other category of the data set
    captions: tuple = ()
    conversations: tuple = ()  # each a tuple of (question, answer) turns
    weight: float = 1.0  # how often an epoch draws it


def box_from_xywh(bbox):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2), same pixels."""
    x, y, w, h = bbox
    return x, y, x + w, y + h


def box_problem(bbox, size):
    """Say what is wrong with a COCO bbox (x, y, w, h), or None; up to a fiftieth of a pixel too wide or too high is rounding."""
    if not are_numbers(bbox, 4) or not all(map(math.isfinite, bbox)):
        return "is not four finite numbers"
    if bbox[2] <= 0 or bbox[3] <= 0:
        return "has no area"
    x1, y1, x2, y2 = box_from_xywh(bbox)
    return fault((x1, y1, max(x1, x2 - 0.02), max(y1, y2 - 0.02)), size) and f"is outside its image of size {size}"


def read_instances(path, content=None):
    """Read a COCO instances JSON, or take its content; refuse another schema by name."""
    coco = read_json(require_file(path, "COCO's instances_*.json")) if content is None else content
    require_rows(coco, COCO_KEYS, path, "COCO's instances_*.json; captions and LLaVA files have flags of their own")
    return coco


def require_rows(content, keys, path, expected):
    """Refuse content that lacks a list of `keys`, or has a row in it without those keys."""
    for key, needs in keys.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and needs <= row.keys() for row in rows):
            raise ValueError(f"{path} lacks {key} with {sorted(needs)}; expected {expected}; check the file")


def read_coco(instances, images, content=None):
    """Read a COCO folder: list of Records in the order of the file, and a Counter of what was left out and why.

    instances  instances_*.json (content: what is in it, where it was read already); an annotation may carry our extra key "description"
    images     folder of the image files, or a zip of them
    Annotations without a usable box are left out and counted; iscrowd=1 counts as many of its category.
    """
    coco = read_instances(instances, content)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    left_out, by_image = Counter(), {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in by_image:
            left_out["annotations of unknown images"] += 1
        elif annotation["category_id"] not in names:
            left_out["annotations of unknown categories"] += 1
        else:
            by_image[annotation["image_id"]].append(annotation)
    records = []
    for image in coco["images"]:
        if leaves(image["file_name"]):
            left_out["images whose path leaves their folder"] += 1
            continue
        size, here = (image["width"], image["height"]), by_image[image["id"]]
        count = Counter(a["category_id"] for a in here)
        count.update(a["category_id"] for a in here if a.get("iscrowd"))
        objects = []
        for a in here:
            problem = box_problem(a.get("bbox"), size)
            if problem:
                left_out[f"boxes where the box {problem.split(' of size')[0]}"] += 1
            elif count[a["category_id"]] == 1:
                x1, y1, x2, y2 = box_from_xywh(a["bbox"])
                objects.append(
                    Object(names[a["category_id"]], (x1, y1, min(x2, size[0]), min(y2, size[1])), a.get("description"))
                )
        present = sorted({names[c] for c in count})
        absent = tuple(name for name in names.values() if name not in present)
        path = Path(images) / image["file_name"]
        records.append(Record(str(image["id"]), path, size, tuple(objects), tuple(present), absent))
    return records, left_out


def leaves(file_name):
    """Say whether a file name leads out of the folder it is in."""
    return Path(file_name).is_absolute() or ".." in Path(file_name).parts


def row_problem(row):
    """Say why a row of a LLaVA-format file cannot be used, or None. Our own rows have `objective` and `box_px` as well."""
    try:
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    except (KeyError, TypeError):
        return f"is {str(row)[:80]}; expected LLaVA's id, image, conversations [{{from, value}}]"
    if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) or not said:
        return f"has turns {[who for who, _ in said]}; expected human and gpt in turn"
    if not all(isinstance(text, str) for _, text in said) or not isinstance(row.get("image", ""), str):
        return "has a text or a file name that is none; expected strings"
    if leaves(row.get("image", "")):
        return f"names {row['image']}, which leaves the images folder"
    if "image" not in row and any("<image>" in text for _, text in said):
        return "speaks of an <image> and names none; expected an image, or text alone"
    return objective_problem(row) if "objective" in row else None


def objective_problem(row):
    """The same of what prepare.py adds to its rows: what each says of its objects, all lists of one length."""
    if not isinstance(row["objective"], str):
        return f"has objective {row['objective']!r}; expected text"
    keys = {"caption": ("name", "description", "box_px"), "neg": ("names",)}
    told = keys.get(row["objective"], ("names", "descriptions", "box_px"))
    lists = [[row.get(key)] if row["objective"] == "caption" else row.get(key) for key in told]
    size, alike = row.get("size"), all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists)
    if not alike or not are_numbers(size, 2):
        return f"lacks its size, or {', '.join(told)} of one length; expected what prepare.py writes"
    for key, values in zip(told, lists, strict=True):
        for value in values:
            if key == "box_px" and (not are_numbers(value, 4) or fault(value, size)):
                return f"has box_px {value} in an image of size {size}; expected x1 < x2, y1 < y2 inside it"
            if key != "box_px" and not isinstance(value, str) and (key, value) != ("descriptions", None):
                return f"has {key} {value!r}; expected text"
    return None


def are_numbers(values, count):
    return isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)


def llava_problem(row):
    """The same of a row about an image, or of text alone."""
    if isinstance(row, dict) and "video" in row and "image" not in row:
        return f"is about the clip {row['video']}; expected images, or text alone; put rows about clips into a file of their own"
    return row_problem(row)


def read_llava(path, images, content=None):
    """Read a LLaVA-format JSON: list of Records, one a row, and a Counter of the rows that were left out and why.

    Rows without an image are text alone. Rows that prepare.py wrote (`objective`) give objects and absent categories, so
    that their text is written anew in the representation of the run.
    """
    rows = read_json(require_file(path, "LLaVA-format JSON")) if content is None else content
    if not isinstance(rows, list):
        raise ValueError(f"{path} is a JSON {type(rows).__name__}; expected LLaVA's list of rows; convert it")
    records, left_out = [], Counter()
    for index, row in enumerate(rows):
        if problem := llava_problem(row):
            left_out[f"rows of {path} (the first: row {index}, it {problem})"] += 1
            continue
        image = Path(images) / row["image"] if "image" in row else None
        record = Record(str(row.get("id", index)), image, tuple(row.get("size", (0, 0))))
        if "objective" not in row:
            texts = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
            record = replace(record, conversations=(tuple(zip(texts[0::2], texts[1::2], strict=True)),))
        elif row["objective"] == "caption":
            objects = (Object(row["name"], tuple(row["box_px"]), row["description"]),)
            record = replace(record, objects=objects, present=(row["name"],))
        elif row["objective"] == "neg":
            record = replace(record, absent=tuple(row["names"]))
        else:
            told = zip(row["names"], map(tuple, row["box_px"]), row["descriptions"], strict=True)
            record = replace(record, objects=tuple(Object(*o) for o in told), present=tuple(row["names"]))
        records.append(record)
    if left_out.total() == len(rows):
        raise ValueError(f"{path}: no row can be used: {next(iter(left_out), 'it is empty')}; is this another schema?")
    return records, left_out


def read_captions(coco, images, path):
    """Read the content of COCO's captions_*.json at `path`: a Record for each image that has some, and a Counter, as `read_coco`."""
    require_rows(coco, CAPTION_KEYS, path, "COCO's captions_*.json")
    records, left_out, told = [], Counter(), {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        caption = annotation["caption"]
        if annotation["image_id"] not in told:
            left_out["captions of unknown images"] += 1
        elif not isinstance(caption, str) or not caption.strip():
            left_out["captions that are no text"] += 1
        else:
            told[annotation["image_id"]].append(caption.strip())
    for image in coco["images"]:
        if leaves(image["file_name"]):
            left_out["images whose path leaves their folder"] += 1
        elif captions := tuple(told[image["id"]]):
            path, size = Path(images) / image["file_name"], (image["width"], image["height"])
            records.append(Record(str(image["id"]), path, size, captions=captions))
    return records, left_out


def of_clips(content):
    """Say whether an annotation file's content is about clips."""
    if isinstance(content, list):
        return bool(content and isinstance(content[0], dict) and content[0].keys() & {"video", "video_id"})
    return isinstance(content, dict) and "videos" in content


def of_captions(content):
    """Say whether an annotation file's content is COCO's captions."""
    rows = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "caption" in rows[0]


def read_file(path, images):
    """Read an annotation file of any kind, of images or clips; its content says which: (Records, Counter of what was left out)."""
    content = read_json(require_file(path, "an annotation file"))
    if of_clips(content):
        return read_clips(path, images, content=content)
    if isinstance(content, list):
        return read_llava(path, images, content)
    if of_captions(content):
        return read_captions(content, images, path)
    return read_coco(path, images, content)


# ----- clips


def static_objects(boxes_by_frame, size):
    """Find what stays where it is: list of Objects in order of appearance, each box the mean over the frames it is in.

    boxes_by_frame  for each annotated frame (category, box_px) pairs; box_px None for a crowd, or a box that is none
    size            (width, height) of the frames; distances are taken in a square of STATIC_SIDE, to which they are squashed
    An object is a category that no frame has twice, and its box's centre keeps within STATIC of its mean on both axes;
    what is in one frame alone is at its mean, the paper's other case.

    >>> static_objects([[("cup", (0, 0, 4, 4))], [("cup", (2, 0, 6, 4)), ("dog", (8, 8, 9, 9))]], (224, 224))
    [Object(name='cup', box_px=(1.0, 0.0, 5.0, 4.0), description=None), Object(name='dog', box_px=(8.0, 8.0, 9.0, 9.0), description=None)]
    """
    boxes, repeated = {}, set()
    for frame in boxes_by_frame:
        count = Counter(name for name, _ in frame)
        repeated.update(name for name, box_px in frame if count[name] > 1 or box_px is None)
        for name, box_px in frame:
            boxes.setdefault(name, []).append(box_px)
    objects = []
    for name in boxes:
        if name in repeated:
            continue
        mean = tuple(sum(box_px[i] for box_px in boxes[name]) / len(boxes[name]) for i in range(4))
        away = max(
            abs(box_px[axis] + box_px[axis + 2] - mean[axis] - mean[axis + 2]) / 2 * STATIC_SIDE / size[axis]
            for box_px in boxes[name]
            for axis in (0, 1)
        )
        if away <= STATIC + 1e-6:  # so that rounding decides nothing
            objects.append(Object(name, mean))
    return objects


def find_clips(folder):
    """What clips a folder holds: file name, and the same without its ending, -> path; a folder of frames goes first."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; expected the clips, each a {' '.join(CLIP_SUFFIXES)} or a folder of frames; check the path"
        )
    found = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.is_dir():
            found[path.name] = (-1, path)
        elif suffix in CLIP_SUFFIXES:
            found[path.name] = (-1, path)
            rank = CLIP_SUFFIXES.index(suffix)
            found[path.stem] = min(found.get(path.stem, (rank, path)), (rank, path))
    return {name: path for name, (_, path) in found.items()}


def with_clips(records, path, folder):
    """Put the clips' paths into records whose `image` is a name: (those that are there, Counter of those that are not)."""
    clips = find_clips(folder)
    missing = sorted({record.image for record in records} - clips.keys())
    if records and len(missing) == len({record.image for record in records}):
        raise FileNotFoundError(
            f"none of the {len(missing)} clips of {path} is in {folder} ({some(missing)}); expected each as a "
            f"{' '.join(CLIP_SUFFIXES)} or a folder of frames of that name; check the folder"
        )
    there = [replace(record, image=clips[record.image]) for record in records if record.image in clips]
    return there, Counter(
        {f"clips of {path} that are not in {folder} ({some(missing)})": len(missing)} if missing else {}
    )


def read_clips(path, folder, content=None):
    """Read annotations of clips: list of Records, and a Counter of what was left out and why; the content says which:

    clips_*.json                    of shapes.py and `prepare.py panoptic`: videos, categories, annotations, a box a frame
    VideoInstruct_Dataset.json      Video-ChatGPT's [{q, a, video_id}], or [{id, video, conversations}] of its converter
    folder                          of the clips, found by name with any ending
    """
    content = read_json(require_file(path, "annotations of clips")) if content is None else content
    if isinstance(content, list):
        return read_talks(content, path, folder)
    require_rows(content, CLIP_KEYS, path, "a clips_*.json, as shapes.py writes, not a file of images")
    return clip_records(content, path, folder)


def clip_records(content, path, folder):
    """The Records of a clips_*.json's content. Boxes that are none are counted; their category is there, not asked for."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    left_out, frames = Counter(), {v["id"]: [[] for _ in range(v["frames"])] for v in content["videos"]}
    sizes = {v["id"]: (v["width"], v["height"]) for v in content["videos"]}
    for a in content["annotations"]:
        clip = a["video_id"]
        if clip not in frames:
            left_out["annotations of unknown clips"] += 1
        elif a["category_id"] not in names:
            left_out["annotations of unknown categories"] += 1
        elif not isinstance(a["frame"], int) or not 0 <= a["frame"] < len(frames[clip]):
            left_out["annotations of frames that their clip has not"] += 1
        else:
            box_px, problem = None, box_problem(a.get("bbox"), sizes[clip])
            if problem:
                left_out[f"boxes where the box {problem.split(' of size')[0]}"] += 1
            elif not a.get("iscrowd"):
                x1, y1, x2, y2 = box_from_xywh(a["bbox"])
                box_px = x1, y1, min(x2, sizes[clip][0]), min(y2, sizes[clip][1])
            frames[clip][a["frame"]].append((names[a["category_id"]], box_px))
    records = []
    for v in content["videos"]:
        if leaves(v["file_name"]):
            left_out["clips whose path leaves their folder"] += 1
            continue
        present = {name for frame in frames[v["id"]] for name, _ in frame}
        records.append(
            Record(
                str(v["id"]),
                v["file_name"],
                sizes[v["id"]],
                tuple(static_objects(frames[v["id"]], sizes[v["id"]])),
                tuple(sorted(present)),
                tuple(name for name in names.values() if name not in present),
            )
        )
    records, missing = with_clips(records, path, folder)
    return records, left_out + missing


def talk_problem(row):
    """Say why a row of Video-ChatGPT's cannot be used, or None; either of its two forms."""
    if isinstance(row, dict) and "q" in row:
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("q", "a", "video_id")):
            return f"is {str(row)[:80]}; expected texts q, a and video_id"
        clip = row["video_id"]
    else:
        if problem := row_problem(row):
            return problem
        clip = row.get("video")
        if not isinstance(clip, str) or not clip:
            return "names no video; expected Video-ChatGPT's id, video, conversations, or q, a, video_id"
    return f"names {clip}, which leaves the clips folder" if leaves(clip) else None


def read_talks(rows, path, folder):
    """Read Video-ChatGPT's rows: list of Records, one a row (`merge` makes one of a clip's), and a Counter, see `read_clips`.

    Its converter names features, v_ID.pkl, where we look for the clip v_ID.
    """
    records, left_out = [], Counter()
    for index, row in enumerate(rows):
        if problem := talk_problem(row):
            left_out[f"rows of {path} (the first: row {index}, it {problem})"] += 1
            continue
        if "q" in row:
            clip, texts = row["video_id"], [row["q"], row["a"]]
        else:
            clip, texts = row["video"].removesuffix(".pkl"), [turn["value"] for turn in row["conversations"]]
        texts = [text.replace("<video>", "").strip() for text in texts]
        turns = tuple(zip(texts[0::2], texts[1::2], strict=True))
        records.append(Record(str(row.get("id", f"{clip}_{index}")), clip, (0, 0), conversations=(turns,)))
    if not records:
        raise ValueError(f"{path}: no row can be used: {next(iter(left_out), 'it is empty')}; is this another schema?")
    records, missing = with_clips(records, path, folder)
    return records, left_out + missing


# ----- mixtures


def merge(records):
    """Make one Record of those about the same image file, so that all that is asked about it shares its prefix.

    An object that two files tell of is one: descriptions are taken from whichever has one. The weight is the largest.
    """
    merged = {}
    for record in records:
        key = os.path.abspath(record.image) if record.image else len(merged)
        known = merged.setdefault(key, record)
        if known is record:
            continue
        objects = {o.name: o for o in known.objects}
        for o in record.objects:
            if objects.setdefault(o.name, o).description is None:
                objects[o.name] = replace(objects[o.name], description=o.description)
        present = dict.fromkeys(known.present + record.present)
        merged[key] = replace(
            known,
            size=known.size if any(known.size) else record.size,
            objects=tuple(objects.values()),
            present=tuple(present),
            absent=tuple(name for name in dict.fromkeys(known.absent + record.absent) if name not in present),
            captions=known.captions + record.captions,
            conversations=known.conversations + record.conversations,
            weight=max(known.weight, record.weight),
        )
    return list(merged.values())


def read_records(sources, exclude=()):
    """Read a mixture of annotation files: list of Records, one an image, and a Counter of what was left out and why.

    sources  (file, images folder or zip, weight) each; a weight says how often an epoch draws each image of the file
    exclude  COCO image ids that must not be there, see `image_ids`
    """
    records, left_out = [], Counter()
    for path, images, weight in sources:
        read, left = read_file(path, images)
        records += [replace(record, weight=weight) for record in read]
        left_out += left
    merged = merge(records)
    kept = [record for record in merged if coco_id(record.image) not in exclude or video.is_clip(record.image)]
    if len(kept) < len(merged):
        left_out["images that --exclude lists"] = len(merged) - len(kept)
    return kept, left_out


def join_sources(data, images, *files):
    """Make a mixture, (file, images, weight) each: `data` as `parse_sources` reads it, then files that share `images`."""
    files = [str(path) for path in files if path]
    if files and not images:
        raise ValueError(f"{files[0]} without --images; expected the folder of its images, or a zip; add it")
    return (parse_sources(data) if data else []) + [(path, str(images), 1.0) for path in files]


def parse_sources(text):
    """Take apart "FILE@IMAGES*WEIGHT, ..." into (file, images, weight); a weight of 1 may be left out."""
    sources = []
    for part in text.split(","):
        found = re.fullmatch(r"(.+?)@([^*]+)(?:\*(\d+\.?\d*|\.\d+))?", part.strip())
        if not found or float(found[3] or 1) <= 0:
            raise ValueError(f"--data {part.strip()}; expected FILE@IMAGES or FILE@IMAGES*WEIGHT; separate by commas")
        sources.append((found[1], found[2], float(found[3] or 1)))
    return sources


# ----- one image in many data sets


def coco_id(image):
    """COCO's id of an image file, which is the same in all years: COCO_val2014_000000581857.jpg -> 581857; or None."""
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(image).stem) if image else None
    return int(found[1]) if found else None


def image_ids_of(files):
    """All COCO image ids of some files, their names parted by commas."""
    return set().union(*(image_ids(path) for path in files.split(",") if path))


def image_ids(path):
    """COCO image ids that a benchmark's file speaks of: JSON or JSON lines of any schema, or one id or file name a line."""
    text = require_file(path, "a list of images, or a benchmark's file").read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if not isinstance(content, dict | list):
            content = {"image_id": content}
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        content = [json.loads(line) if line.lstrip()[:1] in "{[" else {"image_id": line.strip()} for line in lines]
    found = set()

    def visit(value, key=None):
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, name)
        elif isinstance(value, list):
            for inner in value:
                visit(inner, key)
        elif key in ("image_id", "image", "file_name") and value is not None:
            number = coco_id(value) if isinstance(value, str) and not value.isdigit() else int(value)
            found.add(number)

    visit(content)
    found.discard(None)
    if not found:
        raise ValueError(f"{path} names no COCO image; expected image_id, image or file_name in it; check the file")
    return found


# ----- questions


@dataclass(frozen=True)
class Wording:
    """How an example's text is written: flags of the run, not of the data."""

    fmt: CoordFormat
    objectives: tuple = OBJECTIVES
    location: str = "box"  # or "point"
    words: str = "name"  # what names an object: "name", "description" or "mixed" (half and half)
    neg_ratio: float = 1.0  # absent objects asked for, per object that is there
    medium: str = "image"  # or "video": what a question about a clip calls it

    def place(self, box_px, size):
        """Write a location as text."""
        if self.location == "box":
            return self.fmt.encode_box(box_px, size)
        x1, y1, x2, y2 = box_px
        return self.fmt.encode_point(((x1 + x2) / 2, (y1 + y2) / 2), size)

    def can_place(self, box_px, size):
        """Say whether enough of a box is in the model's square to ask for it: half, and its centre for a point.

        What lies within a pixel of the corner is not: `CoordFormat` takes such numbers for fractions.
        """
        x1, y1, x2, y2 = box_px
        centre_px = (x1 + x2) / 2, (y1 + y2) / 2
        if max(box_px if self.location == "box" else centre_px) <= 1 < min(size):
            return False
        centre = self.fmt.unit_from_px(centre_px, size)
        return self.fmt.visible(box_px, size) >= 0.5 and all(0 <= v <= 1 for v in centre)


def loc_question(category, wording, rng):
    return rng.choice(LOC_PROMPTS).format(category=category, repr=REPR[wording.location])


def draw_questions(record, wording, rng, descriptions=None):
    """Draw the objectives' question/answer pairs for one image: (objective, question, answer), in random order.

    LocPred and RevLoc for each unique object, NegPred for absent categories (Sec. 3.3, App. B).
    descriptions: category -> descriptions of it in other images, which NegPred borrows half of the time unless all is asked
    by name.
    """

    def called(name, description):
        if wording.words == "name" or description is None or (wording.words == "mixed" and rng.random() < 0.5):
            return name
        return description

    objects = [o for o in record.objects if wording.can_place(o.box_px, record.size)]
    pairs = []
    for o in objects:
        where = wording.place(o.box_px, record.size)
        if "loc" in wording.objectives:
            pairs.append(
                ("loc", loc_question(called(o.name, o.description), wording, rng), LOC_ANSWER.format(loc=where))
            )
        if "rev" in wording.objectives:
            pairs.append(
                (
                    "rev",
                    rng.choice(REV_PROMPTS).format(loc=where),
                    REV_ANSWER.format(category=called(o.name, o.description)),
                )
            )
    if "neg" in wording.objectives and record.absent:
        wanted = wording.neg_ratio * max(1, len(objects))
        count = min(int(wanted) + (rng.random() < wanted % 1), len(record.absent))
        count = max(count, int(wanted > 0 and not pairs))  # an image is never left without a question
        for name in rng.sample(record.absent, count):
            borrowed = rng.choice(descriptions[name]) if descriptions and descriptions.get(name) else None
            described = borrowed and wording.words != "name" and rng.random() < 0.5
            pairs.append(("neg", loc_question(borrowed if described else name, wording, rng), NEG_ANSWER))
    rng.shuffle(pairs)
    return pairs


# ----- token ids and labels


def encode_prefix(tokenizer, template, num_patches):
    """Ids up to and with the image, the same for every question about it. `plain` is LLaVA's stage 1, `v1` Vicuna's chat.

    Text on either side of the image is tokenised on its own, as LLaVA does: the space before it is a piece. Without an
    image (num_patches 0) the question brings that space.
    """
    before = tokenizer.encode(SYSTEM + " USER:" + " " * (num_patches > 0)) if template == "v1" else []
    return [tokenizer.bos_token_id] + before + [IMAGE_ID] * num_patches


def encode_question(tokenizer, question, before="\n"):
    """Ids of one user turn up to where the answer starts; a line end parts the first one from the image."""
    return tokenizer.encode(before + question + " ASSISTANT:")


def encode_segment(tokenizer, template, turns, first="\n"):
    """(question, answer) turns -> (ids, labels). Built turn by turn: what is supervised is what was put there as answer.

    plain: the answer and a line end, no question. v1: each answer and its end-of-sentence token, so that the model
    learns to stop.
    """
    ids, labels = [], []
    for index, (question, answer) in enumerate(turns):
        if template == "plain":
            asked, said = [], tokenizer.encode(answer + "\n")
        else:
            asked, said = (
                encode_question(tokenizer, question, "USER: " if index else first),
                tokenizer.encode(answer) + [tokenizer.eos_token_id],
            )
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


def pack(prefix, segments, max_length):
    """A prefix and k (ids, labels) segments -> one row: dict of equally long lists.

    input_ids, labels; `segments` 0 for the prefix, 1..k; `positions` continue from the prefix in each segment. A
    segment is cut where its position reaches max_length; one with no supervised token left is an error.
    """
    row = {
        "input_ids": list(prefix),
        "labels": [IGNORE] * len(prefix),
        "segments": [0] * len(prefix),
        "positions": list(range(len(prefix))),
    }
    for number, (ids, labels) in enumerate(segments, start=1):
        room = max(0, max_length - len(prefix))
        ids, labels = ids[:room], labels[:room]
        if all(label == IGNORE for label in labels):
            raise ValueError(
                f"a question leaves no room for its answer in {max_length} tokens, {len(prefix)} of them before it; raise max_length"
            )
        row["input_ids"] += ids
        row["labels"] += labels
        row["segments"] += [number] * len(ids)
        row["positions"] += range(len(prefix), len(prefix) + len(ids))
    return row


def collate(rows):
    """Right-pad rows to one length: dict of long (B, T); padding has segment -1."""
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": 0, "labels": IGNORE, "segments": -1, "positions": 0}
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for key, fill in filler.items()
    }


class Examples:
    """Records as training rows: `row(index, epoch)` draws one; what it draws is a function of (seed, epoch, index) alone."""

    def __init__(
        self,
        records,
        tokenizer,
        vision,
        wording,
        template="v1",
        questions=4,
        instruct_share=0.5,
        max_length=2048,
        seed=0,
        skip_bad=False,
        features=None,
        frames=0,
    ):
        self.tokenizer, self.wording, self.template = tokenizer, wording, template
        self.questions, self.instruct_share, self.max_length, self.seed = questions, instruct_share, max_length, seed
        self.skip_bad, self.unreadable = skip_bad, set()  # ids of images whose damage showed when they were drawn
        self.features = features  # clip_vit.Features, or None: images are read
        self.visual_size = frames + vision.num_patches, vision.hidden_size
        self.prefix = encode_prefix(tokenizer, template, frames + vision.num_patches)
        self.text_prefix = encode_prefix(tokenizer, template, 0)
        self.descriptions = {}
        for record in records:
            for o in record.objects:
                if o.description:
                    self.descriptions.setdefault(o.name, []).append(o.description)
        fitting = [self.that_fits(record) for record in records]
        self.left_out = sum(len(r.conversations) - len(f.conversations) for r, f in zip(records, fitting, strict=True))
        if self.left_out and not skip_bad:
            first = next(r.id for r, f in zip(records, fitting, strict=True) if r is not f)
            raise ValueError(
                f"{self.left_out} conversations, the first about image {first}, ask more than {max_length} tokens hold with the "
                "image before it; expected room for an answer; raise --max-length, as far as this LLaMA reads, or leave them out "
                "with --skip-bad"
            )
        self.records = [record for record in fitting if self.turns(record, random.Random(0))]
        if not self.records:
            raise ValueError(
                f"none of {len(records)} images has anything to say for template {template!r} and objectives {wording.objectives}; "
                "expected captions, conversations or unique objects; check the data flags"
            )
        self.weights = np.array([record.weight for record in self.records])
        self.epoch_length = max(1, round(self.weights.sum()))  # rows an epoch
        self.orders = {}  # epoch -> its order

    def that_fits(self, record):
        """Give a record without the conversations whose first question leaves no room for an answer."""
        room = self.max_length - len(self.prefix if record.image else self.text_prefix) - 1

        def fits(turns):  # a piece is a byte at least: most need no tokenizer to tell
            asked = "\n" + turns[0][0] + " ASSISTANT:"
            return len(asked.encode()) < room or len(self.tokenizer.encode(asked)) < room

        kept = tuple(turns for turns in record.conversations if self.template == "plain" or fits(turns))
        return record if len(kept) == len(record.conversations) else replace(record, conversations=kept)

    def turns(self, record, rng):
        """Draw the k segments of one row, each a conversation: captions in stage 1, else objectives and instructions."""
        if self.template == "plain":
            told = record.captions or [turns[0][1] for turns in record.conversations]
            return (
                rng.sample([(("", caption),) for caption in told], min(self.questions, len(told)))
                if record.image
                else []
            )
        located = [
            ((question, answer),)
            for _, question, answer in draw_questions(record, self.wording, rng, self.descriptions)
        ]
        talks = rng.sample(record.conversations, len(record.conversations))
        share = self.instruct_share if located else 1.0
        wanted = int(share * self.questions + rng.random())
        talks = talks[:wanted]
        return talks + located[: self.questions - len(talks)]

    def text_row(self, record, epoch):
        """Draw what is said about a record in an epoch: a packed row."""
        rng = random.Random(f"{self.seed} {epoch} {record.id}")
        first = "\n" if record.image else ""
        segments = [encode_segment(self.tokenizer, self.template, turns, first) for turns in self.turns(record, rng)]
        return pack(self.prefix if record.image else self.text_prefix, segments, self.max_length)

    def row(self, index, epoch):
        """Draw record `index` of epoch `epoch`: (packed row, image (3, S, S) or features (P, Dv) or None, record).

        An image whose damage shows only when it is decoded stops the run; with skip_bad the next record takes its place.
        """
        record, fmt = self.records[index], self.wording.fmt
        row = self.text_row(record, epoch)
        if record.image is None:
            return row, None, record
        if self.features:
            return row, self.features.read(record.image), record
        try:
            return row, preprocess(open_image(record.image), fmt.side, fmt.geometry), record
        except ValueError as error:
            tolerated = min(max(1, len(self.records) // 100), len(self.records) - 1)
            if not self.skip_bad or len(self.unreadable | {record.id}) > tolerated:
                raise ValueError(f"{error}; or leave out up to one in a hundred with --skip-bad") from None
            self.unreadable.add(record.id)
            return self.row((index + 1) % len(self.records), epoch)

    def order(self, sample):
        """The `sample`-th draw of the run -> (index, epoch). An epoch's order is a function of (seed, epoch).

        Each record comes as often as its weight says, up to one time more or less where that is no whole number.
        """
        epoch, place = divmod(sample, self.epoch_length)
        if epoch not in self.orders:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.records))
            if (
                self.weights != 1
            ).any():  # marks at equal distances on the records laid end to end, each as long as its weight
                ends = self.weights[order].cumsum()
                marks = (np.arange(self.epoch_length) + rng.random()) * ends[-1] / self.epoch_length
                order = rng.permutation(order[np.searchsorted(ends, marks, side="right").clip(max=len(ends) - 1)])
            self.orders = {epoch: order}
        return int(self.orders[epoch][place]), epoch

    def batch(self, samples):
        """Collate the given draws of the run; also gives their record ids."""
        rows, images, records = zip(*(self.row(*self.order(sample)) for sample in samples), strict=True)
        seen, side = [image for image in images if image is not None], self.wording.fmt.side
        nothing = torch.empty(0, *self.visual_size) if self.features else torch.empty(0, 3, side, side)
        batch = collate(rows)
        batch["pixel_values"] = torch.stack(seen) if seen else nothing
        return batch, [record.id for record in records]


# ----- to look at, and to check


def marked(tokenizer, row):
    """A packed row as text: patches counted, what carries loss between « and »."""
    out, run, loss = [], [], False

    def flush():
        if run:
            text = tokenizer.decode(run).replace("\n", "\\n")
            out.append(f"«{text}{'</s>' if run[-1] == tokenizer.eos_token_id else ''}»" if loss else text)
            run.clear()

    for i, (token, label, segment) in enumerate(zip(row["input_ids"], row["labels"], row["segments"], strict=True)):
        if i and segment != row["segments"][i - 1]:
            flush()
            out.append("\n  ")
        if (label != IGNORE) != loss:
            flush()
            loss = label != IGNORE
        if token == IMAGE_ID:
            if row["input_ids"][i - 1] != IMAGE_ID:
                flush()
                out.append(f"<image x {row['input_ids'].count(IMAGE_ID)}>")
        else:
            run.append(token)
    flush()
    return "<s>" + " ".join(out).replace("\n   ", "\n  ")


def check(path, images):
    """List every problem of an annotation file and its images: one line each, none if it is clean. Opens every image."""
    content = read_json(require_file(path, "an annotation file"))
    if of_clips(content):
        return check_clips(path, images, content)
    if isinstance(content, list):
        return check_llava(content, images)
    if of_captions(content):
        left_out = read_captions(content, images, path)[1]  # refuses another schema
        told = [f"{count} {what}" for what, count in left_out.items() if what.startswith("captions")]
        return image_problems(content, images) + told
    coco = read_instances(path, content)
    names, problems = {category["id"] for category in coco["categories"]}, image_problems(coco, images)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for index, a in enumerate(coco["annotations"]):
        name = f"annotation {a.get('id', index)}"
        if a["image_id"] not in sizes:
            problems.append(f"{name}: no image {a['image_id']}")
            continue
        if a["category_id"] not in names:
            problems.append(f"{name}: no category {a['category_id']}")
        problem = box_problem(a.get("bbox"), sizes[a["image_id"]])
        if problem:
            problems.append(f"{name}: bbox {a.get('bbox')} {problem}")
    return problems


def image_problems(coco, images):
    """What is wrong with the image files of a COCO file's content."""
    told = ((i["id"], image_problem(images, i["file_name"], (i["width"], i["height"]))) for i in coco["images"])
    return [f"image {name}: {problem}" for name, problem in told if problem]


def check_llava(rows, images):
    """The same of LLaVA-format rows."""
    problems, opened = [], set()
    for index, row in enumerate(rows):
        problem = llava_problem(row)
        if not problem and row.get("image") and row["image"] not in opened:
            opened.add(row["image"])
            problem = image_problem(images, row["image"], tuple(row.get("size", ())))
        problems += [f"row {index}: {problem}"] if problem else []
    return problems


def check_clips(path, folder, content):
    """The same of annotated clips; of each, one frame is read."""
    records, left_out = read_clips(path, folder, content=content)
    problems = [f"{count} {what}" for what, count in left_out.items()]
    for clip in {record.image for record in records}:
        try:
            video.read_frames(clip, 1)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return problems


def image_problem(images, file_name, size=()):
    """Say what is wrong with an image file, or None; `size` is what the annotations say of it, if they do."""
    path = Path(images) / file_name
    if leaves(file_name):
        return f"{file_name} leaves the images folder"
    try:
        found = open_image(path).size
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return f"{path} is {found}, the annotations say {size}" if any(size) and found != size else None


def overlap(args):
    """Print how many images to train on are in each benchmark."""
    records, _ = read_records(parse_sources(args.data), image_ids_of(args.exclude))
    ours = {coco_id(record.image) for record in records} - {None}
    print(f"{len(records)} records to train on, {len(ours)} of them COCO images")
    for benchmark in args.benchmarks:
        theirs = image_ids(benchmark)
        print(f"{benchmark}: {len(ours & theirs)} of its {len(theirs)} images are among them")


def show(args):
    """Print examples as the model will read them."""
    records, left_out = read_records(args.sources)
    wording = Wording(CoordFormat(args.kind, args.side), location=args.location, words=args.words)
    examples = Examples(
        records,
        Tokenizer(args.tokenizer),
        CLIPVisionConfig(image_size=args.side),
        wording,
        args.template,
        seed=args.seed,
    )
    for index in range(min(args.number, len(examples.records))):
        row, image, record = examples.row(*examples.order(index))
        size = f"{record.size[0]} x {record.size[1]} px" if any(record.size) else "size not told"
        seen = f"{size} -> {tuple(image.shape)}" if record.image else "text alone"
        print(f"--- {record.id}  {record.image}  {seen}, {len(row['input_ids'])} tokens")
        print(marked(examples.tokenizer, row))
    for what, count in left_out.items():
        print(f"left out: {count} {what}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Look at training data, or check it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("show", "print examples, what carries loss between « and »"),
        ("check", "list missing or unreadable images and bad boxes"),
        ("overlap", "count the images to train on that benchmarks test"),
    ):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--data", default="", help="FILE@IMAGES*WEIGHT, several parted by commas, as train.py has it")
        if name in ("show", "check"):
            sub.add_argument("--coco", help="instances_*.json")
            sub.add_argument("--llava", help="LLaVA-format conversations about the same images")
            sub.add_argument("--captions", help="captions_*.json")
            sub.add_argument("--images", help="folder of the images, or a zip")
        if name == "overlap":
            sub.add_argument("--exclude", default="", help="files of images that are not trained on, parted by commas")
            sub.add_argument("benchmarks", nargs="+", help="files of the benchmarks: POPE, VQAv2, RefCOCO as JSON, ...")
        if name == "show":
            sub.add_argument("--tokenizer", default="tiny/llama", help="folder with tokenizer.model")
            sub.add_argument(
                "--template", choices=("v1", "plain"), default="v1", help="v1: stage 2; plain: captions of stage 1"
            )
            sub.add_argument("--kind", choices=KINDS, default="ivb", help="how coordinates are written")
            sub.add_argument("--location", choices=REPR, default="box", help="what a location is")
            sub.add_argument(
                "--words", choices=("name", "description", "mixed"), default="name", help="what names an object"
            )
            sub.add_argument("--side", type=int, default=224, help="of the model's square image")
            sub.add_argument("--number", type=int, default=3, help="how many images")
            sub.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(argv)
    if args.command == "overlap":
        return overlap(args)
    args.sources = join_sources(args.data, args.images, args.coco, args.captions, args.llava)
    if not args.sources:
        raise ValueError("no data; expected --data FILE@IMAGES, or --coco or --llava with --images; give one")
    if args.command == "show":
        return show(args)
    problems = 0
    for path, images, _ in args.sources:
        found = check(path, images)
        print("".join(f"{line}\n" for line in found[:1000]) + f"{path}: {len(found) or 'no'} problems")
        problems += len(found)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"data.py: {error}")
