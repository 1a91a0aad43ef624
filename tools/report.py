"""Show an evaluation as one HTML page: figures beside the paper's, boxes on pictures as in its Fig. 3 to 5.

    python -m tools.report runs/default                        writes runs/default/eval/report.html
    python -m tools.report runs/default --out page.html

Reads the results, the blind baseline in RUN/eval_blind, and RUN/log.jsonl, as far as they exist. This file computes the data;
report.html lays it out and escapes every text. The page is one file without scripts that may load or run nothing: a model's
answers may contain anything. The same files make the same bytes.

run  run folder, with evaluate.py's results in its eval folder
out  where to write the page (default: RUN/eval/report.html)
"""

import base64
import io
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import jinja2
from PIL import ImageOps

from evaluate import TASKS
from formats.eval_folder import differences, read_results
from formats.files import read_json, write_text
from formats.images import is_clip, open_image
from formats.pictures import is_right
from tools import command
from video import read_frames

CARDS, FRAMES = 6, 4  # at most: of successes and of failures each; of a clip
PICTURES_BYTES = 1_800_000  # of all pictures; base64 makes them a third larger
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # control characters, lone surrogates


def read_lines(path):
    """Read a JSONL file: (its objects, the number of other lines). A killed process may leave half a line."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            rows.append(None)
    objects = [row for row in rows if isinstance(row, dict)]
    return objects, len(rows) - len(objects)


def part(mapping, key):
    """Return the dict under a key, or an empty one."""
    return mapping[key] if isinstance(mapping.get(key), dict) else {}


def is_number(value):
    """Return True for a number that can be drawn and written: finite, and an int no longer than a float."""
    return isinstance(value, int | float) and abs(value) < 1e300


def place(box_px):
    return "(" + ", ".join(str(round(v)) for v in box_px) + ")"


def kind_of(row):
    """Return (the kind of question, the kind of answer), "" for either if there is nothing to say."""
    truth, right = part(row, "truth"), is_right(row.get("correct"))
    question, answer = truth.get("setting") or truth.get("type") or "", ""
    if not str(row.get("answer") or "").strip():
        answer = "no answer"
    elif is_number(truth.get("iou")):
        answer = f"IoU {truth['iou']:.3f}" if truth["iou"] > 0 else "no overlap" if row.get("boxes_px") else "no box"
    elif not right and "opposite" in truth:
        answer = "the opposite word" if truth["opposite"] else "neither word"
    elif not right and "named" in truth:
        answer = "another name" if truth["named"] else "no name"
    return str(question), answer


def choose(rows, count=CARDS):
    """Choose rows to show, always the same: of each kind in turn, spread over all of its rows."""
    kinds = {}
    for row in rows:
        question, answer = kind_of(row)
        kind = (question, re.sub("[0-9.]+", "", answer), str(part(row, "truth").get("label")))
        kinds.setdefault(kind, []).append(row)
    groups = list(kinds.values())[:count]
    shares = Counter([k for turn in range(count) for k, group in enumerate(groups) if turn < len(group)][:count])
    # each group begins elsewhere, as several kinds of question often ask about one image
    starts = [(k + 1) / (len(groups) + 1) for k in range(len(groups))]
    return [groups[k][int((i + starts[k]) * len(groups[k]) / shares[k])] for k in range(len(groups)) for i in range(shares[k])]


def drawable(boxes):
    """Keep the boxes that can be drawn: four finite numbers, their corners put in order, near enough for a screen."""
    boxes = [box for box in boxes if isinstance(box, list) and len(box) == 4] if isinstance(boxes, list) else []
    near = [[min(max(v, -99999), 99999) for v in box] for box in boxes if all(map(is_number, box))]
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in near]


def data_uri(image, allowed):
    """Scale a PIL image to a width of 320 or less, until it takes at most `allowed` bytes: JPEG, or a drawing's smaller PNG."""
    for width in (320, 240, 160, 96):
        scaled, files = image.copy(), {}
        scaled.thumbnail((width, 2 * width))
        for name in ("jpeg", "png") if scaled.size == image.size else ("jpeg",):
            file = io.BytesIO()
            scaled.save(file, name, quality=82, optimize=True)
            files[name] = file.getvalue()
        name = min(files, key=lambda name: len(files[name]))
        if len(files[name]) <= allowed:
            break
    return f"data:image/{name};base64,{base64.b64encode(files[name]).decode()}"


def pictures_of(row, allowed):
    """Return a row's image, or frames of its clip: (frames, error). A frame: (width, height, data URI)."""
    path = row.get("image")
    try:
        frames = (read_frames(path, FRAMES) if is_clip(path) else [open_image(path)]) if path else []
    except (OSError, ValueError, TypeError, ImportError) as error:
        return [], str(error)
    frames = [ImageOps.mirror(frame) if row.get("mirrored") else frame for frame in frames]
    return [(*frame.size, data_uri(frame, allowed // len(frames))) for frame in frames], None


def truth_text(task, truth, boxes_px):
    """Return the right answer in words: a word, or an object and its place."""
    keys = ("word", "label", "answer", "answers", "sentences", "name")
    key = next((key for key in keys if truth.get(key) not in (None, "", [])), None)
    text = "no " * (task == "negpred") + str(truth.get(key, ""))
    if isinstance(truth.get(key), list):
        text = " / ".join(dict.fromkeys(map(str, truth[key])))
    if boxes_px and key not in ("word", "label", "answer", "answers"):
        text = " ".join(filter(None, (text, "at", " and ".join(map(place, boxes_px[:4])), "px")))
    return text or "–"


def card(task, row, allowed):
    """Return one question as the page shows it. Boxes are in the pixels that the model saw, mirrored ones too."""
    truth, boxes, score, mirrored = part(row, "truth"), row.get("boxes_px") or [], row.get("correct"), row.get("mirrored")
    truth_px = drawable([truth["box_px"]] if "box_px" in truth else truth.get("boxes_px"))
    answer_px, (frames, error) = drawable(boxes), pictures_of(row, allowed)
    tags = [*kind_of(row), f"score {score:.2f}" if is_number(score) and 0 < score < 1 else "", "mirrored" if mirrored else ""]
    if not isinstance(boxes, list) or len(answer_px) < len(boxes):
        tags.append("a box is not four numbers")
    return {
        "frames": frames, "error": error, "file": Path(row["image"]).name + ", mirrored" * bool(mirrored) if frames else "",
        "truth_px": truth_px[:20], "answer_px": answer_px[:20], "tag": " · ".join(filter(None, tags)),
        "question": row.get("question", "–"), "answer": str(row.get("answer") or ""),
        "truth": truth_text(task, truth, truth_px),
    }  # fmt: skip


def ticks(low, high, most=5):
    """Return round numbers between two.

    >>> ticks(0, 3.97), ticks(0, 150)
    ([0.0, 1.0, 2.0, 3.0], [0, 50, 100, 150])
    """
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10) if (high - low) / (size * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(points, x, top, height):
    """Return (step, value) as SVG points: a line through the means of at most 120 groups, and a band between their extremes."""
    size, high = math.ceil(len(points) / 120), max(value for _, value in points) * 1.05 or 1.0
    groups = [points[i : i + size] for i in range(0, len(points), size)]

    def y(value):
        return top + height * (1 - value / high)

    def path(summary):
        return [f"{x(group[len(group) // 2][0]):.1f},{y(summary([value for _, value in group])):.1f}" for group in groups]

    line, band = path(lambda values: sum(values) / len(values)), path(max) + path(min)[::-1]
    return {"top": top, "grid": [(y(v), v) for v in ticks(0, high, 4)], "line": " ".join(line), "band": " ".join(band)}


def curves(log):
    """Yield loss and learning rate over the steps of each stage, as SVG coordinates."""
    stages = defaultdict(list)
    for row in log:
        if is_number(row.get("step")):
            stages[str(row.get("stage", "–"))].append(row)
    for stage, rows in stages.items():
        first, last = min(row["step"] for row in rows), max(row["step"] for row in rows) + 1

        def x(step, first=first, last=last):
            return 46 + 292 * (step - first) / (last - first)

        losses, rates = ([(row["step"], row[key]) for row in rows if is_number(row.get(key))] for key in ("loss", "lr"))
        ends = f", loss from {losses[0][1]:.3g} to {losses[-1][1]:.3g}" if losses else ""
        yield {
            "caption": f"Stage {stage}: {len(rows):,} steps{ends}", "ticks": [(x(step), step) for step in ticks(first, last)],
            "loss": losses and plot(losses, x, 24, 150), "rate": rates and plot(rates, x, 212, 70),
        }  # fmt: skip


def section(name, result, blind, answers, allowed):
    """Return one result as the page shows it: its figures, and groups of cards (is_right, count of rows, cards)."""
    (rows, bad), task = answers, (result or blind)["task"]
    ours, of_blind, paper = part(result, "metrics"), part(blind, "metrics"), part(result, "paper")
    groups = {verdict: [row for row in rows if is_right(row.get("correct")) is verdict] for verdict in (True, False, None)}
    return {
        "name": name, "task": task, "result": result, "differences": differences(result, blind), "bad_lines": bad,
        "names": [*ours | of_blind | paper], "ours": ours, "blind": of_blind, "paper": paper or part(blind, "paper"),
        "groups": [
            (verdict, len(group), [card(task, row, allowed) for row in choose(group)])
            for verdict, group in groups.items() if group or (rows and verdict is not None)
        ],
    }  # fmt: skip


def page_data(run):
    """Return all that the page of a run folder shows: dicts, lists, numbers and texts."""
    ours, blind = (read_results(run / folder, list(TASKS)) for folder in ("eval", "eval_blind"))
    if not (ours or blind):
        raise FileNotFoundError(f"no results in {run / 'eval'}; run evaluate.py {run} first")
    answers = {name: read_lines(run / "eval" / f"{name}.jsonl") for name in {**ours, **blind}}
    verdicts = [Counter(is_right(row.get("correct")) for row in rows) for rows, _ in answers.values()]
    allowed = PICTURES_BYTES // max(1, sum(min(CARDS, count) for counts in verdicts for count in counts.values()))
    (log, bad), folders = read_lines(run / "log.jsonl"), {"eval": ours, "eval_blind": blind}
    files = {f"{folder}/{name}.json": result for folder, found in folders.items() for name, result in found.items()}
    config, about = read_json(run / "config.json") if (run / "config.json").is_file() else {}, next(iter(files.values()))
    return {
        "name": run.resolve().name, "about": about, "decoding": part(about, "decoding"), "own": part(config, "locvlm"),
        "tower": part(config, "vision_config"), "language": part(config, "text_config"),
        "has_mixed_weights": len({json.dumps(result.get("weights_sha256"), sort_keys=True) for result in ours.values()}) > 1,
        "sections": [section(name, ours.get(name, {}), blind.get(name, {}), answers[name], allowed) for name in answers],
        "curves": list(curves(log)), "bad_log_lines": bad,
        "files": [(name, json.dumps(result, indent=2, ensure_ascii=False)) for name, result in files.items()],
    }  # fmt: skip


def write_report(run, /, out=None):
    """Write the page of a run folder's evaluations, and return its path."""
    run, folder = Path(run), jinja2.FileSystemLoader(Path(__file__).parent)
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    templates = jinja2.Environment(loader=folder, **how)
    templates.filters |= {"place": place}
    page = templates.get_template("report.html").render(page_data(run)).strip() + "\n"
    out = Path(out or run / "eval" / "report.html")
    write_text(out, UNPRINTABLE.sub("\ufffd", page))
    print(f"written: {out}")
    return out


main = command(__name__, write_report)
