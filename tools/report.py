"""Show an evaluation as one HTML page: figures beside the paper's, boxes on pictures as in its Fig. 3 to 5.

    python -m tools.report runs/default

Reads the results, the blind baseline in RUN/eval_blind, and RUN/log.jsonl, as far as they exist. This file computes the data;
report.html lays it out and escapes every text. The page is one file that may load or run nothing: a model's answers may contain
anything. The same files make the same bytes.

run  run folder, with evaluate.py's results in its eval folder
out  where to write the page (default: RUN/eval/report.html)
"""

import base64
import io
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import jinja2
from PIL import ImageOps

from evaluate import TASKS
from formats.eval_folder import differences, read_results
from formats.files import read_json, write_text
from formats.images import is_clip, open_image
from formats.pictures import is_right
from formats.schema import are_numbers
from tools import command
from video import read_frames

CARDS, FRAMES = 6, 4  # at most: of successes and of failures each; of a clip
PICTURES_BYTES = 1_800_000  # of all pictures; base64 makes them a third larger
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # control characters, lone surrogates


def read_lines(path):
    """Read a JSONL file: (its objects, the number of other lines). A killed process may leave half a line."""
    text, rows = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else "", []
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        with suppress(ValueError, RecursionError):
            rows += [row] if isinstance(row := json.loads(line), dict) else []
    return rows, len(lines) - len(rows)


def is_number(value):
    """Return True for a number that can be drawn and written: finite, and an int no longer than a float."""
    return isinstance(value, int | float) and abs(value) < 1e300


def place(box_px):
    return "(" + ", ".join(str(round(v)) for v in box_px) + ")"


def kind_of(row):
    """Return (the kind of question, the kind of answer), "" for either if there is nothing to say."""
    truth, right = row.get("truth") or {}, is_right(row.get("correct"))
    measured = truth | (row.get("measured") or {})  # which older rows have among the truth
    question, answer = truth.get("setting") or truth.get("type") or "", ""
    if not str(row.get("answer") or "").strip():
        answer = "no answer"
    elif is_number(measured.get("iou")):
        answer = f"IoU {measured['iou']:.3f}" if measured["iou"] > 0 else "no overlap" if row.get("boxes_px") else "no box"
    elif not right and "opposite" in measured:
        answer = "the opposite word" if measured["opposite"] else "neither word"
    elif not right and "named" in measured:
        answer = "another name" if measured["named"] else "no name"
    return str(question), answer


def choose(rows):
    """Choose rows to show, always the same: of each kind in turn, spread over all of its rows."""
    kinds = defaultdict(list)
    for row in rows:
        question, answer = kind_of(row)
        kinds[question, re.sub("[0-9.]+", "", answer), str((row.get("truth") or {}).get("label"))].append(row)
    groups = list(kinds.values())[:CARDS]
    shares = Counter([k for turn in range(CARDS) for k, group in enumerate(groups) if turn < len(group)][:CARDS])
    chosen = []
    for k, group in enumerate(groups):
        start = (k + 1) / (len(groups) + 1)  # each begins elsewhere, as several kinds of question often ask about one image
        chosen += [group[int((i + start) * len(group) / shares[k])] for i in range(shares[k])]
    return chosen


def drawable(boxes):
    """Keep the boxes that can be drawn: four finite numbers, their corners put in order, near enough for a screen."""
    boxes = boxes if isinstance(boxes, list) else []
    near = [[min(max(v, -99999), 99999) for v in box] for box in boxes if are_numbers(box, 4) and all(map(is_number, box))]
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in near]


def data_uri(image, allowed):
    """Scale a PIL image to a width of 320 or less, until it takes at most `allowed` bytes: JPEG, or a drawing's smaller PNG."""
    for width in (320, 240, 160, 96):
        scaled, files = image.copy(), {}
        scaled.thumbnail((width, 2 * width))
        for name in ("jpeg", "png") if scaled.size == image.size else ("jpeg",):
            files[name] = io.BytesIO()
            scaled.save(files[name], name, quality=82, optimize=True)
        name, file = min(files.items(), key=lambda pair: pair[1].tell())
        if file.tell() <= allowed:
            break
    return f"data:image/{name};base64,{base64.b64encode(file.getvalue()).decode()}"


def pictures_of(row, allowed):
    """Return a row's image, or frames of its clip: (frames, error). A frame: (width, height, data URI)."""
    path = row.get("image")
    try:
        as_clip = row["is_clip"] if "is_clip" in row else bool(path) and is_clip(path)  # older rows do not say it
        frames = (read_frames(path, FRAMES) if as_clip else [open_image(path)]) if path else []
    except (OSError, ValueError, TypeError, ImportError) as error:
        return [], str(error)
    frames = [ImageOps.mirror(frame) if row.get("mirrored") else frame for frame in frames]
    return [(*frame.size, data_uri(frame, allowed // len(frames))) for frame in frames], None


def truth_text(task, truth, boxes_px):
    """Return the right answer in words: a word, or an object and its place."""
    # of an objective about one object, "answer" is only how the model would word its name or place
    is_object = "name" in truth and ("box_px" in truth or "names" not in truth)
    keys = ("word", "label", "name" if is_object else "answer", "answers", "sentences", "name")
    key = next((key for key in keys if truth.get(key)), None)
    values = truth[key] if isinstance(truth.get(key), list) else [truth.get(key, "")]
    text = "no " * (task == "negpred") + " / ".join(dict.fromkeys(map(str, values)))
    if boxes_px and key in (None, "sentences", "name"):
        text = f"{text} at {' and '.join(map(place, boxes_px[:4]))} px".lstrip()
    return text or "–"


def card(task, row, allowed):
    """Return one question as the page shows it. Boxes are in the pixels that the model saw, mirrored ones too."""
    truth, score, (frames, error) = row.get("truth") or {}, row.get("correct"), pictures_of(row, allowed)
    truth_px = drawable([truth["box_px"]] if "box_px" in truth else truth.get("boxes_px"))
    mirrored = ["mirrored"] * bool(row.get("mirrored"))
    tags = [*kind_of(row), f"score {score:.2f}" if is_number(score) and 0 < score < 1 else "", *mirrored]
    return {
        "frames": frames, "error": error, "file": ", ".join([Path(row["image"]).name, *mirrored]) if frames else "",
        "truth_px": truth_px[:20], "answer_px": drawable(row.get("boxes_px"))[:20], "tag": " · ".join(filter(None, tags)),
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


def plot(points, top, height):
    """Return (x, value) as SVG points: a line through the means of at most 120 groups, and a band between their extremes."""
    size, high = math.ceil(len(points) / 120), max(value for _, value in points) * 1.05 or 1.0
    groups = [points[i : i + size] for i in range(0, len(points), size)]

    def y(value):
        return top + height * (1 - value / high)

    def path(summary):
        return [f"{group[len(group) // 2][0]:.1f},{y(summary([value for _, value in group])):.1f}" for group in groups]

    line, band = path(statistics.fmean), path(max) + path(min)[::-1]
    return {"top": top, "grid": [(y(v), v) for v in ticks(0, high, 4)], "line": " ".join(line), "band": " ".join(band)}


def curves(log):
    """Yield loss and learning rate over the steps of each stage, as SVG coordinates."""
    stages = defaultdict(list)
    for row in (row for row in log if is_number(row.get("step"))):
        stages[str(row.get("stage", "–"))].append(row)
    for stage, rows in stages.items():
        steps = [row["step"] for row in rows]
        first, last = min(steps), max(steps) + 1
        marks = ticks(first, last)
        x = {step: 46 + 292 * (step - first) / (last - first) for step in (*steps, *marks)}
        losses, rates = ([(x[row["step"]], row[key]) for row in rows if is_number(row.get(key))] for key in ("loss", "lr"))
        ends = f", loss from {losses[0][1]:.3g} to {losses[-1][1]:.3g}" if losses else ""
        yield {
            "caption": f"Stage {stage}: {len(rows):,} steps{ends}", "ticks": [(x[step], step) for step in marks],
            "loss": losses and plot(losses, 24, 150), "rate": rates and plot(rates, 212, 70),
        }  # fmt: skip


def section(name, result, blind, answers, allowed):
    """Return one result as the page shows it: its figures, and groups of cards (is_right, count of rows, cards)."""
    (rows, bad_lines), task, groups = answers, (result or blind)["task"], []
    ours, of_blind, paper = result.get("metrics", {}), blind.get("metrics", {}), result.get("paper") or blind.get("paper") or {}
    for verdict in (True, False, None):
        group = [row for row in rows if is_right(row.get("correct")) is verdict]
        if group or (rows and verdict is not None):
            groups.append((verdict, len(group), [card(task, row, allowed) for row in choose(group)]))
    return {
        "name": name, "task": task, "result": result, "differences": differences(result, blind), "bad_lines": bad_lines,
        "names": [*ours | of_blind | paper], "ours": ours, "blind": of_blind, "paper": paper, "groups": groups,
    }  # fmt: skip


def page_data(run):
    """Return all that the page of a run folder shows: dicts, lists, numbers and texts."""
    ours, blind = (read_results(run / folder, list(TASKS)) for folder in ("eval", "eval_blind"))
    if not (ours or blind):
        raise FileNotFoundError(f"no results in {run / 'eval'}; run evaluate.py {run} first")
    answers = {name: read_lines(run / "eval" / f"{name}.jsonl") for name in ours | blind}
    verdicts = [Counter(is_right(row.get("correct")) for row in rows) for rows, _ in answers.values()]
    allowed = PICTURES_BYTES // max(1, sum(min(CARDS, count) for counts in verdicts for count in counts.values()))
    files = {f"{folder}/{name}.json": row for folder, rows in (("eval", ours), ("eval_blind", blind)) for name, row in rows.items()}
    log, bad_log_lines = read_lines(run / "log.jsonl")
    first, *others = files.values()
    note = "differs, see Provenance"
    about = {key: value if all(other.get(key) == value for other in others) else note for key, value in first.items()}
    return {
        "name": run.resolve().name, "about": about,
        "config": read_json(run / "config.json") if (run / "config.json").is_file() else {},
        "has_mixed_weights": len({json.dumps(result.get("weights_sha256"), sort_keys=True) for result in ours.values()}) > 1,
        "sections": [section(name, ours.get(name, {}), blind.get(name, {}), answers[name], allowed) for name in answers],
        "curves": list(curves(log)), "bad_log_lines": bad_log_lines,
        "files": [(name, json.dumps(result, indent=2, ensure_ascii=False)) for name, result in files.items()],
    }  # fmt: skip


def write_report(run, /, out=None):
    """Write the page of a run folder's evaluations, and return its path."""
    how = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)
    templates.filters["place"] = place
    page = templates.get_template("report.html").render(page_data(Path(run))).strip() + "\n"
    out = Path(out or Path(run) / "eval" / "report.html")
    write_text(out, UNPRINTABLE.sub("\ufffd", page))
    print(f"written: {out}")
    return out


main = command(__name__, write_report)
