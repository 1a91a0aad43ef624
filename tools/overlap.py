"""TODO tools.overlap."""

from formats.annotations import coco_id, image_ids, image_ids_of, parse_sources, read_records


def overlap(args):
    """Print how many images to train on are in each benchmark."""
    records, _ = read_records(parse_sources(args.data), image_ids_of(args.exclude))
    ours = {coco_id(record.image) for record in records} - {None}
    print(f"{len(records)} records to train on, {len(ours)} of them COCO images")
    for benchmark in args.benchmarks:
        theirs = image_ids(benchmark)
        print(f"{benchmark}: {len(ours & theirs)} of its {len(theirs)} images are among them")
