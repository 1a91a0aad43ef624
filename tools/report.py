"""One evaluation as one HTML page to look at: figures beside the paper's, boxes on pictures as in its Fig. 3 to 5.

    python report.py runs/default                        writes runs/default/eval/report.html
    python report.py runs/default --out page.html

Reads RUN/eval/NAME.json and NAME.jsonl as evaluate.py names them, the blind baseline in RUN/eval_blind, and RUN/log.jsonl;
what is absent is left out, or said to be absent. The page needs no network and no script: pictures are inside it, boxes and curves are SVG, and
its own policy forbids a browser to load or run anything, for the answers are a model's and may hold anything. The same
files give the same bytes.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import ImageOps

from formats.clips import is_clip
from formats.eval_folder import differences, is_number, read_lines, read_results, verdict
from formats.files import read_json, write_whole
from formats.images import open_image
from video import read_frames

MAIN = {"spatial": ("across", "along", "icl across", "icl along")}  # the headline; of other tasks, the first metric
CARDS = 6  # at most, of successes and of failures each
FRAMES = 4  # of a clip
PICTURES_BYTES = 1_800_000  # of all pictures; base64 makes them a third larger
FOLDED, LONGEST, FILE = 170, 1500, 50_000  # characters from which on a text is folded, a text is cut, a result file is


def part(mapping, key):
    """Give the dict under a key, or an empty one."""
    return mapping[key] if isinstance(mapping.get(key), dict) else {}


# ----- text


def esc(value):
    """Make any value HTML text. Control characters and halves of characters become U+FFFD."""
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def prose(value):
    """Show a text of any length: above FOLDED characters its beginning and end, to be opened; cut above LONGEST."""
    text = str(value)
    if len(text) <= FOLDED:
        return esc(text)
    cut = f'<p class="note">Cut here; it has {len(text):,} characters.</p>' if len(text) > LONGEST else ""
    # the end too: a question in context ends with what is asked
    head, tail = text[: FOLDED // 2].rsplit(" ", 1)[0], text[-FOLDED // 2 :].split(" ", 1)[-1]
    return f"<details><summary>{esc(head)} … {esc(tail)}</summary>{esc(text[:LONGEST])}{cut}</details>"


def number(value, scale=100):
    """Write a figure: shares as percent, counts as they are, what is none as a dash. The paper's are percent: scale 1.

    >>> number(0.9428), number(314), number(70, 1), number(None), number(float("nan"))
    ('94.3 %', '314', '70.0 %', '–', '–')
    """
    if isinstance(value, float) or (scale == 1 and is_number(value)):
        return f"{scale * value:.1f} %" if is_number(value) else "–"
    return "–" if value is None else esc(value)


def place(box_px):
    return "(" + ", ".join(str(round(v)) for v in box_px) + ")"


def table(caption, head, rows, text_columns=1):
    """Lay out cells, HTML already, in a table that scrolls inside its own box. All but the first columns are numbers."""

    def line(cells, tag):
        cells = (f"<{tag}{' class=n' * (i >= text_columns)}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(cells)}</tr>"

    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"
    )


def kind_of(row):
    """Tell the rows of a task apart: (what was asked, what the answer did), "" where there is nothing to say."""
    truth, right = part(row, "truth"), verdict(row.get("correct"))
    asked, did = truth.get("setting") or truth.get("type") or "", ""
    if not str(row.get("answer") or "").strip():
        did = "no answer"
    elif is_number(truth.get("iou")):
        did = f"IoU {truth['iou']:.3f}" if truth["iou"] > 0 else "no overlap" if row.get("boxes_px") else "no box"
    elif not right and "opposite" in truth:
        did = "the opposite word" if truth["opposite"] else "neither word"
    elif not right and "named" in truth:
        did = "another name" if truth["named"] else "no name"
    return str(asked), did


def choose(rows, count=CARDS):
    """Choose rows to show, always the same: of each kind in turn, spread over all of its rows."""
    kinds = {}
    for row in rows:
        asked, did = kind_of(row)
        kind = (asked, re.sub("[0-9.]+", "", did), str(part(row, "truth").get("label")))
        kinds.setdefault(kind, []).append(row)
    groups = list(kinds.values())[:count]
    shares = [0] * len(groups)
    while sum(shares) < min(count, sum(map(len, groups))):
        poorest = min((i for i, group in enumerate(groups) if shares[i] < len(group)), key=shares.__getitem__)
        shares[poorest] += 1
    # each group begins elsewhere, as several kinds of question often ask about one image
    return [
        group[int((i + (k + 1) / (len(groups) + 1)) * len(group) / share)]
        for k, (group, share) in enumerate(zip(groups, shares, strict=True))
        for i in range(share)
    ]


# ----- cards


def drawable(boxes):
    """Keep the boxes that can be drawn: four finite numbers, their corners put in order, near enough for a screen."""
    kept = []
    for box_px in boxes if isinstance(boxes, list) else ():
        if isinstance(box_px, list) and len(box_px) == 4 and all(map(is_number, box_px)):
            x1, y1, x2, y2 = (min(max(v, -99999), 99999) for v in box_px)
            kept.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return kept


def data_uri(image, allowed):
    """Scale a PIL image to a width of 320 or less, and so far that it takes `allowed` bytes or 96 pixels.

    JPEG, or PNG where that is smaller, as it may be of drawings that need no scaling.
    """
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


def picture(row, truth_px, said_px, allowed):
    """Show a row's image, or frames of its clip, under its boxes; a line that says why where it cannot be shown.

    Boxes are in the pixels of what the model saw: those of a mirrored image are mirrored already.
    """
    path = row.get("image")
    if not path:
        return '<p class="missing">Asked without an image.</p>'
    try:
        frames = read_frames(path, FRAMES) if is_clip(path) else [open_image(path)]
    except (OSError, ValueError, TypeError, ImportError) as error:
        return f'<div class="missing">No picture: {prose(error)}</div>'
    marks, alt = "", [Path(path).name + ", mirrored" * bool(row.get("mirrored"))]
    for name, colour, boxes in (("truth", "green", truth_px), ("said", "blue", said_px)):
        for x1, y1, x2, y2 in boxes[:20]:
            corners = f'x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"'
            marks += f'<rect class="halo" {corners}/><rect class="{name}" {corners}/>'
            alt.append(f"{colour} box {place((x1, y1, x2, y2))}")
    shown = ""
    for i, frame in enumerate(frames, 1):
        frame = ImageOps.mirror(frame) if row.get("mirrored") else frame
        text = esc(", ".join([f"frame {i} of {len(frames)} shown"] * (len(frames) > 1) + alt))
        w, h = frame.size
        shown += (
            f'<div class="pic" style="aspect-ratio:{w}/{h};max-width:{20 * w / h:.3f}rem">'
            f'<img alt="{text}" src="{data_uri(frame, allowed // len(frames))}">'
            f'<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg></div>'
        )
    return f'<div class="{"frames" if len(frames) > 1 else "still"}">{shown}</div>'


def truth_text(task, truth, boxes_px):
    """Say what the answer should have been: a word, or what is where."""
    keys = ("word", "label", "answer", "answers", "sentences", "name")
    key = next((key for key in keys if truth.get(key) not in (None, "", [])), None)
    text = "no " * (task == "negpred") + str(truth.get(key, ""))
    if isinstance(truth.get(key), list):
        text = " / ".join(dict.fromkeys(map(str, truth[key])))
    if boxes_px and key not in ("word", "label", "answer", "answers"):
        text = " ".join(filter(None, (text, "at", " and ".join(map(place, boxes_px[:4])), "px")))
    return text or "–"


def card(task, row, allowed):
    """Show one question: the picture, what was asked, what was answered, and the truth."""
    truth, score, answer = part(row, "truth"), row.get("correct"), str(row.get("answer") or "")
    truth_px = drawable([truth["box_px"]] if "box_px" in truth else truth.get("boxes_px"))
    said = row.get("boxes_px") or []
    said_px, said_count = drawable(said), len(said) if isinstance(said, list) else 1
    tags = [*kind_of(row), f"score {score:.2f}" if is_number(score) and 0 < score < 1 else ""]
    tags += [
        "mirrored" if row.get("mirrored") else "",
        "a box is not four numbers" if len(said_px) < said_count else "",
    ]
    where = f" <small>at {' and '.join(map(place, said_px[:4]))} px</small>" if said_px else ""
    told = (
        ("Q", "", prose(row.get("question", "–"))),
        ("A", ' class="a"', (prose(answer) if answer.strip() else "<em>empty</em>") + where),
        ("Truth", "", prose(truth_text(task, truth, truth_px))),
    )
    lines = "".join(f'<dt>{name}</dt><dd dir="auto"{more}>{text}</dd>' for name, more, text in told)
    tag = prose(" · ".join(filter(None, tags)))
    return f'<article class="card">{picture(row, truth_px, said_px, allowed)}<p class="tag">{tag}</p><dl>{lines}</dl></article>'


def rows_of_cards(task, rows, allowed):
    """Lay out the successes, the failures and what nobody judged, a row each."""
    out = ""
    for name, label, want in (("good", "Right", True), ("bad", "Wrong", False), ("open", "Not judged", None)):
        here = [row for row in rows if verdict(row.get("correct")) is want]
        if here or (rows and want is not None):
            chosen = choose(here)
            shown = f"{len(chosen)} of {len(here):,}" if here else "none"
            cards = "".join(card(task, row, allowed) for row in chosen)
            clips = " clips" * ('<div class="frames">' in cards)
            out += f'<h3 class="{name}">{label} <span>{shown}</span></h3><div class="cards{clips}">{cards}</div>'
    return out


# ----- curves


def ticks(low, high, most=5):
    """Give round numbers between two.

    >>> ticks(0, 3.97), ticks(0, 150)
    ([0.0, 1.0, 2.0, 3.0], [0, 50, 100, 150])
    """
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10) if (high - low) / (size * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(points, x, top, height, title):
    """Draw (step, value) as a line through the means of at most 120 parts, in the band of their extremes."""
    size = math.ceil(len(points) / 120)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    high = max(value for _, value in points) * 1.05
    high = high if high > 0 else 1.0

    def y(value):
        return top + height * (1 - value / high)

    def path(pick):
        return [f"{x(p[len(p) // 2][0]):.1f},{y(pick([v for _, v in p])):.1f}" for p in parts]

    grid = "".join(
        f'<line x1="46" x2="338" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="40" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in ticks(0, high, 4)
    )
    return (
        f'<g class="grid">{grid}</g><text x="46" y="{top - 8}">{title}</text>'
        f'<polygon class="band" points="{" ".join(path(max) + path(min)[::-1])}"/>'
        f'<polyline class="line" points="{" ".join(path(lambda values: sum(values) / len(values)))}"/>'
    )


def curves(log):
    """Draw loss and learning rate over the steps of each stage."""
    stages = {}
    for row in log:
        if is_number(row.get("step")):
            stages.setdefault(str(row.get("stage", "–")), []).append(row)
    figures = ""
    for stage, rows in stages.items():
        first, last = min(row["step"] for row in rows), max(row["step"] for row in rows) + 1

        def x(step, first=first, last=last):
            return 46 + 292 * (step - first) / (last - first)

        losses, rates = ([(row["step"], row[key]) for row in rows if is_number(row.get(key))] for key in ("loss", "lr"))
        drawn = plot(losses, x, 24, 150, "<tspan>loss</tspan>, nats per answer token") if losses else ""
        drawn += plot(rates, x, 212, 70, "<tspan>learning rate</tspan>") if rates else ""
        for step in ticks(first, last):
            drawn += f'<text x="{x(step):.1f}" y="300" text-anchor="middle">{step:g}</text>'
        ends = f", loss from {losses[0][1]:.3g} to {losses[-1][1]:.3g}" if losses else ""
        caption = f"Stage {esc(stage)}: {len(rows):,} steps{ends}"
        figures += (
            f'<figure><svg class="plot" viewBox="0 0 360 322" role="img" aria-label="{caption}">{drawn}'
            f'<text x="192" y="318" text-anchor="middle">step</text></svg><figcaption>{caption}</figcaption></figure>'
        )
    return figures


def figures_of(result, blind, names, task=()):
    """Make the cells of some metrics: ours, the blind baseline's, the paper's."""
    ours, of_blind, paper = (
        part(result, "metrics"),
        part(blind, "metrics"),
        part(result, "paper") or part(blind, "paper"),
    )
    star = "*" * bool(differences(result, blind))
    cells = ((number(ours.get(x)), number(of_blind.get(x)) + star, number(paper.get(x), 1)) for x in names)
    return [(*task, esc(x), f"<b>{mine}</b>", *rest) for x, (mine, *rest) in zip(names, cells, strict=True)]


def headline(results):
    rows = []
    for name, (result, blind) in results.items():
        metrics, task = part(result, "metrics") or part(blind, "metrics"), (result or blind)["task"]
        main = [metric for metric in MAIN.get(task, ()) if metric in metrics] or list(metrics)[:1]
        rows += figures_of(result, blind, main, (esc(name),))
    return table("Main figures", ("task", "figure", "this run", "blind", "LocVLM-B"), rows, 2)


def section(n, name, result, blind, rows, bad, allowed):
    """Tell one result: its figures, its prompts, its cards."""
    notes, count = [], result.get("questions", len(rows))
    if changed := differences(result, blind):
        notes.append(f"* The blind baseline is of another evaluation; it differs in {', '.join(changed)}.")
    if not result:
        notes.append("Only the blind baseline is there.")
    elif not rows:
        notes.append(f"No answers to show: eval/{name}.jsonl is absent or empty.")
    elif len(rows) != count:
        notes.append(
            f"eval/{name}.jsonl holds {len(rows)} answers, but the figures count {count}: of another evaluation?"
        )
    if bad:
        notes.append(f"Left out: lines of eval/{name}.jsonl that are not JSON objects, {bad} of them.")
    about = [f"{result[key]:,} {key}" for key in ("questions", "images") if isinstance(result.get(key), int)]
    figures = figures_of(result, blind, {**part(result, "metrics"), **part(blind, "metrics"), **part(result, "paper")})
    height = math.ceil(len(figures) / math.ceil(len(figures) / 16)) if figures else 1  # a long table becomes several
    tables, head = "", ("figure", "this run", "blind", "LocVLM-B")
    for i in range(0, len(figures), height):
        tables += table(f"Figures of {esc(name)}{', continued' * (i > 0)}", head, figures[i : i + height])
    if theirs := result.get("paper_rows"):
        columns = list(dict.fromkeys(column for _, of_model in theirs for column in of_model))
        rows_of_paper = [(esc(model), *(number(of_model.get(x), 1) for x in columns)) for model, of_model in theirs]
        tables += table("The paper's models", ("model", *map(esc, columns)), rows_of_paper)
    asked = result.get("prompts") or []
    prompts = "".join(f"<li>{prose(text)}</li>" for text in (asked if isinstance(asked, list) else [asked]))
    return (
        f'<section id="t{n}"><h2>{esc(name)}</h2><p class="about">{" · ".join(about)}</p>'
        + "".join(f'<p class="note">{esc(text)}</p>' for text in notes)
        + f'<div class="tables">{tables}</div>'
        + (f'<details class="prompts"><summary>Prompts</summary><ul>{prompts}</ul></details>' if prompts else "")
        + rows_of_cards((result or blind)["task"], rows, allowed)
        + "</section>"
    )


def description(run, result):
    """Say what was evaluated, as far as config.json and a result tell: {term: text}."""
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    vision, text, own = part(config, "vision_config"), part(config, "text_config"), part(config, "locvlm")
    told = {}
    if vision:
        told["tower"] = f"CLIP ViT, {vision.get('num_hidden_layers', '?')} layers of {vision.get('hidden_size', '?')}, "
        told["tower"] += f"{vision.get('image_size', '?')} px in patches of {vision.get('patch_size', '?')}"
    if text:
        told["language"] = f"LLaMA, {text.get('num_hidden_layers', '?')} layers of {text.get('hidden_size', '?')}"
    told |= {key: own[key] for key in ("adapter", "n_bins", "frames", "stage") if own.get(key)}
    keys = ("kind", "geometry", "location", "template", "dtype", "images", "split", "seed", "git_commit")
    told |= {key: result[key] for key in keys if result.get(key) is not None}
    decoding = part(result, "decoding")
    return told | ({"decoding": ", ".join(f"{key} {value}" for key, value in decoding.items())} if decoding else {})


def write_report(run, out=None):
    """Write the page of a run folder's evaluations to `out` (RUN/eval/report.html), and give its path."""
    run = Path(run)
    seen, blind = read_results(run / "eval"), read_results(run / "eval_blind")
    results = {name: (seen.get(name, {}), blind.get(name, {})) for name in {**seen, **blind}}
    if not results:
        raise FileNotFoundError(
            f"no results in {run / 'eval'}; expected the JSON files of evaluate.py; run evaluate.py {run} first"
        )
    answers = {name: read_lines(run / "eval" / f"{name}.jsonl") for name in results}
    verdicts = [Counter(verdict(row.get("correct")) for row in rows) for rows, _ in answers.values()]
    allowed = PICTURES_BYTES // max(1, sum(min(CARDS, count) for counts in verdicts for count in counts.values()))
    sections = "".join(section(n, name, *results[name], *answers[name], allowed) for n, name in enumerate(results))
    what = description(run, next(iter((seen or blind).values())))
    terms = "".join(
        f"<div><dt>{esc(key.replace('_', ' '))}</dt><dd>{prose(value)}</dd></div>" for key, value in what.items()
    )
    links = "".join(f'<a href="#t{n}">{esc(name)}</a>' for n, name in enumerate(results))
    weights = {json.dumps(result.get("weights_sha256"), sort_keys=True) for result in seen.values()}
    mixed = '<p class="note">These results are not all of the same weights: see Provenance.</p>' * (len(weights) > 1)
    log, bad = read_lines(run / "log.jsonl")
    training = curves(log) or '<p class="note">No curves: log.jsonl is absent or empty.</p>'
    if bad:
        training += f'<p class="note">Left out: lines of log.jsonl that are not JSON objects, {bad} of them.</p>'
    everything = ""
    for file, result in [(f"eval/{k}.json", v) for k, v in seen.items()] + [
        (f"eval_blind/{k}.json", v) for k, v in blind.items()
    ]:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        cut = f" <small>cut; it has {len(text):,} characters</small>" * (len(text) > FILE)
        everything += f"<h3>{esc(file)}{cut}</h3><pre>{esc(text[:FILE])}</pre>"
    page = PAGE.format(
        name=esc(run.resolve().name),
        style=STYLE,
        terms=terms,
        links=links,
        top=mixed + headline(results),
        sections=sections,
        training=training,
        everything=everything,
    )
    out = Path(out or run / "eval" / "report.html")
    write_whole(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return out


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}: evaluation</title><style>{style}</style></head>
<body><header><p class="about">LocVLM · evaluation</p><h1>{name}</h1><dl class="what">{terms}</dl></header>
<nav aria-label="tasks">{links}<a href="#training">training</a><a href="#provenance">provenance</a></nav><main>
{top}
<p class="about"><i>Blind</i>: the same questions with the images blanked (<code>--blind</code>). <i>LocVLM-B</i>: the
paper's figures on its own data, for orientation. In pictures, <b class="green">green</b> is the truth or the place asked
about and <b class="blue">blue</b> what was answered.</p>
{sections}
<section id="training"><h2>Training</h2><div class="curves">{training}</div>
<p class="about">Lines: means of neighbouring steps; bands: their smallest and largest.</p></section>
<section id="provenance"><h2>Provenance</h2><details><summary>Everything in the result files</summary>{everything}</details>
</section></main></body></html>
"""
STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --text: #1b1c1d; --soft: #5b6066; --rule: #dcdfe2; --raised: #f4f5f5;
  --green: #15803d; --blue: #1d4ed8; --red: #b42318; --amber: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e7e8ea; --soft: #a2a8af; --rule: #353a40;
  --raised: #1e2125; --green: #4ade80; --blue: #7ea6ff; --red: #ff8a80; --amber: #e0b050 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 3.5rem }
body { margin: 0 auto; padding: 0 1rem 4rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
header { padding: 2.5rem 0 1.25rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; font-weight: 650; letter-spacing: -.01em }
h2 { font-size: 1.35rem; margin: 0; font-weight: 650 }
h3 { font-size: .95rem; margin: 1.75rem 0 .6rem; font-weight: 650 } h3 span { color: var(--soft); font-weight: 400 }
.good, .bad, .open { padding-top: .5rem; border-top: 3px solid }
.good, .green { color: var(--green) } .bad { color: var(--red) } .open { color: var(--soft) } .blue { color: var(--blue) }
.about, figcaption, caption { color: var(--soft); font-size: .875rem; margin: .25rem 0 }
.note { color: var(--amber); font-size: .875rem; margin: .25rem 0 }
.what { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem 1.5rem; margin: 0 }
.what dt, .card dt, .tag, small { color: var(--soft); font-size: .75rem; font-weight: 400 }
.what dd { margin: 0; font-size: .9rem }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 1.25rem; overflow-x: auto; white-space: nowrap;
  background: var(--page); border-block: 1px solid var(--rule); padding: .6rem 0; margin-bottom: 1.5rem; font-size: .9rem }
a { color: var(--blue); text-decoration: none } a:hover { text-decoration: underline }
section { margin-top: 3.5rem }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem } .tables > * { min-width: min(100%, 26rem) }
.scroll { overflow-x: auto; margin: .75rem 0; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: min(100%, 26rem);
  border-block: 1.5px solid var(--text); overflow-wrap: normal }
caption { text-align: left; padding-bottom: .4rem }
th { font-weight: 600; text-align: left; border-bottom: 1px solid var(--text) }
th, td { padding: .28rem .7rem } th:first-child, td:first-child { padding-left: .1rem }
tbody tr + tr td { border-top: 1px solid var(--rule) } .n { text-align: right; white-space: nowrap }
@media (max-width: 30rem) { table { font-size: .82rem } th, td { padding: .28rem .35rem } }
summary { cursor: pointer }
.prompts { font-size: .9rem } .prompts ul { margin: .5rem 0; padding-left: 1.2rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); gap: 0 .75rem }
.cards.clips { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.card { display: grid; grid-row: span 3; grid-template-rows: subgrid; background: var(--raised); min-width: 0;
  border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; margin-bottom: .75rem }
.still { align-self: center } .frames { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; align-self: center }
.pic { position: relative; width: 100%; margin: 0 auto }
.pic img, .pic svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block }
.pic rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.pic .halo { stroke: #fff; stroke-width: 4.5; stroke-opacity: .85 } .pic .truth { stroke: #15933f } .pic .said { stroke: #1d4ed8 }
.missing { margin: 0; padding: .6rem; min-height: 7rem; background: var(--page); color: var(--soft); font-size: .8rem }
.tag { margin: .4rem .6rem 0 }
.card dl { margin: .2rem .6rem .4rem; font-size: .8125rem; line-height: 1.4 }
.card dt { float: left; margin: .1rem .4rem 0 0; line-height: 1.3 }
.card dd { margin: 0 0 .35rem; white-space: pre-line; unicode-bidi: isolate } .card .a { font-weight: 600 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem }
figure { margin: 1rem 0 0 } .plot { width: 100%; max-width: 27rem; font-size: 11px; display: block; margin-bottom: .3rem }
.plot text { fill: var(--soft); font-variant-numeric: tabular-nums } .plot tspan { fill: var(--text); font-weight: 600 }
.grid line { stroke: var(--rule) } .band { fill: var(--blue); opacity: .18 }
.line { fill: none; stroke: var(--blue); stroke-width: 1.6; stroke-linejoin: round }
pre { font: .78rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; white-space: pre-wrap; background: var(--raised);
  padding: .75rem; border-radius: 6px; margin: .25rem 0 }
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, with what evaluate.py wrote in its eval folder")
    parser.add_argument("--out", help="where to write the page (default: RUN/eval/report.html)")
    args = parser.parse_args(argv)
    print(f"written: {write_report(args.run, args.out)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"report.py: {error}")
