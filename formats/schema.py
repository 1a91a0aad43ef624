"""What a row of an annotation file must hold: one function per format, which the readers and tools.check share.

`coco_rows`, `caption_rows` and `llava_rows` return clean rows, and note in Problems what they skip. A value counts where its
meaning is certain: "12.5" is a number, 7 a name, ids are compared as text. Else ValueError names file, row and key.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from coords import fault

EDGE = 2  # px that a box may reach over the edge of its image (annotation tools round); it is cut there
NOTES = (  # how kinds of problems begin that lose nothing
    "parts of boxes", "annotations that repeat", "entries of the same file", "categories that are", "categories with the name",
    "images without", "boxes smaller than",
)  # fmt: skip
IMAGE_KEYS = {"id", "file_name", "width", "height"}
NO_AREA = "boxes where bbox has no area"
HARMLESS = (NO_AREA, "images that --exclude", *NOTES)  # these do not stop training; COCO has the first


class Problems(dict):
    """The problems of a file's rows: {kind: [the problem of each row]}."""

    def add(self, kind, text):
        self.setdefault(kind, []).append(text)

    def count(self):
        """Return {kind, and the first row that has it: number of rows}."""
        return Counter({f"{kind} (the first: {texts[0]})": len(texts) for kind, texts in self.items()})


# ----- values


def identity(value):
    """a number or a text"""
    if type(value) is int or (type(value) is str and value):
        return str(value)
    if type(value) is float and value == int(value):
        return str(int(value))
    raise ValueError


def number(value):
    """a finite number"""
    value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return value


def count(value):
    """a number above 0"""
    if number(value) <= 0:
        raise ValueError
    return int(number(value)) if number(value) == int(number(value)) else number(value)


def words(value):
    """a text that is not blank"""
    value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    value = " ".join(re.sub("[\ud800-\udfff]", "\ufffd", value).split())  # a half of a surrogate pair fits in no file
    if not value:
        raise ValueError
    return value


def file_name(value):
    """the name of a file"""
    if not isinstance(value, str) or not value.strip("/. "):
        raise ValueError
    return value.replace("\\", "/")  # as Windows writes it


def flag(value):
    """0 or 1"""
    if value not in (0, 1, None, "", "0", "1"):
        raise ValueError
    return value in (1, "1")


def values(row, where, **readers):
    """Read values of a row: values(row, "image 3", id=identity, width=number). Raise ValueError that names row and key."""
    found = []
    for key, read in readers.items():
        try:
            found.append(read(row[key]))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: {key} is {str(row[key])[:60]!r}, not {read.__doc__}") from None
    return found


def leaves_folder(name):
    """Return True if a file name points out of the folder it is in."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def are_numbers(row, length):
    return isinstance(row, list) and len(row) == length and all(isinstance(v, int | float) for v in row)


def box_from_xywh(bbox):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2), same pixels."""
    x, y, width, height = bbox
    return x, y, x + width, y + height


def read_box(bbox, size):
    """Read COCO's bbox [x, y, width, height] in an image of `size`: box_px, cut at the edge. Raise ValueError: the problem.

    >>> read_box(["2", 3.5, 8.5, 4], (10, 10))
    (2.0, 3.5, 10, 7.5)
    """
    try:
        x, y, width, height = map(number, bbox if isinstance(bbox, list | tuple) else ())
    except (TypeError, ValueError):
        raise ValueError("is not four finite numbers") from None
    if width < 0 or height < 0:
        raise ValueError("has a negative width or height")
    if width == 0 or height == 0:
        raise ValueError("has no area")
    if max(x, y, width, height) <= 1 < min(size) / EDGE:
        raise ValueError("looks like fractions of the image, not pixels")
    if max(-x, -y, x + width - size[0], y + height - size[1]) > EDGE:
        raise ValueError(f"reaches more than {EDGE} px over the edge of its image")
    box_px = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
    if fault(box_px, size):
        raise ValueError("has no area")
    return box_px


def clip_box(bbox, size, skipped, rows="boxes"):
    """Return a COCO bbox as box_px, or None for an invalid one, which counts as skipped among `rows`."""
    try:
        return read_box(bbox, size)
    except ValueError as error:
        skipped[f"{rows} where the box {error}"] += 1


# ----- COCO


class Box(NamedTuple):
    """An annotation: its category, a box in pixels or None if that is invalid, and for clips the frame."""

    name: str
    box_px: tuple | None
    is_crowd: bool
    frame: int | None
    description: str | None


def require_lists(content, needs, path, expected):
    """Raise ValueError if a file's content lacks a list, or a row one of its keys. needs: {name of a list: keys of its rows}"""
    for name, keys in needs.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            is_dict, kind = isinstance(content, dict), type(content).__name__
            what = f"it is a dictionary of {', '.join(map(str, [*content][:5]))}" if is_dict else f"it is a JSON {kind}"
            raise ValueError(f"{path} lacks {name} with {sorted(keys)}: {what}; is it {expected}?")
        for index, row in enumerate(rows):
            if not isinstance(row, dict) or not keys <= row.keys():
                has = f"has no {', '.join(sorted(keys - row.keys()))}" if isinstance(row, dict) else f"is {str(row)[:40]}"
                raise ValueError(f"{path} lacks {name} with {sorted(keys)}: row {index} {has}; is it {expected}?")


def is_captions(content):
    """Return True for COCO's captions. A caption beside a box describes the box."""
    rows = content.get("annotations") if isinstance(content, dict) else None
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    return "caption" in first and not {"bbox", "category_id"} & first.keys()


def is_about_clips(content):
    """Return True for a clips_*.json. Files of images may hold an empty list of videos."""
    return isinstance(content, dict) and bool(content.get("videos")) and not content.get("images")


def owner_rows(content, path, problems, key="images"):
    """Read a COCO file's images or videos: {id: (file name, (width, height), frames)}, and {id: the id to use for it}.

    Entries of one file are one. Two files under one id are refused: nobody can tell whose the boxes are.
    """
    owners, alias, first_of = {}, {}, {}
    readers = {"id": identity, "file_name": file_name, "width": count, "height": count}
    readers |= {"frames": count} if key == "videos" else {}
    for row in content[key]:
        who = f"{key[:-1]} {row['id']}"
        i, name, width, height, *frames = values(row, f"{path}: {who}", **readers)
        owner, first = (name, (width, height), *frames), first_of.setdefault(name, i)
        if i in alias and alias[i] in owners and owners[alias[i]][0] != name:
            both = f"{owners[alias[i]][0]} and {name}"
            raise ValueError(f"{path}: {who} is two files, {both}; give each {key[:-1]} an id of its own")
        if leaves_folder(name):
            fix = "leaves the folder; write it relative to the folder of images"
            problems.add(f"{key} whose path leaves their folder", f"{who}: {name} {fix}")
            alias[i] = i  # so that its annotations are known, and dropped with it
        elif owners.setdefault(first, owner) != owner:
            problems.add("entries of one file with other sizes", f"{who}: {name} is {owner[1]} and {owners[first][1]}")
        else:
            if i != first or i in alias:
                problems.add("entries of the same file", f"{who}: {name} is there twice")
            alias[i] = first
    return owners, alias


def category_rows(content, path, problems):
    """Read a COCO file's categories: {id: name}. Names that differ in case or blanks alone are one.

    Dropped are parents that no annotation uses, such as the first category of every Roboflow export.
    """
    rows = [(*values(row, f"{path}: category {index}", id=identity, name=words), row.get("supercategory"))
            for index, row in enumerate(content["categories"])]  # fmt: skip
    used = {str(a["category_id"]).removesuffix(".0") for a in content["annotations"]}
    parents = {str(parent) for _, name, parent in rows if parent != name}
    names, first_of = {}, {}
    for i, name, _ in rows:
        if i in names and names[i] != name:
            raise ValueError(f"{path}: category {i} is {names[i]} and {name}; give each category an id of its own")
        if name in parents and i not in used:
            problems.add("categories that are the parent of others", f"category {i}: {name} is a parent without boxes")
            continue
        first, first_name = first_of.setdefault(name.casefold(), (i, name))
        if first != i:
            problems.add("categories with the name of another", f"category {i}: {name} is counted as {first_name} ({first})")
        names[i] = first_name
    return names


def coco_rows(content, path, problems, key="images"):
    """Read COCO instances, or a clips_*.json (key "videos"): (owners, boxes, absent), each by id of image or video.

    owners  (file name, (width, height)), for a video also its number of frames
    boxes   list of Box, identical ones once
    absent  the names that may be absent. Where annotations were lost, what they say may be there, and is not among them
    """
    expected = "COCO's instances_*.json, or LLaVA's list of rows" if key == "images" else "a clips_*.json"
    more = ({"frames"}, {"frame"}) if key == "videos" else (set(), set())
    keys = {key: IMAGE_KEYS | more[0], "annotations": {f"{key[:-1]}_id", "category_id"} | more[1], "categories": {"id", "name"}}
    require_lists(content, keys, path, expected)
    (owners, alias), names = owner_rows(content, path, problems, key), category_rows(content, path, problems)
    boxes, unsure, unsure_everywhere = {i: [] for i in owners}, set(), set()
    ids = {f"{key[:-1]}_id": identity, "category_id": identity}
    for index, a in enumerate(content["annotations"]):
        where = f"annotation {a.get('id', index)}"
        owner, category = values(a, f"{path}: {where}", **ids)
        i = alias.get(owner)
        if owner not in alias:
            problems.add(f"annotations of unknown {key}", f"{where}: no {key[:-1]} {owner}")
            unsure_everywhere.update([names[category]] if category in names else names.values())
        elif i not in owners:
            continue
        elif category not in names:
            problems.add("annotations of unknown categories", f"{where}: no category {category}")
            unsure.add(i)
        elif key == "videos" and not (isinstance(a.get("frame"), int) and 0 <= a["frame"] < owners[i][2]):
            problems.add("annotations of frames beyond their clip's last", f"{where}: no frame {a.get('frame')}")
            boxes[i].append(Box(names[category], None, True, 0, None))
        else:
            box = box_row(a, names[category], owners[i][1], where, problems)
            if box.box_px and any(box[:4] == other[:4] for other in boxes[i]):
                problems.add("annotations that repeat another one", f"{where}: {box.name} {a['bbox']} is there twice")
            else:
                boxes[i].append(box)
    if content["annotations"] and not any(boxes.values()):
        first = next(text for texts in problems.values() for text in texts)
        raise ValueError(f"{path}: none of its annotations belongs to its images and categories (the first: {first})")
    if 2 * len(problems.get(NO_AREA, ())) > len(content["annotations"]):  # not the few that COCO itself has
        problems["most boxes, of which bbox has no area"] = problems.pop(NO_AREA)
    empty = [i for i in owners if not boxes[i]]
    for i in empty if key == "images" and len(owners) / 10 < len(empty) < len(owners) else ():  # COCO has one in a hundred
        problems.add("images without an annotation, where every category counts as absent", f"image {i} has no annotation")
    everywhere = tuple(dict.fromkeys(name for name in names.values() if name not in unsure_everywhere))
    absent = {i: () if i in unsure else everywhere for i in owners}
    for row in content[key]:  # LVIS: what is certainly absent, and of what not every object has a box
        i = alias.get(identity(row["id"]))
        if i in owners and "neg_category_ids" in row:
            absent[i] = tuple(names[str(c)] for c in row["neg_category_ids"] if str(c) in names)
            more = row.get("not_exhaustive_category_ids", ())
            boxes[i] += [Box(names[str(c)], None, True, None, None) for c in more if str(c) in names]
    return owners, boxes, absent


def box_row(a, name, size, where, problems):
    """Read one annotation: a Box, without box_px if that is invalid."""
    box_px, is_crowd, text = None, True, a.get("description")
    try:
        is_crowd = flag(a.get("iscrowd"))
    except (TypeError, ValueError):
        problems.add("annotations whose iscrowd is not 0 or 1", f"{where}: iscrowd is {a['iscrowd']!r}, not 0 or 1")
    try:
        box_px = read_box(a.get("bbox"), size)
        if any(abs(cut - v) > 0.02 for cut, v in zip(box_px, box_from_xywh(map(number, a["bbox"])), strict=True)):
            problems.add("parts of boxes over the edge of their image", f"{where}: bbox {a['bbox']} is cut at {size}")
        if isinstance(area := a.get("area"), int | float) and area > 1.01 * math.prod(map(number, a["bbox"][2:])) + 1:
            wrong = f"{where}: area {area} exceeds bbox {a['bbox']}; is bbox x, y, width, height in pixels?"
            problems.add("boxes smaller than the area of their annotation", wrong)
    except ValueError as error:
        problems.add(f"boxes where bbox {error}", f"{where}: bbox {str(a.get('bbox'))[:80]} {error}")
    return Box(name, box_px, is_crowd, a.get("frame"), words(text) if isinstance(text, str) and text.strip() else None)


def caption_rows(content, path, problems):
    """Read COCO's captions_*.json: (owners, captions), each by image id."""
    require_lists(content, {"images": IMAGE_KEYS, "annotations": {"image_id", "caption"}}, path, "COCO's captions_*.json")
    owners, alias = owner_rows(content, path, problems)
    captions = {i: [] for i in owners}
    for index, a in enumerate(content["annotations"]):
        where = f"annotation {a.get('id', index)}"
        (owner,) = values(a, f"{path}: {where}", image_id=identity)
        text = a.get("caption")
        if owner not in alias:
            problems.add("captions of unknown images", f"{where}: no image {owner}")
        elif not isinstance(text, str) or not text.strip():
            problems.add("captions that are not text", f"{where}: caption {text!r} is not text")
        elif alias[owner] in owners:
            captions[alias[owner]].append(text.strip())
    return owners, captions


# ----- LLaVA


OTHER_KEYS = ("videos", "image_path", "image_file", "img", "img_path", "image_url", "video_path")  # of other trainers


class Row(NamedTuple):
    """A row of LLaVA's list. One with boxes_px or absent names was written by tools.prefcoco and has no turns."""

    id: str
    image: str | None
    clip: str | None
    size: tuple  # (width, height), or (0, 0)
    turns: tuple = ()  # (question, answer) pairs
    names: tuple = ()
    boxes_px: tuple | None = None  # None: the names are absent
    descriptions: tuple = ()


def llava_rows(content, path, problems):
    """Read LLaVA's list of rows: a Row of each that is valid. Raise ValueError if none is.

    A row is about an image, about a clip ("video", or Video-ChatGPT's q, a and video_id), or text alone.
    """
    if not isinstance(content, list):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not LLaVA's list of rows")
    rows = []
    for index, row in enumerate(content):
        try:
            rows.append(llava_row(row, index))
        except ValueError as error:
            kind, *detail = error.args
            problems.add(f"bad rows, each {kind}", f"row {index}: it {kind}" + "".join(f": {str(d)[:80]}" for d in detail))
    if not rows:
        raise ValueError(f"{path}: no usable row: {next(iter(problems.count()), 'the list is empty')}")
    return rows


def llava_row(row, index):
    """Read one row. Raise ValueError(kind of problem, detail)."""
    if not isinstance(row, dict):
        raise ValueError("is no dictionary", row)
    medium, clip = only_one(row.get("image") or row.get("images")), row.get("video", row.get("video_id")) or None
    if others := [] if medium or clip else [key for key in OTHER_KEYS if row.get(key)]:
        raise ValueError(f'has "{others[0]}"; call it "image" or "video"')
    turns = turns_of(row, clip)
    if not turns or [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("does not have human and gpt in turn", [speaker for speaker, _ in turns])
    if not all(isinstance(text, str) for _, text in turns):
        raise ValueError("has a text that is not a string", turns)
    if not all(isinstance(name, str | None) for name in (medium, clip)) or (medium and clip):
        raise ValueError("names one image or clip in a way that is not a string", row.get("image", clip))
    medium, clip = (name and name.replace("\\", "/") for name in (medium, clip))  # as Windows writes them
    if any(name and leaves_folder(name) for name in (medium, clip)):
        raise ValueError("names a file that leaves its folder", medium or clip)
    for name in ("image", "video"):
        if not (medium or clip) and any(f"<{name}>" in text for _, text in turns):
            raise ValueError(f'contains <{name}> but has no "{name}" key')
    name = str(row["id"] if isinstance(row.get("id"), str | int) else f"{clip}_{index}" if clip else index)
    size = tuple(row["size"]) if are_numbers(row.get("size"), 2) and min(row["size"]) > 0 else (0, 0)
    if "objective" in row:
        return Row(name, medium, clip, size, (), *objective_of(row, size))
    texts = [re.sub("[\ud800-\udfff]", "\ufffd", re.sub("<image>|<video>", "", text)).strip() for _, text in turns]
    if not all(texts[1::2]):
        raise ValueError("has an empty answer")
    return Row(name, medium, clip and clip.removesuffix(".pkl"), size, tuple(zip(texts[0::2], texts[1::2], strict=True)))


def turns_of(row, clip):
    """Return (speaker, text) pairs: LLaVA's conversations, other trainers' messages, or q and a of a row about a clip."""
    if "q" in row and isinstance(row["q"], str) and isinstance(row.get("a"), str) and clip:
        return [("human", row["q"]), ("gpt", row["a"])]
    try:
        turns = row.get("conversations") or row["messages"] if "q" not in row else None
        turns = [(turn.get("from") or turn["role"], turn["value"] if "value" in turn else turn["content"]) for turn in turns]
        return [({"user": "human", "assistant": "gpt"}.get(speaker, speaker), text) for speaker, text in turns]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("has no conversations [{from, value}], or texts q, a and video_id", row) from None


def only_one(image):
    """Return the image that a row names, or None for null, "" and an empty list. A list of one is that one."""
    if isinstance(image, list) and len(image) > 1:
        raise ValueError("names several images; this model reads one", image)
    return (image[0] if isinstance(image, list) and image else image) or None


def objective_of(row, size):
    """Read what tools.prefcoco adds to a row: (names, boxes_px or None, descriptions), as long as each other."""
    if not isinstance(row["objective"], str):
        raise ValueError("has an objective that is not a text", row["objective"])
    is_one, is_absent = row["objective"] == "caption", row["objective"] == "neg"
    keys = ("name", "description", "box_px") if is_one else ("names", "descriptions", "box_px")
    lists = [[row.get(key)] if is_one else row.get(key) for key in (keys[:1] if is_absent else keys)]
    if not size[0] or not all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists):
        raise ValueError(f"lacks its size, or {', '.join(keys)} of one length, as tools.prefcoco writes them")
    names, descriptions, boxes_px = (lists + [[], []])[:3]
    for box_px in boxes_px:
        if not are_numbers(box_px, 4) or fault(box_px, size):
            raise ValueError(f"has a box_px that is not x1 < x2, y1 < y2 inside its image of size {size}", box_px)
    if not all(isinstance(text, str) for text in names + [text for text in descriptions if is_one or text is not None]):
        raise ValueError("has a name or description that is not a text", names + descriptions)
    return tuple(names), None if is_absent else tuple(map(tuple, boxes_px)), tuple(descriptions)
