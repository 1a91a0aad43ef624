"""From annotation files to Records: one file of any format, a mixture of files, and lists of COCO images to exclude."""

import json
import math
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from data import Object, Record, unique_objects
from formats.clips import CLIP_KINDS, find_clips
from formats.files import naming, read_rows, read_text, require_file, some
from formats.images import has_image, image_problem, split_zip
from formats.schema import read_entries

FRACTIONS = re.compile(r"\[(?:[01]?\.\d+, ?){3}[01]?\.\d+\]")  # [0.18, 0.41, 0.33, 0.6]
STATIC, STATIC_SIDE = 5, 224  # at most 5 px from the mean, in a square of 224 px (App. D does not say in which pixels)


def read_file(path, images, problems=None):
    """Read an annotation file about images or clips: a list of Records, and a Counter {reason: rows skipped}.

    COCO    instances_*.json: images [{id, file_name, width, height}], categories [{id, name}], annotations [{image_id,
            category_id, bbox [x, y, width, height] in px}], perhaps with iscrowd and our own "description"; captions_*.json;
            clips_*.json of tiny.moving or tools.panoptic, about videos with a number of frames, a box per frame
    LLaVA   rows {id, image, conversations [{from, value}]}, or with "video", or about no image; Video-ChatGPT's {q, a, video_id};
            rows of tools.prefcoco become objects and absent categories, so that a run writes text in its own representation
    images is the folder of images or clips, or a zip; problems, a defaultdict(list), takes the problem of each row.
    """
    problems, records, missing = defaultdict(list) if problems is None else problems, [], set()
    entries = read_entries(read_rows(path, "an annotation file"), path, problems)
    are_clips = {entry.is_clip for entry in entries if entry.file_name}
    if False in are_clips and not Path(images).is_dir() and not split_zip(Path(images) / "x")[0]:
        raise FileNotFoundError(f"no folder or zip {images}, the images of {path}")
    clips = find_clips(images) if True in are_clips and str(images) else {}  # --score opens none
    for entry in entries:
        image = entry.file_name and Path(images) / entry.file_name
        if image and (inside := split_zip(image))[0]:  # one path, whether its name has the zip's one folder or not
            image = Path(*inside)
        if entry.is_clip and str(images):
            image = clips.get(entry.file_name) or (image if image.exists() or has_image(image) else None)  # in sub-folders
            if not image:
                missing.add(entry.file_name)
                continue
        records.append(Record(
            entry.id, image, entry.size, absent=entry.absent, captions=tuple(entry.captions), is_clip=entry.is_clip,
            objects=tuple(static_objects(entry.boxes, entry.size) if entry.frames else unique_objects(entry.boxes)),
            present=tuple(sorted({box.name for box in entry.boxes})), conversations=(entry.turns,) if entry.turns else (),
        ))  # fmt: skip
    counts = Counter({f"{kind} (the first: {texts[0]})": len(texts) for kind, texts in problems.items()})
    names = some(sorted(missing))
    if missing and not records:
        raise FileNotFoundError(f"none of the {len(missing)} clips of {path} is in {images} ({names}), as {CLIP_KINDS}")
    return records, counts + Counter({f"clips of {path} that are not in {images} ({names})": len(missing)})


def static_objects(boxes, size):
    """Find the objects of a clip that stay in place: Objects in order of appearance, each box the mean over its frames.

    boxes holds a `schema.Box` for each object in each frame; box_px is None for a crowd or an invalid box. An object is a
    category that no frame shows twice, with its centre within STATIC of its mean on both axes, in a square of STATIC_SIDE px.

    >>> from formats.schema import Box
    >>> boxes = [Box("cup", (0, 0, 4, 4), 0), Box("cup", (2, 0, 6, 4), 1), Box("dog", (8, 8, 9, 9), 1)]
    >>> [(o.name, o.box_px) for o in static_objects(boxes, (224, 224))]
    [('cup', (1.0, 0.0, 5.0, 4.0)), ('dog', (8.0, 8.0, 9.0, 9.0))]
    """
    by_name, objects = {}, []
    for box in sorted(boxes, key=lambda box: box.frame):
        by_name.setdefault(box.name, []).append(box)
    for name, track in by_name.items():
        boxes_px = [box.box_px for box in track]
        if None in boxes_px or len({box.frame for box in track}) < len(track):
            continue
        mean = tuple(sum(edge) / len(edge) for edge in zip(*boxes_px, strict=True))
        moves = (abs(b[i] + b[i + 2] - mean[i] - mean[i + 2]) / 2 * STATIC_SIDE / size[i] for b in boxes_px for i in (0, 1))
        if max(moves) <= STATIC + 1e-6:  # float noise must not decide
            objects.append(Object(name, mean))
    return objects


def merge(records):
    """Join the Records about one image file, so that its questions share a prefix. The largest weight counts.
    An object stays unique only if every record that has its category has it once, with the same box."""
    merged, real = {}, cache(os.path.realpath)  # folders may be links, as LLaVA's coco/train2017 often is
    for record in records:
        key = os.path.join(real(record.image.parent), record.image.name) if record.image else len(merged)
        first = merged.setdefault(key, record)
        if first is record:
            continue
        if any(first.size) and any(record.size) and first.size != record.size:
            sizes = f"{first.size} and {record.size}; correct the one that its pixels do not have"
            raise ValueError(f"{record.image} has two sizes in these annotations, {sizes}")
        record = respelled(record, first)
        present = tuple(dict.fromkeys(first.present + record.present))
        merged[key] = replace(
            first, size=first.size if any(first.size) else record.size, weight=max(first.weight, record.weight),
            objects=common_objects(first, record) if record.present else first.objects, present=present,
            absent=tuple(name for name in dict.fromkeys(first.absent + record.absent) if name not in present),
            captions=first.captions + record.captions, conversations=first.conversations + record.conversations,
        )  # fmt: skip
    return list(merged.values())


def common_objects(first, record):
    """Join the unique objects of two records about one image; see `merge`."""
    objects = []
    for name in dict.fromkeys(o.name for o in first.objects + record.objects):
        same = [{o.name: o for o in r.objects}.get(name) for r in (first, record) if name in r.present]
        if None not in same and all(abs(a - b) <= 0.02 for a, b in zip(same[0].box_px, same[-1].box_px, strict=True)):
            objects.append(replace(same[0], description=same[0].description or same[-1].description))
    return tuple(objects)


def respelled(record, first):
    """Spell a record's categories as another record does that has them in other case."""
    if not (record.present or record.absent):
        return record
    spellings = {name.casefold(): name for name in first.present + first.absent}
    present, absent = ([spellings.get(name.casefold(), name) for name in names] for names in (record.present, record.absent))
    objects = (replace(o, name=spellings.get(o.name.casefold(), o.name)) for o in record.objects)
    return replace(record, objects=tuple(objects), present=tuple(present), absent=tuple(absent))


def read_records(sources, exclude=()):
    """Read a mixture of annotation files, (file, images folder or zip, weight) each: one Record per image.
    The weight says how often an epoch draws each image of the file. `exclude` holds COCO image ids to skip (`image_ids`)."""
    records, skipped = [], Counter()
    for path, images, weight in sources:
        of_file, reasons = read_file(path, images)
        records += [replace(record, weight=weight) for record in of_file]
        skipped += reasons
    merged = merge(records)
    kept = [record for record in merged if record.is_clip or coco_id(record.image) not in exclude]
    return kept, skipped + Counter({"images that --exclude lists": len(merged) - len(kept)})  # + drops a 0


def parse_sources(text, images=""):
    """Read --data: a list of (file, images, weight). Without @IMAGES, `images` is the folder; the weight is 1.

    FILE@IMAGES*WEIGHT,...              an @ inside a name of a file that exists does not split it
    [["FILE", "IMAGES", WEIGHT], ...]   the same as JSON, for names with other signs

    >>> parse_sources("coco.json, chat.json@photos*0.5", "train2017")
    [('coco.json', 'train2017', 1.0), ('chat.json', 'photos', 0.5)]
    """
    with naming("--data", json.JSONDecodeError):
        parts = json.loads(text) if text.startswith("[") else map(split_source, text.split(",") if text else ())
    if images and not text:
        raise ValueError(f"--images {images} without --data, the annotation files of these images")
    sources = []
    for part in parts:
        match [part] if isinstance(part, str) else part:
            case [str(file)]:
                folder, weight = "", 1.0
            case [str(file), str(folder)]:
                weight = 1.0
            case [str(file), str(folder) | (None as folder), int(weight) | float(weight)] if 0 < weight < math.inf:
                pass
            case _:
                raise ValueError(f"--data {part}: write FILE or FILE@IMAGES or FILE@IMAGES*WEIGHT, separated by commas")
        if not (folder or images):
            raise ValueError(f"--data {file} without --images, the folder or zip of its images")
        sources.append((file, str(folder or images), float(weight)))
    return sources


def split_source(text):
    """Split FILE@IMAGES*WEIGHT: (file, images or None, weight; 0 if the text has another form)."""
    text = text.strip()
    cuts = [match.start() for match in re.finditer("@|$", text)]
    cut = next((cut for cut in cuts if Path(text[:cut]).is_file()), cuts[0])
    match = re.fullmatch(r"(?:@([^*]+)(?:\*(\d+\.?\d*|\.\d+))?)?", text[cut:])
    return text[:cut], match and match[1], float(match[2] or 1) if match and text[:cut] else 0


def unreadable(records):
    """Look at every image file (see image_size): {image: its problem}. Clips are not opened."""
    sizes = {record.image: record.size for record in records if record.image and not record.is_clip}
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(image_problem, sizes, sizes.values()))
    return {image: problem for image, problem in zip(sizes, problems, strict=True) if problem}


def note_fractions(records, geometry):
    """Print a note if conversations hold boxes as fractions, which LLaVA-1.5's data measure in the padded square."""
    texts = (text for r in records for turns in r.conversations for turn in turns for text in turn)
    if geometry != "pad" and (count := sum(bool(FRACTIONS.search(text)) for text in texts)):
        print(f"note: {count} texts hold boxes as fractions, which LLaVA-1.5 means of the padded square; see --geometry pad")


def require_usable(records, source, kind=""):
    """Raise ValueError if images cannot be read, or have other sizes than the file `source` states. kind: words of a problem"""
    if problems := [problem for problem in unreadable(records).values() if kind in problem]:
        raise ValueError(f"{len(problems)} images of {source} cannot be used: {'; '.join(problems[:3])}")


def coco_id(image):
    """Return the COCO id of an image file, the same in all years (COCO_val2014_000000581857.jpg -> 581857), or None."""
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", Path(str(image).replace("\\", "/")).stem) if image else None
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
        if lost := [line for line in content if isinstance(line, str) and not line.isdigit() and coco_id(line) is None]:
            problem = f"{len(lost)} of {len(lines)} lines name no COCO image (the first: {lost[0]:.80})"
            raise ValueError(f"{path}: {problem}; remove them") from None

    images = content.get("images") if isinstance(content, dict) else None
    if images and isinstance(images, list) and all(isinstance(image, dict) and image.get("file_name") for image in images):
        content = {"images": [image["file_name"] for image in images]}  # their other ids may be the file's own

    def visit(value, key="image_id"):
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else ((key, inner) for inner in value):
                yield from visit(inner, name)
        elif key in ("image_id", "image", "images", "file_name") and value is not None:
            yield coco_id(value) if isinstance(value, str) and not value.isdigit() else int(value)

    if not (found := set(visit(content)) - {None}):
        raise ValueError(f"{path} names no COCO image (keys image_id, image or file_name)")
    return found
