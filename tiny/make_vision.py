"""Train the tiny tower that replaces CLIP: `python -m tiny.make_vision` writes tiny/clip (HF format), 30 minutes on two cores.

A ViT of CLIP's architecture learns the shapes world patch by patch. Its features hold, in fixed random directions, name and
colour of the shape whose box covers the patch, and that box's sides; of background nothing, and other directions stay small. So
a patch holds what a bag of words holds for the tiny LLaMA: a linear adapter can turn one into the other. LocVLM reads the
last layer but one, so the last block stays as drawn. Training on whole images made features without places (LOG.md).
"""

import math
import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from clip_vit import CLIPVisionTower, preprocess
from coords import iou
from formats.fast_cpu import keep_freed_memory
from formats.files import run_command, write_json
from formats.weights import write_tensors
from model import VARIANTS
from tiny.shapes import COLOURS, NAMES, draw_scene

FOLDER = Path(__file__).parent / "clip"
CONFIG, FORMAT = VARIANTS["tiny"].vision_config, VARIANTS["tiny"].coord_format()
GRID = FORMAT.representation.grid  # patches along each axis
CODE = len(NAMES) + len(COLOURS) + 4  # numbers that a patch holds: which name, which colour, sides
WORD, SIDE = 6.0, 12.0  # how large a name or colour is in the features, and the width of the image
IMAGES, HELD_OUT, STEPS, BATCH, LR = 12000, 500, 4000, 64, 1.5e-3


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


def codes(boxes_unit, names, colours):
    """Return what each patch should hold, (B, P, CODE), and whether a shape covers it, (B, P): the one that covers most."""
    box, cell = boxes_unit * GRID, torch.arange(GRID)  # (B, 4 shapes, 4)
    overlap = torch.minimum(box[..., 2:, None], cell + 1.0) - torch.maximum(box[..., :2, None], cell.float())
    columns, rows = overlap.clamp(min=0).unbind(2)  # (B, 4, grid)
    cover = (rows[..., None] * columns[..., None, :]).flatten(2)  # (B, 4, P)
    most, which = cover.where(names[..., None] >= 0, 0.0).max(1)  # (B, P)
    words = [F.one_hot(kind.gather(1, which).clamp(min=0), len(of)) for kind, of in ((names, NAMES), (colours, COLOURS))]
    words = WORD * (0.4 + 0.6 * most[..., None]) * torch.cat(words, -1)  # weaker at the edges of a shape
    sides = SIDE * (boxes_unit.gather(1, which[..., None].expand(-1, -1, 4)) - 0.5)
    is_shape = most > 0.15
    return torch.cat([words, sides], -1) * is_shape[..., None], is_shape


@torch.no_grad()
def exam(tower, directions, images, boxes_unit, names, colours):
    """Read the patch at the centre of each shape: (share of right names, mean IoU). clip.log calls it "gate"."""
    read = tower(images.float()) @ directions.T  # (N, P, CODE)
    image, shape = (names >= 0).nonzero(as_tuple=True)
    truth_unit = boxes_unit[image, shape]
    column, row = ((truth_unit[:, :2] + truth_unit[:, 2:]) / 2 * GRID).long().unbind(1)
    read = read[image, row * GRID + column]
    ious = [iou(a, b) for a, b in zip((read[:, -4:] / SIDE + 0.5).tolist(), truth_unit.tolist(), strict=True)]
    return (read[:, : len(NAMES)].argmax(-1) == names[image, shape]).float().mean().item(), sum(ious) / len(ious)


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
    keep_freed_memory()
    data = paint(IMAGES, "tower train")
    tower, width = CLIPVisionTower(CONFIG), CONFIG.hidden_size
    directions = nn.init.orthogonal_(torch.empty(CODE, width))
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
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(STEPS):
        pick = torch.randint(len(data[0]), (BATCH,))
        images, boxes_unit, names, colours = (part[pick] for part in data)
        images = images.float() * (1 + 0.1 * torch.randn(BATCH, 1, 1, 1)) + 0.1 * torch.randn(BATCH, 3, 1, 1)
        if step % 2:  # mirrored: each shape is its own mirror image
            x1, y1, x2, y2 = boxes_unit.unbind(-1)
            images, boxes_unit = images.flip(3), torch.stack([1 - x2, y1, 1 - x1, y2], -1)
        code, is_shape = codes(boxes_unit, names, colours)
        features = tower(images)  # (B, P, Dv)
        read = features @ directions.T  # (B, P, CODE)
        words, sides = (read - code).split((CODE - 4, 4), -1)
        rest = features.square().mean() - read.square().sum(-1).mean() / width  # mean square outside of the directions
        # absolute errors keep teaching a side that is nearly right
        loss = words.square().mean() + 2 * sides[is_shape].abs().mean() + 0.5 * sides[~is_shape].abs().mean() + 0.003 * rest
        rate = LR * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        update(loss, {optimizer: rate}, tower.parameters())
        if step % 100 == 99:
            error = sides[is_shape].abs().mean() / SIDE
            print(f"step {step + 1} loss {loss:.4f}, words {words.square().mean():.4f}, sides {error:.2%} of the image", flush=True)
    save(FOLDER, tower, "vision_model.", model_type="clip_vision_model", architectures=["CLIPVisionModel"])
    name, box = exam(tower, directions, *paint(HELD_OUT, "tower held out"))
    print(f"exam: at the centres of shapes, names {name:.1%}, mean IoU {box:.1%}")


if __name__ == "__main__":
    run_command("tiny.make_vision", main)
