"""Every published figure has a hand-counted case."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VISION, free_port
from PIL import Image

import data
import evaluate
from clip_vit import mean_colour
from coords import CoordFormat
from data import SIDE_ANSWERS, SIDE_PROMPTS, Object, Record, Wording, first_named, judge_loc, judge_neg
from evaluate import (
    MEASURES,
    TASKS,
    Item,
    hal_metrics,
    judge_hal,
    judge_spatial,
    spatial_items,
    spatial_metrics,
    spatial_triplets,
)
from formats import eval_folder, pictures
from formats.files import read_json, sha256, write_json
from formats.journal import open_journal
from tiny.moving import write_clips
from tiny.shapes import write_world

WORDING = Wording(CoordFormat("ivb", 224))
RECORD = Record("1", "x.png", (224, 224), (Object("cup", (0, 0, 100, 100)),), ("cup",), ("dog", "cat"))


def judged(judge, answer, **truth):
    item = Item("1", RECORD.image, RECORD.size, "?", truth, answer)
    judge(item, WORDING)
    return item


def test_locpred_counts_iou_of_the_first_box():
    """Half of the box is IoU 0.5, and counts; less, no box, or the right box too late does not."""
    box_px = (0, 0, 100, 100)
    assert judged(judge_loc, "It is located at (0, 0, 100, 50)", box_px=box_px).correct
    assert not judged(judge_loc, "It is located at (0, 0, 100, 49)", box_px=box_px).correct
    assert not judged(judge_loc, "There is no such object in the image", box_px=box_px).correct
    assert not judged(judge_loc, "(200, 200, 210, 210) or (0, 0, 100, 100)", box_px=box_px).correct
    items = [judged(judge_loc, text, box_px=box_px) for text in ("(0, 0, 100, 100)", "no", "(0, 0, 300, 50)")]
    metrics = evaluate.locpred_metrics(items)
    tight = [judged(judge_loc, f"(0, 0, 100, {y2})", box_px=box_px) for y2 in (75, 74)]
    assert evaluate.locpred_metrics(tight)["acc@0.75"] == 1 / 2 and metrics["acc@0.75"] == 1 / 3
    assert metrics["acc@0.5"] == 1 / 3 and metrics["no box"] == 1 / 3 and metrics["invalid box"] == 1 / 2
    assert metrics["mean IoU"] == pytest.approx((1 + 0 + 5000 / 20000) / 3)


def test_points_count_inside_the_true_box():
    item = Item("1", RECORD.image, RECORD.size, "?", {"box_px": (0, 0, 100, 100)}, "It is located at (50, 99)")
    judge_loc(item, Wording(CoordFormat("ivb", 224), location="point"))
    assert item.correct
    item.answer = "It is located at (0, 1)"
    judge_loc(item, Wording(CoordFormat("ivb", 224), location="point"))
    metrics = evaluate.locpred_metrics([item])
    assert metrics["acc@0.5"] == 1 and all(math.isnan(metrics[name]) for name in ("acc@0.75", "mean IoU", "invalid box"))
    for answer, right in (("(100, 100)", True), ("(101, 50)", False), ("(50, 101)", False), ("(101, 50) (50, 50)", False), ("no", False)):
        item.answer = answer
        judge_loc(item, Wording(CoordFormat("ivb", 224), location="point"))
        assert item.correct == right, answer


def test_negpred_wants_the_refusal():
    item = Item("1", RECORD.image, RECORD.size, "?", {"name": "dog"}, "It is located at (40, 52)")
    for location, gave in (("point", 1.0), ("box", 0.0)):
        judge_neg(item, Wording(CoordFormat("ivb", 224), location=location))
        assert evaluate.negpred_metrics([item]) == {"accuracy": 0.0, "gave a box": gave}, location
    assert judged(judge_neg, "There is no such object in the image", name="dog").correct
    assert not judged(judge_neg, "It is located at (4, 52, 13, 63)", name="dog").correct


def test_revloc_takes_the_first_and_longest_name():
    names = ["dog", "hot dog", "cat", "person"]
    assert first_named("There is a hot dog next to a cat", names) == "hot dog"
    assert first_named("A personal catalogue", names) is None
    assert first_named("", names) is None
    for text, name in (
        ("There are two boys.", "person"), ("a group of children", "person"), ("some kids", "person"), ("a man's tie", "tie"),
        ("There are knives.", "knife"), ("two mice", "mouse"), ("ripe cherries", "cherry"), ("toys", "toy"), ("a wolf", None),
        ("a person's tie", "tie"), ("the boys' tie", "tie"), ("She cares for a toy.", "toy"), ("two buses", "bus"),
    ):  # fmt: skip
        assert first_named(text, ["person", "tie", "knife", "mouse", "cherry", "toy", "car", "bus"]) == name


def test_spatial_keeps_the_papers_rule():
    """Three objects alone of their category, centres out of the central fifth, one on the other side than two."""

    def record(*centres):
        objects = tuple(Object(n, (c - 5, 10, c + 5, 20)) for n, c in zip("abcd", centres, strict=False))
        return Record("1", "x.png", (100, 100), objects, tuple("abcd"[: len(centres)]), ("z",))

    rng = random.Random(0)
    assert not list(spatial_triplets([record(10, 20, 30)], rng, 0)), "all on one side"
    assert not list(spatial_triplets([record(10, 80)], rng, 0)), "two objects are no triplet"
    assert not list(spatial_triplets([record(10, 50, 80)], rng, 0)), "one is in the middle"
    [(_, a, b, c, side)] = spatial_triplets([record(10, 70, 80)], rng, 0)
    assert (a.name, {b.name, c.name}, side) == ("a", {"b", "c"}, "left")
    [(_, a, b, c, side)] = spatial_triplets([record(10, 20, 80)], rng, 0)
    assert (a.name, side) == ("c", "right")
    assert not list(spatial_triplets([record(10, 70, 80)], rng, 1)), "all of one height"


def test_spatial_questions_read_as_in_the_paper():
    record = Record(
        "1",
        "x.png",
        (100, 100),
        (Object("dog", (0, 10, 10, 20)), Object("cat", (70, 10, 80, 20)), Object("cup", (80, 12, 90, 20))),
        ("dog",),
        (),
    )
    items = {item.truth["setting"]: item for item in spatial_items([record], WORDING, random.Random(0))}
    second = next(o.name for o in record.objects if o.box_px == items["left/right"].truth["boxes_px"][1])
    assert (
        items["left/right"].question == f"Which side of the dog is the {second} located?"
        and items["left/right"].truth["word"] == "right"
    )
    third = "cup" if second == "cat" else "cat"
    examples = {
        f"Q: Which side of the dog is the {second} located? A: The {second} is located to the right of the dog.",
        f"Q: Which side of the {second} is the dog located? A: The dog is located to the left of the {second}.",
    }
    assert all(example in items["icl left/right"].question for example in examples)
    assert (
        items["icl left/right"].question.endswith(f"Q: Which side of the {third} is the dog located?")
        and items["icl left/right"].truth["word"] == "left"
    )
    assert items["icl verbatim"].question == (
        f"Q: Which side of the dog is the {second} located? A: The dog is located to the left of the {second}. "
        f"Q: Which side of the {second} is the dog located? A: The {second} is located to the right of the dog. "
        f"Q: Which side of the {third} is the dog located?"
    )


def test_above_and_below_are_asked_as_the_paper_prints_it_too():
    """Each example answers the other's question; the draws of the other settings are as without it."""
    objects = tuple(Object(n, (40, y, 60, y + 10)) for n, y in (("dog", 0), ("cat", 85), ("cup", 88)))
    items = {i.truth["setting"]: i for i in spatial_items([Record("1", "x", (100, 100), objects)], WORDING, random.Random(0))}
    assert [*items] == ["above/below", "icl above/below", "icl verbatim above/below"]
    direct, right, verbatim = items.values()
    second, third = ("cat", "cup") if "cat" in direct.question else ("cup", "cat")
    questions = [SIDE_PROMPTS["above/below"].format(obj_1=f"the {a}", obj_2=f"the {b}")
                 for a, b in (("dog", second), (second, "dog"), (third, "dog"))]  # fmt: skip
    answers = [SIDE_ANSWERS["above"].format(obj_1=f"the {second}", obj_2="The dog"),
               SIDE_ANSWERS["below"].format(obj_1="the dog", obj_2=f"The {second}")]  # fmt: skip
    assert verbatim.question == " ".join(f"Q: {q} A: {a}" for q, a in zip(questions, answers, strict=False)) + f" Q: {questions[2]}"
    assert verbatim.truth["word"] == right.truth["word"] == "above"
    for item in items.values():
        item.answer = "below"
        judge_spatial(item, WORDING)
    metrics = spatial_metrics([*items.values()])
    assert metrics["icl verbatim above/below"] == 0 and metrics["icl verbatim above/below, as its examples answer"] == 1


def test_a_word_counts_where_it_is_said_and_strictly_where_only_it_is():
    items = [
        judged(judge_spatial, text, setting="left/right", word="left", has_whole_boxes=True)
        for text in ("To the left.", "left or right", "Right", "", "leftover")
    ]
    metrics = spatial_metrics(items)
    right = judged(judge_spatial, "right", setting="left/right", word="right", has_whole_boxes=True)
    both = spatial_metrics([*items, right])
    assert (both["left/right"], both["left/right, left"], both["left/right, macro"]) == (3 / 6, 2 / 5, (2 / 5 + 1) / 2)
    assert (
        metrics["left/right"] == 2 / 5
        and metrics["left/right, strict"] == 1 / 5
        and metrics["left/right, neither word"] == 2 / 5
        and metrics["left/right, questions"] == 5
    )


@pytest.mark.parametrize("present, absent, each", [(3, 4, 2), (1, 4, 1), (3, 1, 1), (3, 0, 0)])
def test_hal_asks_for_as_many_present_as_absent(present, absent, each):
    record = Record("1", "x", (9, 9), (), tuple("abc"[:present]), tuple("wxyz"[:absent]))
    items = evaluate.hal_items([record], WORDING, random.Random(0))
    assert [item.truth["label"] for item in items] == ["yes"] * each + ["no"] * each
    assert all((item.truth["name"] in record.present) == (item.truth["label"] == "yes") for item in items)


def test_hal_figures_come_from_one_confusion_matrix():
    """2 true yes, 1 false yes, 1 false no, 1 true no; an empty answer reads as yes (POPE)."""
    said = [("yes", "Yes."), ("yes", ""), ("yes", "No, there is no cup."), ("no", "Yes"), ("no", "There is not.")]
    items = [judged(judge_hal, answer, label=label) for label, answer in said]
    assert hal_metrics(items) == {
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "F1": 2 / 3,
        "says yes": 3 / 5,
    }
    nothing = [judged(judge_hal, "no", label="no")]
    assert hal_metrics(nothing)["precision"] == 0 and hal_metrics(nothing)["F1"] == 0


def test_real_photos_give_questions_for_every_task(real):
    """COCO-Spatial, Hal and localisation examples from real boxes; the counts are those of the sample."""
    from formats.annotations import read_file

    folder = real("coco-sample")
    records, skipped = read_file(folder / "annotations/instances_train2017.json", folder / "images")
    counts = {task: len(make(records, WORDING, random.Random(0))) for task, (make, *_) in MEASURES.items()}
    assert not skipped and len(records) == 178 and all(count > 50 for count in counts.values()), counts
    assert counts["locpred"] == counts["revloc"] == sum(len(r.objects) for r in records)


def result_of(folder, task, timed=True):
    """A result without what differs from one run to the next."""
    result = json.loads((folder / f"{task}.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not timed or result.pop("seconds") >= 0 and result.pop("questions_per_second") >= 0
    return {key: value for key, value in result.items() if key not in ("asked", "world_size")}


@pytest.mark.parametrize("blind", [False, True])
def test_a_run_is_evaluated_from_the_command_line(tmp_path, make_model, blind):
    """Every task writes its metrics with provenance, a row for each question, and pictures; the same again gives the same."""
    write_world(tmp_path / "world", {"val": 12})
    make_model().save_pretrained(tmp_path / "run")
    flags = [
        str(tmp_path / "run"),
        "--coco",
        str(tmp_path / "world/instances_val.json"),
        "--images",
        str(tmp_path / "world/images"),
        "--max-new-tokens",
        "3",
    ]
    evaluate.main(flags + ["--blind"] * blind)
    folder = tmp_path / "run" / ("eval_blind" if blind else "eval")
    first = {f"{task}-instances_val": result_of(folder, f"{task}-instances_val") for task in TASKS}
    for task, result in first.items():
        assert (
            result["metrics"]
            and result["weights_sha256"]
            and result["data_sha256"]
            and result["prompts"]
            and result["blind"] == blind
        )
        assert all(v is None or isinstance(v, int) or 0 <= v <= 1 for v in result["metrics"].values())
        assert len((folder / f"{task}.jsonl").read_text().splitlines()) == result["questions"]
        assert (folder / f"{task}.png").exists()
    evaluate.main(flags + ["--blind"] * blind)
    assert first == {task: result_of(folder, task) for task in first}


def test_blind_answers_are_about_blank_images(run, monkeypatch):
    seen, generate = [], evaluate.LocVLM.generate
    monkeypatch.setattr(evaluate.LocVLM, "generate", lambda model, images, *a, **k: seen.extend(images) or generate(model, images, *a, **k))
    evaluate.main([*run, "--blind"])
    assert seen and all(image.getcolors() == [(224 * 224, mean_colour(VISION))] for image in seen)


def test_an_evaluation_ends_in_its_page(run, page, capsys):
    evaluate.main(run)
    html = Path(run[0]) / "eval/report.html"
    assert html.is_file() and f"written: {html}" in capsys.readouterr().out


def test_an_image_has_the_same_questions_whatever_follows_it(run, tmp_path):
    """A run with --limit and the scoring of its first rows (tasks --score --limit) ask what the whole run asks."""
    records, _ = evaluate.read_file(run[4], run[6])
    for name, (make, *_) in MEASURES.items():
        few, many = ({i.id + i.image.name: i.question for i in make(records[:n], WORDING, random.Random(0))} for n in (4, None))
        assert few and len(few) < len(many) and few.items() <= many.items(), name


def test_images_that_give_no_question_are_an_error(run, tmp_path):
    words = [run[0], "--task", "spatial", *run[3:]]
    world = read_json(run[4])
    write_json(tmp_path / "bare.json", world | {"annotations": []})
    words[words.index("--coco") + 1] = str(tmp_path / "bare.json")
    with pytest.raises(ValueError, match="bare.json yields no question for spatial"):
        evaluate.main(words)


def test_successes_lie_above_failures(tmp_path):
    """One success and two failures: two rows of cards, not one."""
    Image.new("RGB", (20, 10)).save(tmp_path / "x.png")
    heights = []
    for right in ((True, False, False), (True, True, True)):
        items = [Item(str(n), tmp_path / "x.png", None, "?", {}, correct=good) for n, good in enumerate(right)]
        pictures.overlay(items, tmp_path / "sheet.png")
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[0] > 1.9 * heights[1]


def test_a_score_below_a_half_is_drawn_among_the_failures(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "x.png")
    marks = []
    monkeypatch.setattr(pictures, "card", lambda image, boxes, lines: marks.append(lines[0]) or image)
    scores = (0.3, True, 0.9, False, None)
    pictures.overlay(
        [Item(str(n), tmp_path / "x.png", None, "?", {}, correct=s) for n, s in enumerate(scores)], tmp_path / "s.png"
    )
    assert marks == ["right: ?", "right: ?", "wrong: ?", "wrong: ?", "?"]


def test_results_about_other_files_are_not_replaced(run, tmp_path, capsys):
    """Files of one name in two folders, as RefCOCO's and RefCOCO+'s; changed files of one path are the same file."""
    write_world(tmp_path / "else/world", {"val": 3}, seed=5)
    other = command(run[0], tmp_path / "else/world")
    evaluate.main(run)
    before = rows_of(run)
    with pytest.raises(ValueError, match="locpred-instances_val.json is about .*, not .*else.*--into FOLDER"):
        evaluate.main(other)
    assert rows_of(run) == before
    evaluate.main([*other, "--fresh"])
    assert rows_of(run) != before
    job = eval_folder.Job("refcoco", "refcoco-refs(unc)-testB", None, [], {}, [])
    write_json(tmp_path / f"{job.name}.json", {"data_sha256": {"refcoco/refs(unc).p": "1", "instances.json": "2"}})
    eval_folder.require_own(job, tmp_path, {"/data/refcoco/refs(unc).p": "1", "instances.json": "2"})
    with pytest.raises(ValueError, match="is about refcoco/refs"):  # though the answers are the same file
        eval_folder.require_own(job, tmp_path, {"refcoco+/refs(unc).p": "3", "instances.json": "2"})
    shutil.rmtree(tmp_path / "else")
    write_world(tmp_path / "else/world", {"val": 2}, seed=5)
    evaluate.main(other)


def test_a_question_of_ones_own_is_answered_and_drawn(tmp_path, make_model, capsys):
    write_world(tmp_path / "world", {"val": 1})
    make_model().save_pretrained(tmp_path / "run")
    image = next((tmp_path / "world/images").iterdir())
    evaluate.main(
        [
            str(tmp_path / "run"),
            "--ask",
            "What is at location (3, 3, 20, 20) in image?",
            "--image",
            str(image),
            "--max-new-tokens",
            "4",
        ]
    )
    assert "ask.png" in capsys.readouterr().out and (tmp_path / "run/eval/ask.png").exists()


def test_an_answer_streams_once_and_boxes_have_their_colours(tmp_path, make_model, monkeypatch, capsys):
    """The last character may be half of one: it waits. Boxes of the question are green, those of the answer blue."""
    def generate(images, questions, on_text):
        for text in ("It", "It is \N{REPLACEMENT CHARACTER}", "It is é (7, 7"):
            on_text(0, text)
        return [["It is é (7, 7, 14, 14)"]]

    model, out = make_model(), tmp_path / "out.png"
    monkeypatch.setattr(model, "generate", generate)
    Image.new("RGB", (56, 56), "grey").save(tmp_path / "in.png")
    evaluate.ask(model, tmp_path / "in.png", "(3, 3, 20, 20)?", out)
    assert capsys.readouterr().out == f"It is é (7, 7, 14, 14)\nwritten: {out}\n"
    drawn = Image.open(out)
    assert drawn.getpixel((49, 100)) == (0, 255, 0) and drawn.getpixel((113, 150)) == (0, 0, 255)


@pytest.mark.parametrize("frames, write, folder", [(0, write_world, "data/shapes"), (2, write_clips, "data/moving")])
def test_held_out_data_is_the_default(make_model, tmp_path, monkeypatch, frames, write, folder):
    monkeypatch.chdir(tmp_path)
    write(folder, {"val": 3})
    make_model(frames=frames).save_pretrained("run")
    evaluate.main(["run", "--task", "hal", "--max-new-tokens", "3"])
    assert next(iter(read_json("run/eval/hal.json")["data_sha256"])).startswith(folder)


# ----- asking: several processes, a kill, answers made elsewhere


@pytest.fixture
def run(make_model, tmp_path):
    """A run folder and a world of 12 images: the words of a command line that evaluates it on locpred."""
    write_world(tmp_path / "world", {"val": 12})
    make_model().save_pretrained(tmp_path / "run")
    return command(tmp_path / "run", tmp_path / "world")


def command(run, world, task="locpred"):
    data = ["--coco", str(world / "instances_val.json"), "--images", str(world / "images")]
    return [str(run), "--task", task, *data, "--max-new-tokens", "6", "--batch", "4"]


def copy_of(words, folder):
    """The same command for a copy of its run."""
    shutil.copytree(words[0], folder)
    return [str(folder), *words[1:]]


def start(words, **environment):
    """Start evaluate.py in a process of its own, whose sums are made in the same order as here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    return subprocess.Popen([sys.executable, ROOT / "evaluate.py", *words], env=environment, stdout=subprocess.PIPE)


def rows_of(words, task="locpred-instances_val", folder="eval"):
    return (Path(words[0]) / folder / f"{task}.jsonl").read_bytes()


def test_killed_and_resumed_on_two_processes_equals_one(run, tmp_path):
    """kill -9 after a batch, a torn line, then two processes: the rows of a run left alone, to the byte, and fewer asked."""
    evaluate.main(run)
    whole = result_of(Path(run[0]) / "eval", "locpred-instances_val")
    killed = copy_of(run, tmp_path / "killed")
    shutil.rmtree(Path(killed[0]) / "eval")
    process = start(killed)
    part = Path(killed[0]) / "eval/locpred-instances_val.parts/part-0.jsonl"
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline and not (part.exists() and part.read_bytes().count(b"\n")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert part.read_bytes().count(b"\n") >= 1 and not (Path(killed[0]) / "eval/locpred-instances_val.json").exists()
    with open(part, "ab") as file:
        file.write(b'["1", {"1')
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # what torchrun tells its processes
    processes = [start(killed, **two, RANK=str(rank)) for rank in (0, 1)]
    printed, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode == processes[1].wait(timeout=120) == 0
    assert rows_of(killed) == rows_of(run) and b"resuming" in printed
    again = json.loads((Path(killed[0]) / "eval/locpred-instances_val.json").read_text())
    assert again["world_size"] == 2 and 0 < again["asked"] < again["questions"] == whole["questions"]
    assert {**whole, "run": killed[0]} == result_of(Path(killed[0]) / "eval", "locpred-instances_val")
    assert not part.parent.exists()


def test_a_journal_of_other_options_is_begun_anew(run, capsys):
    parts = Path(run[0]) / "eval/locpred-instances_val.parts"
    write_json(parts / "options.json", {"decoding": {"seed": 7}})
    (parts / "part-3.jsonl").write_text('["none of ours", {"none of ours": "x"}]\n')
    evaluate.main(run)
    assert "begun with other" in capsys.readouterr().out and not parts.exists()


def ten():
    return [Item(str(i), Path(f"{i // 3}.png"), None, "?" * (i + 1), {}) for i in range(10)]


def test_batches_keep_a_picture_together_and_do_not_depend_on_order():
    items = ten()
    cut = [[item.id for item in batch] for batch in eval_folder.batches(items, 4)]
    assert cut == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8", "9"]]
    assert cut == [[item.id for item in batch] for batch in eval_folder.batches(items[::-1], 4)]
    small = [[item.id for item in batch] for batch in eval_folder.batches(items, 2)]
    assert max(map(len, small)) == 2 and sorted(sum(small, [])) == [str(i) for i in range(10)], "a picture is cut"


def test_answers_are_joined_by_id_and_what_is_wrong_is_named(tmp_path, monkeypatch):
    """Journals of two processes; then an id that is missing, doubled or unknown."""
    options, alone = {"seed": 0}, (0, 1, lambda: None)
    parts = tmp_path / "t.parts"

    def asker():
        return list, lambda batch: {item.id: item.id + "!" for item in batch}

    items = ten()
    assert eval_folder.answer_all(items, 3, asker, parts, options, alone)[0] == 10
    assert [item.answer for item in items] == [f"{i}!" for i in range(10)]
    assert eval_folder.answer_all(ten(), 3, None, parts, options, alone)[0] == 0, "all is there: the model is not wanted"
    rows = (parts / "part-0.jsonl").read_text().splitlines(keepends=True)
    (parts / "part-1.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match=r"3 ids occur twice \(0, 1, 2\)"):
        eval_folder.answer_all(ten(), 3, asker, parts, options, alone)
    (parts / "part-1.jsonl").write_text('["else", {"else": ""}]\n')
    with pytest.raises(ValueError, match=r"1 ids belong to no question \(else\)"):
        eval_folder.answer_all(ten(), 3, asker, parts, options, alone)
    with pytest.raises(ValueError, match=r"10 ids are missing \(0, 1, 2, 3, 4 and 5 more\)"):
        eval_folder.join(ten(), [], "x")
    assert eval_folder.answer_all(ten(), 3, asker, parts, options, alone, fresh=True)[0] == 10
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with open_journal(parts / "part-0.jsonl"), pytest.raises(ValueError, match="written by another run"):
        eval_folder.answer_all(ten(), 3, asker, parts, {"seed": 1}, alone)


def test_sampled_answers_do_not_depend_on_the_batch(run, tmp_path):
    sampled = [*run, "--temperature", "0.9", "--seed", "3"]
    other = copy_of(sampled, tmp_path / "other")
    evaluate.main(sampled)
    evaluate.main([*other, "--batch", "7"])
    assert rows_of(sampled) == rows_of(other)
    evaluate.main([*other, "--batch", "7", "--seed", "4"])
    assert rows_of(sampled) != rows_of(other)


def test_answers_that_had_to_stop_are_counted(run, capsys, monkeypatch):
    """Of a model with random weights all are, at 6 tokens; and answers begun about other pictures are not kept."""
    answer_all, options = eval_folder.answer_all, []
    monkeypatch.setattr(eval_folder, "answer_all", lambda *how: options.append(how[4]) or answer_all(*how))
    evaluate.main(run)
    cut = result_of(Path(run[0]) / "eval", "locpred-instances_val")["cut"]
    assert cut and f"  cut: at least {cut} answers, at --max-new-tokens 6\n" in capsys.readouterr().out
    picture = next(Path(run[run.index("--images") + 1]).glob("*.png"))
    content = picture.read_bytes()
    picture.write_bytes(content + b"\0")
    evaluate.main([*run, "--fresh"])
    picture.write_bytes(content)
    assert options[1]["image_bytes"] == options[0]["image_bytes"] + 1


def test_a_result_says_what_it_was_made_of(run, tmp_path, make_model):
    """What the loader reads is hashed and nothing else; the images trained on are counted where the run says which."""
    folder, world = Path(run[0]), Path(run[4]).parent
    (folder / "pytorch_model.bin").write_text("the loader prefers the other")
    notes = {"data": str(world / "instances_val.json"), "images": str(world / "images"), "stages": "2"}
    notes |= {"exclude": "", "init_from": ""}
    config = read_json(folder / "config.json")
    evaluate.main([*run, "--limit", "5"])
    assert result_of(folder / "eval", "locpred-instances_val")["contamination"] == "unknown"
    write_json(folder / "config.json", {**config, "locvlm": {**config["locvlm"], "trained_with": notes}})
    evaluate.main([*run, "--limit", "5"])
    result = result_of(folder / "eval", "locpred-instances_val")
    assert result["contamination"] == {"images": 5, "of": 5, "files": [notes["data"]]}
    assert result["weights_sha256"] == {n: sha256(folder / n) for n in ("config.json", "model.safetensors")}
    assert result["data_sha256"] == {notes["data"]: sha256(notes["data"])} and result["images"] == 5
    assert result["template"] == "v1" and result["geometry"] == "squash" and result["kind"] == "ivb"
    assert result["decoding"] == {"max_new_tokens": 6, "temperature": 0.0, "seed": 0} and result["dtype"] == "float32"
    assert {"torch", "device", "git_commit", "split", "location", "batch", "paper", "skipped"} <= result.keys()
    (tmp_path / "ids.txt").write_text("COCO_val2014_000000000009.jpg\n")
    evaluate.main([*run, "--limit", "5", "--trained-on", str(tmp_path / "ids.txt")])
    assert result_of(folder / "eval", "locpred-instances_val")["contamination"]["images"] == 0
    write_json(
        folder / "config.json", {**config, "locvlm": {**config["locvlm"], "trained_with": {**notes, "data": "gone"}}}
    )
    evaluate.main([*run, "--limit", "5"])
    assert result_of(folder / "eval", "locpred-instances_val")["contamination"] == "unknown"


def test_images_that_were_not_trained_on_are_known_while_their_list_is(run, tmp_path):
    notes = {"data": run[4], "stages": "2", "images": run[6], "init_from": ""}
    config = read_json(Path(run[0]) / "config.json")
    (tmp_path / "ids.txt").write_text("000001000001.jpg\n")
    for exclude, known in (("", 12), (str(tmp_path / "ids.txt"), 11), (str(tmp_path / "gone.txt"), None)):
        ours = {**config["locvlm"], "trained_with": {**notes, "exclude": exclude}}
        write_json(Path(run[0]) / "config.json", {**config, "locvlm": ours})
        seen = eval_folder.trained_on(run[0])
        assert known == (seen and len(seen[1])), exclude
    ours = {**config["locvlm"], "trained_with": {**notes, "exclude": "", "init_from": str(tmp_path / "moved")}}
    write_json(Path(run[0]) / "config.json", {**config, "locvlm": ours})
    assert eval_folder.trained_on(run[0]) is None, "the run that it started from is gone"


def test_the_blind_baseline_and_the_paper_stand_beside_ours(run, capsys):
    words = [word if word != "locpred" else "hal" for word in run]
    evaluate.main([*words, "--with-blind"])
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "ours" in line).split() == ["ours", "blind", "paper"]
    accuracy = next(line for line in lines if line.startswith("  accuracy")).split()
    ours, blind = (result_of(Path(words[0]) / folder, "hal-instances_val") for folder in ("eval", "eval_blind"))
    assert accuracy == ["accuracy", f"{100 * ours['metrics']['accuracy']:.1f}", "%"] + [
        f"{100 * blind['metrics']['accuracy']:.1f}", "%", "88.3", "%",
    ]  # fmt: skip
    assert blind["blind"] and not ours["blind"]
    evaluate.main([*words, "--limit", "3", "--into", str(Path(words[0]) / "three")])
    assert result_of(Path(words[0]) / "three", "hal-instances_val")["images"] == 3
    assert result_of(Path(words[0]) / "eval", "hal-instances_val") == ours
    assert "two evaluations" not in capsys.readouterr().out
    evaluate.main([*words, "--max-new-tokens", "1"])
    assert "ours and blind are of two evaluations; they differ in decoding" in capsys.readouterr().out
    evaluate.main([*words, "--limit", "3"])
    assert " blind " not in capsys.readouterr().out, "of other questions"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "gqa-like"], "invalid choice"),
        (["--images", "x"], "--images needs --coco"),
        (["--coco", "x"], "--coco needs --images"),
        (["--blind", "--with-blind"], "not allowed with"),
        (["--ask", "Where?"], "--ask needs --image"),
        (["--batch", "0"], "--batch below 1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--ask", "Where?", "--image", "x", "--blind", "--task", "hal"], "leave out --blind, --task"),
        (["--out", "x"], "--out is the picture that --ask draws"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["no run is read", *words])
    assert message in capsys.readouterr().err


def test_missing_images_are_reported_before_the_weights_are_read(run, monkeypatch):
    made = evaluate.LocVLM.from_pretrained
    only_shapes = lambda folder, vision, device: made(folder, vision, device=device)  # noqa: E731
    monkeypatch.setattr(evaluate.LocVLM, "from_pretrained", only_shapes)
    sorted((Path(run[4]).parent / "images").iterdir())[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 8 images of .* are not in .* \(000001000001.png\)"):
        evaluate.main(run)


def test_a_model_is_asked_as_it_was_trained(run, make_model, tmp_path):
    """The saved config holds location and words; options override them."""
    make_model(location="point", words="description").save_pretrained(tmp_path / "points")
    words = [str(tmp_path / "points"), *run[1:]]
    evaluate.main(words)
    result = result_of(tmp_path / "points/eval", "locpred-instances_val")
    rows = [json.loads(line) for line in rows_of(words).splitlines()]
    assert result["location"] == "point" and result["words"] == "description"
    assert all("(cx,cy) point" in row["question"] for row in rows)
    assert any(row["truth"]["name"] + " that is" in row["question"] for row in rows)
    evaluate.main([*words, "--location", "box", "--words", "name", "--fresh"])
    rows = [json.loads(line) for line in rows_of(words).splitlines()]
    assert all("bbox" in row["question"] and "that is" not in row["question"] for row in rows)


def test_an_objective_of_your_own_becomes_a_task(monkeypatch):
    """One entry in data.OBJECTIVES: training draws it, evaluation asks and judges it."""

    def ask(pair, record, wording, rng):
        small, large = sorted(pair, key=lambda o: o.box_px[2] - o.box_px[0])
        return f"Which is narrower, the {pair[0].name} or the {pair[1].name}?", f"The {small.name}."

    entry = data.Objective("narrower", "pair", ask, data.judge_named)
    monkeypatch.setitem(data.OBJECTIVES, "width", entry)
    objects = (Object("cup", (0, 0, 20, 20)), Object("dog", (100, 0, 140, 40)))
    record = Record("1", "x.png", (224, 224), objects, ("cup", "dog"), ("car",))
    wording = Wording(CoordFormat("ivb"), objectives=("width", "loc"))
    drawn = data.draw_questions(record, wording, random.Random(0))
    assert sorted(name for name, *_ in drawn) == ["loc", "loc", "width"]
    [item] = evaluate.objective_items(entry, [record], wording, random.Random(0))
    assert "narrower" in item.question and item.truth["answer"] == "The cup."
    for answer, is_right in (("the cup", True), ("The dog.", False)):
        item.answer = answer
        entry.judge(item, wording)
        assert item.correct == is_right
    item.answer, item.truth["answer"] = "Hm.", "The first one."  # neither names an object: nothing to agree about
    entry.judge(item, wording)
    assert item.correct is False
