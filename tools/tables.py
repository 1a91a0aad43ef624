"""Make the paper's tables in miniature: train every row here, on the shapes worlds, with several seeds; print mean and spread.

    python -m tools.tables 11a                 one table: 2, 4, 8, 10, 11a, 11b, 11c or 12
    python -m tools.tables all --seeds 0,1,2   all of them

tables.json holds settings, measures and the paper's figures. A run that several tables share is trained once, in
runs/tables/NAME-SEED; a killed command resumes. Each table is printed and written to runs/tables/table-N.md.

table  its number in the paper, or all
seeds  separated by commas
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Literal

import evaluate
import train
from formats.eval_folder import folders_of, name_of
from formats.files import read_json, write_json, write_text
from tasks import __main__ as benchmarks
from tasks.words import require_meteor
from tiny.moving import ensure_clips
from tiny.shapes import NAMES, SPLITS, ensure_world
from tools import command, prefcoco
from tools.features import features
from train import TrainConfig, parse_config

IMAGES, CAPTIONED = 150, 1000  # held-out images or clips in each evaluation; training images that a model captions
SEEN, UNSEEN = NAMES[:5], NAMES[5:]  # Tab. 8: the shapes that training is about, and the others, in worlds of their own


def read_tables(path):
    """Read tables.json: words, settings, measures and tables.

    words     what {WORDS} stand for in all of its texts; {SEED} is filled in by each run
    settings  name: (setting whose run it starts from, options of train.py; small steps learn most in little time)
    measures  heading: (task, its metric, options of its evaluation; the second is the file of its questions)
    tables    measures are columns, rows are (label, setting, figures of the paper's columns); ", blind" is with blank images
    """
    text = path.read_text(encoding="utf-8")
    for name, value in reversed(json.loads(text)["words"].items()):  # the last first: later ones use earlier ones
        text = text.replace(f"{{{name}}}", value)
    return json.loads(text).values()


WORDS, SETTINGS, MEASURES, TABLES = read_tables(Path(__file__).with_name("tables.json"))
OUT, STILL, MOVING, FEW, OTHER = (Path(WORDS[name]) for name in ("OUT", "STILL", "MOVING", "FEW", "OTHER"))


def ensure_worlds():
    """Write the worlds that are missing."""
    ensure_world(STILL)
    ensure_clips(MOVING)
    ensure_world(FEW, names=SEEN)
    ensure_world(OTHER, names=UNSEEN, images={"val": SPLITS["val"]})
    if not (FEW / "silent_train.json").exists():  # conversations as LLaVA's, in which nothing is denied
        rows = read_json(FEW / "conversations_train.json")
        silent = [row for row in rows if not re.match(r"(Yes|No)\b", row["conversations"][1]["value"])]
        write_json(FEW / "silent_train.json", silent)


def tuned(name, seed):
    """Return the folder of a setting's run. Train it if it is missing, after the run that it starts from."""
    run, (starts_from, options) = OUT / f"{name}-{seed}", SETTINGS[name]
    if (run / "config.json").exists():  # written after the last step
        return run
    start = tuned(starts_from, seed) if starts_from else None
    if "captions" in name:
        caption("stage-1" if name == "own-captions" else "none", seed)
    if name.startswith("clips"):  # the tower is frozen: one folder serves all these runs
        features(WORDS["CLIPS"], Path(WORDS["FEATURES"]), Path(__file__).parent.parent / "tiny/clip", frames=8)
    argv = [*options.format(SEED=seed).split(), "--out", str(run), "--seed", str(seed), "--no-evaluate"]
    argv += ["--init-from", str(start)] * bool(start) + ["--resume"] * (run / "train.json").exists()
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
    title, measures, paper_measures, rows = TABLES[number].values()
    head = [*measures, *(f"paper: {name}" for name in paper_measures)]
    lines = [f"Tab. {number}, {title}; {len(seeds)} seeds, percent", ""]
    lines += ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for label, name, paper in rows:
        ours = [cell([figure(heading, name, seed) for seed in seeds]) for heading in measures]
        theirs = [f"{value:.1f}" for value in paper] + [""] * (len(paper_measures) - len(paper))
        lines.append(f"| {label} | " + " | ".join([*ours, *theirs]) + " |")
    write_text(OUT / f"table-{number}.md", "\n".join(lines) + "\n")
    print("", *lines, "", sep="\n", flush=True)


def make_tables(table: Literal[*TABLES, "all"], /, seeds="0,1,2"):
    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise ValueError(f"--seeds {seeds}: write whole numbers separated by commas, such as 0,1,2")
    numbers = list(TABLES) if table == "all" else [table]
    if any("METEOR" in TABLES[number]["measures"] for number in numbers):
        require_meteor()  # before hours of training
    ensure_worlds()
    for number in numbers:
        make(number, [int(seed) for seed in seeds.split(",")])


main = command(__name__, make_tables)
