"""Checks of the rows of annotation files, used by the readers and by tools.check.

Each *_problem function returns a row's problem, to follow its name in a sentence, or None.
"""

import math
from pathlib import Path

from coords import fault

# the lists that a file must hold, and the keys that each of their rows needs
IMAGE_KEYS, CATEGORY_KEYS = {"id", "file_name", "width", "height"}, {"id", "name"}
COCO_KEYS = {"images": IMAGE_KEYS, "annotations": {"image_id", "category_id"}, "categories": CATEGORY_KEYS}
CAPTION_KEYS = {"images": IMAGE_KEYS, "annotations": {"image_id", "caption"}}
CLIP_ANNOTATION_KEYS = {"video_id", "frame", "category_id"}
CLIP_KEYS = {"videos": IMAGE_KEYS | {"frames"}, "annotations": CLIP_ANNOTATION_KEYS, "categories": CATEGORY_KEYS}


def require_rows(content, keys, path, expected):
    """Raise ValueError if content lacks a list of `keys`, or one of its rows lacks a key."""
    for key, needs in keys.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and needs <= row.keys() for row in rows):
            raise ValueError(f"{path} lacks {key} with {sorted(needs)}; is it {expected}?")


def is_about_clips(content):
    """Return True if an annotation file's content is about clips."""
    if isinstance(content, list):
        return bool(content and isinstance(content[0], dict) and content[0].keys() & {"video", "video_id"})
    return isinstance(content, dict) and "videos" in content


def is_captions(content):
    """Return True if an annotation file's content is COCO's captions."""
    rows = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "caption" in rows[0]


def leaves_folder(file_name):
    """Return True if a file name points out of the folder it is in."""
    return Path(file_name).is_absolute() or ".." in Path(file_name).parts


def are_numbers(values, count):
    return isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)


def box_from_xywh(bbox):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2), same pixels."""
    x, y, width, height = bbox
    return x, y, x + width, y + height


def box_problem(bbox, size):
    """Check a COCO bbox (x, y, w, h) in an image of `size`. Up to 0.02 px too wide or too high counts as rounding."""
    if not are_numbers(bbox, 4) or not all(map(math.isfinite, bbox)):
        return "is not four finite numbers"
    if bbox[2] <= 0 or bbox[3] <= 0:
        return "has no area"
    x1, y1, x2, y2 = box_from_xywh(bbox)
    return fault((x1, y1, max(x1, x2 - 0.02), max(y1, y2 - 0.02)), size) and f"is outside its image of size {size}"


def clip_box(bbox, size, skipped, rows="boxes"):
    """Return a COCO bbox as (x1, y1, x2, y2), clipped to its image. An invalid one counts as skipped, among `rows`: None."""
    if problem := box_problem(bbox, size):
        skipped[f"{rows} where the box {problem.split(' of size')[0]}"] += 1
        return None
    x1, y1, x2, y2 = box_from_xywh(bbox)
    return x1, y1, min(x2, size[0]), min(y2, size[1])


def llava_problem(row):
    """Check a row in LLaVA's format, about an image or text-only."""
    if isinstance(row, dict) and "video" in row and "image" not in row:
        return f"is about the clip {row['video']}; put rows about clips into a file of their own"
    return conversation_problem(row)


def conversation_problem(row):
    """Check a row's conversation and file name, and what tools.prefcoco adds to it (`objective`, `box_px`)."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    except (KeyError, TypeError):
        return f"is {str(row)[:80]}, expected LLaVA's id, image, conversations [{{from, value}}]"
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        return f"has turns {[speaker for speaker, _ in turns]}, expected human and gpt in turn"
    if not all(isinstance(text, str) for _, text in turns) or not isinstance(row.get("image", ""), str):
        return "has a text or an image name that is not a string"
    if leaves_folder(row.get("image", "")):
        return f"names {row['image']}, which leaves the images folder"
    if "image" not in row and any("<image>" in text for _, text in turns):
        return "contains <image> but has no \"image\" key"
    return objective_problem(row) if "objective" in row else None


def objective_problem(row):
    """Check the fields that tools.prefcoco adds: lists of one length, one entry per object."""
    if not isinstance(row["objective"], str):
        return f"has objective {row['objective']!r}, not a text"
    keys_of = {"caption": ("name", "description", "box_px"), "neg": ("names",)}
    keys = keys_of.get(row["objective"], ("names", "descriptions", "box_px"))
    lists = [[row.get(key)] if row["objective"] == "caption" else row.get(key) for key in keys]
    size, is_even = row.get("size"), all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists)
    if not is_even or not are_numbers(size, 2):
        return f"lacks its size, or {', '.join(keys)} of one length, as tools.prefcoco writes them"
    for key, values in zip(keys, lists, strict=True):
        for value in values:
            if key == "box_px" and (not are_numbers(value, 4) or fault(value, size)):
                return f"has box_px {value}, expected x1 < x2, y1 < y2 inside its image of size {size}"
            if key != "box_px" and not isinstance(value, str) and (key, value) != ("descriptions", None):
                return f"has {key} {value!r}, not a text"
    return None


def clip_row_problem(row):
    """Check a row of Video-ChatGPT's, in either of its two forms."""
    if isinstance(row, dict) and "q" in row:
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("q", "a", "video_id")):
            return f"is {str(row)[:80]}, expected texts q, a and video_id"
    elif problem := conversation_problem(row):
        return problem
    elif not isinstance(row.get("video"), str) or not row["video"]:
        return "names no video, expected id, video, conversations, or q, a, video_id"
    clip = row["video_id"] if "q" in row else row["video"]
    return f"names {clip}, which leaves the clips folder" if leaves_folder(clip) else None
