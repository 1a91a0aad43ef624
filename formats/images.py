"""Image files in folders, zips and parquet files: open one, look at its size, tell images and clips apart by name."""

import io
import unicodedata
import zipfile
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from formats.files import naming, read_json
from formats.parquet import is_parquet, key_of, parquet_image, places_of

ANIMATIONS = (".gif", ".webp", ".png", ".apng")
IMAGES = (*ANIMATIONS, ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")
CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".npy")
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError)  # damaged; RuntimeError: encrypted
PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, *ZIP_ERRORS)
NO_IMAGES = {  # bytes among the first 24 -> what the file is instead
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`", b"<svg": "an SVG drawing", b"<?xml": "an SVG drawing",
    b"<!doctype": "a web page", b"<html": "a web page", b"ftyphei": "HEIC; convert it to JPEG",
}  # fmt: skip
BLUR_MANIFEST = "blurred.json"  # tools.blur writes it into its output folder


def is_hidden(name):
    """Return True for what systems put beside files: names that begin with a dot, macOS's __MACOSX, a NAS's @eaDir."""
    return any((part[0] == "." and part != "..") or part in ("__MACOSX", "@eaDir") for part in Path(name).parts)


def is_clip(path):
    """Return True for a path that is opened as a clip where no annotation decides: a folder, or one of CLIP_SUFFIXES."""
    suffix = Path(path).suffix.lower()
    return suffix in CLIP_SUFFIXES or suffix not in IMAGES and bool(names_in(path))


def open_image(path):
    """Open an image file as RGB, in its stored orientation (COCO's boxes ignore the EXIF rotation, and so do we), without its
    transparency, as CLIP's own reader. `path` may lead into a zip, or a parquet file: images.zip/000000000.jpg.
    Raise FileNotFoundError, or ValueError if the file is damaged."""
    if not has_image(path):
        raise FileNotFoundError(f"no image file {path}")
    with naming(path, *PIL_ERRORS), image_file(path) as file:
        try:
            with Image.open(file) as image:
                return to_rgb(image)
        except UnidentifiedImageError:
            file.seek(0)
            head = file.read(24).lower()
            found = next((what for mark, what in NO_IMAGES.items() if mark in head), "no image that Pillow knows")
            raise ValueError(f"it is {found}") from None


def to_rgb(image):
    image.load()
    if image.mode.startswith("I"):  # 16-bit greyscale: PIL's own conversion would clip it to white
        grey = np.asarray(image).astype(np.int64)
        grey = grey if grey.max() < 256 else grey >> 8  # 16 or 32 bits may hold 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, not 8 or 16 bit")
    return image.convert("RGB")


def image_file(path):
    """Open an image's file to read its bytes, in its folder, zip or parquet file."""
    if is_parquet(Path(path).parent):
        return io.BytesIO(parquet_image(path))
    zip_path, member = split_zip(path)
    return io.BytesIO(open_zip(zip_path).read(member)) if zip_path else open(path, "rb")


def has_image(path):
    """Return True if an image file exists, in its folder, zip or parquet file."""
    if is_parquet(Path(path).parent):
        return key_of(path) in places_of(Path(path).parent)
    zip_path, member = split_zip(path)
    return member in open_zip(zip_path).NameToInfo if zip_path else Path(path).is_file()


def split_zip(path):
    """Split a path that leads into a zip: (zip, name inside), or (None, None). A zip's one folder need not be named."""
    for parent in Path(path).parents if ".zip" in str(path).lower() else ():
        if parent.suffix.lower() == ".zip" and parent.is_file():
            name, names = Path(path).relative_to(parent).as_posix(), open_zip(parent).NameToInfo
            is_inside = name not in names and top_of(parent) + name in names
            return parent, top_of(parent) + name if is_inside else name
    return None, None


def names_in(folder):
    """Return the names of the files in a folder, which may lie in a zip; none if there is no such folder."""
    if Path(folder).is_dir():
        return [path.name for path in Path(folder).iterdir() if not is_hidden(path.name)]
    zip_path, member = split_zip(Path(folder) / "_")
    if not zip_path:
        return []
    folder, folders = member.removesuffix("_"), zip_folders(zip_path)
    return folders.get(top_of(zip_path) + folder) or folders.get(folder, [])


@lru_cache(maxsize=8)
def zip_folders(path):
    """Return the folders in a zip that hold files: {path that ends in /: names of the files}, without what is hidden."""
    folders = {}
    for inside in open_zip(path).namelist():
        folder, slash, name = inside.rpartition("/")
        if name and not is_hidden(inside):
            folders.setdefault(folder + slash, []).append(name)
    return folders


@lru_cache(maxsize=8)
def top_of(path):
    """Return the folder in which a zip has its images and clips, as "val2017/", or "" if it has several."""
    names = (name for name in open_zip(path).namelist() if name.lower().endswith((*IMAGES, *CLIP_SUFFIXES)))
    tops = {name.partition("/")[0] + "/" for name in names if "/" in name and not is_hidden(name)}
    return tops.pop() if len(tops) == 1 else ""


@lru_cache(maxsize=8)
def open_zip(path):
    """Open a zip once; any thread may read it."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip ({error}); download or copy it again") from None


def image_size(path):
    """Return (width, height) of an image file; JPEG and PNG of intact end, or in zips, are not decoded. Raises as open_image."""
    with suppress(*PIL_ERRORS, KeyError), image_file(path) as file, Image.open(file) as image:  # KeyError: not in its zip
        file.seek(-12, io.SEEK_END)
        mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
        if split_zip(path)[0] or mark and mark in file.read():  # damage in the middle goes unnoticed, except in zips: checksums
            return image.size
    return open_image(path).size


def image_problem(path, size=(), decode=False):
    """Return the problem of an image file, or None. size: (width, height) that annotations state, if they do"""
    try:
        found = open_image(path).size if decode else image_size(path)
    except FileNotFoundError as error:  # is there almost that name in its nearest folder that exists, or one below?
        folder = next((parent for parent in Path(path).parents if parent.is_dir()), None)
        near = folder and names_by_stem(folder).get(unicodedata.normalize("NFC", Path(path).stem).casefold())
        return f"{error}; {folder} has {near!r}" if near else str(error)
    except ValueError as error:
        return str(error)
    if not any(size) or found == tuple(size):
        return None
    turn = orientation(path)
    fix = f"; its EXIF orientation is {turn}: save it upright, or annotate the pixels as they are stored" if turn != 1 else ""
    return f"{path} is {found[0]} x {found[1]}, but the annotations say {size[0]} x {size[1]}{fix}"


@lru_cache(maxsize=8)
def names_by_stem(folder):
    names = [f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")] + list(names_in(folder))  # the last one counts
    return {unicodedata.normalize("NFC", Path(name).stem).casefold(): name for name in names}


def orientation(path):
    """Return an image's EXIF orientation: 1 is upright, 3 upside down, 6 and 8 turned by 90 degrees."""
    with image_file(path) as file, Image.open(file) as image:
        return image.getexif().get(0x0112, 1)


def blur_manifest(images):
    """Return what tools.blur noted in a folder, {source, faces, images: {relative name: faces}}, or None."""
    path = Path(images) / BLUR_MANIFEST
    return read_json(path) if path.is_file() else None


def are_faces_blurred(sources):
    """Return True if tools.blur made every images folder of (file, images, weight) sources; None without sources."""
    return all((Path(images) / BLUR_MANIFEST).is_file() for _, images, _ in sources) if sources else None
