"""TODO tools.features."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from clip_vit import CLIPVisionTower
from formats.annotations import parse_sources, read_records
from formats.features import write_features
from formats.journal import start_processes

# ----- features


def features(data, out, vision, geometry="squash", frames=0, batch=32, skip_bad=False):
    """Keep on disk what a CLIP tower makes of every image or clip of a mixture, for `train.py --features` (clip_vit.Features).

    data    FILE@IMAGES, several parted by commas, as train.py has it
    vision  the tower's folder
    frames  of a clip, which is pooled to frames + P tokens (video.pool); 0: images, P tokens
    Takes P x Dv x 2 bytes an image: half a megabyte at ViT-L/14 and 224 px. May be several processes, and several starts.
    """
    if (Path(out) / "features.json").exists():
        return print(f"{out} is complete") if os.environ.get("RANK", "0") == "0" else None
    rank, world, wait = start_processes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    tower = CLIPVisionTower.from_pretrained(vision, device=device)
    records, left_out = read_records(parse_sources(data))
    for what, count in left_out.items() if rank == 0 else ():
        print(f"left out: {count} {what}")
    write_features(records, out, tower, geometry, frames, batch, skip_bad, (rank, world, wait))
    if world > 1:
        dist.destroy_process_group()
