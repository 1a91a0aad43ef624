"""One evaluation as one HTML page to look at: figures beside the paper's, boxes on pictures as in its Fig. 3 to 5.

    python report.py runs/default                        writes runs/default/eval/report.html
    python report.py runs/default --out page.html

Reads RUN/eval/TASK.json and TASK.jsonl, the blind baseline of RUN/eval_blind and the losses of RUN/log.jsonl; whatever is
absent is left out or said to be. The page needs no network and no script: pictures are inside it, boxes and curves are
drawn as SVG, and its own policy lets a browser load and run nothing. Answers are a model's, so they are hostile input.
The same files give the same bytes.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

from PIL import ImageOps

import video
from benchmarks import TASKS
from checkpoint import read_json, write_whole
from clip_vit import open_image

MAIN = {"spatial": ("across", "along", "icl across", "icl along")}  # the headline; of other tasks, the first metric
CARDS = 6  # at most, of successes and of failures each
FRAMES = 4  # of a clip
PICTURES_BYTES = 1_900_000  # of all pictures; base64 makes them a third larger
LONGEST = 1500  # characters shown of one text
FOLDED = 170  # characters, from which on a text is folded
WHAT_IT_IS = ("kind", "location", "geometry", "template", "dtype", "seed", "split", "decoding", "images", "git_commit")


# ----- reading


def read_results(folder):
    """Read what evaluate.py wrote: {task: result}, the tasks of `benchmarks` first, in their order."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if isinstance(result, dict) and isinstance(
            result.get("metrics"), dict
        ):  # else a submission, a list of requests
            found[path.stem] = result
    known = [task for task in TASKS if task in found]
    return {task: found[task] for task in [*known, *(task for task in found if task not in TASKS)]}


def read_lines(path):
    """Read a JSONL file: (its objects, how many lines are none). The last line of a killed process may be half one."""
    rows, bad = [], 0
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                rows, bad = (rows + [row], bad) if isinstance(row, dict) else (rows, bad + 1)
    return rows, bad


# ----- text


def esc(value):
    """Make any value HTML text; characters that no page may hold, or that a terminal would obey, become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def prose(text):
    """Show a text of any length: folded above FOLDED characters to its beginning and end, cut above LONGEST."""
    text = str(text)
    if len(text) <= FOLDED:
        return esc(text)
    cut = f'<p class="note">cut: {len(text):,} characters in all</p>' if len(text) > LONGEST else ""
    half = FOLDED // 2 - 10  # an in-context question ends with what is asked
    short = f"{esc(text[:half].rstrip())} … {esc(text[-half:].lstrip())}"
    return f"<details><summary>{short}</summary>{esc(text[:LONGEST])}{cut}</details>"


def number(value):
    """Write a metric: shares as percent, counts as they are, what is none as a dash.

    >>> number(0.9428), number(314), number(None), number(float("nan"))
    ('94.3 %', '314', '–', '–')
    """
    if isinstance(value, float):
        return f"{100 * value:.1f}\u202f%".replace("\u202f", " ") if math.isfinite(value) else "–"
    return "–" if value is None else esc(value)


def percent(value):
    """Write a figure of the paper, which is in percent already."""
    return "–" if not isinstance(value, int | float) or not math.isfinite(value) else f"{value:.1f} %"


def table(caption, head, rows, text_columns=1):
    """Lay out cells, HTML already, in a table that scrolls inside its own box; columns after the first ones are numbers."""

    def line(cells, tag):
        columns = enumerate(cells)
        return "<tr>" + "".join(f"<{tag}{' class=n' * (i >= text_columns)}>{c}</{tag}>" for i, c in columns) + "</tr>"

    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"
    )


# ----- which rows become cards


def verdict(row):
    """Say whether a row counts as a success: True, False, or None where nobody has judged it. A score does from 0.5 on."""
    score = row.get("correct")
    known = isinstance(score, int | float) and not math.isnan(score)
    return score >= 0.5 if known else None


def truth_of(row):
    return row["truth"] if isinstance(row.get("truth"), dict) else {}


def kind_of(row):
    """Tell rows of one task apart: (what was asked, how the answer fails), each "" where there is nothing to say."""
    truth, answer = truth_of(row), str(row.get("answer") or "")
    asked, how = next((str(truth[key]) for key in ("setting", "type") if truth.get(key)), ""), ""
    if not answer.strip():
        how = "empty answer"
    elif isinstance(truth.get("iou"), int | float):
        how = f"IoU {truth['iou']:.2f}" if row.get("boxes_px") else "no box"
    elif not verdict(row) and "opposite" in truth:
        how = "the opposite word" if truth["opposite"] else "neither word"
    elif "named" in truth and not verdict(row):
        how = f"named {truth['named']}" if truth["named"] else "named nothing"
    return asked, how


def spread(rows, count):
    """Take the middles of `count` equal parts.

    >>> spread(range(10), 2), spread(range(2), 6)
    ([2, 7], [0, 1])
    """
    count = min(count, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def choose(rows, count=CARDS):
    """Choose rows to show, always the same: of every kind in turn, and of each kind spread over the rows."""
    kinds = {}
    for row in rows:
        asked, how = kind_of(row)
        near = how.startswith("IoU") and how != "IoU 0.00"
        label = truth_of(row).get("label")
        kinds.setdefault((asked, "IoU" if near else how.split()[:2], str(label)).__repr__(), []).append(row)
    groups, places = spread(list(kinds.values()), count), [0] * min(count, len(kinds))
    while sum(places) < min(count, sum(map(len, groups))):
        for i, group in enumerate(groups):
            if places[i] < len(group) and sum(places) < count:
                places[i] += 1
    return [row for group, n in zip(groups, places, strict=True) for row in spread(group, n)]


# ----- cards


def finite_boxes(boxes):
    """Keep what can be drawn: four finite numbers, corners in order, not further off than a screen could tell."""
    kept = []
    for box_px in boxes if isinstance(boxes, list | tuple) else ():
        known = isinstance(box_px, list | tuple) and len(box_px) == 4
        if known and all(isinstance(v, int | float) and math.isfinite(v) for v in box_px):
            x1, y1, x2, y2 = (min(max(v, -99999), 99999) for v in box_px)
            kept.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return kept


def data_uri(image, allowed):
    """Scale a PIL image to 320 pixels' width or less, as PNG or JPEG, whichever is smaller, in `allowed` bytes if it can."""
    for width in (320, 240, 160, 96):
        scaled, files = image.copy(), []
        scaled.thumbnail((width, 2 * width))
        for name, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82, "optimize": True})):
            file = io.BytesIO()
            scaled.save(file, name, **options)
            files.append((len(file.getvalue()), name, file.getvalue()))
        size, name, content = min(files)
        if size <= allowed:
            break
    return f"data:image/{name};base64,{base64.b64encode(content).decode()}"


def picture(row, truth_px, said_px, allowed):
    """Show a row's image, or some frames of its clip, under its boxes; one line of text where it cannot be shown.

    Boxes are in the pixels of the image as the model saw it: of a mirrored one, they are mirrored already.
    """
    path = row.get("image")
    if not path:
        return '<p class="missing">asked without an image</p>'
    try:
        frames = video.read_frames(path, FRAMES) if video.is_clip(path) else [open_image(path)]
    except (OSError, ValueError, ImportError, TypeError) as error:
        return f'<p class="missing" role="img" aria-label="missing image">No picture: {prose(error)}</p>'
    alt = esc(Path(path).name) + (", mirrored" if row.get("mirrored") else "")
    for colour, boxes in (("green", truth_px), ("blue", said_px)):
        alt += "".join(f", {colour} box at {place(box_px)}" for box_px in boxes[:4])
    rects = "".join(
        f'<rect class="{name}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>'
        for kind, boxes in (("truth", truth_px), ("said", said_px))
        for x1, y1, x2, y2 in boxes[:20]
        for name in ("halo", kind)
    )
    shown = ""
    for i, frame in enumerate(frames, 1):
        frame = ImageOps.mirror(frame) if row.get("mirrored") else frame
        which = f"frame {i} of {len(frames)} shown, " if len(frames) > 1 else ""
        shown += (
            f'<div class="pic" style="aspect-ratio:{frame.width}/{frame.height};'
            f'max-width:{20 * frame.width / frame.height:.3f}rem">'
            f'<img alt="{which}{alt}" src="{data_uri(frame, allowed // len(frames))}">'
            f'<svg viewBox="0 0 {frame.width} {frame.height}" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>'
            "</div>"
        )
    return f'<div class="{"frames" if len(frames) > 1 else "still"}">{shown}</div>'


def place(box_px):
    return "(" + ", ".join(f"{v:.0f}" for v in box_px) + ")"


def truth_text(task, row, boxes_px):
    """Say what the answer should have been."""
    truth = truth_of(row)
    keys = ("word", "label", "answer", "answers", "caption", "captions", "description", "descriptions", "name")
    value = next((truth[key] for key in keys if truth.get(key) not in (None, "", [])), None)
    if isinstance(value, list | tuple):
        value = " / ".join(dict.fromkeys(map(str, value)))
    if task == "negpred":
        value = f"no {value}"
    at = " and ".join(map(place, boxes_px[:4]))
    return " at ".join(text for text in (value and str(value), at) if text) or "–"


def card(task, row, allowed):
    truth = truth_of(row)
    truth_px = finite_boxes([truth["box_px"]] if "box_px" in truth else truth.get("boxes_px"))
    said = row.get("boxes_px") or []
    said_px = finite_boxes(said)
    tag = " · ".join(filter(None, kind_of(row)))
    score = row.get("correct")
    if isinstance(score, float) and 0 < score < 1:
        tag = " · ".join(filter(None, (tag, f"score {score:.2f}")))
    if row.get("mirrored"):
        tag = " · ".join(filter(None, (tag, "mirrored")))
    if len(said_px) < len(said):
        tag += f" · {len(said) - len(said_px)} boxes are not four finite numbers"
    answer = row.get("answer")
    lines = (
        ("Q", prose(row.get("question", "–")), ""),
        ("A", prose(answer) if str(answer or "").strip() else "<em>empty</em>", " a"),
        ("Truth", prose(truth_text(task, row, truth_px)), ""),
    )
    told = "".join(f'<dt>{name}</dt><dd dir="auto" class="text{more}">{text}</dd>' for name, text, more in lines)
    tag = f'<p class="tag">{prose(tag)}</p>' if tag else ""
    return f'<article class="card">{picture(row, truth_px, said_px, allowed)}{tag}<dl>{told}</dl></article>'


def rows_of_cards(task, chosen, rows, allowed):
    """Lay out the successes, the failures and what nobody judged, a row each."""
    out = ""
    for name, label, want in (("good", "Right", True), ("bad", "Wrong", False), ("open", "Not judged", None)):
        count = sum(verdict(row) is want for row in rows)
        if chosen[want]:
            clips = " clips" if any(row.get("image") and video.is_clip(row["image"]) for row in chosen[want]) else ""
            cards = "".join(card(task, row, allowed) for row in chosen[want])
            shown = f"{len(chosen[want])} of {count:,} shown"
            out += f'<h4 class="{name}">{label} <span>{shown}</span></h4><div class="cards{clips}">{cards}</div>'
        elif want is not None and rows:
            out += f'<h4 class="{name}">{label} <span>none</span></h4>'
    return out


# ----- curves


def ticks(low, high, most=5):
    """Give round numbers between two.

    >>> ticks(0, 3.97), ticks(0, 150)
    ([0, 1, 2, 3], [0, 50, 100, 150])
    """
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10) if (high - low) / (size * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(points, top, height, name, unit, first, last):
    """Draw (step, value) as a line through the means of at most 120 equal parts, in a band of their extremes."""
    left, right = 46, 352
    size = math.ceil(len(points) / 120)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    high = max(value for _, value in points) * 1.05 or 1.0

    def x(step):
        return left + (right - left) * (step - first) / max(last - first, 1)

    def y(value):
        return top + height * (1 - value / high)

    def path(values):
        return " ".join(f"{x(part[len(part) // 2][0]):.1f},{y(v):.1f}" for part, v in zip(parts, values, strict=True))

    means = [sum(v for _, v in part) / len(part) for part in parts]
    lows, highs = ([extreme(v for _, v in part) for part in parts] for extreme in (min, max))
    band = path(highs) + " " + " ".join(reversed(path(lows).split()))
    grid = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in ticks(0, high, 4)
    )
    return (
        f'<g class="grid">{grid}</g><text class="name" x="{left}" y="{top - 8}">{name}'
        f'<tspan class="unit"> {unit}</tspan></text>'
        f'<polygon class="band" points="{band}"/><polyline class="line" points="{path(means)}"/>'
    )


def curves(log):
    """Draw loss and learning rate over the steps of each stage."""
    figures = ""
    for stage in dict.fromkeys(str(row.get("stage", "–")) for row in log):
        series = {}
        for name in ("loss", "lr"):
            series[name] = [
                (row["step"], row[name])
                for row in log
                if str(row.get("stage", "–")) == stage
                and all(isinstance(row.get(k), int | float) and math.isfinite(row[k]) for k in ("step", name))
            ]
        steps = [step for points in series.values() for step, _ in points]
        if not steps:
            continue
        first, last, drawn = min(steps), max(steps), ""
        plots = (("loss", 24, 150, "loss", "nats per answer token"), ("lr", 212, 70, "learning rate", "per step"))
        for name, top, height, label, unit in plots:
            if series[name]:
                drawn += plot(series[name], top, height, label, unit, first, last)
        for step in ticks(first, max(last, first + 1)):
            x = 46 + 306 * (step - first) / max(last - first, 1)
            drawn += f'<text x="{x:.1f}" y="300" text-anchor="middle">{step:g}</text>'
        ends = [f"{series['loss'][i][1]:.3g}" for i in (0, -1)] if series["loss"] else ["–", "–"]
        caption = f"Stage {esc(stage)}: {len(set(steps)):,} steps, loss from {ends[0]} to {ends[1]}"
        figures += (
            f'<figure><svg class="plot" viewBox="0 0 360 322" role="img" aria-label="{caption}">{drawn}'
            f'<text x="199" y="318" text-anchor="middle">step</text></svg><figcaption>{caption}</figcaption></figure>'
        )
    return figures


# ----- the page


def same_questions(ours, theirs):
    """Name what sets a blind baseline apart from the result beside it, other than that it saw nothing."""
    keys = ("questions", "images", "weights_sha256", "data_sha256", "seed", "decoding", "location", "template")
    return [key for key in keys if key in ours and key in theirs and ours[key] != theirs[key]]


def headline(results, blind):
    rows = []
    for task in dict.fromkeys([*results, *blind]):
        ours, baseline = results.get(task, {}), blind.get(task, {})
        metrics = ours.get("metrics") or baseline.get("metrics") or {}
        for name in [name for name in MAIN.get(task, ()) if name in metrics] or list(metrics)[:1]:
            of_blind = number((baseline.get("metrics") or {}).get(name)) + "*" * bool(same_questions(ours, baseline))
            value = number((ours.get("metrics") or {}).get(name))
            paper = percent((ours.get("paper") or {}).get(name))
            count = ours.get("questions", baseline.get("questions"))
            rows.append((esc(task), esc(name), f"<b>{value}</b>", of_blind, paper, number(count)))
    return table("Main figures", ("task", "figure", "this run", "blind", "LocVLM-B", "questions"), rows, 2)


def section(n, task, result, baseline, rows, bad, chosen, allowed):
    """Tell one task: its figures, its prompts, its cards."""
    metrics, of_blind, paper = (
        {} if r is None else r for r in (result.get("metrics"), baseline.get("metrics"), result.get("paper"))
    )
    names = dict.fromkeys([*metrics, *of_blind, *paper])
    cells = [
        (esc(name), f"<b>{number(metrics.get(name))}</b>", number(of_blind.get(name)), percent(paper.get(name)))
        for name in names
    ]
    notes = []
    differ = same_questions(result, baseline)
    if differ:
        notes.append(f"The blind baseline is of another evaluation: it differs in {', '.join(differ)}.")
    if bad:
        notes.append(f"{bad} lines of {task}.jsonl are not JSON objects and are left out.")
    if result and not rows:
        notes.append(f"No answers to show: {task}.jsonl is absent or empty.")
    if result and rows and len(rows) != result.get("questions", len(rows)):
        notes.append(f"{task}.jsonl holds {len(rows)} answers, its result counts {result['questions']}.")
    if not result:
        notes.append("Only the blind baseline was evaluated.")
    about = " · ".join(f"{result[key]:,} {key}" for key in ("questions", "images") if isinstance(result.get(key), int))
    prompts = "".join(f"<li>{prose(text)}</li>" for text in result.get("prompts") or baseline.get("prompts") or ())
    return (
        f'<section id="t{n}"><h2>{esc(task)}</h2><p class="about">{about}</p>'
        + "".join(f'<p class="note">{esc(text)}</p>' for text in notes)
        + table(f"Figures of {esc(task)}", ("figure", "this run", "blind", "LocVLM-B"), cells)
        + (f"<details class=prompts><summary>Prompts</summary><ul>{prompts}</ul></details>" if prompts else "")
        + rows_of_cards(task, chosen, rows, allowed)
        + "</section>"
    )


def sizes(run):
    """Say what the model is, as far as its config.json tells."""
    path = run / "config.json"
    config = read_json(path) if path.is_file() else {}
    text, vision, own = (config.get(key) or {} for key in ("text_config", "vision_config", "locvlm"))
    told = {}
    if vision:
        told["tower"] = (
            "CLIP ViT, {num_hidden_layers} layers of {hidden_size}, {image_size} px in patches of {patch_size}"
        )
        told["tower"] = told["tower"].format_map(Unknown(vision))
    if text:
        told["language"] = "LLaMA, {num_hidden_layers} layers of {hidden_size}".format_map(Unknown(text))
    return told | {key: own[key] for key in ("adapter", "n_bins", "frames", "stage") if own.get(key)}


class Unknown(dict):
    def __missing__(self, key):
        return "?"


def write_report(run, out=None):
    """Write the page of a run folder's evaluations to `out` (RUN/eval/report.html), and give its path."""
    run = Path(run)
    results, blind = read_results(run / "eval"), read_results(run / "eval_blind")
    tasks = list(dict.fromkeys([*results, *blind]))
    if not tasks:
        raise FileNotFoundError(f"no results in {run / 'eval'}; expected TASK.json files; run evaluate.py {run} first")
    answers = {task: read_lines(run / "eval" / f"{task}.jsonl") for task in tasks}
    chosen = {
        task: {want: choose([row for row in rows if verdict(row) is want]) for want in (True, False, None)}
        for task, (rows, _) in answers.items()
    }
    count = sum(len(rows) for by_verdict in chosen.values() for rows in by_verdict.values())
    allowed = PICTURES_BYTES // max(count, 1)
    first = next(iter(results.values()), None) or next(iter(blind.values()))
    is_what = sizes(run) | {key: first[key] for key in WHAT_IT_IS if first.get(key) not in (None, "", {})}
    if isinstance(is_what.get("decoding"), dict):
        is_what["decoding"] = ", ".join(f"{key} {value}" for key, value in is_what["decoding"].items())
    terms = "".join(
        f"<div><dt>{esc(key.replace('_', ' '))}</dt><dd>{prose(value)}</dd></div>" for key, value in is_what.items()
    )
    weights = {json.dumps(result.get("weights_sha256"), sort_keys=True) for result in results.values()}
    mixed = "<p class=note>These results are not all of the same weights; see the end of the page.</p>"
    log, bad = read_lines(run / "log.jsonl")
    drawn = curves(log) or "<p class=note>No curves: log.jsonl is absent or empty.</p>"
    broken = f"<p class=note>{bad} lines of log.jsonl are not JSON objects and are left out.</p>" if bad else ""
    sections = [
        section(i, task, results.get(task, {}), blind.get(task, {}), *answers[task], chosen[task], allowed)
        for i, task in enumerate(tasks)
    ]
    everything = "".join(
        f"<h3>{name}/{esc(task)}.json</h3><pre>{esc(json.dumps(result, indent=2, ensure_ascii=False)[:40000])}</pre>"
        for name, of in (("eval", results), ("eval_blind", blind))
        for task, result in of.items()
    )
    links = "".join(f'<a href="#t{i}">{esc(task)}</a>' for i, task in enumerate(tasks))
    name = esc(run.resolve().name)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>{name}: evaluation</title><style>{STYLE}</style></head><body>
<header><p class="kicker">LocVLM · evaluation</p><h1>{name}</h1><dl class="what">{terms}</dl></header>
<nav aria-label="tasks">{links}<a href="#training">training</a><a href="#provenance">provenance</a></nav><main>
{mixed * (len(weights) > 1)}{headline(results, blind)}
<p class="about">Shares in percent. <i>Blind</i>: the same questions with the image blanked (<code>--blind</code>);
with a star, of another evaluation. <i>LocVLM-B</i>: the paper's figure on its own data, for orientation.
Pictures: <b class="green">green</b> is the truth or the place asked about, <b class="blue">blue</b> the answer.</p>
{"".join(sections)}
<section id="training"><h2>Training</h2><div class="curves">{drawn}</div>{broken}
<p class="about">Line: mean of neighbouring steps; band: their smallest and largest.</p></section>
<section id="provenance"><h2>Provenance</h2><details><summary>Everything in the result files</summary>{everything}</details>
</section></main></body></html>
"""
    out = Path(out or run / "eval" / "report.html")
    write_whole(out, lambda temporary: temporary.write_bytes(page.encode("utf-8", "replace")))
    return out


STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --text: #1b1c1d; --soft: #5b6066; --rule: #dcdfe2; --raised: #f4f5f5;
  --green: #15803d; --blue: #1d4ed8; --red: #b42318; --amber: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e7e8ea; --soft: #a2a8af; --rule: #353a40;
  --raised: #1e2125; --green: #4ade80; --blue: #7ea6ff; --red: #ff8a80; --amber: #e0b050 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 3.5rem }
body { margin: 0 auto; padding: 0 1rem 4rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere }
header { padding: 2.5rem 0 1rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; font-weight: 650; letter-spacing: -.01em }
h2 { font-size: 1.35rem; margin: 0; font-weight: 650 }
h3 { font-size: .95rem; margin: 1.5rem 0 .25rem }
h4 { font-size: .95rem; margin: 1.75rem 0 .6rem; padding-top: .5rem; border-top: 3px solid; font-weight: 650 }
h4 span { color: var(--soft); font-weight: 400 }
.good { color: var(--green) } .bad { color: var(--red) } .open { color: var(--soft) }
.green { color: var(--green) } .blue { color: var(--blue) }
.kicker, .about, .note, figcaption, caption { color: var(--soft); font-size: .875rem; margin: .25rem 0 }
.note { color: var(--amber) }
.what { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem 1.5rem; margin: 0 }
.what dt, .card dt { color: var(--soft); font-size: .75rem }
.what dd { margin: 0; font-size: .9rem }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 1.25rem; overflow-x: auto; white-space: nowrap;
  background: var(--page); border-block: 1px solid var(--rule); padding: .6rem 0; font-size: .9rem }
a { color: var(--blue); text-decoration: none } a:hover { text-decoration: underline }
section { margin-top: 3.5rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: min(100%, 34rem);
  border-block: 1.5px solid var(--text); overflow-wrap: normal }
caption { text-align: left; padding-bottom: .4rem }
th { font-weight: 600; text-align: left; border-bottom: 1px solid var(--text) }
th, td { padding: .3rem .75rem } th:first-child, td:first-child { padding-left: .1rem }
tbody tr + tr td { border-top: 1px solid var(--rule) }
.n { text-align: right; white-space: nowrap }
summary { cursor: pointer }
.prompts { font-size: .9rem } .prompts ul { margin: .5rem 0; padding-left: 1.2rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); gap: 1rem .75rem }
.cards.clips { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.card { background: var(--raised); border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; min-width: 0 }
.frames { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.pic { position: relative; width: 100%; margin: 0 auto }
.pic img, .pic svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block }
.pic rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.pic .halo { stroke: #fff; stroke-width: 4.5; stroke-opacity: .85 }
.pic .truth { stroke: #15933f } .pic .said { stroke: #1d4ed8 }
.missing { margin: 0; padding: 1rem .6rem; min-height: 7rem; background: var(--page); color: var(--soft);
  border-bottom: 1px dashed var(--rule); font-size: .8rem }
.tag { margin: .4rem .6rem 0; color: var(--soft); font-size: .75rem }
.card dl { margin: .4rem .6rem .6rem; font-size: .8125rem; line-height: 1.4 }
.card dd { margin: 0 0 .35rem; white-space: pre-line; unicode-bidi: isolate; overflow: hidden } .card .a { font-weight: 600 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem }
figure { margin: 0 } .plot { width: 100%; max-width: 27rem; font-size: 11px }
.plot text { fill: var(--soft); font-variant-numeric: tabular-nums } .plot .name { fill: var(--text); font-weight: 600 }
.plot .unit { font-weight: 400; fill: var(--soft) } .grid line { stroke: var(--rule) }
.band { fill: var(--blue); opacity: .18 } .line { fill: none; stroke: var(--blue); stroke-width: 1.6; stroke-linejoin: round }
pre { font: .78rem/1.45 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--raised); padding: .75rem; border-radius: 6px; margin: .25rem 0 }
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder with an eval folder in it")
    parser.add_argument("--out", help="where to write the page (default: RUN/eval/report.html)")
    args = parser.parse_args(argv)
    print(f"written: {write_report(args.run, args.out)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"report.py: {error}")
