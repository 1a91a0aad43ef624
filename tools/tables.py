"""The paper's tables in miniature: every row trained here, on the shapes worlds, with several seeds; mean and spread.

    python tables.py 11a                 one table: 2, 4, 8, 10, 11a, 11b, 11c or 12
    python tables.py all --seeds 0,1,2   all of them

What several tables share is trained once: a run lies in runs/tables/NAME-SEED, and a table asked for again is only read.
Killed in the middle, it goes on where it was. A table is printed, and left in runs/tables/table-N.md.
"""

import argparse
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import evaluate
import train
from evaluate import folders_of
from formats.files import read_json, write_json, write_whole
from tasks.__main__ import name_of
from tasks.words import require_meteor
from tiny.moving import ensure_clips
from tiny.shapes import NAMES, SPLITS, ensure_world, write_world
from tools import features, prefcoco
from train import TrainConfig, parse_config

OUT, STILL, MOVING = Path("runs/tables"), Path("data/shapes"), Path("data/moving")
SEEN, UNSEEN = NAMES[:5], NAMES[5:]  # the shapes that tuning is about in Tab. 8, and the others
FEW, OTHER = Path("data/shapes-seen"), Path("data/shapes-unseen")  # worlds of the one and of the other
CLIPS = f"{MOVING}/clips_train.json@{MOVING}/clips,{MOVING}/conversations_train.json@{MOVING}/clips"
FEATURES = OUT / "clips-features"
IMAGES = 150  # held-out images or clips that are asked about
CAPTIONED = 1000  # training images that the stage-1 model describes


def world_data(folder, *kinds):
    """Files of a world as train.py's --data."""
    return ",".join(f"{folder}/{kind}_train.json@{folder}/images" for kind in kinds)


TOLD = f"{STILL}/images,{world_data(STILL, 'conversations')}"
SILENT = f"{world_data(FEW, 'instances')},{FEW}/silent_train.json@{FEW}/images"
TALK = world_data(STILL, "instances", "conversations")
SETTINGS = {  # name: (the setting whose run of the same seed it begins from, flags of train.py)
    "stage-1": ("", f"--stages 1 --data {world_data(STILL, 'captions')}"),
    "none": ("stage-1", f"--stages 2 --data {TALK} --objectives none"),
    "loc": ("stage-1", f"--stages 2 --data {TALK} --objectives loc"),
    "loc-neg": ("stage-1", f"--stages 2 --data {TALK} --objectives loc,neg"),
    "all": ("stage-1", f"--stages 2 --data {TALK}"),
    "nfp": ("stage-1", f"--stages 2 --data {TALK} --kind nfp"),
    "diga": ("stage-1", f"--stages 2 --data {TALK} --kind diga"),
    "point": ("stage-1", f"--stages 2 --data {TALK} --location point"),
    # Localize-Instruct of what a model said of each shape: the one to be tuned (Sec. 3.4), or a tuned one (App. C)
    "own-captions": ("stage-1", f"--stages 2 --data {OUT}/localize-stage-1-SEED.json@{TOLD} --words description"),
    "captions": ("stage-1", f"--stages 2 --data {OUT}/localize-none-SEED.json@{TOLD} --words description"),
    "captions-names": ("stage-1", f"--stages 2 --data {OUT}/localize-none-SEED.json@{TOLD} --words name"),
    "seen-none": ("stage-1", f"--stages 2 --data {world_data(FEW, 'instances', 'conversations')} --objectives none"),
    "seen-all": ("stage-1", f"--stages 2 --data {world_data(FEW, 'instances', 'conversations')}"),
    "silent-none": ("stage-1", f"--stages 2 --data {SILENT} --objectives none"),
    "silent-all": ("stage-1", f"--stages 2 --data {SILENT}"),
    "clips-adapter": ("all", f"--stages 3 --data {CLIPS} --features {FEATURES}"),
    "clips-none": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives none"),
    "clips-loc": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives loc"),
    "clips-loc-neg": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives loc,neg"),
    "clips-all": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES}"),
}
RECIPES = {  # what differs from the tiny preset, by stage: small steps learn most in little time
    "1": "",
    "2": "--batch 4 --steps 220",
    "3": "--batch 4 --steps 120",
    "4": "--batch 4 --steps 200",
}


def boxes_of(folder):
    return f"--coco {folder}/instances_val.json --images {folder}/images"


CLIP_BOXES = f"--coco {MOVING}/clips_val.json --images {MOVING}/clips"
MEASURES = {  # heading: (task of evaluate.py, its metric, flags)
    "QA": ("gqa", "contains", f"--questions {STILL}/gqa_val.json --images {STILL}/images"),
    "METEOR": (
        "refcoco",
        "METEOR 1.5",
        f"--questions {STILL}/refs_val.json --images {STILL}/images",
    ),
    "boxes": ("locpred", "acc@0.5", boxes_of(STILL)),
    "names": ("revloc", "name accuracy", boxes_of(STILL)),
    "left/right": ("spatial", "across", boxes_of(STILL)),
    "left": ("spatial", "across left", boxes_of(STILL)),
    "right": ("spatial", "across right", boxes_of(STILL)),
    "above/below": ("spatial", "along", boxes_of(STILL)),
    "ICL left/right": ("spatial", "icl across", boxes_of(STILL)),
    "ICL above/below": ("spatial", "icl along", boxes_of(STILL)),
    "is there": ("hal", "accuracy", boxes_of(STILL)),
    "is there, seen": ("hal", "accuracy", boxes_of(FEW)),
    "is there, unseen": ("hal", "accuracy", boxes_of(OTHER)),
    "video QA": (
        "activitynet-qa",
        "contains",
        f"--questions {MOVING}/q_val.json --answers {MOVING}/a_val.json --images {MOVING}/clips",
    ),
    "static boxes": ("locpred", "acc@0.5", CLIP_BOXES),
    "no such object": ("negpred", "accuracy", CLIP_BOXES),
    "clip names": ("revloc", "name accuracy", CLIP_BOXES),
    "is there, clips": ("hal", "accuracy", CLIP_BOXES),
}


@dataclass(frozen=True)
class Table:
    """One table: measures across, settings down, and what the paper's table of that number has in the same rows."""

    title: str
    measures: tuple  # of MEASURES
    paper_measures: tuple
    rows: tuple  # (label, setting, the paper's figures)


ABLATION = ("QA", "names", "boxes", "left/right", "above/below", "is there")
TABLES = {
    "2": Table(
        "how coordinates are written",
        ABLATION,
        ("GQA", "RD", "A-QA"),
        (
            ("normalized floating point", "nfp", (46.1, 19.6, 37.1)),
            ("integer valued binning", "all", (47.3, 20.7, 37.4)),
            ("deviation from anchor", "diga", (47.0, 20.8, 37.3)),
            ("binning, images blanked", "all, blind", ()),
        ),
    ),
    "4": Table(
        "which side, asked directly and in context",
        ("left/right", "left", "right", "above/below", "ICL left/right", "ICL above/below"),
        ("left/right", "above/below", "ICL left/right", "ICL above/below"),
        (
            ("instructions alone (LLaVA)", "none", (55.1, 58.9, 55.1, 58.2)),
            ("LocVLM-B", "all", (69.5, 65.4, 76.5, 74.1)),
            ("LocVLM-B, images blanked", "all, blind", ()),
        ),
    ),
    "8": Table(
        "is there a ...?",
        ("is there, seen", "is there, unseen"),
        ("Hal-COCO", "Hal-ADE"),
        (
            ("instructions alone (LLaVA)", "seen-none", (61.9, 53.8)),
            ("LocVLM-B", "seen-all", (88.3, 75.2)),
            ("instructions alone, no yes or no in them", "silent-none", ()),
            ("LocVLM-B, no yes or no in its instructions", "silent-all", ()),
            ("LocVLM-B, images blanked", "seen-all, blind", ()),
        ),
    ),
    "10": Table(
        "describing what is at a place",
        ("METEOR", "names"),
        ("RefCOCO", "RefCOCO+", "RefCOCOg val", "RefCOCOg test"),
        (
            ("instructions alone (LLaVA)", "none", (4.2, 7.3, 10.6, 10.3)),
            ("names of categories", "all", ()),
            ("names, of the shapes that have a caption", "captions-names", ()),
            ("pseudo-captions of the stage-1 model", "own-captions", (11.0, 11.1, 20.6, 20.7)),
            ("pseudo-captions of the model of instructions", "captions", (11.0, 11.1, 20.6, 20.7)),
            ("that, images blanked", "captions, blind", ()),
        ),
    ),
    "11a": Table(
        "objectives",
        ABLATION,
        ("GQA", "RD", "A-QA"),
        (
            ("instructions alone", "none", (44.7, 10.3, 35.2)),
            ("+ LocPred", "loc", (45.2, 12.2, 35.8)),
            ("+ NegPred", "loc-neg", (46.9, 12.5, 37.2)),
            ("+ RevLoc", "all", (47.3, 20.7, 37.4)),
            ("the last, images blanked", "all, blind", ()),
        ),
    ),
    "11b": Table(
        "what a location is",
        ABLATION,
        ("GQA", "RD", "A-QA"),
        (
            ("point", "point", (47.3, 20.6, 37.4)),
            ("box", "all", (47.3, 20.7, 37.4)),
            ("box, images blanked", "all, blind", ()),
        ),
    ),
    "11c": Table(
        "pseudo-captions: the shapes that the model of instructions described, by name and as described",
        ABLATION,
        ("GQA", "RD", "A-QA"),
        (
            ("names", "captions-names", (46.5, 11.6, 37.1)),
            ("pseudo-captions", "captions", (47.3, 20.7, 37.4)),
            ("pseudo-captions, images blanked", "captions, blind", ()),
        ),
    ),
    "12": Table(
        "objectives in tuning on clips",
        ("video QA", "static boxes", "no such object", "clip names", "is there, clips"),
        ("A-QA",),
        (
            ("model of images, one frame", "all", (29.2,)),
            ("Vid-B: adapter, conversations", "clips-adapter", (37.4,)),
            ("Vid-B+: conversations alone", "clips-none", (37.4,)),
            ("+ LocPred", "clips-loc", (37.6,)),
            ("+ NegPred", "clips-loc-neg", (38.2,)),
            ("+ RevLoc", "clips-all", (38.2,)),
            ("the last, clips blanked", "clips-all, blind", ()),
        ),
    ),
}
DENIABLE = re.compile("(Yes|No)\\b")


def answer_of(row):
    return row["conversations"][1]["value"]


def ensure_worlds():
    """Write the worlds that are not there yet."""
    ensure_world(STILL)
    ensure_clips(MOVING)
    for folder, names, images in ((FEW, SEEN, SPLITS), (OTHER, UNSEEN, {"val": SPLITS["val"]})):
        if not (folder / "instances_val.json").exists():
            print(f"writing the world of {', '.join(names)} to {folder}")
            write_world(folder, images, names=names)
    if not (FEW / "silent_train.json").exists():  # conversations as LLaVA's: nothing is ever denied
        rows = read_json(FEW / "conversations_train.json")
        write_json(FEW / "silent_train.json", [row for row in rows if not DENIABLE.match(answer_of(row))])


def tuned(name, seed):
    """Give the folder of a setting's run, trained first where it is not there, and what it begins from before it."""
    begins_from, flags = SETTINGS[name]
    run = OUT / f"{name}-{seed}"
    if (run / "config.json").exists():  # written after the last step
        return run
    start = tuned(begins_from, seed) if begins_from else None
    if "captions" in name:
        caption("stage-1" if name == "own-captions" else "none", seed)
    if name.startswith("clips"):  # the tower is frozen: once for all of them
        features.features(CLIPS, FEATURES, Path(__file__).parent / "tiny/clip", frames=8)
    stage = flags.split()[1]
    argv = flags.replace("SEED", str(seed)).split() + RECIPES[stage].split() + ["--out", str(run), "--seed", str(seed)]
    argv += ["--init-from", str(start)] if start else []
    argv += ["--no-evaluate"] + ["--resume"] * (run / "train.json").exists()
    print("\ntrain.py", " ".join(argv), flush=True)
    train.main(parse_config(TrainConfig, argv))
    return run


def caption(captioner, seed):
    """Let a model describe the shapes of the world's first images, and make Localize-Instruct of it (Sec. 3.4, App. C)."""
    told, localize = OUT / f"prefcoco-{captioner}-{seed}.json", OUT / f"localize-{captioner}-{seed}.json"
    coco = STILL / "instances_train.json"
    if not told.exists():
        prefcoco.caption(
            tuned(captioner, seed), coco, STILL / "images", told, batch=32, limit=CAPTIONED, max_new_tokens=32
        )
    if not localize.exists():
        prefcoco.localize(told, coco, localize)


def figure(heading, name, seed):
    """One figure of one run in percent, asked first where that was not done. "NAME, blind": with the images blanked."""
    task, metric, flags = MEASURES[heading]
    name, _, blind = name.partition(", ")
    run = tuned(name, seed)
    argv = flags.split() + ["--limit", str(IMAGES)] + (["--location", "point"] if name == "point" else [])
    argv += ["--blind"] if blind else []
    world = Path(flags.split()[1]).parent.name
    into = run / f"eval-{world}"
    folder = folders_of(run, into)["blind" if blind else "ours"]
    result = folder / f"{name_of(task, flags.split()[1])}.json"
    if not result.exists():
        evaluate.main([str(run), "--task", task, *argv, "--into", str(into)])
    value = read_json(result)["metrics"][metric]
    return math.nan if value is None else 100 * value


def cell(values):
    """Mean and, of several seeds, standard deviation; nan where a seed has no such figure."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and not any(map(math.isnan, values)) else ""
    return f"{statistics.mean(values):.1f}{spread}"


def make(number, seeds):
    """Train, ask, print and write one table."""
    table = TABLES[number]
    head = [*table.measures, *(f"paper: {name}" for name in table.paper_measures)]
    lines = [f"Tab. {number}, {table.title}; {len(seeds)} seeds, percent", ""]
    lines += ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for label, name, paper in table.rows:
        ours = [cell([figure(heading, name, seed) for seed in seeds]) for heading in table.measures]
        theirs = [f"{value:.1f}" for value in paper] + [""] * (len(table.paper_measures) - len(paper))
        lines.append(f"| {label} | " + " | ".join([*ours, *theirs]) + " |")
    text = "\n".join(lines) + "\n"
    write_whole(OUT / f"table-{number}.md", lambda path: path.write_text(text, encoding="utf-8"))
    print("\n" + text, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--seeds", default="0,1,2", help="parted by commas (default: 0,1,2)")
    args = parser.parse_args(argv)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}; expected whole numbers parted by commas, as 0,1,2; give them so")
    numbers = list(TABLES) if args.table == "all" else [args.table]
    if any("METEOR" in TABLES[number].measures for number in numbers):
        require_meteor()  # before hours of training
    ensure_worlds()
    for number in numbers:
        make(number, seeds)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tables.py: {error}")
