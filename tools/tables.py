"""Make the paper's tables in miniature: train every row here, on the shapes worlds, with several seeds, and compare the rows.

    python -m tools.tables 11a                 one table: 2, 4, 8, 10, 11a, 11b, 11c or 12
    python -m tools.tables all --seeds 0,1,2   all of these
    python -m tools.tables curves              boxes and sides after 220, 440, 880 and 1,760 steps, also drawn (curves.svg)

A run that several tables share is trained once, in runs/tables/NAME-SEED. NAME-SEED.recipe.json beside it says how it was made.
A killed command resumes; a folder that was made by another recipe is removed and made again, and so is what was made from it.
Each table is printed and written to runs/tables/table-N.md, the figures of each seed to table-N.json.

table  its number in the paper, all, or curves
seeds  separated by commas
"""

import json
import re
import shutil
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from typing import Literal

import torch

import evaluate
import train
from data import Wording, encode_prefix, encode_question
from formats.eval_folder import ROW_KEYS, folders_of, name_of
from formats.files import read_json, sha256, write_json, write_text, write_whole
from formats.journal import read_journal
from formats.weights import weights_sha256
from model import VARIANTS, LocVLM
from tasks import __main__ as benchmarks
from tasks.words import require_meteor
from tiny.moving import ensure_clips
from tiny.shapes import NAMES, SPLITS, ensure_side_texts, ensure_world, write_side_texts
from tools import command, prefcoco
from tools.features import features
from train import TrainConfig, parse_config

TINY = Path(__file__).parent.parent / "tiny"
CAPTIONED, TALKS = 1000, 6  # training images that a model captions; conversations of each training image or clip
SEEN, UNSEEN = NAMES[:5], NAMES[5:]  # Tab. 8: the shapes that training is about, and the others, in worlds of their own


def read_tables(path):
    """Read tables.json: words, settings, measures, and tables with the paper's figures.

    words     what {WORDS} stand for in all of its texts; {SEED} is filled in by each run
    settings  name: (setting whose run it starts from, options of train.py; few images a step learn most in little time)
    measures  heading: (task, its score, options of evaluate.py or tasks; the second word is the questions' file). The score is one
              of SCORES, or a metric of the task; the task "text" is `sides_in_text` and needs neither. A fourth entry
              {key of the truth: pattern} keeps only the questions that match
    tables    measures are columns, rows are (label, setting, figures of the paper's columns); ", blind" is with blank images,
              "@440" after 440 steps. Each row is compared with the last of the settings in `references` above it
    """
    text = path.read_text(encoding="utf-8")
    for name, value in reversed(json.loads(text)["words"].items()):  # the last first: later ones use earlier ones
        text = text.replace(f"{{{name}}}", value)
    return json.loads(text).values()


def has_centre(row):
    """Return True if the centre of the first box in an answer, or its point, lies in the true box."""
    (u1, v1, u2, v2), boxes_px = row["truth"]["box_px"], row["boxes_px"][:1]
    return any(u1 <= (x1 + x2) / 2 <= u2 and v1 <= (y1 + y2) / 2 <= v2 for x1, y1, x2, y2 in boxes_px)


def matching(rows, only=None):
    """Keep the rows whose truth matches a pattern under each key of `only`, the fourth entry of a measure, if there is one."""
    return [row for row in rows if all(re.search(pattern, str(row["truth"][key])) for key, pattern in (only or {}).items())]


SCORES = {"right": lambda row: row["correct"], "contains": lambda row: row["measured"]["contains"], "point in box": has_centre}
WORDS, SETTINGS, MEASURES, TABLES = read_tables(Path(__file__).with_name("tables.json"))
OUT, STILL, MOVING, FEW, OTHER = (Path(WORDS[name]) for name in ("OUT", "STILL", "MOVING", "FEW", "OTHER"))


def ensure_worlds():
    ensure_world(STILL)
    ensure_clips(MOVING)
    ensure_world(FEW, names=SEEN)
    ensure_world(OTHER, names=UNSEEN, images={"val": SPLITS["val"]})
    for world in (STILL, MOVING, FEW):
        limit_conversations(world, "some")
    limit_conversations(FEW, "silent", r"(?!Yes\b|No\b)")  # as LLaVA's, in which nothing is denied
    for kind, location in (("nfp", "box"), ("diga", "box"), ("ivb", "point")):
        ensure_side_texts(STILL, Wording(replace(VARIANTS["tiny"], kind=kind).coord_format(), location=location))
    if not (path := STILL / "text_quiz_train.json").exists():  # with other words for sides
        write_side_texts(path, has_quiz=True)


def limit_conversations(world, name, pattern=""):
    """Write NAME_train.json: of each image or clip the first TALKS conversations whose answers match; their order is random.
    So every setting has the same conversations, whatever its objectives. A row holds all six (their share of --questions: 0.17 of
    36, of clips 0.34 of 18) and, after them, all questions of the objectives, at most three for each of four shapes."""
    rows, count, path = [], Counter(), world / f"{name}_train.json"
    for row in read_json(world / "conversations_train.json") if not path.exists() else ():
        owner, answer = (row["image"], row["conversations"][1]["value"]) if "image" in row else (row["video_id"], row["a"])
        if re.match(pattern, answer) and count[owner] < TALKS:
            count[owner] += 1
            rows.append(row)
    if rows:
        write_json(path, rows, indent=None)


def is_made(folder, last, recipe):
    """Return True if a folder holds the file `last`, made by this recipe. What another recipe left there is removed."""
    folder, note = Path(folder), Path(f"{folder}.recipe.json")
    if not note.exists() or read_json(note) != recipe:
        if folder.exists():
            print(f"{folder} was made by another recipe; it is removed and made again", flush=True)
            shutil.rmtree(folder)
        write_json(note, recipe)  # before the work: what a kill leaves of this recipe is continued
    return (folder / last).exists()


def hashes(paths):
    return {str(path): sha256(path) for path in paths}


def tuned(name, seed):
    """Return the folder of a setting's run. Train it, after the run that it starts from, unless it is made already."""
    run, (setting, _, steps) = OUT / f"{name}-{seed}", name.partition("@")
    starts_from, options = SETTINGS[setting]
    start = tuned(starts_from, seed) if starts_from else None
    for captioner in re.findall(r"captions-([\w-]+)-{SEED}", options):
        caption(captioner, seed)
    argv = [*options.format(SEED=seed).split(), "--out", str(run), "--seed", str(seed), "--no-evaluate"]
    argv += ["--steps", steps] * bool(steps) + ["--init-from", str(start)] * bool(start)
    config = parse_config(TrainConfig, argv)
    data, numbers = hashes(file for file, *_ in config.sources), config.recipe(*config.stage_list)
    if config.features:  # the tower is frozen: one folder serves all runs of so many frames
        recipe = {"data": data, "frames": numbers.frames, "vision": weights_sha256(TINY / "clip")}
        if not is_made(config.features, "features.json", recipe):
            features(config.data, Path(config.features), TINY / "clip", frames=numbers.frames)
    before = read_json(f"{start}.recipe.json") if start else [weights_sha256(TINY / part) for part in ("clip", "llama")]
    if not is_made(run, "config.json", {"argv": argv, "numbers": asdict(numbers), "data": data, "start": before}):
        argv += ["--resume"] * (run / "train.json").exists()
        print("\ntrain.py", " ".join(argv), flush=True)
        train.main(parse_config(TrainConfig, argv))  # config.json is written after the last step
    return run


def caption(captioner, seed):
    """Let a model caption the shapes of the first training images, and make Localize-Instruct (Sec. 3.4, App. C)."""
    run, folder = tuned(captioner, seed), OUT / f"captions-{captioner}-{seed}"
    coco, how = STILL / "instances_train.json", {"batch": 32, "limit": CAPTIONED, "max_new_tokens": 32}
    if not is_made(folder, "localize.json", {"run": read_json(f"{run}.recipe.json"), "data": hashes([coco]), **how}):
        prefcoco.caption(run, coco, STILL / "images", folder / "prefcoco.json", **how)
        prefcoco.localize(folder / "prefcoco.json", coco, folder / "localize.json")


@torch.no_grad()
def sides_in_text(run):
    """Ask a model, without an image, the questions of text_val.json: True for each whole answer that is right (greedy)."""
    model = LocVLM.from_pretrained(run).eval()
    llama, tokenizer, rows = model.language_model, model.tokenizer, read_json(STILL / "text_val.json")
    before = encode_prefix(tokenizer, "v1", visual_tokens=0)
    pairs = [[turn["value"] for turn in row["conversations"]] for row in rows]
    prompts = [before + encode_question(tokenizer, question, tokenizer.space) for question, _ in pairs]
    answers = llama.generate(prompts, max_new_tokens=32, eos_token_id=tokenizer.eos_token_id)
    return [tokenizer.decode(ids).strip() == answer for ids, (_, answer) in zip(answers, pairs, strict=True)]


def figure(heading, run, seed, is_blind=False):
    """Return one figure of a run, in percent, and its number of questions. Evaluate the run, unless that is made already."""
    task, score, options, *only = MEASURES[heading]
    if task == "text":
        return 100 * statistics.mean(right := sides_in_text(run)), len(right)
    source = options.split()[1]
    name, into = name_of(task, source), run / f"eval-{task}-{Path(source).parent.name}"
    argv = [*options.split(), "--words", "name", "--seed", str(seed), *["--blind"] * is_blind, "--into", str(into)]
    folder = folders_of(run, into)["blind" if is_blind else "ours"]
    recipe = {"argv": argv, "data": hashes(word for word in argv if word.endswith(".json")), "row": list(ROW_KEYS)}
    if not is_made(folder, f"{name}.json", recipe):
        if task in evaluate.TASKS:
            evaluate.main([str(run), "--task", task, *argv])
        else:
            benchmarks.main([task, str(run), *argv])
    if score not in SCORES:
        result = read_json(folder / f"{name}.json")
        return 100 * result["metrics"][score], result["questions"]
    rows = matching(read_journal(folder / f"{name}.jsonl"), *only)
    return 100 * statistics.mean(map(SCORES[score], rows)), len(rows)


def cell(values, reference=None):
    """Write mean and standard deviation of a figure over seeds; in brackets the mean of its differences from the reference,
    seed by seed, and their standard error; in bold if the difference exceeds two of these.

    >>> cell([50.0]), cell([1.0, 2.0, 3.0]), cell([11.0, 12.0, 14.0], [1.0, 2.0, 3.0])
    ('50.0', '2.0 ± 1.0', '**12.3 ± 1.5 (+10.3 ± 0.3)**')
    """
    def written(numbers, sign="", count=1):
        spread = f" ± {statistics.stdev(numbers) / sqrt(count):.1f}" if len(numbers) > 1 else ""
        return f"{statistics.mean(numbers):{sign}z.1f}{spread}"
    if reference is None:
        return written(values)
    gaps = [value - other for value, other in zip(values, reference, strict=True)]
    text = f"{written(values)} ({written(gaps, '+', len(gaps))})"
    is_sure = len(gaps) > 1 and abs(statistics.mean(gaps)) > 2 * statistics.stdev(gaps) / sqrt(len(gaps))
    return f"**{text}**" if is_sure else text


def make(number, seeds):
    """Train, evaluate, print and write one table."""
    title, measures, paper_measures, references, rows = TABLES[number].values()
    figures, count = {}, {heading: set() for heading in measures}
    for _, name, _ in rows:
        setting, _, blind = name.partition(", ")
        runs, figures[name] = {seed: tuned(setting, seed) for seed in seeds}, {}
        for heading in measures:
            pairs = [figure(heading, run, seed, bool(blind)) for seed, run in runs.items()]
            figures[name][heading] = [value for value, _ in pairs]
            count[heading] |= {n for _, n in pairs}
    head = [f"{heading} (n {'-'.join(map(str, sorted({min(count[heading]), max(count[heading])})))})" for heading in measures]
    head += [f"paper: {name}" for name in paper_measures]
    about = f"Percent, mean ± standard deviation over {len(seeds)} seed(s) of n questions; in brackets the paired difference from "
    about += "the last row marked * above, ± its standard error, bold beyond two of these"
    lines = [f"Tab. {number}, {title}", "", about, "", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    reference = references[0]
    for label, name, paper in rows:
        base = {} if name == reference else figures[reference]
        ours = [cell(figures[name][heading], base.get(heading)) for heading in measures]
        theirs = [f"{value:.1f}" for value in paper] + [""] * (len(paper_measures) - len(paper))
        lines.append(f"| {label}{' *' * (name in references)} | " + " | ".join([*ours, *theirs]) + " |")
        reference = name if name in references else reference
    write_json(OUT / f"table-{number}.json", {"seeds": seeds, "figures": figures})
    write_text(OUT / f"table-{number}.md", "\n".join(lines) + "\n")
    print("", *lines, "", sep="\n", flush=True)
    if number == "curves":
        draw_curves(figures, seeds, OUT / "curves.svg")


def draw_curves(figures, seeds, path):
    """Draw the table of curves, a line for each setting. First the loss over the steps of its longest run with the first seed,
    each 20 steps averaged. Then each measure over the steps of all its runs: the mean over seeds, in a band that holds all of them.

    figures  {setting, or setting@steps: {measure: [its figure with each seed]}}
    """
    from matplotlib.figure import Figure
    runs, measures = defaultdict(dict), list(next(iter(figures.values())))  # setting -> {steps: name in figures}
    for name in figures:
        setting, _, steps = name.partition("@")
        runs[setting][int(steps or WORDS["STEPS"])] = name
    rows = len(measures) // 4 + 1  # of four panels: the loss, then the measures
    picture = Figure(figsize=(12, 3 * rows), layout="constrained")
    loss, *axes = (picture.add_subplot(rows, 4, place) for place in range(1, len(measures) + 2))
    for setting, run_after in runs.items():
        steps = sorted(run_after)
        losses = [row["loss"] for row in read_journal(OUT / f"{run_after[steps[-1]]}-{seeds[0]}" / "log.jsonl")]
        means = [statistics.mean(losses[i : i + 20]) for i in range(0, len(losses), 20)]
        loss.plot(range(10, 20 * len(means), 20), means, label=setting)
        for axis, measure in zip(axes, measures, strict=True):
            values = [figures[run_after[step]][measure] for step in steps]  # of each number of steps, a figure for each seed
            axis.plot(steps, list(map(statistics.mean, values)), marker="o")
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2)
            axis.set(title=measure, ylim=(-2, 102), xlabel="steps of stage 2")
    loss.set(title="loss", xlabel="steps of stage 2")
    picture.legend(loc="lower right")
    write_whole(path, lambda temporary: picture.savefig(temporary, format="svg", metadata={"Date": None}))


def make_tables(table: Literal[*TABLES, "all"], /, seeds="0,1,2,3,4"):
    if not re.fullmatch(r"\d+(,\d+)*", seeds) or len(set(seeds.split(","))) < len(seeds.split(",")):
        raise ValueError(f"--seeds {seeds}: write different whole numbers separated by commas, such as 0,1,2")
    numbers = [number for number in TABLES if number != "curves"] if table == "all" else [table]
    if any("METEOR" in TABLES[number]["measures"] for number in numbers):
        require_meteor()  # before hours of training
    if "curves" in numbers and not find_spec("matplotlib"):
        raise ValueError("curves are drawn by another package: pip install matplotlib")
    ensure_worlds()
    for number in numbers:
        make(number, [int(seed) for seed in seeds.split(",")])


main = command(__name__, make_tables)
