"""Train the tiny tower that stands in for CLIP: `python tiny/make_vision.py` writes tiny/clip (HF format).

A ViT of CLIP's architecture learns the shapes world region by region: every patch is asked for the name and the colour
of the shape whose box covers it (or "nothing"), and for that box's four sides, in the image and as distances from the patch. Both the
last layer and the last but one are asked, by the same linear heads; LocVLM reads the last but one. Purely image-level
training gave features without places (LOG.md).

The gate at the end is what stage 2 needs: from the features of the patch at a shape's centre alone, a small MLP must
name the shape and give its box.
"""

import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from checkpoint import write_json, write_tensors
from shapes import COLOURS, NAMES, draw_scene, render

from clip_vit import CLIPVisionTower, preprocess
from coords import CoordFormat, iou
from model import VARIANTS

HERE = Path(__file__).parent
CONFIG = VARIANTS["tiny"].vision_config
GRID = CONFIG.image_size // CONFIG.patch_size
IMAGES, STEPS, BATCH, LR = 12000, 3000, 64, 1.5e-3


def paint(count, seed):
    """Scenes -> images (N, 3, S, S) in fp16, boxes in units of the square (N, 4 shapes, 4), names and colours (N, 4), -1 where none."""
    fmt = CoordFormat(side=CONFIG.image_size)
    images = torch.empty(count, 3, CONFIG.image_size, CONFIG.image_size, dtype=torch.float16)
    boxes_unit, names, colours = torch.zeros(count, 4, 4), torch.full((count, 4), -1), torch.full((count, 4), -1)
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        scene = draw_scene(rng)
        images[i] = preprocess(render(scene, rng), CONFIG.image_size)
        for j, shape in enumerate(scene.shapes):
            boxes_unit[i, j] = torch.tensor(fmt.unit_from_px(shape.box_px, scene.size))
            names[i, j], colours[i, j] = NAMES.index(shape.name), list(COLOURS).index(shape.colour)
    return images, boxes_unit, names, colours


def patch_targets(boxes_unit, names, colours):
    """For each patch: name (len(NAMES) = nothing), colour, box in grid cells; of the shape whose box covers most of it."""
    edge = torch.arange(GRID + 1).float()
    box = boxes_unit * GRID  # (B, 4, 4)

    def along(low, high):
        return (torch.minimum(high[..., None], edge[1:]) - torch.maximum(low[..., None], edge[:-1])).clamp(min=0)

    cover = (
        along(box[..., 1], box[..., 3])[..., :, None] * along(box[..., 0], box[..., 2])[..., None, :]
    )  # (B, 4, row, column)
    cover = torch.where(names[..., None, None] >= 0, cover, 0.0).flatten(2)  # (B, 4, P)
    most, which = cover.max(1)
    name = torch.where(most > 0.15, names.gather(1, which), len(NAMES))
    return name, colours.gather(1, which), box.gather(1, which[..., None].expand(-1, -1, 4)), most


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(CONFIG.hidden_size)
        self.ask = nn.Linear(CONFIG.hidden_size, len(NAMES) + 1 + len(COLOURS) + 8)

    def loss(self, features, name, colour, box, most):
        centre = (
            torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).flip(-1).view(-1, 2)
            + 0.5
        )
        said_name, said_colour, said_box, said_distances = self.ask(self.norm(features)).split(
            [len(NAMES) + 1, len(COLOURS), 4, 4], -1
        )
        on = name < len(NAMES)
        distances = box - centre.repeat(1, 2)  # sides of the box as seen from the patch, in cells
        return (
            F.cross_entropy(said_name.flatten(0, 1), name.flatten())
            + F.cross_entropy(said_colour[on], colour[on])
            + F.smooth_l1_loss(said_box[on], box[on], beta=0.2)
            + F.smooth_l1_loss(said_distances[on], distances[on], beta=0.2)
        )


def sinusoids(width):
    """Position table (1 + P, width) to start from: sine and cosine of row and column; the class token's row is zero."""
    place = torch.arange(GRID).float()[:, None] * torch.exp(
        -math.log(100.0) * torch.arange(width // 4).float() / (width // 4)
    )
    axis = torch.cat([place.sin(), place.cos()], 1)  # (grid, width / 2)
    table = torch.cat([axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)], -1).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), table]) * 0.5


def both_layers(tower, images):
    """Patches of the last layer but one, and of the last (post-normalised)."""
    x = tower.pre_layrnorm(tower.embeddings(images))
    for block in tower.encoder["layers"][:-1]:
        x = block(x)
    return x[:, 1:], tower.post_layernorm(tower.encoder["layers"][-1](x))[:, 1:]


def gate(tower, train, held_out):
    """Train the probe on `train`, give its name accuracy and acc@0.5 on `held_out`: features of the centre patch -> name, box."""

    def rows(data):
        images, boxes_unit, names, _ = data
        with torch.no_grad():
            features = torch.cat([tower(part.float()) for part in images.split(256)])
        image, shape = (names >= 0).nonzero(as_tuple=True)
        boxes_unit = boxes_unit[image, shape]
        column, row = (((boxes_unit[:, :2] + boxes_unit[:, 2:]) / 2 * GRID).long()).unbind(1)
        return features[image, row * GRID + column], names[image, shape], boxes_unit

    x, name, box_unit = rows(train)
    probe = nn.Sequential(
        nn.LayerNorm(x.shape[1]), nn.Linear(x.shape[1], 256), nn.GELU(), nn.Linear(256, len(NAMES) + 4)
    )
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 1500)
        pick = torch.randint(len(x), (256,))
        said = probe(x[pick])
        loss = F.cross_entropy(said[:, :-4], name[pick]) + 10 * F.l1_loss(said[:, -4:], box_unit[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, name, box_unit = rows(held_out)
    with torch.no_grad():
        said = probe(x)
    hits = [iou(a, b) >= 0.5 for a, b in zip(said[:, -4:].tolist(), box_unit.tolist(), strict=True)]
    return (said[:, :-4].argmax(-1) == name).float().mean().item(), np.mean(hits)


def main(steps=STEPS):
    torch.manual_seed(0)
    began = time.time()
    data, held_out = paint(IMAGES, "tower train"), paint(500, "tower held out")
    print(f"painted {IMAGES} scenes in {time.time() - began:.0f} s", flush=True)
    tower, heads = CLIPVisionTower(CONFIG), Heads()
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.04)
            nn.init.zeros_(module.bias)
    tower.embeddings.position_embedding.weight.data.copy_(sinusoids(CONFIG.hidden_size))
    params = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.05, betas=(0.9, 0.98))
    running = 0.0
    for step in range(steps):
        lr = LR * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        pick = torch.randint(IMAGES, (BATCH,))
        images, boxes_unit, names, colours = (part[pick] for part in data)
        images = images.float() * (1 + 0.1 * torch.randn(BATCH, 1, 1, 1)) + 0.1 * torch.randn(BATCH, 3, 1, 1)
        if step % 2:  # mirrored: every shape is its own mirror image, its box is not
            images, boxes_unit = (
                images.flip(3),
                torch.stack(
                    [1 - boxes_unit[..., 2], boxes_unit[..., 1], 1 - boxes_unit[..., 0], boxes_unit[..., 3]], -1
                ),
            )
        targets = patch_targets(boxes_unit, names, colours)
        loss = sum(heads.loss(features, *targets) for features in both_layers(tower, images))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            print(
                f"step {step + 1} loss {running / (1 - 0.98 ** (step + 1)):.4f} {time.time() - began:.0f} s", flush=True
            )
        if step % 1000 == 999 or step == steps - 1:
            write_tensors(
                HERE / "clip" / "model.safetensors",
                {f"vision_model.{k}": v.half() for k, v in tower.state_dict().items()},
            )
            write_json(
                HERE / "clip" / "config.json",
                {
                    "model_type": "clip_vision_model",
                    "architectures": ["CLIPVisionModel"],
                    **{k: getattr(CONFIG, k) for k in CONFIG.__dataclass_fields__},
                },
            )
    tower.eval()
    name, box = gate(tower, tuple(part[:6000] for part in data), held_out)
    print(
        f"gate: centre-patch probe names {name:.1%} (>= 95%), acc@0.5 {box:.1%} (>= 80%), {time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
