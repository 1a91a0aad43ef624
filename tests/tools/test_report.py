"""The page of an evaluation stands alone, shows what is there, and lets no answer do anything to it."""

import json
import math
import random
import re
import shutil
import subprocess

import pytest
from PIL import Image

from coords import CoordFormat
from data import OBJECTIVES, Object, Objective, Record, Wording, judge_named
from evaluate import TASKS, objective_items
from tools import report

HOSTILE = [
    '<script>alert(1)</script><img src="https://evil.example/x.png" onerror="alert(1)">',
    "</dd></dl></article></main>{style}{0}%s{{ name }}{% for %}{#",
    "x" * 1_000_000,
    "\u202eright to left \u0000\ud800 \U0001f600 é 左",
    "",
    None,
    ["not", "a text"],
]


def row(image, answer="Yes.", correct=True, **more):
    return {"id": "1", "image": image and str(image), "question": "Is it?", "answer": answer, "correct": correct} | more


def write(run, task, rows, folder="eval", **result):
    """Write a task's two files as evaluate.py does."""
    (run / folder).mkdir(parents=True, exist_ok=True)
    result = {"task": task, "metrics": {"accuracy": 0.5, "asked": 4}, "questions": len(rows), "images": 2} | result
    (run / folder / f"{task}.json").write_text(json.dumps(result))
    (run / folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def picture(tmp_path):
    """A picture whose left half is red and whose right half is white."""
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (0, 0, 32, 32))
    image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def run(tmp_path, picture):
    """A run with every task of `benchmarks`, one of nobody's, a blind baseline and a log."""
    run = tmp_path / "run"
    for task in (*TASKS, "zoo"):
        rows = [row(picture, correct=i % 2 == 0, id=f"{task}{i}", truth={"label": "yes"}) for i in range(20)]
        write(run, task, rows, paper={"accuracy": 88.3, "F1": 70} if task == "hal" else None, weights_sha256={"a": "f"})
    write(run, "hal", [], "eval_blind", metrics={"accuracy": 0.25}, questions=20, blind=True)
    (run / "eval/._hal.json").write_bytes(b"a Mac was here\0\xff")
    steps = [{"stage": s, "step": i, "loss": 4 / (i + 1), "lr": 1e-3} for s in (1, 2) for i in range(300)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    return run


def page_of(run):
    return report.write_report(run).read_text(encoding="utf-8")


def unfold(page):
    """What a browser could load or run: everything but the text between tags."""
    return " ".join(re.findall(r"<[^>]*>", page))


def test_the_page_loads_nothing_and_runs_nothing(run):
    page = page_of(run)
    tags = unfold(page)
    assert not re.search(r"https?:|<script|<link|<iframe|@import|url\(| on\w+=", page)
    assert all(value.startswith("data:image/") for value in re.findall(r'\bsrc="([^"]*)"', tags))
    assert all(value.startswith("#") for value in re.findall(r'\bhref="([^"]*)"', tags))
    assert "default-src 'none'" in tags and "script-src" not in tags


def test_every_task_stands_with_the_papers_figure_and_the_blind_one_beside_it(run):
    page = page_of(run)
    order = [page.index(f"<h2>{task}</h2>") for task in (*TASKS, "zoo")]
    assert order == sorted(order)
    assert re.search(
        r"<td>hal</td><td>accuracy</td><td class=n><b>50\.0 %</b></td><td class=n>25\.0 %</td><td class=n>88\.3 %</td>",
        page,
    )
    assert "<td>F1</td><td class=n><b>–</b></td><td class=n>–</td><td class=n>70.0 %</td>" in page
    assert page.count('<polyline class="line"') == 4  # loss and learning rate of two stages
    assert "Stage 2: 300 steps" in page and "nats per answer token" in page


def test_the_head_of_the_page_says_what_all_results_share(tmp_path, picture):
    write(tmp_path, "hal", [row(picture)], dtype="float32", seed=0, decoding={"temperature": 0.0})
    write(tmp_path, "pope", [row(picture)], dtype="float32", seed=7, decoding={"temperature": 0.9}, questions_sha256="a")
    write(tmp_path, "pope", [row(picture)], "eval_blind", dtype="float32", seed=7, questions_sha256="b")
    page = page_of(tmp_path)
    head = page[page.index("<header>") : page.index("</header>")]
    assert "float32" in head and head.count("differs, see Provenance") == 2 and "0.9" not in head
    assert "50.0 %*" in page, "the blind baseline answers other questions"


def test_the_papers_models_stand_below_where_none_is_of_the_same_input(tmp_path, picture):
    write(
        tmp_path,
        "pope",
        [row(picture)],
        paper=None,
        paper_rows=[["LLaVA, random", {"accuracy": 50.4}], ["<B>", {"F1": 88}]],
    )
    page = page_of(tmp_path)
    assert "<td>LLaVA, random</td><td class=n>50.4 %</td><td class=n>–</td>" in page
    assert "<td>&lt;B&gt;</td><td class=n>–</td><td class=n>88.0 %</td>" in page


def test_a_description_stands_beside_its_references(tmp_path, picture):
    truth = {"sentences": ["left cup", "the cup"], "box_px": [1, 2, 30, 20]}
    write(tmp_path, "refcoco", [row(picture, "There is a cup.", None, truth=truth)])
    assert "left cup / the cup at (1, 2, 30, 20) px" in page_of(tmp_path)


def test_the_truth_of_an_objective_is_its_object_not_the_models_text():
    """As evaluate.py writes it: "answer" is the expected text; of a pair it names the right one."""
    wording, rng = Wording(CoordFormat("ivb")), random.Random(0)
    pair = Objective("left", "pair", lambda pair, *_: ("Which?", f"The {pair[0].name}."), judge_named)
    record = Record("1", None, (64, 32), (Object("cup", (1, 2, 31, 22)), Object("dog", (30, 4, 50, 30))), ("cup", "dog"), ("car",))
    found = {}
    for objective in (*(OBJECTIVES[name] for name in ("loc", "neg", "rev")), pair):
        item = objective_items(objective, [record], wording, rng)[0]
        boxes_px = [item.truth["box_px"]] if "box_px" in item.truth else []
        found[objective.task] = report.truth_text(objective.task, item.truth, boxes_px)
    assert found.pop("left") in ("The cup.", "The dog.")
    assert found == {"locpred": "cup at (1, 2, 31, 22) px", "negpred": "no car", "revloc": "cup at (1, 2, 31, 22) px"}


def test_the_same_files_give_the_same_bytes_wherever_they_are_written(run, tmp_path):
    first = report.write_report(run).read_bytes()
    assert report.write_report(run).read_bytes() == first
    assert report.write_report(run, tmp_path / "else" / "page.html").read_bytes() == first


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, picture, text):
    """In answers, questions, truths, file names and task names; a megabyte is cut, with a note."""
    truth = {"answers": [text], "name": text, "box_px": [1, 2, 3, 4], "setting": text}
    write(
        tmp_path,
        "x<script>&",
        [row(picture, text, question=text, truth=truth), row(text, text, False)],
        prompts=[str(text)],
    )
    page = page_of(tmp_path)
    assert "<script" not in page and 'evil.example/x.png"' not in page and not re.search("onerror=&(quot|#34);", unfold(page))
    assert not re.search("[\x00-\x08\ud800-\udfff]", page)
    assert page.count("<article") == page.count("</article>") == 2 and page.count("</main>") == 1
    if text == "x" * 1_000_000:
        assert "1,000,000 characters" in page and len(page) < 100_000


@pytest.mark.parametrize(
    "boxes", [[[math.nan, 0, 1, 1]], [[0, 0, math.inf, 1]], [[1, 2]], [["a", 0, 1, 2]], 7, [[10**400, 0, 1, 1]], [None]]
)
def test_a_box_that_is_no_box_is_not_drawn(tmp_path, picture, boxes):
    write(
        tmp_path, "locpred", [row(picture, correct=False, boxes_px=boxes, truth={"box_px": [1, 2, 30, 20]}, measured={"iou": 0.0})]
    )
    page = page_of(tmp_path)
    assert page.count('<rect class="truth"') == 1 and '<rect class="said"' not in page


def test_boxes_lie_in_the_pixels_of_the_image(tmp_path, picture):
    write(
        tmp_path, "locpred", [row(picture, boxes_px=[[30, 20, 2, 4]], truth={"name": "cup", "box_px": [1, 2, 31, 22]})]
    )
    page = page_of(tmp_path)
    assert 'viewBox="0 0 64 32"' in page and '<rect class="truth" x="1" y="2" width="30" height="20"/>' in page
    assert '<rect class="said" x="2" y="4" width="28" height="16"/>' in page  # corners put in order
    assert "cup at (1, 2, 31, 22) px" in page


def test_a_gif_is_shown_as_what_was_asked_about(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.gif")
    for is_clip, count in ((False, 1), (True, report.FRAMES)):
        write(tmp_path, "hal", [row(tmp_path / "a.gif", is_clip=is_clip)])
        assert page_of(tmp_path).count("<img") == count


def test_a_mirrored_image_is_shown_mirrored(tmp_path, picture):
    write(tmp_path, "spatial", [row(picture, mirrored=True)])
    mirrored = report.data_uri(Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT), 10**6)
    assert mirrored in page_of(tmp_path) and mirrored != report.data_uri(Image.open(picture), 10**6)


def test_a_missing_image_is_a_card_that_says_so(tmp_path):
    write(tmp_path, "hal", [row(tmp_path / "gone.png"), row(None), row(tmp_path / "gone.mp4"), row("images.zip/1.jpg")])
    page = page_of(tmp_path)
    assert page.count("<article") == 4 and page.count("No picture:") == 3 and "gone.png" in page
    assert "Asked without an image." in page and "<img" not in page


def test_a_clip_is_some_of_its_frames_each_under_the_boxes(tmp_path, picture):
    (tmp_path / "clip").mkdir()
    for i in range(9):
        shutil.copy(picture, tmp_path / "clip" / f"{i}.png")
    write(tmp_path, "locpred", [row(tmp_path / "clip", truth={"box_px": [1, 2, 30, 20]})])
    page = page_of(tmp_path)
    assert page.count("<img") == page.count('<rect class="truth"') == report.FRAMES and "frame 4 of 4 shown" in page


def test_rows_of_before_measured_have_it_among_the_truth():
    rows = {"truth": {"iou": 0.3}}, {"measured": {"iou": 0.3}, "truth": {}}, {"measured": {"iou": 0.3}, "truth": None}
    assert {report.kind_of({"answer": "a", **row}) for row in rows} == {("", "IoU 0.300")}


def test_cards_are_spread_over_rows_and_kinds():
    """Of a hundred rows of one kind not the first ones; of several kinds, each."""
    chosen = report.choose([{"id": i, "answer": "a"} for i in range(100)])
    assert [r["id"] for r in chosen] == [8, 25, 41, 58, 75, 91]
    misses = [{"id": i, "answer": "a", "measured": {"iou": 0.3}, "boxes_px": [1]} for i in range(95)]
    misses += [{"id": 95, "answer": ""}, {"id": 96, "answer": "a", "measured": {"iou": 0.0}, "boxes_px": []}]
    chosen = report.choose(misses)
    assert len(chosen) == 6 and {95, 96} < {r["id"] for r in chosen} and len({r["id"] for r in chosen}) == 6
    assert [len(report.choose(misses[:n])) for n in range(8)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_scores_count_from_a_half_and_the_unjudged_stand_apart(tmp_path, picture):
    scores = [0.6, 0.3, None, math.nan, True]
    write(tmp_path, "vqa", [row(picture, correct=score) for score in scores])
    page = page_of(tmp_path)
    assert "Right <span>2 of 2" in page and "Wrong <span>1 of 1" in page and "Not judged <span>2 of 2" in page
    assert "score 0.60" in page


def test_what_is_absent_is_left_out_or_said_to_be(tmp_path, picture):
    """No log, no blind baseline, no paper, no answers (a half-written evaluation), figures that are none."""
    write(tmp_path, "pope", [], metrics={"F1": math.nan, "yes": None, "asked": 12_000}, questions=12_000)
    (tmp_path / "eval" / "pope.jsonl").unlink()
    (tmp_path / "eval" / "submission.json").write_text("[1, 2]")
    page = page_of(tmp_path)
    assert (
        "eval/pope.jsonl is absent or empty" in page
        and "log.jsonl is absent" in page
        and "nan" not in page.lower().split("</main>")[0].split("provenance")[0]
    )
    assert page.count("<td class=n><b>–</b></td>") == 3 and "submission" not in page


def test_half_a_line_is_counted_and_another_evaluations_baseline_is_named(tmp_path, picture):
    write(tmp_path, "hal", [row(picture)] * 3, weights_sha256={"a": "1"})
    with open(tmp_path / "eval" / "hal.jsonl", "a") as file:
        file.write('{"id": "4", "ans')
    write(tmp_path, "hal", [], "eval_blind", weights_sha256={"a": "2"}, questions=3)
    write(tmp_path, "negpred", [], "eval_blind")
    page = page_of(tmp_path)
    assert "not JSON objects, 1 of them" in page and "it differs in weights_sha256" in page
    assert "Only the blind baseline is there" in page


def test_nothing_to_show_and_broken_results_are_named_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results in .*run evaluate.py"):
        report.write_report(tmp_path)
    write(tmp_path, "hal", [])
    (tmp_path / "eval" / "hal.json").write_text('{"metrics": {')
    with pytest.raises(ValueError, match="hal.json is not JSON"):
        report.write_report(tmp_path)


def test_pictures_are_scaled_until_the_page_is_small(tmp_path):
    """Sixty cards of noise, which at full width would take more than three megabytes."""
    Image.effect_noise((500, 400), 90).convert("RGB").save(tmp_path / "noise.jpg")
    for n in range(5):
        write(tmp_path, f"task{n}", [row(tmp_path / "noise.jpg", correct=i % 2 == 0) for i in range(12)])
    assert report.write_report(tmp_path).stat().st_size < 3_000_000


def test_chromium_draws_it(run, tmp_path, chromium):
    """Headless Chromium writes a screenshot as wide as a phone, and not of one colour."""
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=390,2400"]
    command = [chromium, *options, f"--screenshot={shot}", report.write_report(run).resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with Image.open(shot) as image:
        assert image.width >= 390 and image.height > 2000 and len(image.convert("RGB").getcolors(1 << 24)) > 20
