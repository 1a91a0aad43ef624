"""The frozen tower's output for every image or clip of a data set, kept on disk, so that training need not run the tower.

features.npy   float16 (images, P, Dv), memory-mapped; clips are pooled to frames + P tokens (video.pool)
features.json  which tower, image side, geometry and number of frames made it, the row of each image, and unreadable images
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clip_vit import preprocess
from formats.files import read_config, read_json, require_file, write_json
from formats.images import open_image
from formats.journal import require_new
from video import encode, read_frames


def fingerprint(tower):
    """Return the sha256 over all weights of a tower, as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Features:
    """A features folder, opened for reading. Raise ValueError if it was made with another tower, side, geometry or frames."""

    def __init__(self, folder, side, geometry, frames=0, tower=None):
        about = read_config(folder, "features.json")
        tower = {"tower": fingerprint(tower)} if tower else {}
        for key, value in ({"side": side, "geometry": geometry, "frames": frames} | tower).items():
            if about[key] != value:
                raise ValueError(f"{folder} was made with {key} {about[key]}, this run has {value}; repeat tools.features")
        self.folder, self.rows_of = folder, {name: row for row, name in enumerate(about["images"])}
        self.skipped = set(about.get("skipped", ()))
        self.rows = np.load(require_file(Path(folder) / "features.npy", "the features"), mmap_mode="r")

    def row_of(self, image):
        """Return the row index of an image file, or None without an image."""
        row = image and self.rows_of.get(os.path.abspath(image))
        if image and row is None:
            raise ValueError(f"{self.folder} lacks {image}; add it: python -m tools.features")
        return row

    def holds(self, image):
        """Return False if an image could not be read when the features were made. Text-only records pass."""
        self.row_of(image)
        return not image or os.path.abspath(image) not in self.skipped

    def read(self, image):
        """Return the features (P, Dv) of an image file, float32."""
        return torch.from_numpy(self.rows[self.row_of(image)].astype(np.float32))


@torch.inference_mode()
def write_features(records, out, tower, geometry, *, frames=0, batch=32, skip_bad=False, processes=(0, 1, lambda: None)):
    """Write the features of all records' images. A killed run continues where it stopped.

    skip_bad   an unreadable image or clip gets a row of zeros and is listed in features.json; else it ends the run
    processes  of journal.start_processes; this process writes every world-th image
    """
    rank, world, wait = processes
    out, device = Path(out), next(tower.parameters()).device
    images = sorted({os.path.abspath(record.image) for record in records if record.image})
    if rank == 0:
        begin(out, images, tower, geometry, frames)
    wait()
    rows, done = (np.load(out / f"{name}.npy", mmap_mode="r+") for name in ("features", "done"))
    mine = [row for row in range(rank, len(images), world) if not done[row]]
    batch = 1 if frames else batch
    for start in tqdm(range(0, len(mine), batch), desc="features", disable=None if rank == 0 else True):
        read = {row: read_input(images[row], tower, geometry, frames, skip_bad) for row in mine[start : start + batch]}
        readable = [row for row, pixels in read.items() if pixels is not None]
        if readable and frames:
            rows[readable[0]] = encode(tower, read[readable[0]], geometry).half().cpu().numpy()
        elif readable:  # (B, 3, S, S) -> (B, P, Dv)
            rows[readable] = tower(torch.stack([read[row] for row in readable]).to(device)).half().cpu().numpy()
        rows.flush()  # before they count as done
        done[list(read)] = [1 if row in readable else 2 for row in read]
    wait()
    begun = out / "begun.json"
    if rank == 0 and begun.is_file():
        skipped = [images[row] for row in np.flatnonzero(np.asarray(done) == 2)]
        write_json(out / "features.json", read_json(begun) | {"skipped": skipped})
        begun.unlink()
        print(f"{out}: {len(images)} images or clips, {len(skipped)} of them skipped, {rows.nbytes / 2**30:.2f} GiB")


def begin(out, images, tower, geometry, frames):
    """Allocate the files of a features folder, or check that one begun earlier is of the same images and tower."""
    config = tower.config
    about = {"tower": fingerprint(tower), "side": config.image_size, "geometry": geometry, "frames": frames, "images": images}
    earlier = [read_json(path) for path in (out / "begun.json", out / "features.json") if path.is_file()]
    if earlier and not earlier[0].items() >= about.items():
        raise ValueError(f"{out} was begun with another tower or other images; change --out")
    if earlier:
        return
    require_new(out)
    out.mkdir(parents=True)
    shape = (len(images), frames + config.num_patches, config.hidden_size)
    np.lib.format.open_memmap(out / "features.npy", "w+", np.float16, shape).flush()
    np.lib.format.open_memmap(out / "done.npy", "w+", np.uint8, shape[:1]).flush()  # 0 not yet, 1 written, 2 unreadable
    write_json(out / "begun.json", about)


def read_input(image, tower, geometry, frames, skip_bad):
    """Return an image as the tower's input (3, S, S), or a clip as PIL frames; None if it is unreadable and skip_bad."""
    try:
        return read_frames(image, frames) if frames else preprocess(open_image(image), tower.config, geometry)
    except (ValueError, FileNotFoundError) as error:
        if not skip_bad:
            raise ValueError(f"{error}; --skip-bad skips what cannot be read") from None
        print(f"skipped: {error}")


def open_features(config, records, model, processes):
    """Open the features of a run, written first for clips without --features: (the records that they hold, Features)."""
    c, folder = model.config, config.features
    tower = model.vision_tower if processes.rank == 0 else None
    if not folder:  # clips are always read as features
        folder = f"{config.out}-features"
        if processes.world == 1:
            write_features(records, folder, tower, c.geometry, frames=c.frames, skip_bad=config.skip_bad)
        elif not Path(folder, "features.json").is_file():
            raise ValueError("training on clips in several processes needs --features; make them with python -m tools.features")
    features = Features(folder, c.vision_config.image_size, c.geometry, c.frames, tower)
    kept = [record for record in records if features.holds(record.image)]  # raises for an image that it lacks
    if lost := len(records) - len(kept):
        message = f"{lost} images or clips could not be read when {folder} was made"
        if not config.skip_bad:
            raise ValueError(f"{message}; skip them with --skip-bad")
        if processes.rank == 0:
            print(f"skipped: {message}")
    return kept, features
