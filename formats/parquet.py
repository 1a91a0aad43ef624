"""Parquet files of the Hugging Face hub, as lmms-lab publishes benchmarks: rows and images (needs pip install pyarrow).

A path that leads into such a file names an image: test-00000-of-00003.parquet/COCO_val2014_000000310196.jpg. Several rows may
hold the same image. All shards of a split are read as one file, whichever of them is named.
"""

import re
from functools import lru_cache
from glob import escape
from pathlib import Path

from formats.files import import_package, naming, require_file, some

SHARD = r"-\d{5}-of-(\d{5})(-[0-9a-f]{16})?"  # ends a shard's name; until 2023, the hub added a hash
COMPARED = 50  # repeated names whose images are compared; normally a repeat is the same image, once for each question
NAMES = ("file_name", "image_source", "image_link", "image_id", "id")  # columns that name a row's image: the first that exists


def is_parquet(path):
    return Path(path).suffix == ".parquet"


def shards(path):
    """Return the paths of all shards of a split; [path] if it is no shard. Raise FileNotFoundError if one is missing."""
    path = Path(path)
    if found := re.fullmatch(rf"(.+){SHARD}\.parquet", path.name):
        names = [f"{found[1]}-{number:05d}-of-{found[2]}" for number in range(int(found[2]))]
        end = f"-{'?' * 16}.parquet" if found[3] else ".parquet"
        paths = [next(path.parent.glob(escape(name) + end), path.with_name(f"{name}.parquet")) for name in names]
    elif re.fullmatch(r"\d{4}\.parquet", path.name):  # as the hub converts other files: 0000.parquet, ...
        last = max([path, *path.parent.glob("[0-9][0-9][0-9][0-9].parquet")])
        paths = [path.with_name(f"{number:04d}.parquet") for number in range(int(last.stem) + 1)]
    else:
        return [path]
    if missing := [shard.name for shard in paths if not shard.is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {some(missing)} of {len(paths)} shards; download the whole split")
    return paths


def open_parquet(path):
    why = f"{path} needs a package"
    pyarrow, parquet = import_package("pyarrow", why), import_package("pyarrow.parquet", why, "pyarrow")
    with naming(path, pyarrow.ArrowException, OSError):
        return parquet.ParquetFile(require_file(path, "a parquet file"))


def has_images(file):
    return "image.bytes" in (file.schema.column(i).path for i in range(len(file.schema)))


def read_parquet(path):
    """Read the rows of all shards: a list of dicts. In files with images, "image" is the image's name."""
    rows = []
    for shard in shards(path):
        with open_parquet(shard) as file, naming(shard, OSError):
            embedded, names = has_images(file), file.schema_arrow.names
            columns = ["image.path" if embedded and name == "image" else name for name in names]
            read = file.read(columns).to_pylist()
            rows += [row | {"image": image_name(row, len(rows) + i)} if embedded else row for i, row in enumerate(read)]
    return rows


def image_name(row, number):
    """Return the file name of a row's image, from its columns, from the path that it had when it was packed, or by the row."""
    named = next((str(row[key]) for key in NAMES if row.get(key) not in (None, "")), None)
    name = Path(named or (row.get("image") or {}).get("path") or f"row-{number}").name
    return name if Path(name).suffix else f"{name}.jpg"


def key_of(name):
    """Return what an image's names have in common: COCO_train2014_000000581857_16.jpg, 000000581857.jpg -> 581857."""
    stem = re.sub(r"^COCO_[a-z]+\d{4}_", "", Path(name).stem)
    return re.sub(r"^(\d{12})_\d+$", r"\1", stem).lstrip("0")


@lru_cache(maxsize=8)
def places_of(path):
    """Return where the images of all shards are: {key_of(name): (shard, row group, row in it)}."""
    places, number, compared = {}, 0, 0
    for shard in shards(path):
        with open_parquet(shard) as file:
            if not has_images(file):
                raise ValueError(f"{shard} holds no images; pass the folder, zip or parquet file that does with --images")
            columns = ["image.path", *(name for name in NAMES if name in file.schema_arrow.names)]
            for group in range(file.num_row_groups):
                for row, content in enumerate(file.read_row_group(group, columns).to_pylist()):
                    key, place = key_of(image_name(content, number)), (shard, group, row)
                    first = places.setdefault(key, place)
                    if first is not place and compared < COMPARED:
                        compared += 1
                        if image_bytes(*first) != image_bytes(*place):
                            raise ValueError(f"{shard}: two images are named {key}; unpack them under names of their own")
                    number += 1
    return places


@lru_cache(maxsize=2)  # of 100 images each, as a rule
def images_of(shard, group):
    with open_parquet(shard) as file, naming(shard, OSError):
        return file.read_row_group(group, ["image.bytes"]).column("image")


def image_bytes(shard, group, row):
    return images_of(shard, group)[row].as_py()["bytes"]


def parquet_image(path):
    """Return the bytes of an image. Raise KeyError if there is no such image, ValueError if only its path was packed."""
    shard, group, row = places_of(Path(path).parent)[key_of(path)]
    content = image_bytes(shard, group, row)
    if content is None:
        raise ValueError(f"{shard} names {Path(path).name}, but does not hold it; pass the folder of the images with --images")
    return content
