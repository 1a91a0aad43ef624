"""An evaluation on disk: questions answered in parts that survive a kill, and figures with all that is needed to repeat them.

RUN/eval/NAME.json    figures, and what they depend on: prompts, data, weights, decoding, seed, counts, hashes
RUN/eval/NAME.jsonl   one row per question
RUN/eval/NAME.png     boxes on pictures: truth green, prediction blue; successes above, failures below
RUN/eval/NAME.parts   answers so far; a killed run continues from there, on any number of processes, to the same rows

NAME: task, file, split. RUN/eval_blind holds results on blank images, RUN/eval_scored the judgement of answers made elsewhere.
"""

import copy
import glob
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from data import NEG_ANSWER
from formats.annotations import coco_id, image_ids, image_ids_of, parse_sources, require_usable
from formats.features import file_size
from formats.files import read_json, remove_temporary, sha256, some, write_json, write_rows
from formats.hub import is_name
from formats.images import has_image, is_hidden, names_in, split_zip
from formats.journal import work_in_parts
from formats.parquet import SHARD, shards
from formats.pictures import overlay
from formats.schema import counted

COMPARED = ("questions", "questions_sha256", "images", "weights_sha256", "data_sha256", "seed", "split", "decoding", "location",
            "template")  # fmt: skip
# what a row keeps of an evaluate.Item
ROW_KEYS = ("id", "image", "size", "question", "answer", "correct", "boxes_px", "mirrored", "is_clip", "truth", "measured")
ids_in = cache(image_ids)  # a training file may be a gigabyte, and several evaluations in one process need it


@dataclass
class Job:
    task: str
    name: str  # of its result files
    rules: object  # evaluate.Task
    items: list
    skipped: dict  # reason -> count
    files: list  # that its questions came from

    @property
    def paper(self):
        return self.rules.paper if self.rules.has_paper(self.items) else ()

    @property
    def paper_b(self):
        """LocVLM-B's figures, in percent, or None: it reads no clips."""
        return None if all(item.is_clip for item in self.items) else dict(self.paper).get("LocVLM-B")


def name_of(task, file=None, split=None):
    """Return the name of a task's results, as refcoco-refs(unc)-testB."""
    return "-".join(filter(None, (task, file and re.sub(f"{SHARD}$", "", Path(file).stem), split)))


def folders_of(run, into=None):
    """Return where results go: {column of the printed table: folder}. That of ORG/NAME on the hub is runs/ORG--NAME/eval."""
    into = Path(into or (Path("runs", str(run).replace("/", "--")) if is_name(run) else Path(run)) / "eval")
    return {"ours": into, **{title: into.with_name(f"{into.name}_{title}") for title in ("blind", "scored")}}


def read_jobs(tasks, args, wording):
    """Read the questions of tasks {name: Task}, before any model is loaded: a list of Jobs. Missing files raise an error."""
    jobs = []
    for name, task in tasks.items():
        items, skipped = task.read(args, wording)
        named = (args.questions, args.answers) if task.files else (args.coco,)
        files = [file for path in named if path for file in shards(path)]
        file = files[0] if task.files or not args.is_default_data else None  # results on the held-out shapes name no file
        job = Job(name, name_of(name, file, args.split if task.files else None), task, items, dict(skipped), files)
        if wrong := [item.id for item in items if not isinstance(item.id, str)]:
            raise ValueError(f"{files[0]}: the id {wrong[0]!r} of a question is no text; read it as str(...)")
        if doubled := [i for i, count in Counter(item.id for item in items).items() if count > 1]:
            raise ValueError(f"{files[0]}: {len(doubled)} ids of questions occur twice ({some(doubled)}); make them unique")
        if items:
            jobs.append(job)
        else:
            print(f"{job.name}: no image of {files[0]} has a question for it")
    if not jobs:
        hint = "is it the right file, or split?" if task.files else "it needs boxes, absent categories, or a larger --limit"
        raise ValueError(f"{files[0]} yields no question for {', '.join(tasks)}; {hint}")
    items = [item for job in jobs for item in job.items]
    if not getattr(args, "score", None):  # which opens no image
        require_images([item.image for item in items], files[0], args.images)
        require_usable([item for item in items if item.size], files[0])
    return jobs


def require_images(paths, source, images):
    """Raise FileNotFoundError if an image or clip that the file `source` asks about is not in the folder or zip `images`."""
    paths = dict.fromkeys(path for path in paths if path)
    if missing := [path.name for path in paths if not (path.exists() or has_image(path) or names_in(path))]:
        images = images or "--images, which is not given"
        raise FileNotFoundError(f"{len(missing)} of the {len(paths)} images of {source} are not in {images} ({some(missing)})")


def by_picture(items):
    """Group items by the picture they are about: {(path, mirrored): items}."""
    pictures = {}
    for item in items:
        pictures.setdefault((item.image, item.mirrored), []).append(item)
    return pictures


def batches(items, size):
    """Yield batches of up to `size` questions. Those about one picture stay together: its prefix is computed once.
    The items' order and who answers do not change a batch: in bfloat16, the rest of a batch can change an answer."""
    batch, groups = [], by_picture(sorted(items, key=lambda item: item.id)).values()
    for piece in (group[i : i + size] for group in groups for i in range(0, len(group), size)):
        if len(batch) + len(piece) > size:
            yield batch
            batch = []
        batch = batch + piece
    yield batch


def answer_all(items, size, make_functions, parts, options, processes, fresh=False):
    """Answer items in all processes; rank 0 gives all of them their answers. Return (how many were answered now, seconds).
    make_functions() returns the functions batch -> input, and input -> {id: answer}."""
    pieces = {batch[0].id: batch for batch in batches(items, size)}
    rows, now, seconds = work_in_parts(pieces, make_functions, parts, options, processes, restarts=True, fresh=fresh)
    if processes[0] == 0:
        join(items, [pair for _, answers in rows for pair in answers.items()], parts)
    return sum(len(pieces[key]) for key in now), seconds


def join(items, pairs, source):
    """Give each item its answer, by id. Raise ValueError for missing, unknown or repeated ids. pairs: (id, answer)"""
    count, asked = Counter(i for i, _ in pairs), {item.id: item for item in items}
    wrong = {
        "occur twice": [i for i in count if count[i] > 1], "belong to no question": [i for i in count if i not in asked],
        "are missing": [i for i in asked if i not in count],
    }
    for what, ids in wrong.items():
        if ids:
            fix = "pass the file that was answered, or answer again with --fresh"
            raise ValueError(f"{source}: {len(ids)} ids {what} ({some(ids)}), of {len(items)} questions; {fix}")
    for i, answer in pairs:
        asked[i].answer = answer


def hashes(items):
    """Hash what identifies the questions (ids, image names and texts), and the answers; in any order."""
    questions = [(item.id, Path(item.image or "").name, item.mirrored, item.question) for item in items]
    rows = {"questions_sha256": questions, "answers_sha256": [(item.id, item.answer) for item in items]}
    return {name: hashlib.sha256(json.dumps(sorted(values)).encode()).hexdigest() for name, values in rows.items()}


def trained_on(run, files=""):
    """Return (annotation files, COCO ids) that a run was trained on, or None if unknown. files: separated by commas; if empty,
    those that train.py noted in the run and in the runs it started from, or its default data"""
    if files:
        return files.split(","), image_ids_of(files)
    files, ids, visited = [], set(), set()
    while run and run not in visited and (path := Path(run) / "config.json").is_file():
        visited.add(run)
        if not (notes := read_json(path).get("locvlm", {}).get("trained_with")):
            return None
        own = [path for path, _, _ in parse_sources(notes["data"], notes["images"])]
        if not own:  # the default data; this file names all images
            own = ["data/moving/clips_train.json" if notes["stages"] in ("3", "4") else "data/shapes/instances_train.json"]
        if not all(Path(path).is_file() for path in own + notes["exclude"].split(",") if path):
            return None
        files, run, of_run = files + own, notes["init_from"], set()
        for path in own:
            with suppress(ValueError):  # it names no COCO image, as chat.json of CC3M
                of_run |= ids_in(path)
        ids |= of_run - image_ids_of(notes["exclude"])
        if run and not Path(run).exists():  # its own files are then unknown
            return None
    return (files, ids) if files else None


def require_own(job, folder, data_sha256):
    """Raise ValueError before results about another file of questions with this name are replaced (refcoco's, refcoco+'s)."""
    path = folder / f"{job.name}.json"
    if before := read_json(path).get("data_sha256") if path.is_file() else None:
        (file, content), (new_file, new_content) = (next(iter(files.items())) for files in (before, data_sha256))
        if file != new_file and content != new_content:
            raise ValueError(f"{path} is about {file}, not {new_file}; keep both with --into FOLDER, or replace with --fresh")


def describe(args, config, wording, jobs):
    """Return what every result says about its origin. The commit of this code is -dirty if files differ from it."""
    commit = ""
    with suppress(OSError):  # without git
        git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "run": str(args.run), "data_sha256": {str(path): sha256(path) for path in jobs[0].files},
        "split": getattr(args, "split", None), "short": getattr(args, "short", False), "template": "v1",
        "geometry": config.geometry, "kind": config.kind, "frames": config.frames,
        "location": wording.location, "words": wording.words, "seed": args.seed, "no_object_answer": NEG_ANSWER,
        "git_commit": commit or None, "torch": torch.__version__,
    }


def is_cut(text, tokenizer, limit):
    """Return True if a text has as many tokens as the model may write. Blanks that were stripped from its end are not counted."""
    return len(tokenizer.encode(text)) >= limit


def run_jobs(args, jobs, wording, answerer, processes):
    """Answer the questions of all jobs with an evaluate.Answerer, judge the answers, write and print the results."""
    rank, world, _ = processes
    folders, about, answering = folders_of(args.run, args.into), {}, {}
    titles = ["blind", "ours"] if args.with_blind else ["blind" if args.blind else "ours"]
    if rank == 0:
        about = describe(args, answerer.config, wording, jobs)
        for job, title in product(jobs, () if args.fresh else titles):
            require_own(job, folders[title], about["data_sha256"])
        # with the questions, all that answers depend on
        answering = {key: about[key] for key in ("template", "geometry", "kind", "frames")} | answerer.describe()
        seen = trained_on(args.run, args.trained_on)
        print(f"{args.run} on {', '.join(about['data_sha256'])}" + (f" in {world} processes" if world > 1 else ""))
    for job, title in product(jobs, titles):
        items, how = copy.deepcopy(job.items), answering | {"blind": title == "blind"}  # judging changes the items
        parts, options = folders[title] / f"{job.name}.parts", {"questions_sha256": hashes(items)["questions_sha256"], **how}
        functions = partial(answerer.functions, title == "blind", job.rules.choose)
        paths = {item.image for item in items if item.image} if rank == 0 and title != "blind" else ()  # rank 0's options count
        options["image_bytes"] = sum(map(file_size, {split_zip(path)[0] or path for path in paths}))
        count, seconds = answer_all(items, args.batch, functions, parts, options, processes, args.fresh)
        if rank > 0:
            continue
        limit = answerer.decoding["max_new_tokens"]
        cut = 0 if job.rules.choose else sum(is_cut(item.answer, answerer.tokenizer, limit) for item in items)
        ours, trained = {coco_id(item.image) for item in items} - {None}, "unknown"
        if seen and ours:  # at most so many: some may have been skipped in training
            trained = {"images": len(ours & seen[1]), "of": len(ours), "files": seen[0]}
        ran = {"contamination": trained, "world_size": world, "asked": count, "cut": cut}
        ran |= {"seconds": round(seconds, 2), "questions_per_second": round(count / seconds, 2)}
        write_results(job, items, folders[title], wording, about | how | ran, args)
        shutil.rmtree(parts)
        if title == titles[-1]:
            print_table(job, {title: folders[title] for title in ("ours", "blind")})
            if trained != "unknown" and trained["images"]:
                print(f"  {trained['images']} of the {trained['of']} images were trained on")


def write_results(job, items, folder, wording, about, args):
    """Judge the answers, and write the figures, the rows, the picture and the submission file."""
    for item in items:
        if (returned := job.rules.judge(item, wording)) is not None:
            raise ValueError(f"the judge of {job.task} returns {returned!r}; it must set item.correct instead")
    metrics = job.rules.metrics(items)
    more, judge = job.rules.after(job, items, folder, args) if job.rules.after else ({}, None)
    rows = [{key: getattr(item, key) for key in ROW_KEYS} | {"image": item.image and str(item.image)} for item in items]
    write_rows(folder / f"{job.name}.jsonl", rows)
    if job.rules.submission:
        write_json(folder / f"{job.name}.submission.json", job.rules.submission(items))
    figures = {  # JSON has no NaN, which stands for: there was no such question
        "task": job.task, "metrics": {name: None if math.isnan(value) else value for name, value in (metrics | more).items()},
        "questions": len(items), "images": len({item.image for item in items}), "skipped": job.skipped, "judge": judge,
        "paper": job.paper_b, "paper_rows": job.paper, "prompts": list(job.rules.prompts), **hashes(items),
    }
    if not getattr(args, "score", None):
        overlay(items, folder / f"{job.name}.png")
    # written last, as it says that all is complete; figures win over older ones in `about` (--score)
    write_json(folder / f"{job.name}.json", figures | about | figures)
    remove_temporary(folder.glob(f"{glob.escape(job.name)}.*"))


def read_results(folder, order=()):
    """Read the results in a folder: {name: result}; tasks of `order` come first."""
    found, place = {}, {task: number for number, task in enumerate(order)}
    for path in sorted(path for path in folder.glob("*.json") if not is_hidden(path.name)):
        result = read_json(path)
        if isinstance(result, dict) and "metrics" in result:  # else a submission file, or a list of requests
            found[path.stem] = {**result, "task": str(result.get("task", path.stem))}
    return dict(sorted(found.items(), key=lambda pair: place.get(pair[1]["task"], len(place))))


def differences(result, blind):
    """Name what sets a blind baseline apart from the result beside it, besides the blank images."""
    return [key for key in COMPARED if key in result and key in blind and result[key] != blind[key]]


def print_table(job, folders):
    """Print a task's figures: a column for each result about the same questions, and the paper's."""
    pin, paper = hashes(job.items)["questions_sha256"], job.paper_b
    results = {title: read_results(folder).get(job.name, {}) for title, folder in folders.items()}
    results = {title: result for title, result in results.items() if result.get("questions_sha256") == pin}
    columns = {title: result["metrics"] for title, result in results.items()}
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    columns |= {"paper": {name: value / 100 for name, value in paper.items()}} if paper else {}
    note = f" (paper: LocVLM-B{'' if job.rules.files else ' on COCO'})" if paper else ""
    print(f"\n{job.name}: {len(job.items)} questions about {len({item.image for item in job.items})} images{note}")
    print(counted(job.skipped, "  "), end="")
    if cut := results.get("ours", {}).get("cut"):
        print(f"  cut: at least {cut} answers, at --max-new-tokens {results['ours']['decoding']['max_new_tokens']}")
    if changed := differences(results.get("ours", {}), results.get("blind", {})):
        print(f"  ours and blind are of two evaluations; they differ in {', '.join(changed)}")
    print(" " * 42 + "".join(f"{title:>10}" for title in columns))
    for name in names:
        print(f"  {name:40}" + "".join(f"{shown(figures.get(name)):>10}" for figures in columns.values()).rstrip())
    if job.rules.summary:
        folder = folders.get("scored", folders["ours"])
        of_task = [result for result in read_results(folder).values() if result["task"] == job.task]
        print(job.rules.summary(of_task, folder), end="")
    for model, figures in job.paper:
        print(f"  paper, {model}: " + ", ".join(f"{name} {value} %" for name, value in figures.items()))


def shown(value):
    """Write a figure: a share in percent, a count or - (for None) as it is."""
    return f"{100 * value:.1f} %" if isinstance(value, float) else str("-" if value is None else value)
