"""Train the tiny tower that replaces CLIP: `python -m tiny.make_vision` writes tiny/clip (HF format).

A ViT of CLIP's architecture learns the shapes world region by region: for every patch, linear heads predict the name and
colour of the shape whose box covers it (or "nothing"), and the four sides of that box, in the image and as distances from the
patch. The same heads read the last layer and the last but one; LocVLM reads the last but one. Training on whole images made
features without places (LOG.md).

The gate at the end tests what stage 2 needs: from the features of the patch at a shape's centre alone, a small MLP must name
the shape and find its box.
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

from clip_vit import CLIPVisionTower, preprocess
from coords import CoordFormat, iou
from formats.files import write_json
from formats.weights import write_tensors
from model import VARIANTS
from tiny.shapes import COLOURS, NAMES, draw_scene, render

FOLDER = Path(__file__).parent / "clip"
CONFIG = VARIANTS["tiny"].vision_config
GRID = CONFIG.image_size // CONFIG.patch_size
IMAGES, STEPS, BATCH, LR = 12000, 3000, 64, 1.5e-3


def paint(count, seed):
    """Paint scenes: images (N, 3, S, S) in fp16, boxes_unit (N, 4 shapes, 4), names and colours (N, 4), -1 for no shape."""
    fmt = CoordFormat(side=CONFIG.image_size)
    images = torch.empty(count, 3, CONFIG.image_size, CONFIG.image_size, dtype=torch.float16)
    boxes_unit, names, colours = torch.zeros(count, 4, 4), torch.full((count, 4), -1), torch.full((count, 4), -1)
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        scene = draw_scene(rng)
        images[i] = preprocess(render(scene, rng), CONFIG)
        for j, shape in enumerate(scene.shapes):
            boxes_unit[i, j] = torch.tensor(fmt.unit_from_px(shape.box_px, scene.size))
            names[i, j], colours[i, j] = NAMES.index(shape.name), list(COLOURS).index(shape.colour)
    return images, boxes_unit, names, colours


def patch_targets(boxes_unit, names, colours):
    """Find the shape that covers most of each patch: its name (len(NAMES): nothing), colour, and box in cells, (B, P, ...)."""
    edge = torch.arange(GRID + 1).float()
    box = boxes_unit * GRID  # (B, 4, 4)

    def overlap(low, high):
        return (torch.minimum(high[..., None], edge[1:]) - torch.maximum(low[..., None], edge[:-1])).clamp(min=0)

    rows, columns = overlap(box[..., 1], box[..., 3]), overlap(box[..., 0], box[..., 2])  # (B, 4, grid)
    cover = rows[..., :, None] * columns[..., None, :]  # (B, 4, row, column)
    cover = torch.where(names[..., None, None] >= 0, cover, 0.0).flatten(2)  # (B, 4, P)
    most, which = cover.max(1)  # (B, P)
    name = torch.where(most > 0.15, names.gather(1, which), len(NAMES))
    return name, colours.gather(1, which), box.gather(1, which[..., None].expand(-1, -1, 4))


class Heads(nn.Module):
    """One linear layer that predicts, for each patch, name, colour, box, and the box's distances from the patch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(CONFIG.hidden_size)
        self.ask = nn.Linear(CONFIG.hidden_size, len(NAMES) + 1 + len(COLOURS) + 8)

    def loss(self, features, name, colour, box):
        """Features (B, P, Dv) and the targets of `patch_targets` -> the sum of four losses."""
        cells = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        centre = torch.stack(cells, -1).flip(-1).view(-1, 2) + 0.5  # (P, 2): x, y
        sizes = [len(NAMES) + 1, len(COLOURS), 4, 4]
        name_logits, colour_logits, box_guess, distance_guess = self.ask(self.norm(features)).split(sizes, -1)
        on = name < len(NAMES)
        distances = box - centre.repeat(1, 2)  # sides of the box relative to the patch, in cells
        return (
            F.cross_entropy(name_logits.flatten(0, 1), name.flatten())
            + F.cross_entropy(colour_logits[on], colour[on])
            + F.smooth_l1_loss(box_guess[on], box[on], beta=0.2)
            + F.smooth_l1_loss(distance_guess[on], distances[on], beta=0.2)
        )


def sinusoids(width):
    """Return initial positions (1 + P, width): sine and cosine of row and column, zero for the class token."""
    rates = torch.exp(-math.log(100.0) * torch.arange(width // 4).float() / (width // 4))
    angles = torch.arange(GRID).float()[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, width / 2)
    table = torch.cat([axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)], -1).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), table]) * 0.5


def both_layers(tower, images):
    """Return the patches of the last layer but one, and of the last (post-normalised)."""
    x = tower.pre_layrnorm(tower.embeddings(images))
    for block in tower.encoder["layers"][:-1]:
        x = block(x)
    return x[:, 1:], tower.post_layernorm(tower.encoder["layers"][-1](x))[:, 1:]


def centre_features(tower, images, boxes_unit, names, colours):
    """Return for each shape the features of the patch at its centre (N, Dv), its name (N) and its box_unit (N, 4)."""
    with torch.no_grad():
        features = torch.cat([tower(part.float()) for part in images.split(256)])
    image, shape = (names >= 0).nonzero(as_tuple=True)
    boxes_unit = boxes_unit[image, shape]
    column, row = ((boxes_unit[:, :2] + boxes_unit[:, 2:]) / 2 * GRID).long().unbind(1)
    return features[image, row * GRID + column], names[image, shape], boxes_unit


def gate(tower, train, held_out, steps=1500):
    """Train a probe from a shape's centre patch to its name and box; return its name accuracy and acc@0.5 on `held_out`."""
    x, name, box_unit = centre_features(tower, *train)
    layers = nn.LayerNorm(x.shape[1]), nn.Linear(x.shape[1], 256), nn.GELU(), nn.Linear(256, len(NAMES) + 4)
    probe = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        pick = torch.randint(len(x), (256,))
        guess = probe(x[pick])
        loss = F.cross_entropy(guess[:, :-4], name[pick]) + 10 * F.l1_loss(guess[:, -4:], box_unit[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, name, box_unit = centre_features(tower, *held_out)
    with torch.no_grad():
        guess = probe(x)
    hits = [iou(a, b) >= 0.5 for a, b in zip(guess[:, -4:].tolist(), box_unit.tolist(), strict=True)]
    return (guess[:, :-4].argmax(-1) == name).float().mean().item(), np.mean(hits)


def initialise(tower):
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.04)
            nn.init.zeros_(module.bias)
    tower.embeddings.position_embedding.weight.data.copy_(sinusoids(CONFIG.hidden_size))


def draw_batch(data, step):
    """Draw a batch, vary contrast and colours, and mirror every other batch (each shape is its own mirror image)."""
    pick = torch.randint(len(data[0]), (BATCH,))
    images, boxes_unit, names, colours = (part[pick] for part in data)
    images = images.float() * (1 + 0.1 * torch.randn(BATCH, 1, 1, 1)) + 0.1 * torch.randn(BATCH, 3, 1, 1)
    if step % 2:
        x1, y1, x2, y2 = boxes_unit.unbind(-1)
        images, boxes_unit = images.flip(3), torch.stack([1 - x2, y1, 1 - x1, y2], -1)
    return images, patch_targets(boxes_unit, names, colours)


def save(tower):
    """Write the checkpoint in half precision."""
    tensors = {f"vision_model.{k}": v.half() for k, v in tower.state_dict().items()}
    write_tensors(FOLDER / "model.safetensors", tensors)
    config = {k: v for k, v in vars(CONFIG).items() if k not in ("image_mean", "image_std")}  # CLIP's own, as in its config
    write_json(FOLDER / "config.json", {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **config})


def main(steps=STEPS):
    torch.manual_seed(0)
    began, running = time.time(), 0.0
    data, held_out = paint(IMAGES, "tower train"), paint(500, "tower held out")
    print(f"painted {IMAGES} scenes in {time.time() - began:.0f} s", flush=True)
    tower, heads = CLIPVisionTower(CONFIG), Heads()
    initialise(tower)
    params = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        lr = LR * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        images, targets = draw_batch(data, step)
        loss = sum(heads.loss(features, *targets) for features in both_layers(tower, images))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            mean = running / (1 - 0.98 ** (step + 1))
            print(f"step {step + 1} loss {mean:.4f} {time.time() - began:.0f} s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            save(tower)
    tower.eval()
    name, box = gate(tower, tuple(part[:6000] for part in data), held_out)
    print(f"gate: centre-patch probe names {name:.1%} (>= 95%), acc@0.5 {box:.1%} (>= 80%), {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
