"""List problems of annotation files and their images, before training, a line each; exit status 1 if there are any.

    python -m tools.check --coco annotations/instances_train2017.json --images train2017
    python -m tools.check --data chat.json@coco,captions.json@cc3m

Reads the files as training does, decodes every image, and one frame of every clip. Lines that begin with "note:" are about data
that is used as it stands, and may be a mistake. Prints at most 50 lines per kind of problem in annotations, 1,000 per file.

data, coco  annotation files, separated by commas: FILE, or FILE@IMAGES
"""

import sys
from collections import defaultdict

from formats.annotations import merge, parse_sources, read_file
from formats.clips import ratio_problem
from formats.images import image_problem, orientation
from formats.schema import NOTES
from tools import command
from video import read_frames


def check_all(data, images=""):
    total = 0
    for path, folder, _ in parse_sources(data, images):
        problems = check(path, folder)
        count = sum(not problem.startswith("note: ") for problem in problems)
        print(*problems[:1000], f"{path}: {count or 'no'} lines of problems", sep="\n")
        total += count
    sys.exit(1 if total else 0)


def check(path, images):
    """List the problems of one annotation file, in any of the formats."""
    found, listed, opened = defaultdict(list), [], set()
    try:
        records, skipped = read_file(path, images, found)
    except (FileNotFoundError, ValueError) as error:
        return [*(text for texts in found.values() for text in texts), str(error)]
    for kind, texts in found.items():
        lead, most = ("note: ", 1) if kind.startswith(NOTES) else ("", 50)
        listed += [lead + text for text in texts[:most]]
        listed += [f"{lead}{len(texts) - most} more {kind}"] if len(texts) > most else []
    listed += [f"{count} {reason}" for reason, count in skipped.items() if reason.startswith("clips")]
    has_data = any(record.objects or record.captions or record.conversations for record in records)
    if not has_data and all(text.startswith("note: ") for text in listed):
        listed.append("nothing to train on: no image has a box to ask for, a caption or a conversation")
    try:
        records = merge(records)  # of the rows about an image, one may state its size
    except ValueError as error:
        listed.append(str(error))
    for record in records:
        image, size = record.image, record.size
        if not image or image in opened:
            continue
        opened.add(image)
        if problem := clip_problem(image, size) if record.is_clip else image_problem(image, size, decode=True):
            listed.append(f"image {record.id}: {problem}")
        elif not record.is_clip and (turn := orientation(record.image)) != 1:
            problem = f"EXIF orientation {turn} is ignored; are the boxes in the pixels as they are stored?"
            listed.append(f"note: image {record.id}: {record.image}: {problem}")
    return listed


def clip_problem(path, size):
    try:
        return ratio_problem(path, *read_frames(path, 1), size)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


main = command(__name__, check_all)
