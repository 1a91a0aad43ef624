"""Ask a trained model the paper's questions and count (Sec. 4; supplement E, H). One function per measure.

    python evaluate.py runs/default --task all                      on the held-out shapes
    python evaluate.py runs/b2 --task spatial --coco instances_train2017.json --images train2017
    python evaluate.py runs/default --ask "Where is the object described circle located in image in terms of (x1,y1,x2,y2) bbox?" --image photo.jpg

    task      asks                                              counts
    locpred   where is ...                                      IoU >= 0.5 in original pixels; no box counts as wrong
    negpred   where is ... (not in the image)                   answers that there is no such object
    revloc    what is at ...                                    the right category named first
    spatial   which side of ... is ... (COCO-Spatial, Tab. 4)   the right word in the answer, direct and in context
    hal       is there a ... (Hal-COCO, Tab. 8)                 yes and no, two objects present and two absent an image

Each task writes RUN/eval/TASK.json (metrics, and everything needed to repeat them), TASK.jsonl (a row per question)
and TASK.png (boxes on pictures: truth green, prediction blue; successes above, failures below).
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import shapes
import video
from checkpoint import write_json, write_whole
from clip_vit import MEAN, open_image
from coords import fault, iou
from data import LOC_PROMPTS, NEG_ANSWER, REV_PROMPTS, SIDE_PROMPTS, Record, Wording, article, loc_question, read_file
from model import LocVLM, sha256

PAPER = {  # LocVLM-B, percent
    "spatial": {
        "across": 69.5,
        "across left": 79.7,
        "across right": 59.2,
        "along": 65.4,
        "along above": 64.2,
        "along below": 65.9,
        "icl across": 76.5,
        "icl along": 74.1,
    },
    "hal": {"accuracy": 88.3},
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass
class Item:
    """One question about one image, what the answer should be, and what it was."""

    id: str
    record: Record
    question: str
    truth: dict
    answer: str = ""
    correct: bool = False
    boxes_px: tuple = ()  # what the answer locates, original pixels


# ----- the tasks: items from records, and the judgement of one item


def locpred_items(records, wording, rng):
    """LocPred for every object that is alone of its category."""
    return [
        Item(f"{r.id}:{o.name}", r, loc_question(o.name, wording, rng), {"name": o.name, "box_px": o.box_px})
        for r in records
        for o in r.objects
        if wording.can_place(o.box_px, r.size)
    ]


def judge_locpred(item, wording):
    """Right if the first box reaches IoU 0.5 with the truth; for points, if the first one lies in the true box."""
    box_px = item.truth["box_px"]
    if wording.location == "point":
        points_px = wording.fmt.decode_points(item.answer, item.record.size)
        item.boxes_px = tuple((x - 2, y - 2, x + 2, y + 2) for x, y in points_px[:1])
        item.correct = (
            bool(points_px) and box_px[0] <= points_px[0][0] <= box_px[2] and box_px[1] <= points_px[0][1] <= box_px[3]
        )
    else:
        item.boxes_px = tuple(wording.fmt.decode_boxes(item.answer, item.record.size)[:1])
        item.truth["iou"] = iou(item.boxes_px[0], box_px) if item.boxes_px else 0.0
        item.correct = item.truth["iou"] >= 0.5


def locpred_metrics(items):
    found = [item for item in items if item.boxes_px]
    return {
        "acc@0.5": mean(item.correct for item in items),
        "mean IoU": mean(item.truth.get("iou", 0.0) for item in items),
        "no box": mean(not item.boxes_px for item in items),
        "box outside image": mean(bool(fault(item.boxes_px[0], item.record.size)) for item in found),
    }


def negpred_items(records, wording, rng):
    """NegPred: as many absent categories as there are unique objects, at least one an image."""
    return [
        Item(f"{r.id}:{name}", r, loc_question(name, wording, rng), {"name": name})
        for r in records
        for name in rng.sample(r.absent, min(len(r.absent), max(1, len(r.objects))))
    ]


def judge_negpred(item, wording):
    item.boxes_px = tuple(wording.fmt.decode_boxes(item.answer, item.record.size)[:1])
    item.correct = "no such object" in item.answer.lower()


def negpred_metrics(items):
    return {"accuracy": mean(item.correct for item in items), "gave a box": mean(bool(item.boxes_px) for item in items)}


def revloc_items(records, wording, rng):
    """RevLoc for every object that is alone of its category. What may be named: every category of the data."""
    return [
        Item(
            f"{r.id}:{o.name}",
            r,
            rng.choice(REV_PROMPTS).format(loc=wording.place(o.box_px, r.size)),
            {"name": o.name, "box_px": o.box_px, "names": sorted(r.present + r.absent)},
        )
        for r in records
        for o in r.objects
        if wording.can_place(o.box_px, r.size)
    ]


def first_named(text, names):
    """Give the category that a text names first, the longest where several start there; None if it names none.

    >>> first_named("There is a wine glass on the table", ["glass", "table", "wine glass"])
    'wine glass'
    """
    found = [
        (match.start(), -len(name), name)
        for name in names
        if (match := re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE))
    ]
    return min(found)[2] if found else None


def judge_revloc(item, wording):
    item.truth["named"] = first_named(item.answer, item.truth["names"])
    item.correct = item.truth["named"] == item.truth["name"]


def revloc_metrics(items):
    return {
        "name accuracy": mean(item.correct for item in items),
        "named nothing": mean(item.truth["named"] is None for item in items),
    }


def spatial_triplets(records, rng, axis):
    """COCO-Spatial (App. E): images with three objects, each alone of its category, whose centres avoid the central 20 %.

    axis 0: left and right halves; 1: above and below. Gives (record, obj_1, obj_2, obj_3, side of obj_1): obj_1 lies on
    one side, obj_2 and obj_3 on the other. One triplet an image, drawn at random.
    """
    words = (("left", "right"), ("above", "below"))[axis]
    for record in records:
        centres = [((o.box_px[axis] + o.box_px[axis + 2]) / 2 / record.size[axis], o) for o in record.objects]
        halves = [[o for c, o in centres if c <= 0.4], [o for c, o in centres if c >= 0.6]]
        choices = [side for side in (0, 1) if halves[side] and len(halves[1 - side]) >= 2]
        if choices:
            side = rng.choice(choices)
            yield record, rng.choice(halves[side]), *rng.sample(halves[1 - side], 2), words[side]


def spatial_items(records, wording, rng):
    """Direct and in-context questions (App. E). In context, `verbatim` has the paper's examples, which answer about the
    other object than was asked for; `consistent` has them answer what was asked, in random order."""
    items = []
    for axis, name in enumerate(("across", "along")):
        ask = SIDE_PROMPTS[name]
        says = "The {} is located to the {} of the {}." if name == "across" else "The {} is located {} the {}."
        for record, a, b, c, side in spatial_triplets(records, rng, axis):
            other = OPPOSITE[side]

            def question(first, second, ask=ask):
                return ask.format(obj_1=f"the {first.name}", obj_2=f"the {second.name}")

            # where obj_2 lies, seen from obj_1
            items.append(
                Item(
                    f"{record.id}:{name}:direct",
                    record,
                    question(a, b),
                    {"setting": name, "word": other, "objects": [a.name, b.name]},
                )
            )
            examples = [
                f"Q: {question(a, b)} A: {says.format(b.name, other, a.name)}",
                f"Q: {question(b, a)} A: {says.format(a.name, side, b.name)}",
            ]
            rng.shuffle(examples)
            final = f"Q: {question(c, a)}"
            items.append(
                Item(
                    f"{record.id}:{name}:icl",
                    record,
                    " ".join([*examples, final]),
                    {"setting": f"icl {name}", "word": side, "objects": [c.name, a.name]},
                )
            )
            if name == "across":
                examples = [
                    f"Q: {question(a, b)} A: {says.format(a.name, side, b.name)}",
                    f"Q: {question(b, a)} A: {says.format(b.name, other, a.name)}",
                ]
                items.append(
                    Item(
                        f"{record.id}:{name}:icl verbatim",
                        record,
                        " ".join([*examples, final]),
                        {"setting": "icl verbatim", "word": side, "objects": [c.name, a.name]},
                    )
                )
    return items


def judge_spatial(item, wording):
    """Right if the word is in the answer (the paper's rule); `strict`: and its opposite is not."""
    words = set(re.findall(r"[a-z]+", item.answer.lower()))
    item.correct = item.truth["word"] in words
    item.truth["strict"] = item.correct and OPPOSITE[item.truth["word"]] not in words
    item.truth["opposite"] = OPPOSITE[item.truth["word"]] in words


def spatial_metrics(items):
    metrics = {}
    for setting in dict.fromkeys(item.truth["setting"] for item in items):
        here = [item for item in items if item.truth["setting"] == setting]
        metrics[setting] = mean(item.correct for item in here)
        for word in sorted({item.truth["word"] for item in here}):
            metrics[f"{setting} {word}"] = mean(item.correct for item in here if item.truth["word"] == word)
        metrics[f"{setting} strict"] = mean(item.truth["strict"] for item in here)
        metrics[f"{setting} neither word"] = mean(not item.correct and not item.truth["opposite"] for item in here)
        if setting == "icl verbatim":  # read as its own examples answer: about obj_3
            metrics["icl verbatim, as its examples answer"] = mean(item.truth["opposite"] for item in here)
        metrics[f"{setting} questions"] = len(here)
    return metrics


def hal_items(records, wording, rng):
    """Hal-COCO: is there a ...? for two categories present in an image and two that are not (one and one where there is one)."""
    items = []
    for r in records:
        count = min(2, len(r.present), len(r.absent))
        for label, names in (("yes", rng.sample(r.present, count)), ("no", rng.sample(r.absent, count))):
            items += [
                Item(f"{r.id}:{name}", r, f"Is there {article(name)} in the image?", {"label": label, "name": name})
                for name in names
            ]
    return items


def says_no(answer):
    """POPE's reading of an answer: no if its first sentence holds No, no or not; else yes, even where it is empty.

    >>> says_no("No, there is none."), says_no("There is not. Yes"), says_no("Yes. No doubt"), says_no("")
    (True, True, False, False)
    """
    return bool({"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")))


def judge_hal(item, wording):
    item.correct = says_no(item.answer) == (item.truth["label"] == "no")


def hal_metrics(items):
    """Accuracy, precision, recall, F1 and yes ratio, all from one confusion matrix."""
    count = Counter((item.truth["label"], not says_no(item.answer)) for item in items)
    tp, fp, fn = count["yes", True], count["no", True], count["yes", False]
    return {
        "accuracy": mean(item.correct for item in items),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "F1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "says yes": (tp + fp) / len(items) if items else 0.0,
    }


TASKS = {
    "locpred": (locpred_items, judge_locpred, locpred_metrics, LOC_PROMPTS),
    "negpred": (negpred_items, judge_negpred, negpred_metrics, LOC_PROMPTS),
    "revloc": (revloc_items, judge_revloc, revloc_metrics, REV_PROMPTS),
    "spatial": (spatial_items, judge_spatial, spatial_metrics, tuple(SIDE_PROMPTS.values())),
    "hal": (hal_items, judge_hal, hal_metrics, ("Is there {a/an object} in the image?",)),
}


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# ----- asking


def blank(size):
    """An image without content: CLIP's mean colour."""
    return Image.new("RGB", size, tuple(int(255 * m) for m in MEAN))


def still(path):
    """Open an image file; of a clip, the frame in its middle: what a model of images is shown."""
    return video.read_frames(path, 1)[0] if video.is_clip(path) else open_image(path)


def answer_all(model, items, batch, max_new_tokens, temperature, seed, blind):
    """Let the model answer: all questions about an image together, `batch` images at a time."""
    by_image = {}
    for item in items:
        by_image.setdefault(item.record.id, []).append(item)
    groups = list(by_image.values())
    for start in range(0, len(groups), batch):
        part = groups[start : start + batch]
        records = [group[0].record for group in part]
        images = [blank(r.size) if blind else r.image if model.config.frames else still(r.image) for r in records]
        answers = model.generate(
            images, [[item.question for item in group] for group in part], max_new_tokens, temperature, seed
        )
        for group, said in zip(part, answers, strict=True):
            for item, answer in zip(group, said, strict=True):
                item.answer = answer


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


def overlay(items, path, wording):
    """Draw four successes and four failures, with the boxes of truth (green), question (green) and answer (blue)."""
    shown = [item for item in items if item.correct][:4] + [item for item in items if not item.correct][:4]
    cards = []
    for item in shown:
        truth = (
            [item.truth["box_px"]]
            if "box_px" in item.truth
            else [o.box_px for o in item.record.objects if o.name in item.truth.get("objects", ())]
        )
        boxes = [(box_px, "lime") for box_px in truth] + [(box_px, "blue") for box_px in item.boxes_px]
        cards.append(
            draw(
                still(item.record.image),
                boxes,
                [("right: " if item.correct else "wrong: ") + item.question, "-> " + item.answer[:160]],
            )
        )
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


def weight_files(folder):
    """The files that hold a checkpoint's weights."""
    kinds = ("*.safetensors", "*.bin")
    return next((found for kind in kinds if (found := sorted(Path(folder).glob(kind)))), [])


def git_commit():
    """The commit of this code, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return done.stdout.strip() or None
    except OSError:
        return None


def table(task, metrics, count):
    """Print a task's figures, the paper's beside them where it has one (another data set: for orientation)."""
    paper = PAPER.get(task, {})
    print(f"\n{task}: {count} questions" + ("    (in brackets: LocVLM-B on COCO, from the paper)" if paper else ""))
    for name, value in metrics.items():
        shown = f"{value:6d}" if isinstance(value, int) else f"{100 * value:6.1f} %"
        print(f"  {name:40} {shown}" + (f"   [{paper[name]:.1f} %]" if name in paper else ""))


def run_task(task, model, records, wording, args, provenance):
    make, judge, summarise, prompts = TASKS[task]
    items = make(records, wording, random.Random(f"{args.seed} {task}"))
    if not items:
        print(f"\n{task}: none of {len(records)} images has a question for it")
        return
    answer_all(model, items, args.batch, args.max_new_tokens, args.temperature, args.seed, args.blind)
    for item in items:
        judge(item, wording)
    metrics = summarise(items)
    folder = Path(args.run) / ("eval_blind" if args.blind else "eval")
    rows = [
        {
            "id": i.id,
            "image": str(i.record.image),
            "question": i.question,
            "answer": i.answer,
            "correct": i.correct,
            **{k: v for k, v in i.truth.items() if k != "names"},
        }
        for i in items
    ]
    write_whole(
        folder / f"{task}.jsonl",
        lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    )
    write_json(
        folder / f"{task}.json",
        {
            "task": task,
            "metrics": metrics,
            "questions": len(items),
            "paper": PAPER.get(task),
            "prompts": prompts,
            **provenance,
        },
    )
    overlay(items, folder / f"{task}.png", wording)
    table(task, metrics, len(items))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, or any checkpoint that LocVLM.from_pretrained takes")
    parser.add_argument("--task", choices=(*TASKS, "all"), default="all", help="what to measure (default: all)")
    parser.add_argument(
        "--coco",
        help="instances_*.json (default: the held-out shapes, written to data/shapes where they are not there)",
    )
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--limit", type=int, help="use the first so many images only")
    parser.add_argument("--location", choices=("box", "point"), default="box", help="what a location is (default: box)")
    parser.add_argument("--blind", action="store_true", help="blank the images: what language alone achieves")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy, the paper samples at 0.2 (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of questions and of sampling (default: 0)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--vision", help="folder of the CLIP tower, for an original LLaVA that does not hold it")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder: a minute, then faster")
    parser.add_argument("--ask", help="a question of your own, about --image")
    parser.add_argument("--image", help="image file or clip to ask about")
    parser.add_argument("--out", help="where --ask draws (default: RUN/eval/ask.png)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        args.dtype or ("bf16" if device == "cuda" else "fp32")
    ]
    model = LocVLM.from_pretrained(args.run, args.vision, dtype, device).eval()
    model.language_model.for_inference(args.compile)
    if args.ask:
        if not args.image:
            parser.error("--ask without --image; expected an image file")
        return ask(
            model,
            args.image,
            args.ask,
            args.out or Path(args.run) / "eval" / "ask.png",
            args.max_new_tokens,
            args.temperature,
            args.seed,
        )
    if args.coco and not args.images:
        parser.error("--coco without --images; expected the folder of its images")
    if not args.coco and model.config.frames:
        world = shapes.ensure_clips()
        args.coco, args.images = world / "clips_val.json", world / "clips"
    elif not args.coco:
        world = shapes.ensure_world()
        args.coco, args.images = world / "instances_val.json", world / "images"
    records, left_out = read_file(args.coco, args.images)
    records = records[: args.limit]
    wording = Wording(model.config.coord_format(), location=args.location)
    provenance = {
        "run": str(args.run),
        "weights_sha256": {path.name: sha256(path) for path in weight_files(args.run)},
        "dtype": str(dtype).removeprefix("torch."),
        "git_commit": git_commit(),
        "data": str(args.coco),
        "data_sha256": sha256(args.coco),
        "images": len(records),
        "left_out": dict(left_out),
        "blind": args.blind,
        "template": "v1",
        "geometry": model.config.geometry,
        "kind": model.config.kind,
        "location": args.location,
        "decoding": {"temperature": args.temperature, "seed": args.seed, "max_new_tokens": args.max_new_tokens},
        "no_object_answer": NEG_ANSWER,
    }
    print(f"{args.run} on {args.coco}: {len(records)} images" + (", blanked" if args.blind else ""))
    for task in TASKS if args.task == "all" else [args.task]:
        run_task(task, model, records, wording, args, provenance)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: {error}")
