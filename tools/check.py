"""List every problem of annotation files and their images, before training: one line each; exit status 1 if there are any.

    python -m tools.check --coco instances_train2017.json --images train2017
    python -m tools.check --data chat.json@coco,captions.json@cc3m

Opens every image, and one frame of every clip. Prints at most 1000 problems per file, and their number.

data, coco  annotation files, separated by commas: FILE, or FILE@IMAGES
"""

import sys
from pathlib import Path

from data import read_instances
from formats.annotations import parse_sources, read_captions, read_clips
from formats.files import read_json, require_file
from formats.images import open_image
from formats.schema import box_problem, is_about_clips, is_captions, leaves_folder, llava_problem
from tools import command
from video import read_frames


def check_all(data, images=""):
    total = 0
    for path, folder, _ in parse_sources(data, images):
        problems = check(path, folder)
        print(*problems[:1000], f"{path}: {len(problems) or 'no'} problems", sep="\n")
        total += len(problems)
    sys.exit(1 if total else 0)


def check(path, images):
    """List the problems of one annotation file, in any of the formats."""
    content, problems, opened = read_json(require_file(path, "an annotation file")), [], set()
    if is_about_clips(content):
        records, skipped = read_clips(path, images, content=content)
        problems += [f"{count} {reason}" for reason, count in skipped.items()]
        for clip in {record.image for record in records}:
            try:
                read_frames(clip, 1)
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
    elif isinstance(content, list):  # LLaVA's
        for index, row in enumerate(content):
            problem = llava_problem(row)
            if not problem and row.get("image") and row["image"] not in opened:
                opened.add(row["image"])
                problem = image_problem(images, row["image"], tuple(row.get("size", ())))
            problems += [f"row {index}: {problem}"] if problem else []
    elif is_captions(content):
        skipped = read_captions(content, images, path)[1]  # refuses another schema
        problems += image_problems(content, images)
        problems += [f"{count} {reason}" for reason, count in skipped.items() if reason.startswith("captions")]
    else:  # COCO instances
        coco = read_instances(path, content)
        problems += [*image_problems(coco, images), *annotation_problems(coco)]
    return problems


def annotation_problems(coco):
    """Yield the problems of the annotations in COCO instances."""
    names = {category["id"] for category in coco["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for index, a in enumerate(coco["annotations"]):
        name, size = f"annotation {a.get('id', index)}", sizes.get(a["image_id"])
        if not size:
            yield f"{name}: no image {a['image_id']}"
        if size and a["category_id"] not in names:
            yield f"{name}: no category {a['category_id']}"
        if size and (problem := box_problem(a.get("bbox"), size)):
            yield f"{name}: bbox {a.get('bbox')} {problem}"


def image_problems(coco, images):
    """List the problems of the image files in a COCO file's content."""
    pairs = ((i["id"], image_problem(images, i["file_name"], (i["width"], i["height"]))) for i in coco["images"])
    return [f"image {name}: {problem}" for name, problem in pairs if problem]


def image_problem(images, file_name, size=()):
    """Return the problem of an image file, or None. size: what the annotations say, if they do"""
    path = Path(images) / file_name
    if leaves_folder(file_name):
        return f"{file_name} leaves the images folder"
    try:
        found = open_image(path).size
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return f"{path} is {found}, but the annotations say {size}" if any(size) and found != size else None


main = command(__name__, check_all)
