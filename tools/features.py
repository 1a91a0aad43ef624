"""Keep on disk what a CLIP tower makes of every image or clip, for training runs that read each more than once.

    torchrun --nproc-per-node 8 -m tools.features --data localize.json@train2017 --vision clip-vit-large-patch14 --out features
    torchrun train.py --data localize.json@train2017 --features features ...

Takes P x Dv x 2 bytes per image: half a megabyte for ViT-L/14 at 224 px. A killed run resumes with the same command.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from clip_vit import CLIPVisionTower
from coords import GEOMETRIES
from formats.annotations import parse_sources, read_records
from formats.features import write_features
from formats.journal import start_processes


def features(data, out, vision, geometry="squash", frames=0, batch=32, skip_bad=False, images=""):
    """Write the features of all images or clips of a mixture (formats.features).

    data, images  as in train.py
    frames        per clip, which is pooled to frames + P tokens (video.pool); 0: images, P tokens
    """
    if (Path(out) / "features.json").exists():
        return print(f"{out} is complete") if os.environ.get("RANK", "0") == "0" else None
    processes = rank, world, _ = start_processes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    tower = CLIPVisionTower.from_pretrained(vision, device=device)
    records, skipped = read_records(parse_sources(data, images))
    for reason, count in skipped.items() if rank == 0 else ():
        print(f"skipped: {count} {reason}")
    write_features(records, out, tower, geometry, frames=frames, batch=batch, skip_bad=skip_bad, processes=processes)
    if world > 1:
        dist.destroy_process_group()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="annotation files, separated by commas: FILE, or FILE@IMAGES")
    add("--images", default="", help="folder or zip of the images of every FILE without @IMAGES")
    add("--vision", required=True, help="CLIP: HF folder, or OpenAI's .pt")
    add("--geometry", choices=GEOMETRIES, default="squash", help="how an image becomes a square (default: squash)")
    add("--frames", type=int, default=0, help="frames per clip; 0: images (default: 0)")
    add("--batch", type=int, default=32, help="images at a time (default: 32)")
    add("--out", required=True, help="folder to write")
    add("--skip-bad", action="store_true", help="skip and count images that cannot be read")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch {args.batch} must be at least 1")
    features(**vars(args))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"tools.features: {error}")
