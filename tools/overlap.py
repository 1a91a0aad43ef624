"""Count the COCO images of the training data that benchmarks ask about too.

    python -m tools.overlap --data annotations/instances_train2017.json@train2017 \\
        coco_pope_random.json v2_OpenEnded_val2014_questions.json

benchmarks  files of benchmarks: POPE, VQAv2, RefCOCO's instances.json, ...
"""

from formats.annotations import coco_id, image_ids, image_ids_of, parse_sources, read_records
from tools import command


def overlap(*benchmarks, data, images="", exclude=""):
    records, _ = read_records(parse_sources(data, images), image_ids_of(exclude))
    ours = {coco_id(record.image) for record in records} - {None}
    print(f"{len(records)} records to train on, {len(ours)} of them COCO images")
    for benchmark in benchmarks:
        theirs = image_ids(benchmark)
        print(f"{benchmark}: {len(ours & theirs)} of its {len(theirs)} images are among them")


main = command(__name__, overlap)
