"""Ask a trained model the paper's questions and write what it says and what that counts (Sec. 4; supplement E, H).

    python evaluate.py runs/default --task all                      on the held-out shapes
    python evaluate.py runs/b2 --task spatial --coco instances_val2017.json --images val2017
    torchrun --nproc-per-node 8 evaluate.py runs/b2 --task gqa --questions testdev_balanced_questions.json --images gqa --with-blind
    python evaluate.py runs/b2 --task gqa --questions testdev_balanced_questions.json --images gqa --score runs/b2/eval/gqa.jsonl
    python evaluate.py runs/default --ask "Where is the object described circle located in image in terms of (x1,y1,x2,y2) bbox?" --image photo.jpg

    task      asks                                              counts
    locpred   where is ...                                      IoU >= 0.5 in original pixels; no box counts as wrong
    negpred   where is ... (not in the image)                   answers that there is no such object
    revloc    what is at ...                                    the right category named first
    spatial   which side of ... is ... (COCO-Spatial, Tab. 4)   the right word in the answer, direct and in context
    hal       is there a ... (Hal-COCO, Tab. 8)                 yes and no, two objects present and two absent an image

These five ask about annotated images (--coco); the other tasks read the files of public benchmarks, see benchmarks.py.
Each task writes RUN/eval/TASK.json (metrics, and everything needed to repeat them), TASK.jsonl (a row per question)
and TASK.png (boxes on pictures: truth green, prediction blue; successes above, failures below). What is answered lies in
TASK.parts until all is: a run that was killed goes on from there, on any number of processes, to the same rows.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import shapes
import video
from benchmarks import BENCHMARKS, PAPER, TASKS, Benchmark, Task
from checkpoint import (
    end_with_parent,
    open_journal,
    read_journal,
    read_json,
    remove_temporary,
    require_file,
    sha256,
    some,
    weights_sha256,
    write_json,
    write_line,
    write_whole,
)
from clip_vit import MEAN, has_image, open_image
from data import NEG_ANSWER, Wording, coco_id, image_ids, image_ids_of, join_sources, parse_sources, read_file
from model import LocVLM, LocVLMConfig

# ----- what is asked


@dataclass
class Job:
    """A task with its questions."""

    name: str
    task: Task | Benchmark
    items: list
    left_out: dict  # reason -> count
    files: list  # that were read


def read_jobs(args, wording, frames):
    """Read what is asked, before any model is: a list of Jobs. Refuses what is missing by name."""
    if args.task in BENCHMARKS:
        task = BENCHMARKS[args.task]
        options = {key: value for key in ("split", "short") if (value := getattr(args, key))}
        answers = Path(args.answers) if args.answers else None
        items, left_out = task.read(Path(args.questions), answers, Path(args.images), **options)
        first = set(list(dict.fromkeys(item.image for item in items))[: args.limit])
        items = [item for item in items if item.image in first]
        jobs = [Job(args.task, task, items, dict(left_out), [args.questions, *[args.answers] * bool(answers)])]
    else:
        if not args.coco:
            world = shapes.ensure_clips() if frames else shapes.ensure_world()
            annotations, images = ("clips_val.json", "clips") if frames else ("instances_val.json", "images")
            args.coco, args.images = world / annotations, world / images
        records, left_out = read_file(args.coco, args.images)
        records, jobs = records[: args.limit], []
        for name in TASKS if args.task == "all" else [args.task]:
            items = TASKS[name].items(records, wording, random.Random(f"{args.seed} {name}"))
            jobs.append(Job(name, TASKS[name], items, dict(left_out), [args.coco]))
    for job in [job for job in jobs if not job.items]:
        print(f"{job.name}: no image of {job.files[0]} has a question for it" + told(job.left_out))
    jobs = [job for job in jobs if job.items]
    for job in jobs:
        if doubled := [i for i, count in Counter(item.id for item in job.items).items() if count > 1]:
            raise ValueError(
                f"{job.files[0]}: {len(doubled)} ids of questions occur twice ({some(doubled)}); expected one each; answers "
                "are joined by them: mend the file"
            )
    return jobs


def require_images(jobs, folder):
    """Refuse to begin where images are missing."""
    paths = {item.image for job in jobs for item in job.items if item.image}
    missing = sorted(str(path) for path in paths if not (path.exists() if video.is_clip(path) else has_image(path)))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are not in {folder} ({some(missing)}); expected all; check --images"
        )


def questions_sha256(items):
    """What pins the questions: sha256 over ids, names of images and texts, in any order."""
    rows = sorted((item.id, Path(item.image or "").name, item.mirrored, item.question) for item in items)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def answers_sha256(items):
    return hashlib.sha256(json.dumps(sorted((item.id, item.answer) for item in items)).encode()).hexdigest()


# ----- asking


def blank():
    """An image without content: CLIP's mean colour."""
    return Image.new("RGB", (224, 224), tuple(int(255 * m) for m in MEAN))


def still(path, mirrored=False):
    """Open an image file; of a clip, the frame in its middle: what a model of images is shown."""
    image = video.read_frames(path, 1)[0] if video.is_clip(path) else open_image(path)
    return ImageOps.mirror(image) if mirrored else image


def batches(items, size):
    """Split items into batches of up to `size` questions, those of a picture together: its prefix is read once.

    Questions of a length go together, so that little of a batch is padding. What is in a batch depends on the items and
    the size alone, not on who answers it: in bfloat16 the company of a question can change its answer.
    """
    pictures = {}
    for item in items:
        pictures.setdefault((item.image, item.mirrored), []).append(item)
    pieces = [group[i : i + size] for group in pictures.values() for i in range(0, len(group), size)]
    pieces.sort(key=lambda piece: max(len(item.question) for item in piece))
    batch = []
    for piece in pieces:
        if len(batch) + len(piece) > size:
            yield batch
            batch = []
        batch = batch + piece
    if batch:
        yield batch


def answers_to(batch, model, blind, decoding):
    """Let the model answer a batch: id -> answer."""
    pictures = {}
    for item in batch:
        pictures.setdefault((item.image, item.mirrored), []).append(item)
    images = []
    for path, mirrored in pictures:
        if blind:
            images.append(blank())
        elif model.config.frames:
            frames = video.frames_of(path, model.config.frames)
            images.append([ImageOps.mirror(frame) for frame in frames] if mirrored else frames)
        else:
            images.append(still(path, mirrored))
    said = model.generate(images, [[item.question for item in group] for group in pictures.values()], **decoding)
    return {
        item.id: answer
        for group, answers in zip(pictures.values(), said, strict=True)
        for item, answer in zip(group, answers, strict=True)
    }


def answer_all(items, size, ask, parts, options, processes, fresh=False):
    """Have all items answered, this process every world-th batch: (how many were asked now, in how many seconds).

    ask      batch -> {id: answer}
    parts    folder of journals; those of a run that was killed are gone on with where its options were these
    options  all that answers depend on, as JSON
    Rank 0 ends with an answer in each item; the folder stays until its caller has written them elsewhere.
    """
    rank, world, wait = processes
    if rank == 0:
        begin(parts, options, fresh)
    wait()
    done = {i for path in parts.glob("part-*.jsonl") for row in read_journal(path) for i in row["answers"]}
    wait()  # all know what was done before any does more
    pending = [batch for batch in batches(items, size) if batch[0].id not in done]
    if rank == 0 and done:
        print(f"{len(done)} of {len(items)} questions are answered in {parts}: going on from there")
    began = time.time()
    with open_journal(parts / f"part-{rank}.jsonl") as journal:
        for batch in tqdm(pending[rank::world], desc=parts.stem, disable=None if rank == 0 else True):
            write_line(journal, {"answers": ask(batch)})
    wait()
    if rank == 0:
        join(
            items,
            [
                pair
                for path in parts.glob("part-*.jsonl")
                for row in read_journal(path)
                for pair in row["answers"].items()
            ],
            parts,
        )
    return sum(map(len, pending)), time.time() - began


def begin(parts, options, fresh):
    """Make the folder of journals, anew where it was begun with other options."""
    path = parts / "options.json"
    before = read_json(path) if path.is_file() else None
    if before == options and not fresh:
        return
    for journal in parts.glob("part-*.jsonl"):
        open_journal(journal).close()  # refuses one that another run is writing
    if before and not fresh:
        changed = [key for key in options if before.get(key) != options[key]]
        print(f"{parts} was begun with other {', '.join(changed)}: it starts anew")
    shutil.rmtree(parts, ignore_errors=True)
    write_json(path, options)


def join(items, pairs, source):
    """Give each item its answer, by id. pairs: (id, answer); refuses ids that are missing, unknown or there twice."""
    count, known = Counter(i for i, _ in pairs), {item.id for item in items}
    for what, ids in (
        ("occur twice", [i for i in count if count[i] > 1]),
        ("belong to no question", [i for i in count if i not in known]),
        ("are missing", [item.id for item in items if item.id not in count]),
    ):
        if ids:
            raise ValueError(
                f"{source}: {len(ids)} ids {what} ({some(ids)}); expected each of the {len(items)} questions once; give the "
                "file these answers were made for, or ask anew with --fresh"
            )
    answers = dict(pairs)
    for item in items:
        item.answer = answers[item.id]


def read_answers(path):
    """Read rows with id and answer, JSON lines: list of (id, answer)."""
    pairs = []
    for number, line in enumerate(
        require_file(path, "rows with id and answer").read_text("utf-8").split("\n"), start=1
    ):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "answer")):
            raise ValueError(
                f"{path}: line {number} is {line[:80]}; expected JSON with the texts id and answer; mend it"
            )
        pairs.append((row["id"], row["answer"]))
    return pairs


# ----- pictures


def draw(image, boxes, lines=(), width=280):
    """Scale an image to `width`, draw boxes, write lines under it. boxes: (box_px, colour) in the image's pixels."""
    scale = width / image.width
    picture = image.resize((width, max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box_px, colour in boxes:
        corners = [min(max(v * scale, -9), 9999) for v in box_px]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour, width=3)
    wrapped = [line for text in lines for line in textwrap.wrap(text, width // 6) or [""]]
    card = Image.new("RGB", (width, picture.height + 13 * len(wrapped) + 6), "white")
    card.paste(picture)
    for i, line in enumerate(wrapped):
        ImageDraw.Draw(card).text((2, picture.height + 2 + 13 * i), line, fill="black")
    return card


def contact_sheet(cards, path, columns=4):
    """Lay cards out in rows and write them as one PNG."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cards[0].width + 8) + 8, sum(heights) + 8 * (len(rows) + 1)), "white")
    y = 8
    for row, height in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            sheet.paste(card, (8 + i * (card.width + 8), y))
        y += height + 8
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


def overlay(items, path):
    """Draw four successes and four failures, with the boxes of truth (green) and answer (blue)."""
    shown = [item for item in items if item.correct][:4] + [item for item in items if not item.correct][:4]
    cards = []
    for item in shown:
        truth = [item.truth["box_px"]] if "box_px" in item.truth else item.truth.get("boxes_px", [])
        boxes = [(box_px, "lime") for box_px in truth] + [(box_px, "blue") for box_px in item.boxes_px]
        lines = [("right: " if item.correct else "wrong: ") + item.question[:400], "-> " + item.answer[:160]]
        cards.append(draw(still(item.image, item.mirrored), boxes, lines))
    if cards:
        contact_sheet(cards, path)


def ask(model, image_path, question, out, max_new_tokens, temperature, seed):
    """Answer one question about an image or a clip; draw the question's boxes green and the answer's blue.

    Of a clip, every frame that the model read is drawn.
    """
    frames = video.frames_of(image_path, model.config.frames) if model.config.frames else [still(image_path)]
    image, fmt = frames[0], model.config.coord_format()
    shown = ""

    def show(row, text):
        """Print what is new of the answer; the last character may still change (it may be half of one)."""
        nonlocal shown
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text.removeprefix(shown), end="", flush=True)
            shown = text

    asked = frames if model.config.frames else image
    [[answer]] = model.generate([asked], [[question]], max_new_tokens, temperature, seed, on_text=show)
    print(answer.removeprefix(shown))
    boxes = [(box_px, "lime") for box_px in fmt.decode_boxes(question, image.size)] + [
        (box_px, "blue") for box_px in fmt.decode_boxes(answer, image.size)
    ]
    for text, colour in ((question, "lime"), (answer, "blue")):
        boxes += [((x - 3, y - 3, x + 3, y + 3), colour) for x, y in fmt.decode_points(text, image.size)]
    if len(frames) > 1:
        video.sheet(frames, out, boxes, [f"frame {i}" for i in range(1, len(frames) + 1)])
    else:
        picture = draw(image, boxes, [question, "-> " + answer], width=max(448, image.width))
        write_whole(out, lambda temporary: picture.save(temporary, "PNG"))
    print(f"written: {out}")


# ----- results


def git_commit():
    """The commit of this code, marked -dirty where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except OSError:
        return None


def trained_on(run, given=""):
    """The COCO ids of the images that a run has seen: (files that name them, ids), or None where that is not known.

    given  the files, parted by commas; else those that train.py noted in the run, and in the one it began with
    """
    if given:
        return given.split(","), image_ids_of(given)
    path = Path(run) / "config.json"
    notes = read_json(path).get("locvlm", {}).get("trained_with") if path.is_file() else None
    if not notes:
        return None
    files = [notes["coco"], notes["captions"], notes["llava"]]
    if notes["data"] or any(files):
        files = [path for path, _, _ in parse_sources(join_sources(notes["data"], notes["images"], *files))]
    else:  # the shapes world
        files = sorted(map(str, Path("data/moving" if notes["stages"] in "34" else "data/shapes").glob("*_train.json")))
    before = trained_on(notes["init_from"]) if notes["init_from"] else None
    if not files or not all(map(os.path.isfile, files)):
        return None
    ids = set()
    for path in files:
        try:
            ids |= image_ids(path)
        except ValueError:  # it names no COCO image
            continue
    ids -= image_ids_of(notes["exclude"])
    return ([*files, *before[0]], ids | before[1]) if before else (files, ids)


def contamination(items, seen):
    """How many of the images asked about were trained on, at most (train.py's --limit may have left some out); or "unknown"."""
    ours = {coco_id(item.image) for item in items} - {None}
    if seen is None or not ours:
        return "unknown"
    return {"images": len(ours & seen[1]), "of": len(ours), "files": seen[0]}


def write_results(job, items, folder, wording, about):
    """Judge the answers and write what they count, the rows, pictures, and what others want of them."""
    for item in items:
        job.task.judge(item, wording)
    metrics = job.task.metrics(items)
    keys = ("id", "image", "size", "question", "answer", "correct", "boxes_px", "mirrored", "truth")
    rows = [{key: getattr(item, key) for key in keys} | {"image": item.image and str(item.image)} for item in items]
    write_rows(folder / f"{job.name}.jsonl", rows)
    if getattr(job.task, "submission", None):
        write_json(folder / f"{job.name}.submission.json", job.task.submission(items))
    counted = {
        "task": job.name,
        "metrics": {name: None if math.isnan(value) else value for name, value in metrics.items()},
        "questions": len(items),
        "images": len({item.image for item in items}),
        "left_out": job.left_out,
        "paper": PAPER.get(job.name),
        "prompts": list(job.task.prompts),
        "questions_sha256": questions_sha256(items),
        "answers_sha256": answers_sha256(items),
    }
    overlay(items, folder / f"{job.name}.png")
    write_json(folder / f"{job.name}.json", counted | about | counted)  # last: it says that all is there
    remove_temporary(folder.glob(f"{job.name}.*"))


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def told(left_out):
    return "".join(f"; left out: {count} {reason}" for reason, count in left_out.items() if count)


def table(job, folders):
    """Print a task's figures: a column for each result of the same questions, and the paper's where it has them."""
    asked, columns = questions_sha256(job.items), {}
    for title, folder in folders.items():
        path = folder / f"{job.name}.json"
        result = read_json(path) if path.is_file() else {}
        if result.get("questions_sha256") == asked:
            columns[title] = result["metrics"]
    if job.name in PAPER:
        columns["paper"] = {name: value / 100 for name, value in PAPER[job.name].items()}
    of_paper = f" (paper: LocVLM-B{' on COCO' if job.name in TASKS else ''})" if job.name in PAPER else ""
    images = len({item.image for item in job.items})
    print(f"\n{job.name}: {len(job.items)} questions about {images} images{told(job.left_out)}{of_paper}")
    print(" " * 42 + "".join(f"{title:>10}" for title in columns))
    for name in dict.fromkeys(name for title, figures in columns.items() if title != "paper" for name in figures):
        print(f"  {name:40}" + "".join(f"{shown(figures.get(name)):>10}" for figures in columns.values()).rstrip())


def shown(value):
    """A figure as it is printed: a share in percent, a count as it is, - where there is none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.1f} %"


# ----- command line


def parse(argv):
    """Read the command line, and refuse what does not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, or any checkpoint that LocVLM.from_pretrained takes")
    parser.add_argument("--vision", help="folder of the CLIP tower, for an original LLaVA that does not hold it")
    parser.add_argument(
        "--task", choices=(*TASKS, "all", *BENCHMARKS), default="all", help="what to measure (default: all five)"
    )

    group = parser.add_argument_group("questions")
    group.add_argument(
        "--coco",
        help="instances_*.json (default: the held-out shapes, written to data/shapes where they are not there)",
    )
    group.add_argument("--questions", help="a benchmark's file of questions")
    group.add_argument("--answers", help="its file of answers, where that is another one")
    group.add_argument("--images", help="folder of the images or clips")
    group.add_argument("--split", help="of a benchmark whose file holds several")
    group.add_argument("--short", action="store_true", help="ask for a word or a phrase, as LLaVA-1.5's are asked")
    group.add_argument("--location", choices=("box", "point"), default="box", help="what a location is (default: box)")
    group.add_argument("--limit", type=int, help="use the first so many images only")

    group = parser.add_argument_group("answers")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--blind", action="store_true", help="blank the images: what language alone achieves")
    which.add_argument("--with-blind", action="store_true", help="ask with the images and without, and print both")
    which.add_argument("--score", help="ask nothing: judge the answers of this file, rows as TASK.jsonl has them")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 is greedy, the paper samples at 0.2; each question draws by itself, from seed and text (default: 0)",
    )
    group.add_argument("--seed", type=int, default=0, help="of questions and of sampling (default: 0)")
    group.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    group.add_argument(
        "--batch", type=int, default=128, help="questions at a time, those of an image together (default: 128)"
    )
    group.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the decoder: a minute, then faster")
    group.add_argument("--fresh", action="store_true", help="ask everything again, whatever a killed run has left")
    group.add_argument(
        "--trained-on",
        default="",
        help="files that name the images trained on, parted by commas (default: the run's own)",
    )

    group.add_argument("--into", help="folder for the results; those of --blind beside it (default: RUN/eval)")

    group = parser.add_argument_group("a question of your own")
    group.add_argument("--ask", help="a question, about --image")
    group.add_argument("--image", help="image file or clip to ask about")
    group.add_argument("--out", help="where --ask draws (default: ask.png there)")
    args = parser.parse_args(argv)

    known = inspect.signature(BENCHMARKS[args.task].read).parameters if args.task in BENCHMARKS else ()
    benchmark = f"--task {args.task}"
    for wrong, complaint in (
        (bool(args.ask) != bool(args.image), "--ask and --image; expected both or none"),
        (args.ask and int(os.environ.get("WORLD_SIZE", 1)) > 1, "--ask in several processes; expected one"),
        (args.coco and not args.images, "--coco without --images; expected the folder of its images"),
        (known and not (args.questions and args.images), f"{benchmark} without --questions FILE --images FOLDER"),
        (known and args.coco, f"{benchmark} with --coco; expected --questions, the benchmark's own file"),
        (not known and args.questions, f"--questions with {benchmark}; expected one of {', '.join(BENCHMARKS)}"),
        (not known and args.images and not args.coco, "--images without --coco; expected the annotations"),
        *(
            (getattr(args, name) and name not in known, f"--{name} with {benchmark}, which has none; leave it out")
            for name in ("answers", "split", "short")
        ),
        (args.score and args.task == "all", "--score with --task all; expected the task that its rows are of"),
        (args.score and int(os.environ.get("WORLD_SIZE", 1)) > 1, "--score in several processes; expected one"),
        *(
            (getattr(args, name) is not None and getattr(args, name) < 1, f"--{name.replace('_', '-')} below 1")
            for name in ("limit", "batch", "max_new_tokens")
        ),
        (not 0 <= args.temperature < math.inf, f"--temperature {args.temperature}; expected 0 or more"),
    ):
        if wrong:
            parser.error(complaint)
    return args


def folders_of(args):
    """Where results go: {column of a table: folder}."""
    into = Path(args.into or Path(args.run) / "eval")
    return {"ours": into, "blind": into.with_name(into.name + "_blind")}


def start_processes():
    """Join the other processes of torchrun: (rank, world, wait for all). One, where another program calls: train.py."""
    world = 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, lambda: None
    end_with_parent()  # a torchrun that is killed leaves its processes
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # for barriers, which wait for the slowest
    return dist.get_rank(), world, dist.barrier


def wording_of(config, location):
    """How questions are put to a model: its coordinates, and its medium where it reads clips."""
    medium = {"medium": "video"} if config.frames and "medium" in {f.name for f in fields(Wording)} else {}
    return Wording(config.coord_format(), location=location, **medium)


def model_config(args):
    """Read a checkpoint's config and check its shapes, but read no weights: (LocVLMConfig, tokenizer)."""
    if args.score and not (Path(args.run) / "config.json").is_file():
        print(f"{args.run} holds no model: its boxes are read as {LocVLMConfig().coord_format()}")
        return LocVLMConfig(), None
    hollow = LocVLM.from_pretrained(args.run, args.vision, device="meta")
    return hollow.config, hollow.tokenizer


def main(argv=None):
    args = parse(argv)
    rank, world, wait = start_processes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0) if world > 1 else 0}" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        args.dtype or ("fp32" if device == "cpu" else "bf16")
    ]
    decoding = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}

    @cache
    def model():
        loaded = LocVLM.from_pretrained(args.run, args.vision, dtype, device).eval()
        loaded.language_model.for_inference(args.compile)
        return loaded

    if args.ask:
        out = args.out or folders_of(args)["ours"] / "ask.png"
        return ask(model(), args.image, args.ask, out, args.max_new_tokens, args.temperature, args.seed)

    # 1 read, and refuse, before weights are
    config, tokenizer = model_config(args)
    wording = wording_of(config, args.location)
    if rank > 0:
        wait()  # until rank 0 has written the shapes world, if it is wanted
    jobs = read_jobs(args, wording, config.frames)
    if rank == 0:
        wait()
    require_images(jobs, args.images)
    about = {
        "run": str(args.run),
        "data": str(jobs[0].files[0]) if jobs else None,
        "split": args.split,
        "template": "v1",
        "short": args.short,
        "geometry": config.geometry,
        "kind": config.kind,
        "location": args.location,
        "frames": config.frames,
        "no_object_answer": NEG_ANSWER,
        "git_commit": git_commit(),
        "torch": torch.__version__,
    }
    if args.score:
        return score(args, jobs, wording, about)
    if rank == 0:
        answering = {
            "weights_sha256": weights_sha256(args.run),
            "vision_sha256": weights_sha256(args.vision) if args.vision else None,
            "tokenizer_sha256": sha256(tokenizer.path),
            "dtype": str(dtype).removeprefix("torch."),
            "decoding": decoding,
            "batch": args.batch,
            "compile": args.compile,
            "device": torch.cuda.get_device_name(device) if device != "cpu" else platform.machine(),
        }
        seen = trained_on(args.run, args.trained_on)
        files = {str(path): sha256(path) for job in jobs for path in job.files}
        print(f"{args.run} on {about['data']}" + (f", {world} processes" if world > 1 else ""))

    # 2 ask, and write
    folders = folders_of(args)
    for job in jobs:
        for blind in (True, False) if args.with_blind else (args.blind,):
            items, folder, options = (
                copy.deepcopy(job.items),
                folders["blind" if blind else "ours"],
                None,
            )
            if rank == 0:
                how = {key: about[key] for key in ("template", "geometry", "kind", "frames")}
                options = {
                    "questions": questions_sha256(items),
                    "images": str(args.images),
                    "blind": blind,
                    **answering,
                    **how,
                }
            asked, seconds = answer_all(
                items,
                args.batch,
                lambda batch, blind=blind: answers_to(batch, model(), blind, decoding),
                folder / f"{job.name}.parts",
                options,
                (rank, world, wait),
                args.fresh,
            )
            if rank == 0:
                ran = {
                    "blind": blind,
                    "contamination": contamination(items, seen),
                    "data_sha256": {str(path): files[str(path)] for path in job.files},
                    "world_size": world,
                    "asked": asked,
                    "seconds": round(seconds, 2),
                    "questions_per_second": round(asked / seconds, 2) if asked else None,
                }
                write_results(job, items, folder, wording, {**about, **answering, **ran})
                shutil.rmtree(folder / f"{job.name}.parts")
        if rank == 0:
            table(job, folders)
    if world > 1:
        wait()
        dist.destroy_process_group()


def score(args, jobs, wording, about):
    """Judge answers that are there. Those of a run's own rows stay its results; others go to RUN/eval_scored."""
    [job] = jobs
    join(job.items, read_answers(args.score), args.score)
    folder, rows = Path(args.run) / "eval_scored", Path(args.score)
    about |= {"scored": {"file": str(rows), "sha256": sha256(rows)}}
    if rows.name == f"{job.name}.jsonl" and rows.with_suffix(".json").is_file():
        before = read_json(rows.with_suffix(".json"))
        ours = {"questions_sha256": questions_sha256(job.items), "answers_sha256": answers_sha256(job.items)}
        if before.items() >= ours.items():
            folder, about = rows.parent, before | {key: about[key] for key in ("git_commit", "torch")}
    write_results(job, job.items, folder, wording, about)
    columns = folders_of(args)
    table(job, columns if folder in columns.values() else {"scored": folder, **columns})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
