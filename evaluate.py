"""Evaluate a model on five tasks on annotated images (Sec. 4; App. E, H): ask, judge, count.

    python evaluate.py runs/default                              the held-out shapes
    python evaluate.py runs/b2 --task spatial --coco annotations/instances_val2017.json --images val2017
    torchrun --nproc-per-node 8 evaluate.py runs/b2 --coco annotations/instances_val2017.json --images val2017 --with-blind
    python evaluate.py runs/default --ask "What is at location (30, 30, 60, 60) in image?" --image photo.jpg

    task      question                                          right if
    locpred   where is ...                                      IoU >= 0.5 in original pixels; no box counts as wrong
    negpred   where is ... (not in the image)                   the answer says that there is no such object
    revloc    what is at ...                                    it names the right category first
    spatial   which side of ... is ... (COCO-Spatial, Tab. 4)   the answer has the right word; asked directly and in context
    hal       is there a ... (Hal-COCO, Tab. 8)                 yes and no, two objects present and two absent per image

The first three are data.OBJECTIVES; an entry there becomes a task here. Public benchmarks: `python -m tasks NAME RUN`.
Results are written as formats/eval_folder.py says, and `python -m tools.report RUN` makes a page of them.
"""

import argparse
import math
import os
import platform
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image

from clip_vit import mean_colour, preprocess
from coords import fault
from data import LOCATIONS, OBJECTIVES, SIDE_ANSWERS, SIDE_PROMPTS, WORDS, Object, Wording, article, targets_of
from formats.annotations import merge, read_file
from formats.eval_folder import by_picture, folders_of, read_jobs, run_jobs
from formats.files import read_json, run_command, sha256, write_whole
from formats.journal import join_processes
from formats.pictures import card, pictures_of, sheet, still
from formats.processes import has_bf16, pick_device
from formats.weights import weights_sha256
from model import LocVLM
from tiny.moving import ensure_clips
from tiny.shapes import ensure_world
from video import frames_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
HAL_PROMPT = "Is there {object} in the {medium}?"


@dataclass
class Item:
    """One question about one image or clip, what the answer should be, and the answer. Everything but the path is JSON."""

    id: str  # unique within a task: answers are joined by it
    image: Path | None  # image file, member of a zip, or clip
    size: tuple | None  # (width, height) of the image if boxes are asked or drawn, else None
    question: str
    truth: dict  # what the answer should be, and of what kind the question is
    answer: str = ""
    correct: bool | float | None = None  # a score 0..1 if the metric is graded, None if only all answers together count
    boxes_px: list = field(default_factory=list)  # locations in the answer, original pixels
    mirrored: bool = False  # asked about the image mirrored left to right; boxes are then in the mirrored image
    is_clip: bool = False
    measured: dict = field(default_factory=dict)  # what else the judge found, for metrics and report, such as iou


@dataclass(frozen=True)
class Task:
    """One measure: this file's five, or a benchmark in tasks/.

    read        (args, wording) -> (items, Counter {reason: rows or questions skipped}); args are the command line's
    judge       (item, wording): sets item.correct, item.boxes_px if the answer holds locations, and item.measured
    metrics     items -> {name: share or count}
    prompts     templates of the questions
    choose      (model, images, [items of each]) -> [answers of each], if the model does not write them: see tasks/whats_up.py
    files       a benchmark's: what --questions and --answers are
    options     the options that it takes beside them: "split", "short"
    paper       the paper's rows: [(model, {metric: percent})], shown if has_paper(items): the questions are of that kind
    submission  items -> what the benchmark's own server or script takes, as JSON
    after       (job, items, folder, args) -> (more metrics, who judged), for a second judgement of all answers
    summary     (results of this task, folder) -> text, if several files make one figure
    """

    read: Callable
    judge: Callable
    metrics: Callable
    prompts: tuple = ()
    files: str = ""
    options: tuple = ()
    paper: tuple = ()
    has_paper: Callable = bool
    submission: Callable | None = None
    after: Callable | None = None
    summary: Callable | None = None
    choose: Callable | None = None


def paper_rows(task):
    """Return the paper's figures for a task, from tasks/paper.json: ((model, {metric: percent}), ...)."""
    metrics, *rows = read_json(Path(__file__).parent / "tasks/paper.json").get(task, [()])
    return tuple((model, dict(zip(metrics, values, strict=True))) for model, *values in rows)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def item_of(record, name, question, truth):
    """Make a question about an annotated image."""
    return Item(f"{record.id}:{name}", record.image, record.size, question, truth, is_clip=record.is_clip)


def mirror(item):
    """Make the same question about the image mirrored left to right: the opposite side is right, boxes are mirrored."""
    width, word = item.size[0], OPPOSITE[item.truth["word"]]
    boxes_px = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in item.truth["boxes_px"]]
    truth = item.truth | {"word": word, "boxes_px": boxes_px}
    return replace(item, id=f"{item.id}:mirrored", truth=truth, boxes_px=[], measured={}, mirrored=True)


# ----- the objectives


def objective_items(objective, records, wording, rng):
    """Ask an objective of data.OBJECTIVES: about every unique object (or pair), or as many absent categories, at least one."""
    items = []
    for record in records:
        if objective.about == "absent":
            count = min(len(record.absent), max(1, len(record.objects)))
            targets = [Object(name, None) for name in rng.sample(record.absent, count)]  # by name, whatever --words says
        else:
            targets = targets_of(record, objective.about, wording, rng)
        for target in targets:
            question, answer = objective.ask(target, record, wording, rng)
            objects = (target,) if isinstance(target, Object) else target
            truth = {"name": " ".join(o.name for o in objects), "answer": answer}
            if objective.about == "pair":
                truth["names"] = [o.name for o in objects]
            if objective.about == "object":
                truth["box_px"] = target.box_px
            if objective.judge is OBJECTIVES["rev"].judge:  # any category of the data may be named
                truth["names"] = sorted(record.present + record.absent)
            items.append(item_of(record, truth["name"], question, truth))
    return items


def accuracy(items):
    return {"accuracy": mean(item.correct for item in items)}


def locpred_metrics(items):
    """For points, acc@0.5 is the share that lies in the true box; acc@0.75, mean IoU and invalid box are NaN."""
    ious = [item.measured["iou"] for item in items if "iou" in item.measured]
    with_iou = [item for item in items if item.boxes_px and "iou" in item.measured]
    return {
        "acc@0.5": mean(item.correct for item in items), "acc@0.75": mean(iou >= 0.75 for iou in ious), "mean IoU": mean(ious),
        "no box": mean(not item.boxes_px for item in items),
        "invalid box": mean(bool(fault(item.boxes_px[0], item.size)) for item in with_iou),  # outside, or corners swapped
    }  # fmt: skip


def negpred_metrics(items):
    return accuracy(items) | {"gave a box": mean(bool(item.boxes_px) for item in items)}


def revloc_metrics(items):
    return {"name accuracy": accuracy(items)["accuracy"], "named nothing": mean(i.measured["named"] is None for i in items)}


# ----- COCO-Spatial: left and right, above and below


def spatial_triplets(records, rng, axis, strict=False):
    """Yield one triplet per image, drawn at random from its unique objects (App. E).

    (record, obj_1, obj_2, obj_3, side of obj_1): obj_1 lies in one half of the image, obj_2 and obj_3 in the other. By the
    paper's rule, no centre lies in the central 20 %; strict, its other wording: the whole box lies in its half as well.
    axis 0: left and right; 1: above and below
    """
    words = (("left", "right"), ("above", "below"))[axis]
    for record in records:
        size, edges = record.size[axis], [(o.box_px[axis], o.box_px[axis + 2], o) for o in record.objects]
        sides = (
            [o for low, high, o in edges if (low + high) / 2 / size <= 0.4 and not (strict and high > size / 2)],
            [o for low, high, o in edges if (low + high) / 2 / size >= 0.6 and not (strict and low < size / 2)],
        )
        choices = [side for side in (0, 1) if sides[side] and len(sides[1 - side]) >= 2]
        if choices:
            side = rng.choice(choices)
            yield record, rng.choice(sides[side]), *rng.sample(sides[1 - side], 2), words[side]


def side_question(setting, obj_1, obj_2):
    return SIDE_PROMPTS[setting].format(obj_1=f"the {obj_1.name}", obj_2=f"the {obj_2.name}")


def side_answer(side, obj_1, obj_2):
    return SIDE_ANSWERS[side].format(obj_1=f"the {obj_1.name}", obj_2=f"The {obj_2.name}")


def spatial_items(records, wording, rng):
    """Ask about sides directly and in context (App. E).

    In context, "icl" shows two examples that answer what they ask, in random order. "icl verbatim" shows the paper's, whose
    answers are swapped; without an axis in its name, it is about left and right. A direct question about left and right is also
    asked of the mirrored image.
    """
    items, start = [], rng.getstate()
    for axis, setting in enumerate(SIDE_PROMPTS):
        rng.setstate(start)  # so that --limit does not change the questions about above and below
        for record, one, two, three, side in spatial_triplets(records, rng, axis):
            other = OPPOSITE[side]  # where two and three are, seen from one
            first, second, third = (side_question(setting, *pair) for pair in ((one, two), (two, one), (three, one)))
            to_first, to_second = side_answer(other, one, two), side_answer(side, two, one)
            examples = [f"Q: {first} A: {to_first}", f"Q: {second} A: {to_second}"]
            rng.shuffle(examples)
            as_printed = f"Q: {first} A: {to_second} Q: {second} A: {to_first} Q: {third}"  # in the paper: answers are swapped
            verbatim = "icl verbatim" + f" {setting}" * (setting != "left/right")
            texts = {setting: first, f"icl {setting}": " ".join([*examples, f"Q: {third}"]), verbatim: as_printed}
            for name, text in texts.items():
                objects, word = ((one, two), other) if name == setting else ((three, one), side)
                truth = {"setting": name, "word": word, "boxes_px": [o.box_px for o in objects]}
                if name == setting:  # the strict rule may find another triplet than the one drawn above
                    truth["has_whole_boxes"] = any(spatial_triplets([record], random.Random(0), axis, strict=True))
                items.append(item_of(record, f"{setting}:{name}", text, truth))
                if name == "left/right":
                    items.append(mirror(items[-1]))
                    items[-1].truth["setting"] = "left/right mirrored"
    return items


def judge_spatial(item, wording):
    """Right if the answer holds the word (the paper's rule); `strict`: and not its opposite. `side`: the only side it names."""
    word, words = item.truth["word"], re.findall(r"[a-z]+", item.answer.lower())
    named = [side for side in (word, OPPOSITE[word]) if side in words]
    item.correct = word in named
    side = named[0] if len(named) == 1 else None
    item.measured |= {"strict": named == [word], "opposite": OPPOSITE[word] in named, "side": side}


def flip_consistency(items):
    """Return the share of questions answered with one side about the image and the opposite side about its mirror image."""
    sides = {item.id: item.measured["side"] for item in items}
    pairs = [(sides[item.id], item.id.removesuffix(":mirrored")) for item in items if item.mirrored]
    return mean(side is not None and sides[other] == OPPOSITE[side] for side, other in pairs if other in sides)


def spatial_metrics(items):
    metrics = {}
    for setting in dict.fromkeys(item.truth["setting"] for item in items):
        of_setting = [item for item in items if item.truth["setting"] == setting]
        metrics[setting] = mean(item.correct for item in of_setting)
        words = sorted({item.truth["word"] for item in of_setting})
        by_word = {word: mean(item.correct for item in of_setting if item.truth["word"] == word) for word in words}
        metrics |= {f"{setting}, {word}": share for word, share in by_word.items()}
        metrics[f"{setting}, macro"] = mean(by_word.values())  # the words are not asked equally often
        metrics[f"{setting}, strict"] = mean(item.measured["strict"] for item in of_setting)
        metrics[f"{setting}, neither word"] = mean(not i.correct and not i.measured["opposite"] for i in of_setting)
        if setting.startswith("icl verbatim"):  # read as its own examples answer: about obj_3
            metrics[f"{setting}, as its examples answer"] = mean(item.measured["opposite"] for item in of_setting)
        metrics[f"{setting}, questions"] = len(of_setting)
        if setting in SIDE_PROMPTS:
            metrics[f"{setting}, images with whole boxes"] = sum(item.truth["has_whole_boxes"] for item in of_setting)
    if any(item.mirrored for item in items):
        metrics["left/right, flip consistency"] = flip_consistency(items)
    return metrics


# ----- Hal-COCO: is there a ...?


def ask_presence(name, medium="image"):
    return HAL_PROMPT.format(object=article(name), medium=medium)


def hal_items(records, wording, rng):
    """Ask for two categories present in an image and two absent ones (as many of each). About clips, this is Hal-Act."""
    items = []
    for r in records:
        medium = "video" if wording.medium == "video" and r.is_clip else "image"
        count = min(2, len(r.present), len(r.absent))
        for label, names in (("yes", rng.sample(r.present, count)), ("no", rng.sample(r.absent, count))):
            items += [item_of(r, name, ask_presence(name, medium), {"label": label, "name": name}) for name in names]
    return items


def says_no(answer):
    """Read an answer as POPE does: no if its first sentence holds No, no or not; else yes, even if it is empty.

    >>> says_no("No, there is none."), says_no("There is not. Yes"), says_no("Yes. No doubt"), says_no("")
    (True, True, False, False)
    """
    return bool({"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")))


def judge_hal(item, wording):
    if (label := item.truth["label"]) not in ("yes", "no"):
        raise ValueError(f"question {item.id} has the label {label!r}; it must be yes or no")
    item.correct = says_no(item.answer) == (label == "no")


def hal_metrics(items):
    """Count accuracy, precision, recall, F1 and the share of yes from one confusion matrix."""
    count = Counter((item.truth["label"], not says_no(item.answer)) for item in items)
    tp, fp, fn = count["yes", True], count["no", True], count["yes", False]
    return {
        "accuracy": mean(item.correct for item in items),
        "precision": tp / (tp + fp) if tp + fp else 0.0, "recall": tp / (tp + fn) if tp + fn else 0.0,
        "F1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0, "says yes": (tp + fp) / len(items) if items else 0.0,
    }  # fmt: skip


# ----- the tasks


def read_items(task, make, args, wording):
    """Read a task's questions about the annotated images of the command line; the file is read once for all tasks."""
    if not args.annotated:
        records, skipped = read_file(args.coco, args.images or "")
        args.annotated = merge(records), skipped
    records, skipped = args.annotated
    return make(records[: args.limit], wording, random.Random(f"{args.seed} {task}")), skipped


METRICS = {"locpred": locpred_metrics, "negpred": negpred_metrics, "revloc": revloc_metrics}  # other objectives: accuracy
MEASURES = {  # task: (its questions, judge, metrics, prompts)
    **{o.task: (partial(objective_items, o), o.judge, METRICS.get(o.task, accuracy), o.prompts) for o in OBJECTIVES.values()},
    "spatial": (spatial_items, judge_spatial, spatial_metrics, (*SIDE_PROMPTS.values(), "Q: ... A: ... Q: ... A: ... Q: ...")),
    "hal": (hal_items, judge_hal, hal_metrics, (HAL_PROMPT,)),
}
TASKS = {
    name: Task(partial(read_items, name, make), judge, metrics, prompts, paper=paper_rows(name))
    for name, (make, judge, metrics, prompts) in MEASURES.items()
}


# ----- answering


class Answerer:
    """The model of a run and how it answers. Its weights are loaded when the first question needs them."""

    def __init__(self, args, world):
        self.args, gpu = args, os.environ.get("LOCAL_RANK", 0) if world > 1 else 0
        self.device = pick_device(gpu)
        self.dtype = DTYPES[args.dtype or ("fp32" if self.device.type == "cpu" else "bf16" if has_bf16() else "fp16")]
        self.decoding = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
        hollow = LocVLM.from_pretrained(args.run, args.vision, device="meta")  # shapes only
        self.config, self.tokenizer = hollow.config, hollow.tokenizer

    @cached_property
    def model(self):
        model = LocVLM.from_pretrained(self.args.run, self.args.vision, self.dtype, self.device).eval()
        return model.for_inference(self.args.compile)

    def functions(self, is_blind, choose=None):
        """Load the weights, if they are not, and return the functions batch -> opened images, and these -> {id: answer}."""
        return partial(self.open, is_blind), partial(self.answer, self.model, choose)

    def open(self, is_blind, batch):
        """Open the images of a batch of items: (items by image, images). Blind: without content, CLIP's mean colour."""
        pictures, images, frames, vision = by_picture(batch), [], self.config.frames, self.config.vision_config
        for (path, _), group in pictures.items():
            if is_blind or not path:
                images.append(Image.new("RGB", (224, 224), mean_colour(vision)))
            else:  # shrunk by the thread that reads it: a photo of 12 megapixels takes 36 MB
                seen = pictures_of(group[0], frames)
                images.append(seen if frames else preprocess(seen[0], vision, self.config.geometry))
        return pictures, images

    def answer(self, model, choose, opened):
        """Answer the questions about opened images: {id: answer}. choose: see Task"""
        groups, images = list(opened[0].values()), opened[1]
        questions = [[item.question for item in group] for group in groups]
        ids = [item.id for group in groups for item in group]
        answers = choose(model, images, groups) if choose else model.generate(images, questions, **self.decoding, seeded_by=ids)
        return dict(zip(ids, sum(answers, []), strict=True))

    def describe(self):
        """Return what answers depend on, beside the questions."""
        args = self.args
        return {
            "weights_sha256": weights_sha256(args.run), "tokenizer_sha256": sha256(self.tokenizer.path),
            "vision_sha256": weights_sha256(args.vision) if args.vision else None,
            "dtype": str(self.dtype).removeprefix("torch."), "decoding": self.decoding, "batch": args.batch,
            "compile": args.compile, "images_folder": str(args.images),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
        }  # fmt: skip


def boxes_to_draw(text, fmt, size):
    """Return the boxes in a text, and its points as boxes of 3 px each way, in original pixels."""
    points_px = fmt.decode_points(text, size)
    return fmt.decode_boxes(text, size) + [(x - 3, y - 3, x + 3, y + 3) for x, y in points_px]


def ask(model, image_path, question, out, **decoding):
    """Answer one question about an image or a clip, and draw the question's boxes green, the answer's blue.

    For a clip, every frame that the model read is drawn.
    """
    frames = frames_of(image_path, model.config.frames) if model.config.frames else [still(image_path)]
    image, fmt, printed = frames[0], model.config.coord_format(), ""

    def show(row, text):
        """Print the new part of the answer. A last character that may be half of one waits."""
        nonlocal printed
        if text.startswith(printed) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text.removeprefix(printed), end="", flush=True)
            printed = text

    [[answer]] = model.generate([frames if model.config.frames else image], [[question]], on_text=show, **decoding)
    print(answer.removeprefix(printed))
    texts = (question, "lime"), (answer, "blue")
    boxes = [(box_px, colour) for text, colour in texts for box_px in boxes_to_draw(text, fmt, image.size)]
    if len(frames) > 1:
        sheet(frames, out, boxes, [f"frame {i}" for i in range(1, len(frames) + 1)])
    else:
        picture = card(image, boxes, [question, "-> " + answer], width=max(448, image.width))
        write_whole(out, lambda temporary: picture.save(temporary, "PNG"))
    print(f"written: {out}")


# ----- command line


def add_options(parser):
    """Add the options that evaluate.py and `python -m tasks` share."""
    add = parser.add_argument
    add("run", help="run folder, or any checkpoint that LocVLM.from_pretrained takes, such as ORG/NAME on the hub")
    add("--vision", help="folder of the CLIP tower, for an original LLaVA that lacks it")
    add("--coco", help="instances_*.json (default: the held-out shapes, written to data/shapes if missing)")
    add("--images", help="folder or zip of the images or clips")
    add("--location", choices=LOCATIONS, help="what a location is (default: as trained)")
    add("--words", choices=WORDS, help="what names an object (default: as trained)")
    add("--limit", type=int, help="use only the first LIMIT images")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--blind", action="store_true", help="blank the images: what language alone achieves")
    either("--with-blind", action="store_true", help="ask with the images and without, and print both")
    add("--temperature", type=float, default=0.0, help="0 is greedy, the paper samples at 0.2 (default: 0)")
    add("--seed", type=int, default=0, help="of questions and sampling (default: 0)")
    add("--max-new-tokens", type=int, default=64, help="longest answer (default: 64; 1024 if a judge reads it)")
    add("--batch", type=int, default=128, help="questions at a time, those about an image together (default: 128)")
    add("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp16 on one older than Ampere, fp32 on a CPU)")
    add("--compile", action="store_true", help="torch.compile the decoder: takes a minute, then faster")
    add("--fresh", action="store_true", help="start over, whatever an earlier run has left")
    add("--trained-on", default="", help="files that name the training images, by commas (default: the run's own)")
    add("--into", help="folder of the results, beside the blind ones (default: RUN/eval; of ORG/NAME, runs/ORG--NAME/eval)")


def check_options(parser, args, refused=()):
    """Exit with a message if options do not go together. refused: further pairs (whether it is wrong, message)"""
    refused = [
        *refused,
        (args.coco and not (args.images or getattr(args, "score", None)), "--coco needs --images, the folder of its images"),
        (args.images and not (args.coco or getattr(args, "questions", None)), "--images needs --coco, the annotations"),
        (not 0 <= args.temperature < math.inf, f"--temperature {args.temperature}; it must be 0 or more"),
    ]
    for name in ("limit", "batch", "max_new_tokens"):
        value = getattr(args, name)
        refused.append((value is not None and value < 1, f"--{name.replace('_', '-')} below 1"))
    for is_wrong, message in refused:
        if is_wrong:
            parser.error(message)
    args.is_default_data, args.annotated = not args.coco, None  # not options; read_items keeps in `annotated` what it has read
    return args


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--task", choices=(*TASKS, "all"), default="all", help="what to measure (default: all)")
    parser.add_argument("--ask", help="a question of your own, about --image")
    parser.add_argument("--image", help="image file or clip to ask about")
    parser.add_argument("--out", help="where --ask draws (default: ask.png in the folder of the results)")
    args = parser.parse_args(argv)
    of_tasks = ("coco", "location", "words", "limit", "blind", "with_blind")
    ignored = [f"--{name.replace('_', '-')}" for name in of_tasks if getattr(args, name)] + ["--task"] * (args.task != "all")
    is_one = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return check_options(parser, args, [
        (bool(args.ask) != bool(args.image), "--ask needs --image, and --image needs --ask"),
        (args.ask and ignored, f"--ask asks one question about one image; leave out {', '.join(ignored)}"),
        (args.out and not args.ask, "--out is the picture that --ask draws; the folder of the results is --into"),
        (args.ask and not is_one, "--ask runs in one process only"),
    ])  # fmt: skip


def use_default_data(args, config):
    """Point --coco and --images at the held-out shapes, or the held-out clips for a model of clips; write them if missing."""
    world = ensure_clips() if config.frames else ensure_world()
    annotations, images = ("clips_val.json", "clips") if config.frames else ("instances_val.json", "images")
    args.coco, args.images = world / annotations, world / images


def wording_of(args, config):
    """Return how questions are worded: as the model was trained, unless options say otherwise."""
    location, words = args.location or config.location, args.words or config.words
    return Wording(config.coord_format(), location=location, words=words, medium="video" if config.frames else "image")


def write_page(run):
    """Make the HTML page of a run's results: the same as `python -m tools.report RUN`."""
    run = folders_of(run)["ours"].parent
    command = [sys.executable, "-m", "tools.report", run.resolve()]
    if subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL).returncode == 0:
        print(f"written: {run / 'eval/report.html'}")


def main(argv=None):
    args = parse(argv)
    processes = join_processes()
    rank, world, wait = processes
    answerer = Answerer(args, world)
    if args.ask:
        out = args.out or folders_of(args.run, args.into)["ours"] / "ask.png"
        return ask(answerer.model, args.image, args.ask, out, **answerer.decoding)

    # 1 read the questions; whatever is wrong with them shows before the weights are read
    wording = wording_of(args, answerer.config)
    if rank > 0:
        wait()  # until rank 0 has written the shapes world, if it is missing
    if args.is_default_data:
        use_default_data(args, answerer.config)
    jobs = read_jobs(TASKS if args.task == "all" else {args.task: TASKS[args.task]}, args, wording)
    if rank == 0:
        wait()  # the others may read it now

    # 2 for each task: Answerer.answer its batches, then Task.judge every item and Task.metrics of all; run_jobs does this in
    # parts that survive a kill, and writes the files
    run_jobs(args, jobs, wording, answerer, processes)
    if rank == 0 and not args.into:
        write_page(args.run)


if __name__ == "__main__":
    run_command("evaluate.py", main, "--into, or with --out for --ask")
