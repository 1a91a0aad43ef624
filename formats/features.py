"""The frozen tower's output for every image or clip of a data set, kept on disk, so that training need not run the tower.

features.npy   float16 (images, P, Dv), memory-mapped; clips are pooled to frames + P tokens (video.pool)
features.json  which tower, image side, geometry and number of frames made it, the row of each image, and unreadable images
"""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from clip_vit import preprocess
from formats.annotations import unreadable
from formats.clips import ratio_problem
from formats.files import read_json, remove_temporary, require_file, some, write_json, write_whole, writing
from formats.images import open_image
from formats.journal import require_new, require_same_options, work_in_parts
from video import encode_clip, read_frames


def fingerprint(tower):
    """Return the sha256 over all weights of a tower, as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_size(path):
    """Return the size of a file, or 0 if it lies in a zip or is a folder of frames."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


class Features:
    """A features folder, opened for reading. Raise ValueError if it was made with another tower, side, geometry or frames."""

    def __init__(self, folder, side, geometry, frames=0, tower=None):
        about = read_json(require_file(Path(folder) / "features.json", "a folder of tools.features"))
        tower = {"tower": fingerprint(tower)} if tower else {}
        for key, value in ({"side": side, "geometry": geometry, "frames": frames} | tower).items():
            if about[key] != value:
                raise ValueError(f"{folder} has {key} {about[key]}, this run has {value}; remake it: python -m tools.features")
        self.file_sizes = dict(zip(about["images"], about.get("bytes", ()), strict=False))
        self.rows_of, self.skipped = {image: row for row, image in enumerate(about["images"])}, set(about.get("skipped", ()))
        self.rows = np.load(require_file(Path(folder) / "features.npy", "the features"), mmap_mode="r")

    def read(self, image):
        """Return the features (P, Dv) of an image file, float32."""
        return torch.from_numpy(self.rows[self.rows_of[os.path.abspath(image)]].astype(np.float32))


@torch.inference_mode()
def write_features(records, out, tower, geometry, *, frames=0, batch=32, skip_bad=False, processes=(0, 1, lambda: None)):
    """Write the features of all records' images. A killed run continues where it stopped.

    skip_bad   an image or clip that cannot be used gets a row of zeros and is listed in features.json; else it ends the run
    processes  of journal.join_processes"""
    config, device, out, batch = tower.config, next(tower.parameters()).device, Path(out), 1 if frames else batch
    parts, file, rank = out / "features.parts", out / "features.npy", processes[0]
    images = sorted({os.path.abspath(record.image) for record in records if record.image})
    sizes = {os.path.abspath(record.image): record.size for record in records if record.image}
    about = {"tower": fingerprint(tower), "side": config.image_size, "geometry": geometry, "frames": frames}
    about |= {"images": images, "bytes": [file_size(image) for image in images]}
    if (out / "features.json").is_file():
        require_same_options(about | read_json(out / "features.json"), about, out)
        return print(f"{out} is complete") if rank == 0 else None
    bad = {os.path.abspath(image): problem for image, problem in unreadable(records).items()}
    if bad and not skip_bad:
        first = "; ".join([*bad.values()][:3])
        raise ValueError(f"{len(bad)} of {len(images)} images cannot be used: {first}; --skip-bad skips them")
    if rank == 0 and not (parts.exists() and file.exists()):
        make_array(file, parts, (len(images), frames + config.num_patches, config.hidden_size))

    def read(chosen):
        """Read the images of some rows: (the rows, {row: its input}) without those that cannot be read."""
        inputs = {}
        for row, image in ((row, images[row]) for row in chosen):
            try:
                if image in bad:
                    raise ValueError(bad[image])
                inputs[row] = read_frames(image, frames) if frames else preprocess(open_image(image), config, geometry)
                if frames and (problem := ratio_problem(image, inputs[row][0], sizes[image])):
                    raise ValueError(problem)
            except (ValueError, FileNotFoundError) as error:
                inputs.pop(row, None)
                if not skip_bad:
                    raise ValueError(f"{error}; --skip-bad skips what cannot be read") from None
                print(f"skipped: {error}")
        return chosen, inputs

    def write(ready):
        """Write the rows that were read. Return the images that were not."""
        (chosen, inputs), rows = ready, np.load(file, mmap_mode="r+")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if inputs and frames:  # one clip
                rows[chosen[0]] = encode_clip(tower, inputs[chosen[0]], geometry).half().cpu().numpy()
            elif inputs:  # (B, 3, S, S) -> (B, P, Dv)
                rows[list(inputs)] = tower(torch.stack([*inputs.values()]).to(device)).half().cpu().numpy()
        rows.flush()  # before they count as done
        return [images[row] for row in chosen if row not in inputs]

    pieces = {first: range(len(images))[first : first + batch] for first in range(0, len(images), batch)}
    done, *_ = work_in_parts(pieces, lambda: (read, write), parts, about | {"batch": batch}, processes)
    if rank == 0:
        skipped = sorted(image for _, unread in done for image in unread)
        write_json(out / "features.json", about | {"skipped": skipped})
        shutil.rmtree(parts)
        print(f"{out}: {len(images)} images or clips, {len(skipped)} of them skipped, {file.stat().st_size / 2**30:.2f} GiB")


def make_array(file, parts, shape):
    """Make a file of zeros, float16. Raise ValueError if its folder exists already, or the disk is too small for it.
    Where the folder has `parts`, a run was killed: its journals are about a file that is gone, and are removed."""
    if not parts.exists():
        require_new(file.parent)
    with writing(file.parent):
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    remove_temporary(file.parent.iterdir())
    size, free = 2 * np.prod(shape) / 2**30, shutil.disk_usage(file.parent).free / 2**30
    if free < size:  # later it would be a bus error: the file is mapped
        parts.rmdir()
        with suppress(OSError):  # it holds other files
            file.parent.rmdir()
        raise ValueError(f"{file} needs {size:.1f} GiB, and {free:.1f} are free; choose another --out")
    write_whole(file, lambda temporary: np.lib.format.open_memmap(temporary, "w+", np.float16, shape).flush())


def open_features(config, records, model, processes):
    """Open the features of a run, written first for clips without --features: (the records that they hold, Features)."""
    c, tower, folder = model.config, model.vision_tower, config.features or f"{config.out}-features"
    if not config.features and not Path(folder, "features.json").is_file():  # clips are always read as features
        if processes.world > 1:
            raise ValueError("training on clips in several processes needs --features; make them with python -m tools.features")
        write_features(records, folder, tower, c.geometry, frames=c.frames, skip_bad=config.skip_bad)
    features = Features(folder, c.vision_config.image_size, c.geometry, c.frames, tower if processes.rank == 0 else None)
    paths = [record.image and os.path.abspath(record.image) for record in records]
    if lacking := [path for path in paths if path and path not in features.rows_of]:
        raise ValueError(f"{folder} lacks {some(lacking)}; make them all: python -m tools.features")
    if changed := [path for path in {*paths} & features.file_sizes.keys() if file_size(path) != features.file_sizes[path]]:
        raise ValueError(f"{some(changed)} changed after {folder} was made; make them again: python -m tools.features")
    kept = [record for record, path in zip(records, paths, strict=True) if path not in features.skipped]
    if lost := len(records) - len(kept):
        message = f"{lost} images or clips could not be read when {folder} was made"
        if not config.skip_bad:
            raise ValueError(f"{message}; skip them with --skip-bad")
        if processes.rank == 0:
            print(f"skipped: {message}")
    return kept, features
