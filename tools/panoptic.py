"""TODO tools.panoptic."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.files import read_json, require_file, some, write_json
from formats.images import open_image
from formats.journal import require_new

# ----- panoptic


def panoptic(segments, masks, out, stuff=False, check=False):
    """Make COCO instances of panoptic masks, as SEEM, Mask2Former and OneFormer write them (Sec. 3.4, weak supervision).

    --json is COCO's panoptic file, or one of a video: annotations [{file_name, segments_info}], categories, no images; or a
    folder of such, CLIP.json with its masks in CLIP/ beside it, which makes a file of clips (Pseudo-ActNet).
    Boxes are those of the masks; categories are the things, with --stuff all. --check lists each bbox in segments_info
    that its mask does not bear out, and fails if there is one.
    """
    require_new(out)
    if Path(segments).is_dir():
        content = clips_from_panoptic(segments, stuff)
        write_json(out, content)
        return print(f"{out}: {len(content['annotations'])} boxes in {len(content['videos'])} clips")
    if not masks:
        raise ValueError(f"--json {segments} without --masks; expected the folder of its PNGs; add it")
    content = read_panoptic(segments)
    frames, images = content["annotations"], {image["id"]: image for image in content.get("images", ())}
    paths = [Path(masks) / Path(frame["file_name"]).with_suffix(".png") for frame in frames]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} masks are not in {masks} ({some(missing)}); expected all; check --masks"
        )
    categories = [c for c in content["categories"] if stuff or c.get("isthing", 1)]
    wanted = {c["id"] for c in categories}
    found, annotations, compared, differing = [], [], 0, []
    for number, (frame, path) in enumerate(zip(tqdm(frames, disable=None), paths, strict=True), start=1):
        mask, image_id = open_image(path), frame.get("image_id", number)
        told = {"id": image_id, "file_name": frame["file_name"], "width": mask.width, "height": mask.height}
        image = images.get(image_id, told)
        if mask.size != (image["width"], image["height"]):
            raise ValueError(
                f"{path} is {mask.size}, {segments} says {image}; expected one size; get both of one version"
            )
        try:
            boxes = boxes_from_panoptic(frame["segments_info"], mask)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found.append(image)
        for told, box in zip(frame["segments_info"], boxes, strict=True):
            compared += "bbox" in told
            if told.get("bbox", box["bbox"]) != box["bbox"]:
                differing.append(f"{path.name}: segment {told['id']} has bbox {told['bbox']}, its mask {box['bbox']}")
            if box["category_id"] in wanted:
                annotations.append({**box, "id": len(annotations) + 1, "image_id": image_id})
    write_json(out, {"images": found, "annotations": annotations, "categories": categories})
    print(f"{out}: {len(annotations)} boxes of {len(categories)} categories in {len(found)} images")
    if check:
        print(*differing, f"{compared - len(differing)} of {compared} boxes equal those in {segments}", sep="\n")
        if differing:
            raise ValueError(f"{len(differing)} boxes differ; expected those of the masks; get both of one version")


def read_panoptic(path):
    """Read a panoptic JSON; refuse another schema by name."""
    content = read_json(require_file(path, "a panoptic JSON"))
    for key, needs in (("annotations", {"file_name", "segments_info"}), ("categories", {"id", "name"})):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and needs <= row.keys() for row in rows):
            raise ValueError(f"{path} lacks {key} with {sorted(needs)}; expected COCO's panoptic format; convert it")
    known = {category["id"] for category in content["categories"]}
    used = {segment["category_id"] for frame in content["annotations"] for segment in frame["segments_info"]}
    if used - known:
        raise ValueError(f"{path} has segments of categories {sorted(used - known)}; expected those it lists; add them")
    return content


def boxes_from_panoptic(segments_info, png):
    """Find the box of every segment: list of {id, category_id, iscrowd, area, bbox}, in the order of segments_info.

    png    the mask, a PIL image whose pixels spell a segment's id as R + 256 G + 65536 B; 0 is no segment
    bbox   COCO's [x, y, width, height], in whole pixels
    Raises ValueError where mask and list do not hold the same segments.
    """
    rgb = np.asarray(png.convert("RGB")).astype(np.int32)  # before the sum: bytes would overflow
    ids = rgb @ np.array([1, 256, 65536], np.int32)  # (H, W)
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    y, x = np.nonzero(starts)  # (R,): a run of one id along a row begins at each
    lengths = np.diff(np.flatnonzero(starts), append=ids.size)
    found, which = np.unique(ids[starts], return_inverse=True)
    place = {segment: index for index, segment in enumerate(found.tolist())}
    listed = {segment["id"] for segment in segments_info}
    if listed ^ (place.keys() - {0}):
        raise ValueError(
            f"segments {sorted(listed - place.keys())} have no pixel, pixels {sorted(place.keys() - listed - {0})} no segment; "
            "expected the same in mask and JSON; a segment's id is R + 256 G + 65536 B"
        )
    x1, y1, x2, y2 = np.array([[png.width], [png.height], [0], [0]]).repeat(len(found), 1)
    np.minimum.at(x1, which, x)
    np.minimum.at(y1, which, y)
    np.maximum.at(x2, which, x + lengths)
    np.maximum.at(y2, which, y + 1)
    bboxes = np.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()
    areas = np.bincount(which, lengths).astype(int).tolist()
    return [
        {
            "id": segment["id"],
            "category_id": segment["category_id"],
            "iscrowd": segment.get("iscrowd", 0),
            "area": areas[place[segment["id"]]],
            "bbox": bboxes[place[segment["id"]]],
        }
        for segment in segments_info
    ]


def clips_from_panoptic(folder, stuff=False):
    """Make the content of a clips_*.json (see data.read_clips) of a folder of panoptic JSONs: CLIP.json, its masks in CLIP/ (App. C).

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
