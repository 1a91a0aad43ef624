"""Count the COCO images to train on that benchmarks test.

    python -m tools.overlap --data instances_train2017.json@train2017 coco_pope_random.json v2_OpenEnded_val2014_questions.json
"""

import argparse
import sys

from formats.annotations import coco_id, image_ids, image_ids_of, parse_sources, read_records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("benchmarks", nargs="+", help="files of benchmarks: POPE, VQAv2, RefCOCO as JSON, ...")
    add("--data", required=True, help="annotation files, separated by commas: FILE, or FILE@IMAGES")
    add("--images", default="", help="folder or zip of the images of every FILE without @IMAGES")
    add("--exclude", default="", help="files that name images not to train on, separated by commas")
    args = parser.parse_args(argv)
    records, _ = read_records(parse_sources(args.data, args.images), image_ids_of(args.exclude))
    ours = {coco_id(record.image) for record in records} - {None}
    print(f"{len(records)} records to train on, {len(ours)} of them COCO images")
    for benchmark in args.benchmarks:
        theirs = image_ids(benchmark)
        print(f"{benchmark}: {len(ours & theirs)} of its {len(theirs)} images are among them")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tools.overlap: {error}")
