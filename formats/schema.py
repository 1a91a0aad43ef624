"""What annotation files must hold. `read_entries` reads any format, for training and for tools.check: a list of Entry.

It notes what it skips in `problems`, a defaultdict(list): {kind: [the problem of each row]}. A value counts where its meaning
is certain: "12.5" is a number, 7 a name, ids are compared as text. Else ValueError names file, row and key.
"""

import math
import re
import reprlib
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from coords import fault

EDGE = 2  # px that a box may reach over the edge of its image (annotation tools round); it is cut there
# problems that begin so lose no data; they are printed as notes
NOTES = ("parts of boxes", "annotations that repeat", "entries of the same", "categories ", "images without an", "boxes smaller",
         "boxes that")
NO_AREA = "boxes where bbox has no area"
HARMLESS = (NO_AREA, "images that --exclude", *NOTES)  # these do not stop training; COCO has the first


def counted(skipped, lead=""):
    """Write a line for each kind of problem of {kind: count}: notes lose nothing, the rest was skipped."""
    named = ((count, kind, "note" if kind.startswith(NOTES) else "skipped") for kind, count in skipped.items() if count)
    return "".join(f"{lead}{what}: {count} {kind}\n" for count, kind, what in named)


class Box(NamedTuple):
    """An annotation. If its box is invalid or a crowd's, box_px is None: the category is present, but not asked for."""
    name: str
    box_px: tuple | None
    frame: int | None = None  # of a clip
    description: str | None = None


@dataclass(eq=False)
class Entry:
    """What a file says about one image or clip: a data.Record before its file is found and its objects are chosen."""
    id: str
    file_name: str | None  # None: text alone
    size: tuple  # (width, height), or (0, 0)
    is_clip: bool
    frames: int | None = None  # how many, of a clip in COCO's form
    boxes: list = field(default_factory=list)  # each a Box
    absent: tuple = ()  # categories that are certainly not there
    captions: list = field(default_factory=list)
    turns: tuple = ()  # (question, answer) pairs
    is_complete: bool = True  # False if an annotation was lost: any category may be there
    row: dict | None = None  # of the JSON


def read_entries(content, path, problems):
    """Return the entries of a JSON file, whose format is detected from its content. Entries of one file name are one."""
    match content:
        case {"videos": [_, *_]} if not content.get("images"):  # files of images may hold an empty list of videos
            return coco_entries(content, path, problems, "video")
        case {"annotations": [{"caption": _} as first, *_]} if not {"bbox", "category_id"} & first.keys():
            return caption_entries(content, path, problems)
        case dict():
            return coco_entries(content, path, problems)
    return llava_entries(content, path, problems)


# ----- values: a reader that raises, or returns nothing, finds a value invalid; the error quotes the reader's docstring


def id_text(value):
    """a number or a text"""
    value = int(value) if type(value) is float and value.is_integer() else value
    return str(value) if type(value) in (int, str) else None


def number(value):
    """a finite number"""
    value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return value


def count(value):
    """a number above 0"""
    value = max(number(value), 0)
    return int(value) if value == int(value) else value


def words(value):
    """a text that is not blank"""
    return " ".join(unicodedata.normalize("NFC", whole(str(value) if type(value) is int else value)).split())


def whole(text):
    """Replace halves of surrogate pairs, such as a cut emoji, which no file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def file_name(value):
    """the name of a file"""
    return value.strip("/. ") and value.replace("\\", "/")  # as Windows writes it


def values(row, where, **readers):
    """Read values of a row: values(row, "image 3", id=id_text, width=count). Raise ValueError that names row and key."""
    found = {}
    for key, read in readers.items():
        with suppress(AttributeError, TypeError, ValueError, OverflowError):
            found[key] = read(row[key])
        if not found.get(key):
            raise ValueError(f"{where}: {key} is {str(row[key])[:60]!r}, not {read.__doc__}")
    return found.values()


def leaves_folder(name):
    """Return True if a file name points out of the folder it is in."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def are_numbers(row, length):
    return isinstance(row, list) and len(row) == length and all(isinstance(v, int | float) for v in row)


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


def try_box(bbox, size, skipped, noun):
    """Return a COCO bbox as box_px, or None for an invalid one, which is counted as skipped, under `noun`."""
    try:
        return read_box(bbox, size)
    except ValueError as error:
        skipped[f"{noun} where the box {error}"] += 1


# ----- COCO

IMAGE = {"id": id_text, "file_name": file_name, "width": count, "height": count}
KINDS = {"image": IMAGE, "video": IMAGE | {"frames": count}}  # how to read the keys that each row needs
EXPECTED = {"image": "COCO's instances_*.json, or LLaVA's list of rows", "video": "a clips_*.json"}


def require_lists(content, needs, path, expected):
    """Raise ValueError if a file's content lacks a list, or a row one of its keys. needs: {name of a list: keys of its rows}"""
    for name, keys in needs.items():
        rows, wanted = content.get(name) if isinstance(content, dict) else None, f"{path} lacks {name} with {sorted(keys)}"
        if not isinstance(rows, list):
            held = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else reprlib.repr(content)
            raise ValueError(f"{wanted}: it holds {held[:80]}; is it {expected}?")
        for index, row in enumerate(rows):
            if missing := set(keys).difference(row if isinstance(row, dict) else ()):
                raise ValueError(f"{wanted}: row {index} has no {', '.join(sorted(missing))}; is it {expected}?")


def entries_by_id(content, path, problems, kind="image"):
    """Read a COCO file's images or videos: {id: Entry, or None if its path leaves the folder}.
    Ids of one file name share an Entry. Two files under one id are refused: nobody can tell whose the boxes are."""
    by_id, by_name = {}, {}
    for row in content[f"{kind}s"]:
        who = f"{kind} {row['id']}"
        i, name, width, height, *frames = values(row, f"{path}: {who}", **KINDS[kind])
        new = Entry(i, name, (width, height), kind == "video", *frames, row=row)
        entry = by_name.setdefault(name, new)
        if by_id.get(i, entry) not in (entry, None):
            raise ValueError(f"{path}: {who} is two files, {by_id[i].file_name} and {name}; give each {kind} an id of its own")
        if leaves_folder(name):
            fix = "leaves the folder; write it relative to the folder of images"
            problems[f"{kind}s whose path leaves their folder"].append(f"{who}: {name} {fix}")
            by_id[i] = None
        elif (entry.size, entry.frames) != (new.size, new.frames):
            problems["entries of one file with other sizes"].append(f"{who}: {name} is {new.size} and {entry.size}")
        else:
            if entry is not new:
                problems["entries of the same file"].append(f"{who}: {name} is there twice")
            by_id[i] = entry
    return by_id


def category_names(content, path, problems):
    """Read a COCO file's categories: {id: name}. Names that differ in case or blanks alone are one.
    Dropped are parents that no annotation uses, as the first category of every Roboflow export, and labelme's background."""
    used = {str(a["category_id"]).removesuffix(".0") for a in content["annotations"]}
    parents = {str(row.get("supercategory")) for row in content["categories"] if row.get("supercategory") != row["name"]}
    names, first_of = {}, {}
    for index, row in enumerate(content["categories"]):
        i, name = values(row, f"{path}: category {index}", id=id_text, name=words)
        if names.get(i, name) != name:
            raise ValueError(f"{path}: category {i} is {names[i]} and {name}; give each category an id of its own")
        if name in parents and i not in used:
            problems["categories that are the parent of others"].append(f"category {i}: {name} is a parent without boxes")
            continue
        if name.strip("_ ").casefold() == "background" and i not in used:
            problems["categories that are no objects"].append(f"category {i}: {name} has no boxes")
            continue
        first = first_of.setdefault(name.casefold(), i)
        names[i] = names.get(first, name)
        if first != i:
            problems["categories with the name of another"].append(f"category {i}: {name} is counted as {names[i]} ({first})")
    return names


def coco_entries(content, path, problems, kind="image"):
    """Read COCO instances, or a clips_*.json (kind "video"). Identical annotations are one.
    Where an annotation is lost, the category that it may have named does not count as absent."""
    ids = {f"{kind}_id": id_text, "category_id": id_text}
    needs = {f"{kind}s": KINDS[kind], "annotations": ids, "categories": {"id", "name"}}
    require_lists(content, needs, path, EXPECTED[kind])
    by_id, names, lost = entries_by_id(content, path, problems, kind), category_names(content, path, problems), set()
    for index, a in enumerate(content["annotations"]):
        where = f"annotation {a.get('id', index)}"
        owner, category = values(a, f"{path}: {where}", **ids)
        entry = by_id.get(owner)
        if owner not in by_id:
            problems[f"annotations of unknown {kind}s"].append(f"{where}: no {kind} {owner}")
            lost.update([names[category]] if category in names else names.values())
        elif entry and category not in names:
            problems["annotations of unknown categories"].append(f"{where}: no category {category}")
            entry.is_complete = False
        elif entry:
            box = read_annotation(a, names[category], entry, where, problems)
            if box.box_px and any(box[:3] == other[:3] for other in entry.boxes):
                problems["annotations that repeat another one"].append(f"{where}: {box.name} {a['bbox']} is there twice")
            else:
                entry.boxes.append(box)
    entries = list(dict.fromkeys(filter(None, by_id.values())))
    empty = [f"{kind} {entry.id} has no annotation" for entry in entries if not entry.boxes]
    if content["annotations"] and len(empty) == len(entries):
        first = next(reversed(problems.values()))[0]  # of annotations, which were read last
        raise ValueError(f"{path}: none of its annotations belongs to its {kind}s and categories (the first: {first})")
    if kind == "image" and len(entries) / 10 < len(empty) < len(entries):  # COCO has one in a hundred
        problems["images without an annotation, where every category counts as absent"] += empty
    boxes_px = [box.box_px for entry in entries for box in entry.boxes if box.box_px]
    if len(boxes_px) > 4 and all(x2 - x1 > x1 and y2 - y1 > y1 for x1, y1, x2, y2 in boxes_px):
        problem = f"in all {len(boxes_px)}, width > x and height > y; is bbox x, y, width, height, not x1, y1, x2, y2?"
        problems["boxes that may be corners"].append(problem)
    if 2 * len(problems.get(NO_AREA, ())) > len(content["annotations"]):  # not the few that COCO itself has
        problems["most boxes, of which bbox has no area"] = problems.pop(NO_AREA)

    def names_of(ids):
        return [names[str(i)] for i in ids if str(i) in names] if isinstance(ids, list | dict) else []

    for entry in entries:  # LVIS lists which categories are certainly absent, and of which not every object has a box
        entry.boxes += [Box(name, None, 0) for name in names_of(entry.row.get("not_exhaustive_category_ids"))]
        unsure = lost.union(box.name for box in entry.boxes)
        absent = names_of(entry.row.get("neg_category_ids", names)) if entry.is_complete else ()
        entry.absent = tuple(dict.fromkeys(name for name in absent if name not in unsure))
    return entries


def read_annotation(a, name, entry, where, problems):
    bbox, frame, crowd, text, box_px = a.get("bbox"), a.get("frame"), a.get("iscrowd"), a.get("description"), None
    if entry.is_clip and not (isinstance(frame, int) and 0 <= frame < entry.frames):
        problems["annotations of frames beyond their clip's last"].append(f"{where}: no frame {frame}")
        return Box(name, None, 0)
    if crowd not in (0, 1, None, "", "0", "1"):
        problems["annotations whose iscrowd is not 0 or 1"].append(f"{where}: iscrowd is {crowd!r}, not 0 or 1")
    try:
        box_px = read_box(bbox, entry.size)
        x, y, width, height = map(number, bbox)
        if any(abs(cut - v) > 0.02 for cut, v in zip(box_px, (x, y, x + width, y + height), strict=True)):
            problems["parts of boxes over the edge of their image"].append(f"{where}: bbox {bbox} is cut at {entry.size}")
        if isinstance(area := a.get("area"), int | float) and area > 1.01 * width * height + 1:
            wrong = f"{where}: area {area} exceeds bbox {bbox}; is bbox x, y, width, height in pixels?"
            problems["boxes smaller than the area of their annotation"].append(wrong)
    except ValueError as error:
        problems[f"boxes where bbox {error}"].append(f"{where}: bbox {str(bbox)[:80]} {error}")
    is_crowd = crowd not in (0, None, "", "0") or a.get("ignore") in (1, "1")  # regions that detectors leave out
    return Box(name, None if is_crowd else box_px, frame, words(text) or None if isinstance(text, str) else None)


def caption_entries(content, path, problems):
    """Read COCO's captions_*.json: the images that have captions."""
    require_lists(content, {"images": IMAGE, "annotations": {"image_id", "caption"}}, path, "COCO's captions_*.json")
    by_id = entries_by_id(content, path, problems)
    for index, a in enumerate(content["annotations"]):
        where, text = f"annotation {a.get('id', index)}", a["caption"]
        (owner,) = values(a, f"{path}: {where}", image_id=id_text)
        if owner not in by_id:
            problems["captions of unknown images"].append(f"{where}: no image {owner}")
        elif not isinstance(text, str) or not text.strip():
            problems["captions that are not text"].append(f"{where}: caption {text!r} is not text")
        elif by_id[owner]:
            by_id[owner].captions.append(text.strip())
    return list(dict.fromkeys(entry for entry in by_id.values() if entry and entry.captions))


# ----- LLaVA

TAG = re.compile(r"^\s*<(image|video)>|<(image|video)>\s*$")  # in a first question; elsewhere it may be text, as in HTML
OTHER_KEY = re.compile("(image|img|picture|photo|video)s?(_?(path|file|url|name))?s?", re.IGNORECASE)  # of other trainers


def llava_entries(content, path, problems):
    """Read LLaVA's list of rows: an Entry of each that is valid. Raise ValueError if none is.
    A row is about an image, about a clip ("video", or Video-ChatGPT's q, a and video_id), or text alone."""
    if not isinstance(content, list):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not LLaVA's list of rows")
    entries = []
    for index, row in enumerate(content):
        try:
            entries.append(llava_row(row, index))
        except ValueError as error:
            kind, *detail = error.args
            problems[f"bad rows, each {kind}"].append(f"row {index}: it {kind}" + "".join(f": {str(d)[:80]}" for d in detail))
    if not entries:
        raise ValueError(f"{path}: no usable row: {next(iter(problems.values()), ['the list is empty'])[0]}")
    return entries


def llava_row(row, index):
    """Read one row. Raise ValueError(kind of problem, detail)."""
    if not isinstance(row, dict):
        raise ValueError("is no dictionary", row)
    image, clip = row.get("image") or row.get("images"), row.get("video") or row.get("video_id")
    image, *others = image if isinstance(image, list) and image else [image]
    if others:
        raise ValueError("names several images; this model reads one", [image, *others])
    file, texts = image or clip or None, texts_of(row, clip)
    if image and clip:
        raise ValueError("names both an image and a clip", [image, clip])
    if not isinstance(file, str | None):
        raise ValueError("names its image or clip by a value that is not a text", file)
    if file is None:
        if other := next((key for key in row if row[key] and OTHER_KEY.fullmatch(key)), None):
            raise ValueError(f'has "{other}"; call it "image" or "video"')
        if mark := TAG.search(texts[0]):
            raise ValueError(f'contains <{mark[1] or mark[2]}> but has no "{mark[1] or mark[2]}" key')
    elif leaves_folder(file := file.replace("\\", "/")):  # as Windows writes it
        raise ValueError("names a file that leaves its folder", file)
    name = str(row["id"] if isinstance(row.get("id"), str | int) else f"{clip}_{index}" if clip else index)
    size = tuple(row["size"]) if are_numbers(row.get("size"), 2) and min(row["size"]) > 0 else (0, 0)
    entry = Entry(name, file.removesuffix(".pkl") if clip else file, size, bool(clip))  # .pkl: Video-ChatGPT's features
    if file:
        texts[0] = TAG.sub("", texts[0])  # either one: some rows call their clip <image>
        texts = [text.replace("<video>" if clip else "<image>", "") for text in texts]
    texts = [whole(text).strip() for text in texts]
    if "objective" in row:
        entry.boxes, entry.absent = objective_of(row, size)
    elif all(texts[1::2]):
        entry.turns = tuple(zip(texts[0::2], texts[1::2], strict=True))
    else:
        raise ValueError("has an empty answer")
    return entry


def texts_of(row, clip):
    """Return questions and answers in turn: LLaVA's conversations, other trainers' messages, or q and a about a clip."""
    try:
        if clip and "q" in row:
            turns = [("human", row["q"]), ("gpt", row["a"])]
        else:
            turns = row.get("conversations") or row["messages"]
            turns = [(turn.get("from") or turn["role"], turn["value"] if "value" in turn else turn["content"]) for turn in turns]
        speakers = [{"user": "human", "assistant": "gpt"}.get(speaker, speaker) for speaker, _ in turns]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("has no conversations [{from, value}], or texts q, a and video_id", row) from None
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("does not have human and gpt in turn", speakers)
    if not all(isinstance(text, str) for _, text in turns):
        raise ValueError("has a text that is not a string", turns)
    return [text for _, text in turns]


def objective_of(row, size):
    """Read what tools.prefcoco adds to a row: its boxes, and its absent categories."""
    is_one, is_absent = row["objective"] == "caption", row["objective"] == "neg"
    keys = ("name", "box_px", "description") if is_one else ("names",) if is_absent else ("names", "box_px", "descriptions")
    columns = [[row.get(key)] if is_one else row.get(key) for key in keys]
    if not size[0] or not all(isinstance(v, list) and len(v) == len(columns[0]) for v in columns):
        raise ValueError(f"lacks its size, or {', '.join(keys)} of one length, as tools.prefcoco writes them")
    texts = [row["objective"], *columns[0], *(text for text in columns[-1] if is_one or text is not None)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("has an objective, name or description that is not a text", texts)
    if is_absent:
        return [], tuple(columns[0])
    for box_px in columns[1]:
        if not are_numbers(box_px, 4) or fault(box_px, size):
            raise ValueError(f"has a box_px that is not x1 < x2, y1 < y2 inside its image of size {size}", box_px)
    return [Box(name, tuple(box_px), None, text) for name, box_px, text in zip(*columns, strict=True)], ()
