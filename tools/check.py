"""TODO tools.check."""

import argparse
import sys
from pathlib import Path

from coords import KINDS
from data import REPR, read_instances
from formats.annotations import join_sources, read_captions, read_clips
from formats.files import read_json, require_file
from formats.images import open_image
from formats.schema import box_problem, leaves, llava_problem, of_captions, of_clips
from tools.overlap import overlap
from tools.show import show
from video import read_frames


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
            read_frames(clip, 1)
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
