"""Ask a trained model the paper's questions and write what it says and what that counts (Sec. 4; supplement E, H).

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
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import shapes
import video
from benchmarks import PAPER, TASKS
from checkpoint import write_json, write_whole
from clip_vit import MEAN, open_image
from data import NEG_ANSWER, Wording, read_file
from model import LocVLM, sha256

# ----- asking


def blank():
    """An image without content: CLIP's mean colour."""
    return Image.new("RGB", (224, 224), tuple(int(255 * m) for m in MEAN))


def still(path):
    """Open an image file; of a clip, the frame in its middle: what a model of images is shown."""
    return video.read_frames(path, 1)[0] if video.is_clip(path) else open_image(path)


def answer_all(model, items, batch, max_new_tokens, temperature, seed, blind):
    """Let the model answer: all questions about an image together, `batch` images at a time."""
    by_image = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    groups = list(by_image.values())
    for start in range(0, len(groups), batch):
        part = groups[start : start + batch]
        files = [group[0].image for group in part]
        images = [blank() if blind else path if model.config.frames else still(path) for path in files]
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
        truth = [item.truth["box_px"]] if "box_px" in item.truth else item.truth.get("boxes_px", [])
        boxes = [(box_px, "lime") for box_px in truth] + [(box_px, "blue") for box_px in item.boxes_px]
        cards.append(
            draw(
                still(item.image),
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
    asked = TASKS[task]
    items = asked.items(records, wording, random.Random(f"{args.seed} {task}"))
    if not items:
        print(f"\n{task}: none of {len(records)} images has a question for it")
        return
    answer_all(model, items, args.batch, args.max_new_tokens, args.temperature, args.seed, args.blind)
    for item in items:
        asked.judge(item, wording)
    metrics = asked.metrics(items)
    folder = Path(args.run) / ("eval_blind" if args.blind else "eval")
    rows = [vars(item) | {"image": str(item.image)} for item in items]
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
            "prompts": asked.prompts,
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
    model.for_inference(args.compile)
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
