"""TODO tools.show."""

from clip_vit import CLIPVisionConfig
from coords import CoordFormat
from data import Examples, Wording, marked
from formats.annotations import read_records
from llama import Tokenizer


def show(args):
    """Print examples as the model will read them."""
    records, left_out = read_records(args.sources)
    wording = Wording(CoordFormat(args.kind, args.side), location=args.location, words=args.words)
    examples = Examples(
        records,
        Tokenizer(args.tokenizer),
        CLIPVisionConfig(image_size=args.side),
        wording,
        args.template,
        seed=args.seed,
    )
    for index in range(min(args.number, len(examples.records))):
        row, image, record = examples.row(*examples.order(index))
        size = f"{record.size[0]} x {record.size[1]} px" if any(record.size) else "size not told"
        seen = f"{size} -> {tuple(image.shape)}" if record.image else "text alone"
        print(f"--- {record.id}  {record.image}  {seen}, {len(row['input_ids'])} tokens")
        print(marked(examples.tokenizer, row))
    for what, count in left_out.items():
        print(f"left out: {count} {what}")
