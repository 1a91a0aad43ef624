"""Print training examples as the model reads them: tokens with loss between « and », one line per question.

    python -m tools.show --coco instances_train2017.json --images train2017
    python -m tools.show --data localize.json@train2017,chat.json@coco --words description --number 5
"""

import argparse
import sys

from clip_vit import CLIPVisionConfig
from coords import KINDS, CoordFormat
from data import REPR, Examples, Wording, marked
from formats.annotations import parse_sources, read_records
from llama import read_tokenizer
from model import LocVLMConfig


def show(args):
    """Print the first examples of an epoch, and how much of the data is skipped."""
    records, skipped = read_records(parse_sources(args.data, args.images))
    wording = Wording(CoordFormat(args.kind, args.side), location=args.location, words=args.words)
    config, tokenizer = LocVLMConfig(CLIPVisionConfig(image_size=args.side)), read_tokenizer(args.tokenizer)
    examples = Examples(records, tokenizer, config, wording, template=args.template, seed=args.seed)
    for index in range(min(args.number, len(examples.records))):
        row, image, record = examples.row(*examples.order(index))
        size = f"{record.size[0]} x {record.size[1]} px" if any(record.size) else "size unknown"
        shape = f"{size} -> {tuple(image.shape)}" if record.image else "text only"
        print(f"--- {record.id}  {record.image}  {shape}, {len(row['input_ids'])} tokens")
        print(marked(tokenizer, row))
    for reason, count in skipped.items():
        print(f"skipped: {count} {reason}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", "--coco", required=True, help="annotation files, separated by commas: FILE, or FILE@IMAGES*WEIGHT")
    add("--images", default="", help="folder or zip of the images of every FILE without @IMAGES")
    add("--tokenizer", default="tiny/llama", help="folder with tokenizer.model (default: tiny/llama)")
    add("--template", choices=("v1", "plain"), default="v1", help="v1: stage 2; plain: captions of stage 1 (default: v1)")
    add("--kind", choices=KINDS, default="ivb", help="how coordinates are written (default: ivb)")
    add("--location", choices=REPR, default="box", help="what a location is (default: box)")
    add("--words", choices=("name", "description", "mixed"), default="name", help="what names an object (default: name)")
    add("--side", type=int, default=224, help="side of the model's square image (default: 224)")
    add("--number", type=int, default=3, help="how many images (default: 3)")
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    show(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tools.show: {error}")
