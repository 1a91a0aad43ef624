"""Ask a trained model the paper's questions and write what it says and what that counts (Sec. 4; supplement E, H).

    python evaluate.py runs/default --task all                      on the held-out shapes
    python evaluate.py runs/b2 --task spatial --coco instances_val2017.json --images val2017
    torchrun --nproc-per-node 8 evaluate.py runs/b2 --task gqa --questions testdev_balanced_questions.json --images gqa --with-blind
    python evaluate.py runs/b2 --task gqa --questions testdev_balanced_questions.json --images gqa --score answers.jsonl
    python evaluate.py runs/default --ask "Where is the object described circle located in image in terms of (x1,y1,x2,y2) bbox?" --image photo.jpg

    task      asks                                              counts
    locpred   where is ...                                      IoU >= 0.5 in original pixels; no box counts as wrong
    negpred   where is ... (not in the image)                   answers that there is no such object
    revloc    what is at ...                                    the right category named first
    spatial   which side of ... is ... (COCO-Spatial, Tab. 4)   the right word in the answer, direct and in context
    hal       is there a ... (Hal-COCO, Tab. 8)                 yes and no, two objects present and two absent an image

These five ask about annotated images (--coco); the other tasks read the files of public benchmarks, see benchmarks.py.
Each task writes RUN/eval/NAME.json (metrics, and everything needed to repeat them), NAME.jsonl (a row per question)
and NAME.png (boxes on pictures: truth green, prediction blue; successes above, failures below), where NAME is the task, or
of given files TASK-FILE-SPLIT. What is answered lies in NAME.parts until all is: a run that was killed goes on from there,
on any number of processes, to the same rows.
"""

import argparse
import copy
import glob
import hashlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

import shapes
import video
from benchmarks import BENCHMARKS, PAPER, PAPER_ROWS, TASKS, Benchmark, Task, require_images
from checkpoint import (
    open_journal,
    read_journal,
    read_json,
    remove_temporary,
    require_file,
    sha256,
    some,
    start_processes,
    weights_sha256,
    write_json,
    write_line,
    write_whole,
)
from clip_vit import MEAN, open_image
from data import NEG_ANSWER, Wording, coco_id, image_ids, image_ids_of, join_sources, read_file
from model import LocVLM, LocVLMConfig
from report import differences, read_results, verdict, write_report
from scores import ask_judge, judge_requests, read_judgements

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ----- what is asked


@dataclass
class Job:
    """A task with its questions."""

    task: str
    name: str  # of the files of its results
    rules: Task | Benchmark
    items: list
    left_out: dict  # reason -> count
    files: list  # that were read


def name_of(task, file=None, split=None):
    """The name of a task's results: of given files, theirs and the split's behind it.

    >>> name_of("hal"), name_of("refcoco", "refcoco/refs(unc).p", "testB")
    ('hal', 'refcoco-refs(unc)-testB')
    """
    return "-".join(filter(None, (task, file and Path(file).stem, split)))


def read_jobs(args, wording, frames):
    """Read what is asked, before any model is: a list of Jobs. Refuses what is missing by name."""
    if args.task in BENCHMARKS:
        rules, name = BENCHMARKS[args.task], name_of(args.task, args.questions, args.split)
        files = [Path(path) for path in (args.questions, args.answers) if path]
        given = {"split": args.split, "short": args.short, "seed": args.seed, "wording": wording}
        options = {key: value for key, value in given.items() if key in rules.options and value is not None}
        items, left_out = rules.read(files[0], files[1] if args.answers else None, Path(args.images), **options)
        first = set(list(dict.fromkeys(item.image for item in items))[: args.limit])
        items = [item for item in items if item.image in first]
        jobs = [Job(args.task, name, rules, items, dict(left_out), files)]
    else:
        file = args.coco
        if not file:
            world = shapes.ensure_clips() if frames else shapes.ensure_world()
            annotations, images = ("clips_val.json", "clips") if frames else ("instances_val.json", "images")
            args.coco, args.images = world / annotations, world / images
        records, left_out = read_file(args.coco, args.images)
        records, jobs = records[: args.limit], []
        for task in TASKS if args.task == "all" else [args.task]:
            items = TASKS[task].items(records, wording, random.Random(f"{args.seed} {task}"))
            jobs.append(Job(task, name_of(task, file), TASKS[task], items, dict(left_out), [args.coco]))
        require_images((item.image for job in jobs for item in job.items), args.coco, args.images)
    for job in [job for job in jobs if not job.items]:
        print(f"{job.name}: no image of {job.files[0]} has a question for it")
    jobs = [job for job in jobs if job.items]
    if not jobs:
        raise ValueError(
            f"{args.coco} gives no question for --task {args.task}; expected annotated images, with boxes and absent categories; "
            "give others, or raise --limit"
        )
    for job in jobs:
        if doubled := [i for i, count in Counter(item.id for item in job.items).items() if count > 1]:
            raise ValueError(
                f"{job.files[0]}: {len(doubled)} ids of questions occur twice ({some(doubled)}); expected one each; answers "
                "are joined by them: mend the file"
            )
    return jobs


def require_own(job, folder, data_sha256):
    """Refuse to replace results about other files that go by the same name, as those of refcoco and refcoco+."""
    path = folder / f"{job.name}.json"
    before = read_json(path).get("data_sha256") if path.is_file() else None
    if before:
        file, content = next(iter(before.items()))  # the questions; answers may be one file for several
        now, content_now = next(iter(data_sha256.items()))
        if file != now and content != content_now:
            raise ValueError(
                f"{path} is about {file}; expected {now}; keep both with --into FOLDER, or replace it with --fresh"
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


def by_picture(items):
    """Put items that are asked about the same picture together: (path, mirrored) -> items."""
    pictures = {}
    for item in items:
        pictures.setdefault((item.image, item.mirrored), []).append(item)
    return pictures


def batches(items, size):
    """Split items into batches of up to `size` questions, those of a picture together: its prefix is read once.

    What is in a batch depends on the items and the size alone, not on their order or on who asks them: in bfloat16 the
    company of a question can change its answer.
    """
    batch, groups = [], by_picture(sorted(items, key=lambda item: item.id)).values()
    for piece in (group[i : i + size] for group in groups for i in range(0, len(group), size)):
        if len(batch) + len(piece) > size:
            yield batch
            batch = []
        batch = batch + piece
    if batch:
        yield batch


def answers_to(batch, model, blind, decoding):
    """Let the model answer a batch: id -> answer."""
    pictures, images = by_picture(batch), []
    for path, mirrored in pictures:
        if blind or not path:
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


def answer_all(items, size, asker, parts, options, processes, fresh=False):
    """Have all items answered, this process every world-th batch: (how many were asked now, in how many seconds).

    asker      gives the function batch -> {id: answer}; called where something is to be asked
    parts      folder of journals; those of a run that was killed are gone on with where its options were these
    options    all that answers depend on, as JSON; rank 0's count
    processes  (rank, world, function that waits for all)
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
    mine = pending[rank::world]
    with open_journal(parts / f"part-{rank}.jsonl") as journal:
        ask, began = asker() if mine else None, time.perf_counter()
        for batch in tqdm(mine, desc=parts.stem, disable=None if rank == 0 else True):
            write_line(journal, {"answers": ask(batch)})
    wait()
    if rank == 0:
        rows = [row["answers"] for path in parts.glob("part-*.jsonl") for row in read_journal(path)]
        join(items, [pair for row in rows for pair in row.items()], parts)
    return sum(map(len, pending)), time.perf_counter() - began


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


def read_rows(path, texts):
    """Read JSON lines whose values under the keys `texts` are text: list of dicts."""
    rows = []
    for number, line in enumerate(require_file(path, "JSON lines").read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in texts):
            raise ValueError(f"{path}: line {number} is {line[:80]}; expected JSON with the texts {texts}; mend it")
        rows.append(row)
    return rows


# ----- pictures


def overlay(items, path):
    """Draw four successes and four failures, with the boxes of truth (green) and answer (blue)."""
    right, wrong = ([item for item in items if bool(verdict(item.correct)) is good][:4] for good in (True, False))
    cards = []
    for item in right + wrong:
        truth = [item.truth["box_px"]] if "box_px" in item.truth else item.truth.get("boxes_px", [])
        boxes = [(box_px, "lime") for box_px in truth] + [(box_px, "blue") for box_px in item.boxes_px]
        mark = {True: "right: ", False: "wrong: ", None: ""}[verdict(item.correct)]
        lines = [mark + item.question[:400], "-> " + item.answer[:160]]
        cards.append(video.card(still(item.image, item.mirrored), boxes, lines))
    if right and wrong:
        cards[len(right) : len(right)] = [Image.new("RGB", (280, 1), "white")] * (4 - len(right))
    video.contact_sheet(cards, path)


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
        picture = video.card(image, boxes, [question, "-> " + answer], width=max(448, image.width))
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

    given  the files, parted by commas; else those that train.py noted in the run, and in those it went on from
    """
    if given:
        return given.split(","), image_ids_of(given)
    files, ids, visited = [], set(), set()
    while run and Path(run).resolve() not in visited:
        visited.add(Path(run).resolve())
        path = Path(run) / "config.json"
        notes = read_json(path).get("locvlm", {}).get("trained_with") if path.is_file() else None
        if not notes:
            break
        own = [notes["coco"], notes["captions"], notes["llava"]]
        if notes["data"] or any(own):
            own = [path for path, _, _ in join_sources(notes["data"], notes["images"], *own)]
        else:
            world = "data/moving" if notes["stages"] in ("3", "4") else "data/shapes"
            own = sorted(map(str, Path(world).glob("*_train.json")))
        excluded = notes["exclude"].split(",") if notes["exclude"] else []
        if not own or not all(map(os.path.isfile, own + excluded)):
            return None
        files, run = files + own, notes["init_from"]
        ids |= set().union(*map(named_by, own)).difference(*map(image_ids, excluded))
    return (files, ids) if files else None


@cache  # a training file may be a gigabyte, and several evaluations in one process ask for it
def named_by(path):
    """The COCO ids of a file's images; none where it names none, as chat.json of CC3M."""
    try:
        return image_ids(path)
    except ValueError:
        return set()


def contamination(items, seen):
    """How many of the images asked about were trained on, at most (train.py's --limit may have left some out); or "unknown"."""
    ours = {coco_id(item.image) for item in items} - {None}
    if seen is None or not ours:
        return "unknown"
    return {"images": len(ours & seen[1]), "of": len(ours), "files": seen[0]}


def write_results(job, items, folder, wording, about, args):
    """Judge the answers and write what they count, the rows, pictures, and what others want of them."""
    for item in items:
        job.rules.judge(item, wording)
    metrics = job.rules.metrics(items)
    judged, judge = judge_of(job, items, folder, args)
    metrics |= judged
    keys = ("id", "image", "size", "question", "answer", "correct", "boxes_px", "mirrored", "truth")
    rows = [{key: getattr(item, key) for key in keys} | {"image": item.image and str(item.image)} for item in items]
    write_rows(folder / f"{job.name}.jsonl", rows)
    if job.task in BENCHMARKS and job.rules.submission:
        write_json(folder / f"{job.name}.submission.json", job.rules.submission(items))
    counted = {
        "task": job.task,
        # NaN, which is none of JSON's: there was no such question
        "metrics": {name: None if math.isnan(value) else value for name, value in metrics.items()},
        "questions": len(items),
        "images": len({item.image for item in items}),
        "left_out": job.left_out,
        "judge": judge,
        "paper": paper_of(job),
        "paper_rows": PAPER_ROWS.get(job.task, []),
        "prompts": list(job.rules.prompts),
        "questions_sha256": questions_sha256(items),
        "answers_sha256": answers_sha256(items),
    }
    overlay(items, folder / f"{job.name}.png")
    # figures first, whatever `score` read of older ones in `about`; and written last: it says that all is there
    write_json(folder / f"{job.name}.json", counted | about | counted)
    remove_temporary(folder.glob(f"{glob.escape(job.name)}.*"))


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def of_clips(job):
    """Say whether a job asks about clips."""
    return all(item.image and video.is_clip(item.image) for item in job.items)


def judgeable(job):
    """Say whether a job is what the paper lets a language model judge: clips, and answers in words (Tab. 6, 7)."""
    return of_clips(job) and all("answer" in item.truth for item in job.items)


def paper_of(job):
    """LocVLM-B's figures, percent, or None where the paper has none of it: it reads no clips."""
    return None if of_clips(job) else PAPER.get(job.task)


def judge_of(job, items, folder, args):
    """Let a language model judge answers about clips: (its figures, what it was), ({}, None) where none is asked.

    Its requests are written for any run. What it said is kept row by row, so that no answer is judged twice.
    """
    if not judgeable(job):
        return {}, None
    requests = judge_requests(items, args.judge_model)
    write_rows(folder / f"{job.name}.requests.jsonl", requests)
    if args.judgements:
        rows = read_rows(args.judgements, ("custom_id",))
        return read_judgements(rows, items), {"model": args.judge_model, "file": args.judgements}
    if not args.judge_url:
        return {}, None
    wanted = {r["custom_id"]: hashlib.sha256(json.dumps(r["body"]).encode()).hexdigest() for r in requests}
    path, key = folder / f"{job.name}.judgements.jsonl", os.environ.get("OPENAI_API_KEY")
    with open_journal(path) as journal:
        kept = [row for row in read_journal(path) if row.get("request") == wanted.get(row["custom_id"], "")]
        for row in tqdm(ask_judge(args.judge_url, key, args.judge_model, items, kept), desc="judge", disable=None):
            kept.append(row | {"request": wanted[row["custom_id"]]})
            write_line(journal, kept[-1])
    return read_judgements(kept, items), {"model": args.judge_model, "url": args.judge_url}


def table(job, folders):
    """Print a task's figures: a column for each result of the same questions, and the paper's where it has them."""
    asked = questions_sha256(job.items)
    paths = {title: folder / f"{job.name}.json" for title, folder in folders.items()}
    results = {title: read_json(path) for title, path in paths.items() if path.is_file()}
    results = {title: result for title, result in results.items() if result.get("questions_sha256") == asked}
    columns = {title: result["metrics"] for title, result in results.items()}
    if paper := paper_of(job):
        columns["paper"] = {name: value / 100 for name, value in paper.items()}
    of_paper = f" (paper: LocVLM-B{' on COCO' if job.task in TASKS else ''})" if paper else ""
    images = len({item.image for item in job.items})
    print(f"\n{job.name}: {len(job.items)} questions about {images} images{of_paper}")
    for reason, count in job.left_out.items():
        print(f"  left out: {count} {reason}")
    if changed := differences(results.get("ours", {}), results.get("blind", {})):
        print(f"  ours and blind are of two evaluations; they differ in {', '.join(changed)}")
    print(" " * 42 + "".join(f"{title:>10}" for title in columns))
    for name in dict.fromkeys(name for title, figures in columns.items() if title != "paper" for name in figures):
        print(f"  {name:40}" + "".join(f"{shown(figures.get(name)):>10}" for figures in columns.values()).rstrip())
    if job.task == "pope":  # as LLaVA reports it
        f1 = [result["metrics"]["F1"] for result in read_results(folders["ours"]).values() if result["task"] == "pope"]
        if len(f1) > 1:
            print(f"  mean F1 of the {len(f1)} files of POPE in {folders['ours']}: {shown(sum(f1) / len(f1))}")
    for model, figures in PAPER_ROWS.get(job.task, ()):
        print(f"  paper, {model}: " + ", ".join(f"{name} {value} %" for name, value in figures.items()))


def shown(value):
    """A figure as it is printed: a share in percent, a count as it is, - where there is none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.1f} %"


# ----- command line


def parse(argv):
    """Read the command line, and refuse what does not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="run folder, or any checkpoint that LocVLM.from_pretrained takes")
    add("--vision", help="folder of the CLIP tower, for an original LLaVA that does not hold it")
    add("--task", choices=(*TASKS, "all", *BENCHMARKS), default="all", help="what to measure (default: all five)")

    add = parser.add_argument_group("questions").add_argument
    add("--coco", help="instances_*.json (default: the held-out shapes, written to data/shapes if they are not there)")
    add("--questions", help="a benchmark's file of questions")
    add("--answers", help="its file of answers, where that is another one")
    add("--images", help="folder of the images or clips")
    add("--split", help="of a benchmark whose file holds several")
    add("--short", action="store_true", help="ask for a single word or phrase, as LLaVA-1.5 is asked")
    add("--location", choices=("box", "point"), default="box", help="what a location is (default: box)")
    add("--limit", type=int, help="use the first so many images only")

    group = parser.add_argument_group("answers")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--blind", action="store_true", help="blank the images: what language alone achieves")
    either("--with-blind", action="store_true", help="ask with the images and without, and print both")
    either("--score", help="ask nothing: judge the answers in this file, rows as NAME.jsonl has them")
    add("--temperature", type=float, default=0.0, help="0 is greedy, the paper samples at 0.2 (default: 0)")
    add("--seed", type=int, default=0, help="of questions, and of sampling, with a question's text (default: 0)")
    add("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    add("--batch", type=int, default=128, help="questions at a time, those of an image together (default: 128)")
    add("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    add("--compile", action="store_true", help="torch.compile the decoder: a minute, then faster")
    add("--fresh", action="store_true", help="ask everything again, whatever another run has left")
    add("--trained-on", default="", help="files that name the images trained on, by commas (default: the run's own)")
    add("--into", help="folder of the results; those of --blind and --score lie beside it (default: RUN/eval)")

    group = parser.add_argument_group("a language model as judge of answers about clips")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--judgements", help="its replies to NAME.requests.jsonl: JSON lines with custom_id and response")
    either("--judge-url", help="ask it: https://host/v1, with the key that OPENAI_API_KEY holds")
    add("--judge-model", default="gpt-3.5-turbo", help="its name (default: gpt-3.5-turbo, the paper's)")

    add = parser.add_argument_group("a question of your own").add_argument
    add("--ask", help="a question, about --image")
    add("--image", help="image file or clip to ask about")
    add("--out", help="where --ask draws (default: ask.png in the folder of the results)")
    args = parser.parse_args(argv)

    task, asked = f"--task {args.task}", BENCHMARKS.get(args.task)
    takes, files = (
        ((*asked.options, "answers" if "answers:" in asked.files else ""), asked.files) if asked else ((), "")
    )
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    refused = [
        (bool(args.ask) != bool(args.image), "--ask and --image; expected both or none"),
        (several and (args.ask or args.score), "--ask or --score in several processes; expected one"),
        (args.coco and not args.images, "--coco without --images; expected the folder of its images"),
        (asked and args.coco, f"{task} with --coco; expected --questions FILE --images FOLDER"),
        (asked and not args.questions, f"{task} without --questions FILE; expected {files}"),
        (asked and not args.images, f"{task} without --images; expected the folder of its images"),
        (not asked and args.questions, f"{task} with --questions; expected one of {', '.join(BENCHMARKS)}"),
        (not asked and args.images and not args.coco, "--images without --coco; expected the annotations"),
        (args.judgements and args.with_blind, "--judgements with --with-blind; expected the replies about one run"),
        (args.score and args.task == "all", "--score with --task all; expected the task that its rows are of"),
        (not 0 <= args.temperature < math.inf, f"--temperature {args.temperature}; expected 0 or more"),
    ]
    for name in ("answers", "split", "short"):
        refused.append(
            (getattr(args, name) and name not in takes, f"{task} with --{name}, which it has not; leave it out")
        )
    for name in ("limit", "batch", "max_new_tokens"):
        refused.append(
            (getattr(args, name) is not None and getattr(args, name) < 1, f"--{name.replace('_', '-')} below 1")
        )
    for wrong, complaint in refused:
        if wrong:
            parser.error(complaint)
    return args


def folders_of(run, into=None):
    """Where results go: {column of a table: folder}."""
    into = Path(into or Path(run) / "eval")
    return {
        "ours": into,
        "blind": into.with_name(into.name + "_blind"),
        "scored": into.with_name(into.name + "_scored"),
    }


def read_config_of(args):
    """Read a checkpoint's config and check its shapes, but read no weights: (LocVLMConfig, what pins its tokenizer)."""
    if args.score and not (Path(args.run) / "config.json").is_file():
        print(f"{args.run} holds no model: boxes are read as {LocVLMConfig().coord_format()}")
        return LocVLMConfig(), None
    hollow = LocVLM.from_pretrained(args.run, args.vision, device="meta")
    return hollow.config, sha256(hollow.tokenizer.path)


def score(args, jobs, wording, about):
    """Judge answers that are there. A run's own rows stay its results; what others say goes to a folder beside them."""
    [job] = jobs
    join(job.items, [(row["id"], row["answer"]) for row in read_rows(args.score, ("id", "answer"))], args.score)
    folders, rows = folders_of(args.run, args.into), Path(args.score)
    folder = folders["scored"]
    about |= {"scored": {"file": str(rows), "sha256": sha256(rows)}}
    own = [path for path in folders.values() if (path / f"{job.name}.jsonl").resolve() == rows.resolve()]
    if own and rows.with_suffix(".json").is_file():
        before = read_json(rows.with_suffix(".json"))
        ours = {"questions_sha256": questions_sha256(job.items), "answers_sha256": answers_sha256(job.items)}
        if before.items() >= ours.items():
            folder, about = own[0], before | {key: about[key] for key in ("git_commit", "torch")}
    if not args.fresh:
        require_own(job, folder, about["data_sha256"])
    write_results(job, job.items, folder, wording, about, args)
    table(job, {title: path for title, path in folders.items() if title != "scored" or path == folder})
    if folder != folders["scored"] and not args.into:
        print(f"\nwritten: {write_report(args.run)}")


def main(argv=None):
    args = parse(argv)
    rank, world, wait = processes = start_processes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0) if world > 1 else 0}" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype or ("fp32" if device == "cpu" else "bf16")]
    decoding = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}

    @cache
    def model():
        loaded = LocVLM.from_pretrained(args.run, args.vision, dtype, device).eval()
        loaded.for_inference(args.compile)
        return loaded

    if args.ask:
        out = args.out or folders_of(args.run, args.into)["ours"] / "ask.png"
        return ask(model(), args.image, args.ask, out, **decoding)

    # 1 read the questions, and refuse what is wrong with them before the weights are read
    config, tokenizer_sha256 = read_config_of(args)
    wording = Wording(config.coord_format(), location=args.location, medium="video" if config.frames else "image")
    if rank > 0:
        wait()  # until rank 0 has written the shapes world, where that is wanted
    jobs = read_jobs(args, wording, config.frames)
    if rank == 0:
        wait()
    if (args.judgements or args.judge_url) and not all(map(judgeable, jobs)):
        raise ValueError(f"a judge for --task {args.task}; expected questions about clips, with answers; leave it out")
    if args.judgements:
        require_file(args.judgements, "the judge's replies")
    spoken = {"template": "v1", "geometry": config.geometry, "kind": config.kind, "frames": config.frames}
    about = {
        "run": str(args.run),
        "data_sha256": {str(path): sha256(path) for job in jobs[:1] if rank == 0 for path in job.files},
        "split": args.split,
        "short": args.short,
        **spoken,
        "location": args.location,
        "seed": args.seed,
        "no_object_answer": NEG_ANSWER,
        "git_commit": git_commit(),
        "torch": torch.__version__,
    }
    folders = folders_of(args.run, args.into)
    if args.score:
        return score(args, jobs, wording, about)
    asked_for = ["blind", "ours"] if args.with_blind else ["blind" if args.blind else "ours"]
    for job in jobs if rank == 0 and not args.fresh else ():
        for title in asked_for:
            require_own(job, folders[title], about["data_sha256"])
    answering = {  # with the questions, all that answers depend on
        **spoken,
        "weights_sha256": weights_sha256(args.run) if rank == 0 else None,
        "vision_sha256": weights_sha256(args.vision) if args.vision and rank == 0 else None,
        "tokenizer_sha256": tokenizer_sha256,
        "dtype": str(dtype).removeprefix("torch."),
        "decoding": decoding,
        "batch": args.batch,
        "compile": args.compile,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else platform.machine(),
        "images_folder": str(args.images),
    }
    seen = trained_on(args.run, args.trained_on) if rank == 0 else None
    if rank == 0:
        print(f"{args.run} on {', '.join(about['data_sha256'])}" + (f" in {world} processes" if world > 1 else ""))

    # 2 ask, and write
    for job in jobs:
        for title in asked_for:
            items = copy.deepcopy(job.items)  # judging marks them
            folder, blind = folders[title], title == "blind"
            parts, how = folder / f"{job.name}.parts", answering | {"blind": blind}
            options = {"questions_sha256": questions_sha256(items), **how}

            def asker(blind=blind):
                return partial(answers_to, model=model(), blind=blind, decoding=decoding)

            asked, seconds = answer_all(items, args.batch, asker, parts, options, processes, args.fresh)
            if rank == 0:
                speed = {"seconds": round(seconds, 2), "questions_per_second": round(asked / seconds, 2)}
                trained = contamination(items, seen)
                ran = {"contamination": trained, "world_size": world, "asked": asked, **speed}
                write_results(job, items, folder, wording, {**about, **how, **ran}, args)
                shutil.rmtree(parts)
        if rank == 0:
            table(job, {title: folders[title] for title in ("ours", "blind")})
            if trained != "unknown" and trained["images"]:
                print(f"  {trained['images']} of the {trained['of']} images were trained on")
    if rank == 0 and not args.into:
        print(f"\nwritten: {write_report(args.run)}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
