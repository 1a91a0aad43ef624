"""Print training examples as the model reads them: tokens with loss between « and », one line per question.

    python -m tools.show --coco annotations/instances_train2017.json --images train2017
    python -m tools.show --data localize.json@train2017,chat.json@coco --words description --number 5

data, coco  annotation files, separated by commas: FILE, or FILE@IMAGES*WEIGHT
tokenizer   folder with tokenizer.model or tokenizer.json, or ORG/NAME on the hub
template    v1: stage 2; plain: captions of stage 1
words       what names an object
objectives  of data.OBJECTIVES, separated by commas, or none
number      how many images
"""

from typing import Literal

from clip_vit import CLIPVisionConfig
from coords import GEOMETRIES, KINDS, CoordFormat
from data import LOCATIONS, WORDS, Examples, Wording, marked
from formats.annotations import parse_sources, read_records
from formats.files import some
from formats.schema import counted
from llama import read_tokenizer
from model import LocVLMConfig
from tools import command
from train import TrainConfig


def show(data, images="", tokenizer="tiny/llama", template: Literal["v1", "plain"] = "v1", kind: Literal[KINDS] = "ivb",
         location: Literal[*LOCATIONS] = "box", words: Literal[WORDS] = "name", objectives="loc,neg,rev", side=224,
         geometry: Literal[GEOMETRIES] = "squash", number=3, seed=0):  # fmt: skip
    records, skipped = read_records(parse_sources(data, images))
    if clips := [record.id for record in records if record.is_clip]:
        raise ValueError(f"{len(clips)} records are about clips ({some(clips)}); train.py --stages 4 --dry-run shows one")
    wording = Wording(CoordFormat(kind, side, geometry), TrainConfig(objectives=objectives).objective_list, location, words)
    config, tokenizer = LocVLMConfig(CLIPVisionConfig(image_size=side)), read_tokenizer(tokenizer)
    examples = Examples(records, tokenizer, config, wording, template=template, seed=seed)
    for index in range(min(number, len(examples.records))):
        row, image, record = examples.row(*examples.order(index))
        size = f"{record.size[0]} x {record.size[1]} px" if any(record.size) else "size unknown"
        shape = f"{size} -> {tuple(image.shape)}" if record.image else "text only"
        print(f"--- {record.id}  {record.image}  {shape}, {len(row['input_ids'])} tokens", marked(tokenizer, row), sep="\n")
    print(counted(skipped), end="")


main = command(__name__, show)
