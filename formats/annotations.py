"""Annotation files beyond COCO instances and LLaVA rows: captions, clips, mixtures of files, and lists of COCO images.

Readers return a list of data.Record and a Counter {reason: rows skipped}. A file's format is detected from its content.
"""

import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from data import Object, Record, read_coco, read_llava
from formats import schema
from formats.files import read_json, require_file, some
from formats.images import image_size, is_clip

CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".npy")
CLIP_KINDS = f"a {' '.join(CLIP_SUFFIXES)} or a folder of frames"
STATIC, STATIC_SIDE = 5, 224  # at most 5 px from the mean, in a square of 224 px (App. D does not say in which pixels)


def read_captions(coco, images, path):
    """Read the content of COCO's captions_*.json: a Record for each image that has captions."""
    schema.require_rows(coco, schema.CAPTION_KEYS, path, "COCO's captions_*.json")
    records, skipped, captions_of = [], Counter(), {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        caption = annotation["caption"]
        if annotation["image_id"] not in captions_of:
            skipped["captions of unknown images"] += 1
        elif not isinstance(caption, str) or not caption.strip():
            skipped["captions that are not text"] += 1
        else:
            captions_of[annotation["image_id"]].append(caption.strip())
    for image in coco["images"]:
        if schema.leaves_folder(image["file_name"]):
            skipped["images whose path leaves their folder"] += 1
        elif captions := tuple(captions_of[image["id"]]):
            path, size = Path(images) / image["file_name"], (image["width"], image["height"])
            records.append(Record(str(image["id"]), path, size, captions=captions))
    return records, skipped


def read_file(path, images):
    """Read an annotation file about images or clips, in any of the formats."""
    content = read_json(require_file(path, "an annotation file"))
    if schema.is_about_clips(content):
        return read_clips(path, images, content=content)
    if isinstance(content, list):
        return read_llava(path, images, content)
    if schema.is_captions(content):
        return read_captions(content, images, path)
    return read_coco(path, images, content)


def static_objects(boxes_by_frame, size):
    """Find the objects that stay in place: Objects in order of appearance, each box the mean over its frames.

    boxes_by_frame holds (category, box_px) pairs for each frame; box_px is None for a crowd or an invalid box. An object is a
    category that no frame shows twice, with its centre within STATIC of its mean on both axes, in a square of STATIC_SIDE px.

    >>> objects = static_objects([[("cup", (0, 0, 4, 4))], [("cup", (2, 0, 6, 4)), ("dog", (8, 8, 9, 9))]], (224, 224))
    >>> [(o.name, o.box_px) for o in objects]
    [('cup', (1.0, 0.0, 5.0, 4.0)), ('dog', (8.0, 8.0, 9.0, 9.0))]
    """
    boxes, repeated = {}, set()
    for frame in boxes_by_frame:
        count = Counter(name for name, _ in frame)
        repeated.update(name for name, box_px in frame if count[name] > 1 or box_px is None)
        for name, box_px in frame:
            boxes.setdefault(name, []).append(box_px)
    objects = []
    for name in (name for name in boxes if name not in repeated):
        mean = tuple(sum(edge) / len(edge) for edge in zip(*boxes[name], strict=True))
        pairs = ((box_px, axis) for box_px in boxes[name] for axis in (0, 1))
        moves = (abs(box_px[i] + box_px[i + 2] - mean[i] - mean[i + 2]) / 2 * STATIC_SIDE / size[i] for box_px, i in pairs)
        if all(move <= STATIC + 1e-6 for move in moves):  # float noise must not decide
            objects.append(Object(name, mean))
    return objects


def find_clips(folder):
    """Find the clips in a folder: {file name, with and without its suffix: path}. A folder of frames has priority."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder} of clips, each {CLIP_KINDS}")
    paths = sorted(Path(folder).iterdir(), reverse=True)
    files = [path for path in paths if path.suffix.lower() in CLIP_SUFFIXES and not path.is_dir()]
    files.sort(key=lambda path: CLIP_SUFFIXES.index(path.suffix.lower()), reverse=True)  # the first suffix overwrites
    return {path.stem: path for path in files} | {path.name: path for path in [*files, *filter(Path.is_dir, paths)]}


def read_clips(path, folder, content=None):
    """Read annotations of clips, which lie in `folder` under any suffix:

    clips_*.json                    of tiny.moving and tools.panoptic: videos, categories, annotations with a box per frame
    VideoInstruct_Dataset.json      Video-ChatGPT's [{q, a, video_id}], or its converter's [{id, video, conversations}]
    """
    content = read_json(require_file(path, "annotations of clips")) if content is None else content
    records, skipped = clip_rows(content, path) if isinstance(content, list) else clip_records(content, path)
    clips, names = find_clips(folder), {record.image for record in records}
    missing = sorted(names - clips.keys())
    if missing and len(missing) == len(names):
        raise FileNotFoundError(f"none of the {len(missing)} clips of {path} is in {folder} ({some(missing)}), as {CLIP_KINDS}")
    if missing:
        skipped[f"clips of {path} that are not in {folder} ({some(missing)})"] = len(missing)
    return [replace(record, image=clips[record.image]) for record in records if record.image in clips], skipped


def clip_records(content, path):
    """Make Records of a clips_*.json. Invalid boxes are counted; their category is present, but not asked for."""
    schema.require_rows(content, schema.CLIP_KEYS, path, "a clips_*.json")
    names = {category["id"]: category["name"] for category in content["categories"]}
    sizes = {v["id"]: (v["width"], v["height"]) for v in content["videos"]}
    frames = {v["id"]: [[] for _ in range(v["frames"])] for v in content["videos"]}
    records, skipped = [], Counter()
    for a in content["annotations"]:
        clip = a["video_id"]
        if clip not in frames:
            skipped["annotations of unknown clips"] += 1
        elif a["category_id"] not in names:
            skipped["annotations of unknown categories"] += 1
        elif not isinstance(a["frame"], int) or not 0 <= a["frame"] < len(frames[clip]):
            skipped["annotations of frames beyond their clip's last"] += 1
        else:
            box_px = schema.clip_box(a.get("bbox"), sizes[clip], skipped)
            frames[clip][a["frame"]].append((names[a["category_id"]], None if a.get("iscrowd") else box_px))
    for v in content["videos"]:
        if schema.leaves_folder(v["file_name"]):
            skipped["clips whose path leaves their folder"] += 1
            continue
        boxes, size = frames[v["id"]], sizes[v["id"]]
        present = {name for frame in boxes for name, _ in frame}
        absent = tuple(name for name in names.values() if name not in present)
        objects = tuple(static_objects(boxes, size))
        records.append(Record(str(v["id"]), v["file_name"], size, objects, tuple(sorted(present)), absent))
    return records, skipped


def clip_rows(rows, path):
    """Make a Record of each row of Video-ChatGPT's. Its converter names feature files, v_ID.pkl; we look for the clip v_ID."""
    records, skipped = [], Counter()
    for index, row in enumerate(rows):
        if problem := schema.clip_row_problem(row):
            skipped[f"rows of {path} (the first: row {index}, it {problem})"] += 1
            continue
        if "q" in row:
            clip, texts = row["video_id"], [row["q"], row["a"]]
        else:
            clip, texts = row["video"].removesuffix(".pkl"), [turn["value"] for turn in row["conversations"]]
        texts = [text.replace("<video>", "").strip() for text in texts]
        turns = tuple(zip(texts[0::2], texts[1::2], strict=True))
        records.append(Record(str(row.get("id", f"{clip}_{index}")), clip, (0, 0), conversations=(turns,)))
    if not records:
        raise ValueError(f"{path}: no usable row: {next(iter(skipped), 'the list is empty')}")
    return records, skipped


def merge(records):
    """Join the Records about one image file, so that its questions share a prefix. The largest weight counts."""
    merged = {}
    for record in records:
        key = os.path.abspath(record.image) if record.image else len(merged)
        first = merged.setdefault(key, record)
        if first is record:
            continue
        objects = {o.name: o for o in first.objects}
        for o in record.objects:  # the description comes from whichever file has one
            if objects.setdefault(o.name, o).description is None:
                objects[o.name] = replace(objects[o.name], description=o.description)
        present = dict.fromkeys(first.present + record.present)
        absent = tuple(name for name in dict.fromkeys(first.absent + record.absent) if name not in present)
        merged[key] = replace(
            first, size=first.size if any(first.size) else record.size, weight=max(first.weight, record.weight),
            objects=tuple(objects.values()), present=tuple(present), absent=absent,
            captions=first.captions + record.captions, conversations=first.conversations + record.conversations,
        )
    return list(merged.values())


def read_records(sources, exclude=()):
    """Read a mixture of annotation files, (file, images folder or zip, weight) each: one Record per image.

    The weight says how often an epoch draws each image of the file. `exclude` holds COCO image ids to skip (`image_ids`).
    """
    records, skipped = [], Counter()
    for path, images, weight in sources:
        of_file, reasons = read_file(path, images)
        records += [replace(record, weight=weight) for record in of_file]
        skipped += reasons
    merged = merge(records)
    kept = [record for record in merged if coco_id(record.image) not in exclude or is_clip(record.image)]
    if len(kept) < len(merged):
        skipped["images that --exclude lists"] = len(merged) - len(kept)
    return kept, skipped


def parse_sources(text, images=""):
    """Split "FILE@IMAGES*WEIGHT, ..." into (file, images, weight). Without @IMAGES, `images` is the folder; the weight is 1.

    >>> parse_sources("coco.json, chat.json@photos*0.5", "train2017")
    [('coco.json', 'train2017', 1.0), ('chat.json', 'photos', 0.5)]
    """
    sources = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([^@]+)(?:@([^*]+)(?:\*(\d+\.?\d*|\.\d+))?)?", part.strip())
        if not match or float(match[3] or 1) <= 0:
            raise ValueError(f"--data {part.strip()}: write FILE or FILE@IMAGES or FILE@IMAGES*WEIGHT, separated by commas")
        if not (match[2] or images):
            raise ValueError(f"--data {match[1]} without --images, the folder or zip of its images")
        sources.append((match[1], str(match[2] or images), float(match[3] or 1)))
    return sources


def unreadable(records):
    """Look at every image file without decoding it: {record id: its problem}. Clips are not opened."""

    def look(record):
        if record.image and is_clip(record.image):
            return None
        try:
            size = image_size(record.image) if record.image else record.size
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        is_wrong = any(record.size) and size != record.size
        return f"{record.image} is {size}, but the annotations say {record.size}" if is_wrong else None

    with ThreadPoolExecutor(8) as pool:
        return {record.id: problem for record, problem in zip(records, pool.map(look, records), strict=True) if problem}


def coco_id(image):
    """Return the COCO id of an image file, the same in all years (COCO_val2014_000000581857.jpg -> 581857), or None."""
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(image).stem) if image else None
    return int(found[1]) if found else None


def image_ids_of(files):
    """Read the COCO image ids of several files, whose names are separated by commas."""
    return set().union(*(image_ids(path) for path in files.split(",") if path))


def image_ids(path):
    """Read the COCO image ids in a benchmark's file: JSON or JSON lines of any schema, or one id or file name per line."""
    text = require_file(path, "a list of images, or a benchmark's file").read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if not isinstance(content, dict | list):
            content = {"image_id": content}
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        content = [json.loads(line) if line.lstrip()[:1] in "{[" else {"image_id": line.strip()} for line in lines]

    def visit(value, key=None):
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else ((key, inner) for inner in value):
                yield from visit(inner, name)
        elif key in ("image_id", "image", "file_name") and value is not None:
            yield coco_id(value) if isinstance(value, str) and not value.isdigit() else int(value)

    found = set(visit(content)) - {None}
    if not found:
        raise ValueError(f"{path} names no COCO image (keys image_id, image or file_name)")
    return found
