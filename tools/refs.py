"""Make training data from RefCOCO's refs, for the fine-tuned models of the paper's Tab. 10.

    python -m tools.refs "refs(unc).p" refs_train.json --split train

Sentences lose their article, because RevLoc's "There is a" adds one: train with --words description.

file       refs(unc).p, refs(umd).p, or another form that tasks/refcoco.py reads
instances  instances.json (default: beside the pickle)
split      split of the file
"""

import random
import re
from collections import Counter
from pathlib import Path

from coords import CoordFormat
from data import Object, Record, Wording
from formats.files import write_json
from formats.journal import require_new
from formats.schema import counted, try_box
from tasks.refcoco import read_refs
from tools import command
from tools.prefcoco import conversations


def refs(file, out, /, instances=None, split="train", seed=0):
    require_new(out)
    chosen, skipped, objects = read_refs(file, instances), Counter(), {}
    splits = Counter(ref["split"] for ref in chosen)
    for ref in chosen:
        if not ref["size"]:
            raise ValueError(f"{file} states no size of {ref['file_name']}, which a box needs; pass RefCOCO's pickle")
        if ref["split"] == split and (box_px := try_box(ref["bbox"], ref["size"], skipped, "refs")):
            about = objects.setdefault((ref["file_name"], tuple(ref["size"])), {})
            for text in filter(None, (" ".join(text.split()).rstrip(". ") for _, text in ref["sentences"])):
                bare = re.sub("(?i)^(an?|the) ", "", text)
                about.setdefault(bare.casefold(), {})[box_px] = Object(text, box_px, bare)
    if not objects:
        raise ValueError(f"{file} has no ref of split {split}, but {', '.join(f'{n} ({k})' for n, k in splits.items())}")
    wording, rows = Wording(CoordFormat("ivb", 224), ("loc", "rev"), words="description"), []
    for (image, size), about in objects.items():
        alone = tuple(o for group in about.values() if len(group) == 1 for o in group.values())
        skipped["sentences about two objects of an image"] += len(about) - len(alone)
        rows += conversations(Record(Path(image).stem, Path(image), size, alone), wording, random.Random(f"{seed} {image}"))
    write_json(out, rows)
    print(counted(skipped), end="")
    print(f"{out}: {len(rows)} conversations about {len(objects)} images")


main = command(__name__, refs)
