"""Make COCO instances, or annotated clips, from panoptic masks, as SEEM and Mask2Former write them (Sec. 3.4, App. C).

    python -m tools.panoptic --json panoptic.json --masks PNG_FOLDER --out instances.json
    python -m tools.panoptic --json FOLDER --out clips.json

--json is COCO's panoptic file; one video's, without a list of images, works too. A folder of such files, CLIP.json with its
masks in CLIP/ beside it, makes a file of clips (the paper's Pseudo-ActNet). Boxes and sizes are those of the masks.

json   panoptic JSON, or a folder of one per clip
masks  folder of its PNGs
stuff  write boxes of stuff too, not only of things
check  compare the boxes with those in the JSON, print the differences, and fail if there are any
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.files import read_json, require_file, some, write_json
from formats.images import is_hidden, open_image
from formats.journal import require_new
from formats.schema import IMAGE, id_text, require_lists, values
from tools import command

PANOPTIC_KEYS = {"annotations": {"file_name", "segments_info"}, "categories": {"id", "name"}}


def panoptic(json, out, masks=None, stuff=False, check=False):
    """Write COCO instances, or a clips_*.json if `json` is a folder."""
    require_new(out)
    is_folder, compared = Path(json).is_dir(), []
    if is_folder and masks:
        raise ValueError(f"--json {json} is a folder, which has masks beside each JSON; leave out --masks")
    if not (is_folder or masks):
        raise ValueError(f"--json {json} without --masks, the folder of its PNGs")
    content = clips_from_panoptic(json, stuff, compared) if is_folder else images_from_panoptic(json, masks, stuff, compared)
    write_json(out, content)
    counts = [f"{len(rows)} {key}" for key, rows in content.items() if key != "annotations"]
    print(f"{out}: {len(content['annotations'])} boxes, {', '.join(counts)}")
    if check:
        differing = [f"{path}: segment {i} has bbox {bbox}, its mask {box}" for path, i, bbox, box in compared if bbox != box]
        print(*differing, f"{len(compared) - len(differing)} of {len(compared)} boxes equal those in {json}", sep="\n")
        if differing:
            raise ValueError(f"{len(differing)} boxes differ from their masks; are JSON and masks of one version?")


def images_from_panoptic(json, masks, stuff, compared):
    """Make the content of COCO instances from a panoptic file."""
    content, categories = read_panoptic(json, stuff)
    frames, listed, images, annotations = content["annotations"], {}, [], []
    require_lists({"images": []} | content, {"images": IMAGE}, json, "COCO's panoptic format")
    for index, image in enumerate(content.get("images", ())):
        key, *_ = values(image, f"{json}: image {index}", **IMAGE)
        listed[key] = image
    if lacking := [frame["file_name"] for frame in frames if listed and id_text(frame.get("image_id")) not in listed]:
        raise ValueError(f"{json}: {some(lacking)} have an image_id that its images lack; are they of one version?")
    paths = [Path(masks) / Path(frame["file_name"]).with_suffix(".png") for frame in frames]
    for number, (frame, path, size, boxes) in enumerate(read_masks(frames, paths, categories, compared), start=1):
        own = {"id": frame.get("image_id", number), "file_name": frame["file_name"], "width": size[0], "height": size[1]}
        images.append(listed.get(id_text(own["id"]), own))
        if size != (images[-1]["width"], images[-1]["height"]):
            raise ValueError(f"{path} is {size}, but {json} lists {images[-1]}; are they of one version?")
        annotations += [box | {"id": i, "image_id": images[-1]["id"]} for i, box in enumerate(boxes, len(annotations) + 1)]
    return {"images": images, "annotations": annotations, "categories": list(categories.values())}


def clips_from_panoptic(folder, stuff, compared):
    """Make the content of a clips_*.json (see formats.annotations.read_file) from a folder of panoptic files."""
    paths = sorted(path for path in Path(folder).glob("*.json") if not is_hidden(path.name))
    if not paths:
        raise FileNotFoundError(f"no panoptic JSON in {folder}; each clip needs one")
    categories, videos, annotations = {}, [], []
    for path in paths:
        content, wanted = read_panoptic(path, stuff)
        frames, sizes, name = content["annotations"], set(), path.stem
        for key, category in wanted.items():
            if (before := categories.setdefault(key, category)["name"]) != category["name"]:
                raise ValueError(f"{path}: category {key} is {category['name']}, but {before} in an earlier file")
        masks = [path.with_suffix("") / Path(frame["file_name"]).with_suffix(".png").name for frame in frames]
        for index, (_, _, size, boxes) in enumerate(read_masks(frames, masks, wanted, compared)):
            sizes.add(size)
            annotations += [{"video_id": name, "frame": index, "track_id": box.pop("id"), **box} for box in boxes]
        if len(sizes) != 1:
            raise ValueError(f"{path} has masks of sizes {sorted(sizes)}; the frames of a clip have one size")
        ((width, height),) = sizes
        videos.append({"id": name, "file_name": name, "width": width, "height": height, "frames": len(masks)})
    return {"videos": videos, "annotations": annotations, "categories": list(categories.values())}


def read_panoptic(path, stuff):
    """Read a panoptic JSON: (its content, {id: category} of the things, or of all categories)."""
    content = read_json(require_file(path, "a panoptic JSON"))
    require_lists(content, PANOPTIC_KEYS, path, "COCO's panoptic format")
    for frame in content["annotations"]:
        require_lists(frame, {"segments_info": {"id", "category_id"}}, path, "COCO's panoptic format")
    categories = {category["id"]: category for category in content["categories"]}
    used = {segment["category_id"] for frame in content["annotations"] for segment in frame["segments_info"]}
    if unlisted := used - categories.keys():
        raise ValueError(f"{path} has segments of categories {sorted(unlisted)}, which its categories lack")
    return content, {key: category for key, category in categories.items() if stuff or category.get("isthing", 1)}


def read_masks(frames, paths, categories, compared):
    """Yield (frame, path of its mask, size of the mask, boxes of its segments in `categories`) for each of a panoptic file's
    frames. Add (path, id, bbox in the JSON, bbox of the mask) of each segment with a bbox to the list `compared`."""
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} masks are not in {paths[0].parent} ({some(missing)}); each frame needs one")
    for frame, path in zip(tqdm(frames, disable=None), paths, strict=True):
        mask = open_image(path)
        try:
            boxes = boxes_from_panoptic(frame["segments_info"], mask)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        pairs = zip(frame["segments_info"], boxes, strict=True)
        compared += [(path, box["id"], segment["bbox"], box["bbox"]) for segment, box in pairs if "bbox" in segment]
        yield frame, path, mask.size, [box for box in boxes if box["category_id"] in categories]


def boxes_from_panoptic(segments_info, png):
    """Find the box of every segment, in order: list of {id, category_id, iscrowd, area, bbox}, with COCO's bbox.
    A pixel of the mask, a PIL image, encodes a segment's id as R + 256 G + 65536 B; 0 is no segment."""
    rgb = np.asarray(png.convert("RGB")).astype(np.int32)  # before the sum: bytes would overflow
    ids = rgb @ np.array([1, 256, 65536], np.int32)  # (H, W)
    listed, drawn = {segment["id"] for segment in segments_info}, set(np.unique(ids).tolist()) - {0}
    if listed != drawn:
        lacking = f"segments {sorted(listed - drawn)} have no pixel, pixels {sorted(drawn - listed)} no segment"
        raise ValueError(f"{lacking}; mask and JSON must hold the same ids, R + 256 G + 65536 B")
    boxes = []
    for segment in segments_info:
        pixels = ids == segment["id"]  # (H, W)
        x, y = np.flatnonzero(pixels.any(0)).tolist(), np.flatnonzero(pixels.any(1)).tolist()
        box = {"id": segment["id"], "category_id": segment["category_id"], "iscrowd": segment.get("iscrowd", 0)}
        boxes.append({**box, "area": int(pixels.sum()), "bbox": [x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0]]})
    return boxes


main = command(__name__, panoptic)
