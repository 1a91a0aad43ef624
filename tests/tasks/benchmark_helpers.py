"""What the tests of benchmarks share: reading as `python -m tasks` does, judging, and small files."""

import json
from argparse import Namespace

from PIL import Image

from coords import CoordFormat
from data import Wording
from formats.eval_folder import read_jobs
from tasks import TASKS

WORDING = Wording(CoordFormat("ivb", 224))
LONG = "left right no 12 ... 1,2 don't " * 33_000  # a megabyte


def options(questions, answers, images, **more):
    """Return a command line's options about files."""
    paths = {"questions": str(questions), "answers": answers and str(answers), "images": str(images)}
    return Namespace(**{**paths, "coco": None, "split": None, "short": False, "seed": 0, "limit": None, **more})


def read(name, questions, answers, images, wording=WORDING, **more):
    """Read a benchmark's questions as its command does: (items, {reason: questions skipped})."""
    [job] = read_jobs({name: TASKS[name]}, options(questions, answers, images, **more), wording)
    return job.items, job.skipped


def answered(name, items, *answers):
    """Put answers to items, judge them and return the benchmark's figures."""
    for item, answer in zip(items, answers, strict=True):
        item.answer = answer
        TASKS[name].judge(item, WORDING)
    return TASKS[name].metrics(items)


def write(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def touch(folder, *names):
    """Make files of which only the names matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
