"""From annotated clips to Records: to be merged into data.py, section "clips".

    records, left_out = read_clips("data/moving/clips_train.json", "data/moving/clips")

A clip is a video file, or a folder of frames. Of a clip `Record.image` is the path, `Record.objects` are those that stay
where they are (Sec. 3.5, App. D): the objectives ask for them as if the clip were one image. Categories that move are
`present` and not asked for; `absent` are those in none of the annotated frames.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from checkpoint import read_json, require_file, some
from clip_vit import open_image
from data import Object, Record, box_from_xywh, box_problem, leaves, row_problem
from prepare import boxes_from_panoptic, read_panoptic

CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".gif")
STATIC = 5  # pixels of the model's square from the mean, on each axis (App. D; which pixels, it does not say)
CLIP_KEYS = {
    "videos": {"id", "file_name", "width", "height", "frames"},
    "annotations": {"video_id", "frame", "category_id"},
    "categories": {"id", "name"},
}


# ----- clips


def static_objects(boxes_by_frame, size, side=224):
    """Find what stays where it is: list of Objects in order of appearance, each box the mean over the frames it is in.

    boxes_by_frame  for each annotated frame (category, box_px) pairs; box_px None for a crowd, or a box that is none
    size            (width, height) of the frames; distances are taken in the model's square of `side`, squashed to it
    An object is a category that no frame has twice, and its box's centre keeps within STATIC of its mean on both axes;
    what is in one frame alone is at its mean, the paper's other case.

    >>> static_objects([[("cup", (0, 0, 4, 4))], [("cup", (2, 0, 6, 4)), ("dog", (8, 8, 9, 9))]], (224, 224))
    [Object(name='cup', box_px=(1.0, 0.0, 5.0, 4.0), description=None), Object(name='dog', box_px=(8.0, 8.0, 9.0, 9.0), description=None)]
    """
    boxes, repeated = {}, set()
    for frame in boxes_by_frame:
        count = Counter(name for name, _ in frame)
        repeated.update(name for name, box_px in frame if count[name] > 1 or box_px is None)
        for name, box_px in frame:
            boxes.setdefault(name, []).append(box_px)
    objects = []
    for name in boxes:
        if name in repeated:
            continue
        mean = tuple(sum(box_px[i] for box_px in boxes[name]) / len(boxes[name]) for i in range(4))
        away = max(
            abs(box_px[axis] + box_px[axis + 2] - mean[axis] - mean[axis + 2]) / 2 * side / size[axis]
            for box_px in boxes[name]
            for axis in (0, 1)
        )
        if away <= STATIC + 1e-6:  # so that rounding decides nothing
            objects.append(Object(name, mean))
    return objects


def find_clips(folder):
    """What clips a folder holds: file name, and the same without its ending, -> path; a folder of frames goes first."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; expected the clips, each a {' '.join(CLIP_SUFFIXES)} or a folder of frames; check the path"
        )
    found = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.is_dir():
            found[path.name] = (-1, path)
        elif suffix in CLIP_SUFFIXES:
            found[path.name] = (-1, path)
            rank = CLIP_SUFFIXES.index(suffix)
            found[path.stem] = min(found.get(path.stem, (rank, path)), (rank, path))
    return {name: path for name, (_, path) in found.items()}


def with_clips(records, path, folder):
    """Put the clips' paths into records whose `image` is a name: (those that are there, Counter of those that are not)."""
    clips = find_clips(folder)
    missing = sorted({record.image for record in records} - clips.keys())
    if records and len(missing) == len({record.image for record in records}):
        raise FileNotFoundError(
            f"none of the {len(missing)} clips of {path} is in {folder} ({some(missing)}); expected each as a "
            f"{' '.join(CLIP_SUFFIXES)} or a folder of frames of that name; check the folder"
        )
    there = [replace(record, image=clips[record.image]) for record in records if record.image in clips]
    return there, Counter(
        {f"clips of {path} that are not in {folder} ({some(missing)})": len(missing)} if missing else {}
    )


def read_clips(path, folder, side=224):
    """Read annotations of clips: list of Records, and a Counter of what was left out and why; the content says which:

    clips_*.json                    of shapes.py: videos, categories, annotations, a box a frame
    a folder                        of panoptic JSONs, one a clip, each with its masks in a folder beside it (Pseudo-ActNet)
    VideoInstruct_Dataset.json      Video-ChatGPT's [{q, a, video_id}], or [{id, video, conversations}] of its converter
    folder                          of the clips, found by name with any ending; side  of the model's square
    """
    if Path(path).is_dir():
        return clip_records(clips_from_panoptic(path), path, folder, side)
    content = read_json(require_file(path, "annotations of clips, or a folder of panoptic JSONs"))
    if isinstance(content, list):
        return read_talks(content, path, folder)
    for key, needs in CLIP_KEYS.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and needs <= row.keys() for row in rows):
            raise ValueError(
                f"{path} lacks {key} with {sorted(needs)}; expected a clips_*.json, as shapes.py writes; is it a file of images?"
            )
    return clip_records(content, path, folder, side)


def clip_records(content, path, folder, side):
    """The Records of a clips_*.json's content. Boxes that are none are counted; their category is there, not asked for."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    left_out, frames = Counter(), {v["id"]: [[] for _ in range(v["frames"])] for v in content["videos"]}
    sizes = {v["id"]: (v["width"], v["height"]) for v in content["videos"]}
    for a in content["annotations"]:
        clip = a["video_id"]
        if clip not in frames:
            left_out["annotations of unknown clips"] += 1
        elif a["category_id"] not in names:
            left_out["annotations of unknown categories"] += 1
        elif not isinstance(a["frame"], int) or not 0 <= a["frame"] < len(frames[clip]):
            left_out["annotations of frames that their clip has not"] += 1
        else:
            box_px, problem = None, box_problem(a.get("bbox"), sizes[clip])
            if problem:
                left_out[f"boxes where the box {problem.split(' of size')[0]}"] += 1
            elif not a.get("iscrowd"):
                x1, y1, x2, y2 = box_from_xywh(a["bbox"])
                box_px = x1, y1, min(x2, sizes[clip][0]), min(y2, sizes[clip][1])
            frames[clip][a["frame"]].append((names[a["category_id"]], box_px))
    records = []
    for v in content["videos"]:
        if leaves(v["file_name"]):
            left_out["clips whose path leaves their folder"] += 1
            continue
        present = {name for frame in frames[v["id"]] for name, _ in frame}
        records.append(
            Record(
                str(v["id"]),
                v["file_name"],
                sizes[v["id"]],
                tuple(static_objects(frames[v["id"]], sizes[v["id"]], side)),
                tuple(sorted(present)),
                tuple(name for name in names.values() if name not in present),
            )
        )
    records, missing = with_clips(records, path, folder)
    return records, left_out + missing


def clips_from_panoptic(folder, stuff=False):
    """Make the content of a clips_*.json of a folder of panoptic JSONs: CLIP.json, its masks in CLIP/ (App. C).

    Boxes are those of the masks, and so is the size: a segmenter may have looked at smaller frames. Categories are the
    things, with `stuff` all.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no JSON in {folder}; expected a panoptic one for each clip; check the folder")
    categories, videos, annotations = {}, [], []
    for path in paths:
        content = read_panoptic(path)
        wanted = {c["id"]: c for c in content["categories"] if stuff or c.get("isthing", 1)}
        for key, category in wanted.items():
            if categories.setdefault(key, category)["name"] != category["name"]:
                raise ValueError(
                    f"{path}: category {key} is {category['name']}, {categories[key]['name']} before; "
                    "expected one list of categories in all files; get them of one segmenter"
                )
        masks = [path.with_suffix("") / Path(a["file_name"]).with_suffix(".png").name for a in content["annotations"]]
        if missing := [mask.name for mask in masks if not mask.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} masks are not in {path.with_suffix('')} ({some(missing)}); expected one a frame; copy them"
            )
        sizes = set()
        for index, (frame, mask) in enumerate(zip(content["annotations"], map(open_image, masks), strict=True)):
            sizes.add(mask.size)
            try:
                boxes = boxes_from_panoptic(frame["segments_info"], mask)
            except ValueError as error:
                raise ValueError(f"{masks[index]}: {error}") from None
            annotations += [
                {"video_id": path.stem, "frame": index, "track_id": box.pop("id"), **box}
                for box in boxes
                if box["category_id"] in wanted
            ]
        if len(sizes) != 1:
            raise ValueError(
                f"{path} has masks of sizes {sorted(sizes)}; expected one size a clip; get them of one version"
            )
        (width, height) = sizes.pop()
        videos.append({"id": path.stem, "file_name": path.stem, "width": width, "height": height, "frames": len(masks)})
    return {"videos": videos, "annotations": annotations, "categories": list(categories.values())}


def talk_problem(row):
    """Say why a row of Video-ChatGPT's cannot be used, or None; either of its two forms."""
    if isinstance(row, dict) and "q" in row:
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("q", "a", "video_id")):
            return f"is {str(row)[:80]}; expected texts q, a and video_id"
        clip = row["video_id"]
    else:
        if problem := row_problem(row):
            return problem
        clip = row.get("video")
        if not isinstance(clip, str) or not clip:
            return "names no video; expected Video-ChatGPT's id, video, conversations, or q, a, video_id"
    return f"names {clip}, which leaves the clips folder" if leaves(clip) else None


def read_talks(rows, path, folder):
    """Read Video-ChatGPT's rows: list of Records, one a row (`merge` makes one of a clip's), and a Counter, see `read_clips`.

    Its converter names features, v_ID.pkl, where we look for the clip v_ID.
    """
    records, left_out = [], Counter()
    for index, row in enumerate(rows):
        if problem := talk_problem(row):
            left_out[f"rows of {path} (the first: row {index}, it {problem})"] += 1
            continue
        if "q" in row:
            clip, texts = row["video_id"], [row["q"], row["a"]]
        else:
            clip, texts = row["video"].removesuffix(".pkl"), [turn["value"] for turn in row["conversations"]]
        texts = [text.replace("<video>", "").strip() for text in texts]
        turns = tuple(zip(texts[0::2], texts[1::2], strict=True))
        records.append(Record(str(row.get("id", f"{clip}_{index}")), clip, (0, 0), conversations=(turns,)))
    if not records:
        raise ValueError(f"{path}: no row can be used: {next(iter(left_out), 'it is empty')}; is this another schema?")
    records, missing = with_clips(records, path, folder)
    return records, left_out + missing
