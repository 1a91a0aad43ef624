"""TODO tasks.__main__."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evaluate import TASKS, Task, folders_of, table
from formats.annotations import read_file
from formats.eval_folder import answers_sha256, join, questions_sha256, require_own, write_results
from formats.files import read_json, require_file, sha256, some
from tasks.files import require_images
from tasks.registry import BENCHMARKS, Benchmark
from tiny.moving import ensure_clips
from tiny.shapes import ensure_world
from tools.report import write_report

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
            world = ensure_clips() if frames else ensure_world()
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
