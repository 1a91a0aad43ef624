"""Train the tiny tower that replaces CLIP: `python -m tiny.make_vision` writes tiny/clip (HF format), in an hour on two cores.

A ViT of CLIP's architecture learns the shapes world region by region: for every patch, linear heads predict the name and
colour of the shape whose box covers it (or "nothing"), and the four sides of that box, in the image and as distances from the
patch. The same heads read the last layer and the last but one; LocVLM reads the last but one. Training on whole images made
features without places (LOG.md). The gate at the end: from the patch at a shape's centre, the heads must find its name and box.
"""

import math
import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from clip_vit import CLIPVisionTower, preprocess
from coords import iou
from formats.files import run_command, write_json
from formats.weights import write_tensors
from model import VARIANTS
from tiny.shapes import COLOURS, NAMES, draw_scene

FOLDER = Path(__file__).parent / "clip"
CONFIG, FORMAT = VARIANTS["tiny"].vision_config, VARIANTS["tiny"].coord_format()
GRID, SIZES = FORMAT.grid, (len(NAMES) + 1, len(COLOURS), 4, 4)  # patches along each axis; what the heads predict for each
IMAGES, STEPS, BATCH, LR = 12000, 3000, 64, 1.5e-3


def paint(count, seed):
    """Paint scenes: images (N, 3, S, S) in fp16, boxes_unit (N, 4 shapes, 4), names and colours (N, 4), -1 for no shape."""
    images = torch.empty(count, 3, CONFIG.image_size, CONFIG.image_size, dtype=torch.float16)
    boxes_unit, names, colours = torch.zeros(count, 4, 4), torch.full((count, 4), -1), torch.full((count, 4), -1)
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        scene = draw_scene(rng)
        images[i] = preprocess(scene.render(rng), CONFIG)
        for j, shape in enumerate(scene.shapes):
            boxes_unit[i, j] = torch.tensor(FORMAT.unit_from_px(shape.box_px, scene.size))
            names[i, j], colours[i, j] = NAMES.index(shape.name), list(COLOURS).index(shape.colour)
    return images, boxes_unit, names, colours


def patch_targets(boxes_unit, names, colours):
    """Find the shape that covers most of each patch: its name (len(NAMES): nothing), colour, and box in cells, (B, P, ...)."""
    box, cell = boxes_unit * GRID, torch.arange(GRID)  # (B, 4 shapes, 4)
    overlap = torch.minimum(box[..., 2:, None], cell + 1.0) - torch.maximum(box[..., :2, None], cell.float())
    columns, rows = overlap.clamp(min=0).unbind(2)  # (B, 4, grid)
    cover = (rows[..., None] * columns[..., None, :]).flatten(2)  # (B, 4, P)
    most, which = cover.where(names[..., None] >= 0, 0.0).max(1)  # (B, P)
    name = torch.where(most > 0.15, names.gather(1, which), len(NAMES))
    return name, colours.gather(1, which), box.gather(1, which[..., None].expand(-1, -1, 4))


def patch_loss(guess, name, colour, box):
    """What the heads predict (B, P, sum(SIZES)) and the targets of `patch_targets` -> the sum of four losses."""
    name_logits, colour_logits, box_guess, distance_guess = guess.split(SIZES, -1)
    centre, on = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).flip(1) + 0.5, name < len(NAMES)  # (P, 2)
    distances = box - centre.repeat(1, 2)  # sides of the box relative to the patch, in cells
    loss = F.cross_entropy(name_logits.flatten(0, 1), name.flatten()) + F.cross_entropy(colour_logits[on], colour[on])
    loss = loss + F.smooth_l1_loss(box_guess[on], box[on], beta=0.2)
    return loss + F.smooth_l1_loss(distance_guess[on], distances[on], beta=0.2)


def both_layers(tower, images):
    """Return the patches of the last layer but one, and of the last (post-normalised)."""
    *blocks, last = tower.encoder["layers"]
    x = nn.Sequential(*blocks)(tower.pre_layrnorm(tower.embeddings(images)))
    return x[:, 1:], tower.post_layernorm(last(x))[:, 1:]


@torch.no_grad()
def gate(tower, heads, images, boxes_unit, names, colours):
    """Ask the heads at the centre of each shape: (share of right names, of boxes with IoU >= 0.5)."""
    name_logits, _, boxes, _ = heads(tower(images.float())).split(SIZES, -1)  # (N, P, ...)
    image, shape = (names >= 0).nonzero(as_tuple=True)
    truth = boxes_unit[image, shape] * GRID  # in cells
    column, row = ((truth[:, :2] + truth[:, 2:]) / 2).long().unbind(1)
    patch = row * GRID + column
    is_right = name_logits[image, patch].argmax(-1) == names[image, shape]
    hits = [iou(a, b) >= 0.5 for a, b in zip(boxes[image, patch].tolist(), truth.tolist(), strict=True)]
    return is_right.float().mean().item(), sum(hits) / len(hits)


def update(loss, rates, clipped):
    """Take a training step: rates {optimizer: its learning rate now}, parameters whose gradients are clipped to norm 1."""
    for optimizer, lr in rates.items():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(clipped, 1.0)
    for optimizer in rates:
        optimizer.step()


def save(folder, module, prefix, **config):
    """Write a module's weights, in half precision and under `prefix` (a head has none), and its config.json."""
    tensors = {("" if k.startswith("lm_head") else prefix) + k: v.half() for k, v in module.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)
    sizes = {k: v for k, v in vars(module.config).items() if v is not None and k not in ("image_mean", "image_std")}
    write_json(folder / "config.json", config | sizes)


def main():
    torch.manual_seed(0)
    data = paint(IMAGES, "tower train")
    tower, width = CLIPVisionTower(CONFIG), CONFIG.hidden_size
    heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(SIZES)))  # one linear layer reads all from a patch
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.04)
            nn.init.zeros_(module.bias)
    # positions start as sine and cosine of row and column, zero for the class token
    quarter = width // 4
    angles = torch.arange(GRID).float()[:, None] * torch.exp(-math.log(100.0) * torch.arange(quarter).float() / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], 1) * 0.5  # (grid, Dv / 2)
    positions = torch.cat([axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)], 1)  # (P, Dv)
    tower.embeddings.position_embedding.weight.data.zero_()[1:] = positions
    params = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(STEPS):
        pick = torch.randint(len(data[0]), (BATCH,))
        images, boxes_unit, names, colours = (part[pick] for part in data)
        images = images.float() * (1 + 0.1 * torch.randn(BATCH, 1, 1, 1)) + 0.1 * torch.randn(BATCH, 3, 1, 1)
        if step % 2:  # mirrored: each shape is its own mirror image
            x1, y1, x2, y2 = boxes_unit.unbind(-1)
            images, boxes_unit = images.flip(3), torch.stack([1 - x2, y1, 1 - x1, y2], -1)
        targets = patch_targets(boxes_unit, names, colours)
        loss = sum(patch_loss(heads(features), *targets) for features in both_layers(tower, images))
        update(loss, {optimizer: LR * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / STEPS))}, params)
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss:.4f}", flush=True)
    save(FOLDER, tower, "vision_model.", model_type="clip_vision_model", architectures=["CLIPVisionModel"])
    name, box = gate(tower, heads, *paint(500, "tower held out"))
    print(f"gate: at the centres of shapes, names {name:.1%} (>= 95%), acc@0.5 {box:.1%} (>= 80%)")


if __name__ == "__main__":
    run_command("tiny.make_vision", main)
