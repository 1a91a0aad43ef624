"""Make the paper's tables in miniature: train every row here, on the shapes worlds, with several seeds; print mean and spread.

    python -m tools.tables 11a                 one table: 2, 4, 8, 10, 11a, 11b, 11c or 12
    python -m tools.tables all --seeds 0,1,2   all of them

A run that several tables share is trained once, in runs/tables/NAME-SEED. A table that exists is only read again, and a killed
command resumes. Each table is printed and written to runs/tables/table-N.md.
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
from formats.eval_folder import folders_of, name_of
from formats.files import read_json, write_json, write_text
from tasks import __main__ as benchmarks
from tasks.words import require_meteor
from tiny.moving import ensure_clips
from tiny.shapes import NAMES, SPLITS, ensure_world, write_world
from tools import prefcoco
from tools.features import features
from train import TrainConfig, parse_config

OUT, STILL, MOVING = Path("runs/tables"), Path("data/shapes"), Path("data/moving")
SEEN, UNSEEN = NAMES[:5], NAMES[5:]  # Tab. 8: the shapes that training is about, and the others
FEW, OTHER = Path("data/shapes-seen"), Path("data/shapes-unseen")  # a world of each
CLIPS = f"{MOVING}/clips_train.json@{MOVING}/clips,{MOVING}/conversations_train.json@{MOVING}/clips"
FEATURES = OUT / "clips-features"
IMAGES = 150  # held-out images or clips in each evaluation
CAPTIONED = 1000  # training images that a model captions


def world_data(folder, *kinds):
    """Write a world's files as train.py's --data."""
    return ",".join(f"{folder}/{kind}_train.json@{folder}/images" for kind in kinds)


def localize_data(captioner):
    """Write --data of Localize-Instruct, with captions by a setting's run of the same seed, and of the conversations."""
    return f"{OUT}/localize-{captioner}-SEED.json@{STILL}/images,{world_data(STILL, 'conversations')}"


TALK = world_data(STILL, "instances", "conversations")
SILENT = f"{world_data(FEW, 'instances')},{FEW}/silent_train.json@{FEW}/images"
FEW_TALK = world_data(FEW, "instances", "conversations")
SETTINGS = {  # name: (the setting whose run of the same seed it starts from, options of train.py)
    "stage-1": ("", f"--stages 1 --data {world_data(STILL, 'captions')}"),
    "none": ("stage-1", f"--stages 2 --data {TALK} --objectives none"),
    "loc": ("stage-1", f"--stages 2 --data {TALK} --objectives loc"),
    "loc-neg": ("stage-1", f"--stages 2 --data {TALK} --objectives loc,neg"),
    "all": ("stage-1", f"--stages 2 --data {TALK}"),
    "nfp": ("stage-1", f"--stages 2 --data {TALK} --kind nfp"),
    "diga": ("stage-1", f"--stages 2 --data {TALK} --kind diga"),
    "point": ("stage-1", f"--stages 2 --data {TALK} --location point"),
    # captions by the stage-1 model (Sec. 3.4), or by one tuned on instructions (App. C)
    "own-captions": ("stage-1", f"--stages 2 --data {localize_data('stage-1')} --words description"),
    "captions": ("stage-1", f"--stages 2 --data {localize_data('none')} --words description"),
    "captions-names": ("stage-1", f"--stages 2 --data {localize_data('none')} --words name"),
    "seen-none": ("stage-1", f"--stages 2 --data {FEW_TALK} --objectives none"),
    "seen-all": ("stage-1", f"--stages 2 --data {FEW_TALK}"),
    "silent-none": ("stage-1", f"--stages 2 --data {SILENT} --objectives none"),
    "silent-all": ("stage-1", f"--stages 2 --data {SILENT}"),
    "clips-adapter": ("all", f"--stages 3 --data {CLIPS} --features {FEATURES}"),
    "clips-none": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives none"),
    "clips-loc": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives loc"),
    "clips-loc-neg": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES} --objectives loc,neg"),
    "clips-all": ("all", f"--stages 4 --data {CLIPS} --features {FEATURES}"),
}
# what differs from the tiny preset, by stage: small steps learn most in little time
RECIPES = {"1": "", "2": "--batch 4 --steps 220", "3": "--batch 4 --steps 120", "4": "--batch 4 --steps 200"}


def boxes_of(folder):
    return f"--coco {folder}/instances_val.json --images {folder}/images"


CLIP_BOXES = f"--coco {MOVING}/clips_val.json --images {MOVING}/clips"
MEASURES = {  # heading: (task, its metric, options of its evaluation; the second is the file of its questions)
    "QA": ("gqa", "contains", f"--questions {STILL}/gqa_val.json --images {STILL}/images"),
    "METEOR": ("refcoco", "METEOR 1.5", f"--questions {STILL}/refs_val.json --images {STILL}/images"),
    "boxes": ("locpred", "acc@0.5", boxes_of(STILL)),
    "names": ("revloc", "name accuracy", boxes_of(STILL)),
    "left/right": ("spatial", "left/right", boxes_of(STILL)),
    "left": ("spatial", "left/right, left", boxes_of(STILL)),
    "right": ("spatial", "left/right, right", boxes_of(STILL)),
    "above/below": ("spatial", "above/below", boxes_of(STILL)),
    "ICL left/right": ("spatial", "icl left/right", boxes_of(STILL)),
    "ICL above/below": ("spatial", "icl above/below", boxes_of(STILL)),
    "is there": ("hal", "accuracy", boxes_of(STILL)),
    "is there, seen": ("hal", "accuracy", boxes_of(FEW)),
    "is there, unseen": ("hal", "accuracy", boxes_of(OTHER)),
    "video QA": (
        "activitynet-qa", "contains",
        f"--questions {MOVING}/q_val.json --answers {MOVING}/a_val.json --images {MOVING}/clips",
    ),
    "static boxes": ("locpred", "acc@0.5", CLIP_BOXES),
    "no such object": ("negpred", "accuracy", CLIP_BOXES),
    "clip names": ("revloc", "name accuracy", CLIP_BOXES),
    "is there, clips": ("hal", "accuracy", CLIP_BOXES),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table: a column per measure, a row per setting, beside the figures of the paper's table of that number."""

    title: str
    measures: tuple  # of MEASURES
    paper_measures: tuple
    rows: tuple  # (label, setting, the paper's figures)


ABLATION = ("QA", "names", "boxes", "left/right", "above/below", "is there")
PAPER_ABLATION = ("GQA", "RD", "A-QA")
TABLES = {
    "2": Table("how coordinates are written", ABLATION, PAPER_ABLATION, (
        ("normalized floating point", "nfp", (46.1, 19.6, 37.1)),
        ("integer valued binning", "all", (47.3, 20.7, 37.4)),
        ("deviation from anchor", "diga", (47.0, 20.8, 37.3)),
        ("binning, images blanked", "all, blind", ()),
    )),
    "4": Table(
        "left/right and above/below, asked directly and in context",
        ("left/right", "left", "right", "above/below", "ICL left/right", "ICL above/below"),
        ("left/right", "above/below", "ICL left/right", "ICL above/below"), (
        ("instructions alone (LLaVA)", "none", (55.1, 58.9, 55.1, 58.2)),
        ("LocVLM-B", "all", (69.5, 65.4, 76.5, 74.1)),
        ("LocVLM-B, images blanked", "all, blind", ()),
    )),
    "8": Table("is there a ...?", ("is there, seen", "is there, unseen"), ("Hal-COCO", "Hal-ADE"), (
        ("instructions alone (LLaVA)", "seen-none", (61.9, 53.8)),
        ("LocVLM-B", "seen-all", (88.3, 75.2)),
        ("instructions alone, without yes and no", "silent-none", ()),
        ("LocVLM-B, without yes and no in its instructions", "silent-all", ()),
        ("LocVLM-B, images blanked", "seen-all, blind", ()),
    )),
    "10": Table(
        "describing the object at a location",
        ("METEOR", "names"), ("RefCOCO", "RefCOCO+", "RefCOCOg val", "RefCOCOg test"), (
        ("instructions alone (LLaVA)", "none", (4.2, 7.3, 10.6, 10.3)),
        ("names of categories", "all", ()),
        ("names, only shapes that have a caption", "captions-names", ()),
        ("pseudo-captions of the stage-1 model", "own-captions", (11.0, 11.1, 20.6, 20.7)),
        ("pseudo-captions of the model tuned on instructions", "captions", (11.0, 11.1, 20.6, 20.7)),
        ("the same, images blanked", "captions, blind", ()),
    )),
    "11a": Table("objectives", ABLATION, PAPER_ABLATION, (
        ("instructions alone", "none", (44.7, 10.3, 35.2)),
        ("+ LocPred", "loc", (45.2, 12.2, 35.8)),
        ("+ NegPred", "loc-neg", (46.9, 12.5, 37.2)),
        ("+ RevLoc", "all", (47.3, 20.7, 37.4)),
        ("the last, images blanked", "all, blind", ()),
    )),
    "11b": Table("what a location is", ABLATION, PAPER_ABLATION, (
        ("point", "point", (47.3, 20.6, 37.4)),
        ("box", "all", (47.3, 20.7, 37.4)),
        ("box, images blanked", "all, blind", ()),
    )),
    "11c": Table("names or pseudo-captions, only shapes that have a caption", ABLATION, PAPER_ABLATION, (
        ("names", "captions-names", (46.5, 11.6, 37.1)),
        ("pseudo-captions", "captions", (47.3, 20.7, 37.4)),
        ("pseudo-captions, images blanked", "captions, blind", ()),
    )),
    "12": Table(
        "objectives in tuning on clips",
        ("video QA", "static boxes", "no such object", "clip names", "is there, clips"), ("A-QA",), (
        ("model of images, one frame", "all", (29.2,)),
        ("Vid-B: adapter, conversations", "clips-adapter", (37.4,)),
        ("Vid-B+: conversations alone", "clips-none", (37.4,)),
        ("+ LocPred", "clips-loc", (37.6,)),
        ("+ NegPred", "clips-loc-neg", (38.2,)),
        ("+ RevLoc", "clips-all", (38.2,)),
        ("the last, clips blanked", "clips-all, blind", ()),
    )),
}  # fmt: skip


def ensure_worlds():
    """Write the worlds that are missing."""
    ensure_world(STILL)
    ensure_clips(MOVING)
    for folder, names, images in ((FEW, SEEN, SPLITS), (OTHER, UNSEEN, {"val": SPLITS["val"]})):
        if not (folder / "instances_val.json").exists():
            print(f"writing the world of {', '.join(names)} to {folder}")
            write_world(folder, images, names=names)
    if not (FEW / "silent_train.json").exists():  # conversations as LLaVA's, in which nothing is denied
        rows = read_json(FEW / "conversations_train.json")
        silent = [row for row in rows if not re.match(r"(Yes|No)\b", row["conversations"][1]["value"])]
        write_json(FEW / "silent_train.json", silent)


def tuned(name, seed):
    """Return the folder of a setting's run. Train it if it is missing, after the run that it starts from."""
    starts_from, options = SETTINGS[name]
    run = OUT / f"{name}-{seed}"
    if (run / "config.json").exists():  # written after the last step
        return run
    start = tuned(starts_from, seed) if starts_from else None
    if "captions" in name:
        caption("stage-1" if name == "own-captions" else "none", seed)
    if name.startswith("clips"):  # the tower is frozen: one folder serves all these runs
        features(CLIPS, FEATURES, Path(__file__).parent.parent / "tiny/clip", frames=8)
    argv = options.replace("SEED", str(seed)).split()
    argv += RECIPES[argv[1]].split() + ["--out", str(run), "--seed", str(seed), "--no-evaluate"]
    argv += ["--init-from", str(start)] if start else []
    argv += ["--resume"] * (run / "train.json").exists()
    print("\ntrain.py", " ".join(argv), flush=True)
    train.main(parse_config(TrainConfig, argv))
    return run


def caption(captioner, seed):
    """Let a model caption the shapes of the first training images, and make Localize-Instruct (Sec. 3.4, App. C)."""
    captions, localize = OUT / f"prefcoco-{captioner}-{seed}.json", OUT / f"localize-{captioner}-{seed}.json"
    coco, how = STILL / "instances_train.json", {"batch": 32, "limit": CAPTIONED, "max_new_tokens": 32}
    if not captions.exists():
        prefcoco.caption(tuned(captioner, seed), coco, STILL / "images", captions, **how)
    if not localize.exists():
        prefcoco.localize(captions, coco, localize)


def figure(heading, name, seed):
    """Return one figure of one run in percent; evaluate the run if that is missing. "NAME, blind": with blank images."""
    task, metric, options = MEASURES[heading]
    name, _, blind = name.partition(", ")
    run, source = tuned(name, seed), options.split()[1]
    into = run / f"eval-{Path(source).parent.name}"
    result = folders_of(run, into)["blind" if blind else "ours"] / f"{name_of(task, source)}.json"
    if not result.exists():
        argv = [*options.split(), "--limit", str(IMAGES), "--words", "name", *["--blind"] * bool(blind), "--into", str(into)]
        if task in evaluate.TASKS:
            evaluate.main([str(run), "--task", task, *argv])
        else:
            benchmarks.main([task, str(run), *argv])
    value = read_json(result)["metrics"][metric]
    return math.nan if value is None else 100 * value


def cell(values):
    """Write mean and, for several seeds, standard deviation; nan if a seed has no such figure."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and not any(map(math.isnan, values)) else ""
    return f"{statistics.mean(values):.1f}{spread}"


def make(number, seeds):
    """Train, evaluate, print and write one table."""
    table = TABLES[number]
    head = [*table.measures, *(f"paper: {name}" for name in table.paper_measures)]
    lines = [f"Tab. {number}, {table.title}; {len(seeds)} seeds, percent", ""]
    lines += ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for label, name, paper in table.rows:
        ours = [cell([figure(heading, name, seed) for seed in seeds]) for heading in table.measures]
        theirs = [f"{value:.1f}" for value in paper] + [""] * (len(table.paper_measures) - len(paper))
        lines.append(f"| {label} | " + " | ".join([*ours, *theirs]) + " |")
    text = "\n".join(lines) + "\n"
    write_text(OUT / f"table-{number}.md", text)
    print("\n" + text, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas (default: 0,1,2)")
    args = parser.parse_args(argv)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}: write whole numbers separated by commas, such as 0,1,2")
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
        sys.exit(f"tools.tables: {error}")
