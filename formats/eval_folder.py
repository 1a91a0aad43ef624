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
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from data import NEG_ANSWER
from formats.annotations import coco_id, image_ids, image_ids_of, parse_sources, require_usable
from formats.files import read_json, remove_temporary, sha256, some, write_json, write_rows
from formats.images import has_image, is_hidden, names_in
from formats.journal import work_in_parts
from formats.pictures import overlay

COMPARED = ("questions", "images", "weights_sha256", "data_sha256", "seed", "split", "decoding", "location", "template")


@dataclass
class Job:
    """A task with its questions."""

    task: str
    name: str  # of its result files
    rules: object  # evaluate.Task
    items: list
    skipped: dict  # reason -> count
    files: list  # that its questions came from

    @property
    def paper(self):
        return self.rules.paper if self.rules.has_paper(self.items) else ()


def name_of(task, file=None, split=None):
    """Return the name of a task's results.

    >>> name_of("hal"), name_of("refcoco", "refcoco/refs(unc).p", "testB")
    ('hal', 'refcoco-refs(unc)-testB')
    """
    return "-".join(filter(None, (task, file and Path(file).stem, split)))


def folders_of(run, into=None):
    """Return where results go: {column of the printed table: folder}."""
    into = Path(into or Path(run) / "eval")
    return {"ours": into, **{title: into.with_name(f"{into.name}_{title}") for title in ("blind", "scored")}}


def read_jobs(tasks, args, wording):
    """Read the questions of tasks {name: Task}, before any model is loaded: a list of Jobs. Missing files raise an error."""
    jobs = []
    for name, task in tasks.items():
        items, skipped = task.read(args, wording)
        files = [Path(path) for path in ((args.questions, args.answers) if task.files else (args.coco,)) if path]
        file = files[0] if task.files or not args.is_default_data else None  # results on the held-out shapes name no file
        job = Job(name, name_of(name, file, args.split if task.files else None), task, items, dict(skipped), files)
        if doubled := [i for i, count in Counter(item.id for item in items).items() if count > 1]:
            raise ValueError(f"{files[0]}: {len(doubled)} ids of questions occur twice ({some(doubled)}); make them unique")
        if not items:
            print(f"{job.name}: no image of {files[0]} has a question for it")
        jobs += [job] if items else []
    if not jobs:
        hint = "is it the right file, or split?" if task.files else "it needs boxes and absent categories"
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
        where = images or "--images, which is not given"
        raise FileNotFoundError(f"{len(missing)} of the {len(paths)} images of {source} are not in {where} ({some(missing)})")


def by_picture(items):
    """Group items by the picture they are about: {(path, mirrored): items}."""
    pictures = {}
    for item in items:
        pictures.setdefault((item.image, item.mirrored), []).append(item)
    return pictures


def batches(items, size):
    """Yield batches of up to `size` questions. Those about one picture stay together: its prefix is computed once.

    Batches do not depend on the items' order or on who answers them: in bfloat16, the rest of a batch can change an answer.
    """
    batch, groups = [], by_picture(sorted(items, key=lambda item: item.id)).values()
    for piece in (group[i : i + size] for group in groups for i in range(0, len(group), size)):
        if len(batch) + len(piece) > size:
            yield batch
            batch = []
        batch = batch + piece
    if batch:
        yield batch


def answer_all(items, size, make_answerer, parts, options, processes, fresh=False):
    """Answer all items on rank 0 (see journal.work_in_parts). Return (how many were answered now, in how many seconds).

    make_answerer() returns the function batch -> {id: answer}.
    """
    pieces = {batch[0].id: batch for batch in batches(items, size)}
    rows, now, seconds = work_in_parts(pieces, make_answerer, parts, options, processes, restarts=True, fresh=fresh)
    if processes[0] == 0:
        join(items, [pair for _, answers in rows for pair in answers.items()], parts)
    return sum(len(pieces[key]) for key in now), seconds


def join(items, pairs, source):
    """Give each item its answer, by id. Raise ValueError for missing, unknown or repeated ids. pairs: (id, answer)"""
    count, asked = Counter(i for i, _ in pairs), {item.id: item for item in items}
    doubled, unknown = [i for i in count if count[i] > 1], [i for i in count if i not in asked]
    missing, fix = [i for i in asked if i not in count], "pass the file that was answered, or answer again with --fresh"
    for what, ids in {"occur twice": doubled, "belong to no question": unknown, "are missing": missing}.items():
        if ids:
            raise ValueError(f"{source}: {len(ids)} ids {what} ({some(ids)}), of {len(items)} questions; {fix}")
    for i, answer in pairs:
        asked[i].answer = answer


def git_commit():
    """Return the commit of this code, marked -dirty if files differ from it; None outside a checkout."""
    command, folder = ["git", "describe", "--always", "--dirty", "--exclude", "*"], Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except OSError:
        return None


def questions_sha256(items):
    """Hash what identifies the questions: ids, image names and texts, in any order."""
    rows = sorted((item.id, Path(item.image or "").name, item.mirrored, item.question) for item in items)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def answers_sha256(items):
    return hashlib.sha256(json.dumps(sorted((item.id, item.answer) for item in items)).encode()).hexdigest()


def trained_on(run, files=""):
    """Return (annotation files, COCO ids) that a run was trained on, or None if unknown.

    files  separated by commas; if empty, those that train.py noted in the run, and in the runs it started from
    """
    if files:
        return files.split(","), image_ids_of(files)
    files, ids, visited = [], set(), set()
    while run and Path(run).resolve() not in visited:
        visited.add(Path(run).resolve())
        path = Path(run) / "config.json"
        notes = read_json(path).get("locvlm", {}).get("trained_with") if path.is_file() else None
        if not notes:
            break
        world = Path("data/moving" if notes["stages"] in ("3", "4") else "data/shapes")  # the default data
        own = [path for path, _, _ in parse_sources(notes["data"], notes["images"])]
        own = own or sorted(map(str, world.glob("*_train.json")))
        needed = own + [path for path in notes["exclude"].split(",") if path]
        if not own or not all(Path(path).is_file() for path in needed):
            return None
        files, run = files + own, notes["init_from"]
        ids |= set().union(*map(ids_in, own)) - image_ids_of(notes["exclude"])
    return (files, ids) if files else None


@cache  # a training file may be a gigabyte, and several evaluations in one process need it
def ids_in(path):
    """Return the COCO ids of a file's images; none if it names none, as chat.json of CC3M."""
    try:
        return image_ids(path)
    except ValueError:
        return set()


def require_own(job, folder, data_sha256):
    """Raise ValueError before results about another file of questions with this name are replaced (refcoco's, refcoco+'s)."""
    path = folder / f"{job.name}.json"
    if before := read_json(path).get("data_sha256") if path.is_file() else None:
        (file, content), (new_file, new_content) = (next(iter(files.items())) for files in (before, data_sha256))
        if file != new_file and content != new_content:
            raise ValueError(f"{path} is about {file}, not {new_file}; keep both with --into FOLDER, or replace with --fresh")


def describe(args, config, wording, jobs):
    """Return what every result says about its origin."""
    return {
        "run": str(args.run), "data_sha256": {str(path): sha256(path) for path in jobs[0].files},
        "split": getattr(args, "split", None), "short": getattr(args, "short", False), "template": "v1",
        "geometry": config.geometry, "kind": config.kind, "frames": config.frames,
        "location": wording.location, "words": wording.words, "seed": args.seed, "no_object_answer": NEG_ANSWER,
        "git_commit": git_commit(), "torch": torch.__version__,
    }


def run_jobs(args, jobs, wording, model, processes):
    """Answer the questions of all jobs with an evaluate.Answerer, judge the answers, write and print the results."""
    rank, world, _ = processes
    folders, about, answering, seen = folders_of(args.run, args.into), {}, {}, None
    titles = ["blind", "ours"] if args.with_blind else ["blind" if args.blind else "ours"]
    if rank == 0:
        about = describe(args, model.config, wording, jobs)
        for job, title in ((job, title) for job in jobs for title in titles if not args.fresh):
            require_own(job, folders[title], about["data_sha256"])
        # with the questions, all that answers depend on
        answering = {key: about[key] for key in ("template", "geometry", "kind", "frames")} | model.describe()
        seen = trained_on(args.run, args.trained_on)
        print(f"{args.run} on {', '.join(about['data_sha256'])}" + (f" in {world} processes" if world > 1 else ""))
    for job in jobs:
        for title in titles:
            items = copy.deepcopy(job.items)  # judging changes them
            folder, how = folders[title], answering | {"blind": title == "blind"}
            parts, options = folder / f"{job.name}.parts", {"questions_sha256": questions_sha256(items), **how}
            answerer = partial(model.answerer, title == "blind")
            count, seconds = answer_all(items, args.batch, answerer, parts, options, processes, args.fresh)
            if rank == 0:
                ours, trained = {coco_id(item.image) for item in items} - {None}, "unknown"
                if seen and ours:  # at most so many: some may have been skipped in training
                    trained = {"images": len(ours & seen[1]), "of": len(ours), "files": seen[0]}
                ran = {"contamination": trained, "world_size": world, "asked": count}
                ran |= {"seconds": round(seconds, 2), "questions_per_second": round(count / seconds, 2)}
                write_results(job, items, folder, wording, {**about, **how, **ran}, args)
                shutil.rmtree(parts)
        if rank == 0:
            print_table(job, {title: folders[title] for title in ("ours", "blind")})
            if trained != "unknown" and trained["images"]:
                print(f"  {trained['images']} of the {trained['of']} images were trained on")


def write_results(job, items, folder, wording, about, args):
    """Judge the answers, and write the figures, the rows, the picture and the submission file."""
    for item in items:
        job.rules.judge(item, wording)
    metrics = job.rules.metrics(items)
    more, judge = job.rules.after(job, items, folder, args) if job.rules.after else ({}, None)
    keys = ("id", "image", "size", "question", "answer", "correct", "boxes_px", "mirrored", "truth")
    rows = [{key: getattr(item, key) for key in keys} | {"image": item.image and str(item.image)} for item in items]
    write_rows(folder / f"{job.name}.jsonl", rows)
    if job.rules.submission:
        write_json(folder / f"{job.name}.submission.json", job.rules.submission(items))
    figures = {  # JSON has no NaN, which stands for: there was no such question
        "task": job.task, "metrics": {name: None if math.isnan(value) else value for name, value in (metrics | more).items()},
        "questions": len(items), "images": len({item.image for item in items}), "skipped": job.skipped, "judge": judge,
        "paper": paper_of(job), "paper_rows": job.paper, "prompts": list(job.rules.prompts),
        "questions_sha256": questions_sha256(items), "answers_sha256": answers_sha256(items),
    }
    if not getattr(args, "score", None):
        overlay(items, folder / f"{job.name}.png")
    # written last, as it says that all is complete; figures win over older ones in `about` (--score)
    write_json(folder / f"{job.name}.json", figures | about | figures)
    remove_temporary(folder.glob(f"{glob.escape(job.name)}.*"))


def paper_of(job):
    """Return LocVLM-B's figures, in percent, or None: it reads no clips."""
    return None if job.rules.is_about_clips(job.items) else dict(job.paper).get("LocVLM-B")


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
    pin, paper, images = questions_sha256(job.items), paper_of(job), len({item.image for item in job.items})
    results = {title: read_results(folder).get(job.name, {}) for title, folder in folders.items()}
    results = {title: result for title, result in results.items() if result.get("questions_sha256") == pin}
    columns = {title: result["metrics"] for title, result in results.items()}
    columns |= {"paper": {name: value / 100 for name, value in paper.items()}} if paper else {}
    note = f" (paper: LocVLM-B{'' if job.rules.files else ' on COCO'})" if paper else ""
    print(f"\n{job.name}: {len(job.items)} questions about {images} images{note}")
    print("".join(f"  skipped: {count} {reason}\n" for reason, count in job.skipped.items()), end="")
    if changed := differences(results.get("ours", {}), results.get("blind", {})):
        print(f"  ours and blind are of two evaluations; they differ in {', '.join(changed)}")
    print(" " * 42 + "".join(f"{title:>10}" for title in columns))
    for name in dict.fromkeys(name for title, figures in columns.items() if title != "paper" for name in figures):
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
