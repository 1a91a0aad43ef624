"""Annotation files beyond COCO instances and LLaVA rows: captions, clips, mixtures of files, and lists of COCO images.

Readers return a list of data.Record and a Counter {reason: rows skipped}. A file's format is detected from its content.
"""

import json
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from data import Object, Record, read_coco, read_llava
from formats import schema
from formats.clips import find_clip, find_clips, missing_clips
from formats.files import naming, read_rows, read_text, require_file
from formats.images import image_problem, split_zip

STATIC, STATIC_SIDE = 5, 224  # at most 5 px from the mean, in a square of 224 px (App. D does not say in which pixels)


def read_captions(path, images, content, problems):
    """Read COCO's captions_*.json: a Record for each image that has captions."""
    owners, captions = schema.caption_rows(content, path, problems)
    records = [Record(i, Path(images) / name, size, captions=tuple(captions[i])) for i, (name, size) in owners.items()]
    return [record for record in records if record.captions], problems.count()


def read_file(path, images, problems=None):
    """Read an annotation file about images or clips, in any of the formats. problems: see read_coco"""
    content = read_rows(path, "an annotation file")
    is_coco = isinstance(content, dict)
    read = read_clips if schema.is_about_clips(content) else read_captions if schema.is_captions(content) else read_coco
    problems = problems if problems is not None else schema.Problems()
    records, skipped = (read if is_coco else read_llava)(path, images, content, problems)
    if any(record.image for record in records) and not Path(images).is_dir() and not split_zip(Path(images) / "x")[0]:
        raise FileNotFoundError(f"no folder or zip {images}, the images of {path}")
    return records, skipped


def static_objects(boxes_by_frame, size):
    """Find the objects that stay in place: Objects in order of appearance, each box the mean over its frames.

    boxes_by_frame holds (category, box_px) pairs for each frame; box_px = None marks a crowd or an invalid box. An object is a
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


def read_clips(path, folder, content, problems):
    """Read a clips_*.json of tiny.moving or tools.panoptic: COCO's format, but of videos, with a box per frame."""
    records, missing = [], []
    owners, boxes, absent = schema.coco_rows(content, path, problems, "videos")
    clips = find_clips(folder) if str(folder) else {name: Path(name) for name, *_ in owners.values()}  # --score opens none
    for clip, (name, size, count) in owners.items():
        found = find_clip(clips, folder, name)
        if not found:
            missing.append(name)
            continue
        frames, present = [[] for _ in range(count)], {box.name for box in boxes[clip]}
        for box in boxes[clip]:
            frames[box.frame].append((box.name, None if box.is_crowd else box.box_px))
        names, objects = tuple(name for name in absent[clip] if name not in present), tuple(static_objects(frames, size))
        records.append(Record(clip, found, size, objects, tuple(sorted(present)), names, is_clip=True))
    return records, problems.count() + missing_clips(missing, len(records), path, folder)


def merge(records):
    """Join the Records about one image file, so that its questions share a prefix. The largest weight counts.

    An object stays unique only if every record that has its category has it once, with the same box.
    """
    merged = {}
    for record in records:
        key = os.path.abspath(record.image) if record.image else len(merged)
        first = merged.setdefault(key, record)
        if first is record:
            continue
        record = respelled(record, first)
        objects, others = ({o.name: o for o in r.objects} for r in (first, record))
        for name, o in others.items():
            same = objects.setdefault(name, o)  # the description comes from whichever file has one
            objects[name] = same if same.description or not o.description else replace(same, description=o.description)
        for name in [name for name in objects if any(name in r.present for r in (first, record))]:
            boxes = [{o.name: o.box_px for o in r.objects}.get(name) for r in (first, record) if name in r.present]
            if None in boxes or any(abs(a - b) > 0.02 for a, b in zip(boxes[0], boxes[-1], strict=True)):
                del objects[name]
        present = tuple(dict.fromkeys(first.present + record.present))
        merged[key] = replace(
            first, size=first.size if any(first.size) else record.size, weight=max(first.weight, record.weight),
            objects=tuple(objects.values()), present=present,
            absent=tuple(name for name in dict.fromkeys(first.absent + record.absent) if name not in present),
            captions=first.captions + record.captions, conversations=first.conversations + record.conversations,
        )  # fmt: skip
    return list(merged.values())


def respelled(record, first):
    """Spell a record's categories as another record does that has them in other case."""
    if not (record.present or record.absent):  # captions and conversations
        return record
    spelled = {name.casefold(): name for name in first.present + first.absent}

    def spell(names):
        return tuple(spelled.get(name.casefold(), name) for name in names)

    names = spell(o.name for o in record.objects)
    objects = tuple(replace(o, name=name) for o, name in zip(record.objects, names, strict=True))
    return replace(record, objects=objects, present=spell(record.present), absent=spell(record.absent))


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
    kept = [record for record in merged if record.is_clip or coco_id(record.image) not in exclude]
    if len(kept) < len(merged):
        skipped["images that --exclude lists"] = len(merged) - len(kept)
    return kept, skipped


def parse_sources(text, images=""):
    """Read --data: a list of (file, images, weight). Without @IMAGES, `images` is the folder; the weight is 1.

    FILE@IMAGES*WEIGHT,...              an @ inside a name of a file that exists does not split it
    [["FILE", "IMAGES", WEIGHT], ...]   the same as JSON, for names with other signs

    >>> parse_sources("coco.json, chat.json@photos*0.5", "train2017")
    [('coco.json', 'train2017', 1.0), ('chat.json', 'photos', 0.5)]
    """
    sources, is_json = [], text.startswith("[")
    with naming("--data", json.JSONDecodeError):
        parts = json.loads(text) if is_json else text.split(",") if text else []
    for part in parts:
        file, folder, weight = [*part, *(None, 1.0)[len(part) - 1 :]] if is_json else split_source(part.strip())
        if not 0 < weight < math.inf:
            raise ValueError(f"--data {part}: write FILE or FILE@IMAGES or FILE@IMAGES*WEIGHT, separated by commas")
        if not (folder or images):
            raise ValueError(f"--data {file} without --images, the folder or zip of its images")
        sources.append((file, str(folder or images), float(weight)))
    return sources


def split_source(text):
    """Split FILE@IMAGES*WEIGHT: (file, images or None, weight; 0 if the text has another form)."""
    cuts = [match.start() for match in re.finditer("@|$", text)]
    cut = next((cut for cut in cuts if Path(text[:cut]).is_file()), cuts[0])
    match = re.fullmatch(r"(?:@([^*]+)(?:\*(\d+\.?\d*|\.\d+))?)?", text[cut:])
    return text[:cut], match and match[1], float(match[2] or 1) if match and text[:cut] else 0


def unreadable(records):
    """Look at every image file without decoding it: {image: its problem}. Clips are not opened."""
    sizes = {record.image: record.size for record in records if record.image and not record.is_clip}
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(image_problem, sizes, sizes.values()))
    return {image: problem for image, problem in zip(sizes, problems, strict=True) if problem}


def require_usable(records, source, kind=""):
    """Raise ValueError if images cannot be read, or have other sizes than the file `source` states. kind: words of a problem"""
    if problems := [problem for problem in unreadable(records).values() if kind in problem]:
        raise ValueError(f"{len(problems)} images of {source} cannot be used: {'; '.join(problems[:3])}")


def coco_id(image):
    """Return the COCO id of an image file, the same in all years (COCO_val2014_000000581857.jpg -> 581857), or None."""
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(image).stem) if image else None
    return int(found[1]) if found else None


def image_ids_of(files):
    """Read the COCO image ids of several files, whose names are separated by commas."""
    return set().union(*(image_ids(path) for path in files.split(",") if path))


def image_ids(path):
    """Read the COCO image ids in a benchmark's file: JSON or JSON lines of any schema, or one id or file name per line."""
    text = read_text(require_file(path, "a list of images, or a benchmark's file"))
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        with naming(path, json.JSONDecodeError):
            content = [json.loads(line) if line[0] in "{[" else line for line in lines]

    def visit(value, key="image_id"):
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else ((key, inner) for inner in value):
                yield from visit(inner, name)
        elif key in ("image_id", "image", "file_name") and value is not None:
            yield coco_id(value) if isinstance(value, str) and not value.isdigit() else int(value)

    found = set(visit(content)) - {None}
    if not found:
        raise ValueError(f"{path} names no COCO image (keys image_id, image or file_name)")
    return found
