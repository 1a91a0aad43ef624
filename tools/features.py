"""Keep on disk what a CLIP tower makes of every image or clip, for training runs that read each more than once.

    torchrun --nproc-per-node 8 -m tools.features --data localize.json@train2017 --vision clip-vit-large-patch14 --out features
    torchrun train.py --data localize.json@train2017 --features features ...

Takes P x Dv x 2 bytes per image: half a megabyte for ViT-L/14 at 224 px. A killed run resumes with the same command.

vision    CLIP: folder, ORG/NAME on the hub, or OpenAI's .pt
frames    frames per clip, which is pooled to so many + P tokens (video.pool); 0: images, of P tokens
skip_bad  skip and count images that cannot be read, or have another size than their file says
"""

import os
from typing import Literal

from clip_vit import CLIPVisionTower
from coords import GEOMETRIES
from formats.annotations import parse_sources, read_records
from formats.features import write_features
from formats.journal import join_processes
from formats.processes import pick_device
from formats.schema import counted
from tools import command, positive


def features(data, out, vision, geometry: Literal[GEOMETRIES] = "squash", frames=0, batch: positive = 32, skip_bad=False,
             images=""):  # fmt: skip
    processes = rank, *_ = join_processes()
    tower = CLIPVisionTower.from_pretrained(vision, device=pick_device(os.environ.get("LOCAL_RANK", 0)))
    records, skipped = read_records(parse_sources(data, images))
    print(counted(skipped) if rank == 0 else "", end="")
    write_features(records, out, tower, geometry, frames=frames, batch=batch, skip_bad=skip_bad, processes=processes)


main = command(__name__, features)
