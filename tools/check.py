"""List every problem of annotation files and their images, before training: one line each; exit status 1 if there are any.

    python -m tools.check --coco instances_train2017.json --images train2017
    python -m tools.check --data chat.json@coco,captions.json@cc3m

Opens every image, and one frame of every clip. Prints at most 1000 problems per file, and their number.
"""

import argparse
import sys
from pathlib import Path

from data import read_instances
from formats.annotations import parse_sources, read_captions, read_clips
from formats.files import read_json, require_file
from formats.images import open_image
from formats.schema import box_problem, is_about_clips, is_captions, leaves_folder, llava_problem
from video import read_frames


def check(path, images):
    """List the problems of one annotation file, in any of the formats."""
    content = read_json(require_file(path, "an annotation file"))
    if is_about_clips(content):
        return check_clips(path, images, content)
    if isinstance(content, list):
        return check_llava(content, images)
    if is_captions(content):
        skipped = read_captions(content, images, path)[1]  # refuses another schema
        captions = [f"{count} {reason}" for reason, count in skipped.items() if reason.startswith("captions")]
        return image_problems(content, images) + captions
    return check_coco(read_instances(path, content), images)


def check_coco(coco, images):
    names, problems = {category["id"] for category in coco["categories"]}, image_problems(coco, images)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for index, a in enumerate(coco["annotations"]):
        name = f"annotation {a.get('id', index)}"
        if a["image_id"] not in sizes:
            problems.append(f"{name}: no image {a['image_id']}")
            continue
        if a["category_id"] not in names:
            problems.append(f"{name}: no category {a['category_id']}")
        if problem := box_problem(a.get("bbox"), sizes[a["image_id"]]):
            problems.append(f"{name}: bbox {a.get('bbox')} {problem}")
    return problems


def check_llava(rows, images):
    problems, opened = [], set()
    for index, row in enumerate(rows):
        problem = llava_problem(row)
        if not problem and row.get("image") and row["image"] not in opened:
            opened.add(row["image"])
            problem = image_problem(images, row["image"], tuple(row.get("size", ())))
        problems += [f"row {index}: {problem}"] if problem else []
    return problems


def check_clips(path, folder, content):
    records, skipped = read_clips(path, folder, content=content)
    problems = [f"{count} {reason}" for reason, count in skipped.items()]
    for clip in {record.image for record in records}:
        try:
            read_frames(clip, 1)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return problems


def image_problems(coco, images):
    """List the problems of the image files in a COCO file's content."""
    pairs = ((i["id"], image_problem(images, i["file_name"], (i["width"], i["height"]))) for i in coco["images"])
    return [f"image {name}: {problem}" for name, problem in pairs if problem]


def image_problem(images, file_name, size=()):
    """Return the problem of an image file, or None. size: what the annotations say, if they do"""
    if leaves_folder(file_name):
        return f"{file_name} leaves the images folder"
    path = Path(images) / file_name
    try:
        found = open_image(path).size
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return f"{path} is {found}, but the annotations say {size}" if any(size) and found != size else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", "--coco", required=True, help="annotation files, separated by commas: FILE, or FILE@IMAGES")
    add("--images", default="", help="folder or zip of the images of every FILE without @IMAGES")
    args = parser.parse_args(argv)
    total = 0
    for path, images, _ in parse_sources(args.data, args.images):
        problems = check(path, images)
        print("".join(f"{line}\n" for line in problems[:1000]) + f"{path}: {len(problems) or 'no'} problems")
        total += len(problems)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tools.check: {error}")
