"""Every published figure has a hand-counted case."""

import json
import random

import pytest

import benchmarks
import evaluate
from benchmarks import (
    TASKS,
    Item,
    first_named,
    hal_metrics,
    judge_hal,
    judge_locpred,
    judge_negpred,
    judge_spatial,
    spatial_items,
    spatial_metrics,
    spatial_triplets,
)
from coords import CoordFormat
from data import Object, Record, Wording
from shapes import write_world

WORDING = Wording(CoordFormat("ivb", 224))
RECORD = Record("1", "x.png", (224, 224), (Object("cup", (0, 0, 100, 100)),), ("cup",), ("dog", "cat"))


def judged(judge, answer, **truth):
    item = Item("1", RECORD.image, RECORD.size, "?", truth, answer)
    judge(item, WORDING)
    return item


def test_locpred_counts_iou_of_the_first_box():
    """Half of the box is IoU 0.5, and counts; less, no box, or the right box too late does not."""
    box_px = (0, 0, 100, 100)
    assert judged(judge_locpred, "It is located at (0, 0, 100, 50)", box_px=box_px).correct
    assert not judged(judge_locpred, "It is located at (0, 0, 100, 49)", box_px=box_px).correct
    assert not judged(judge_locpred, "There is no such object in the image", box_px=box_px).correct
    assert not judged(judge_locpred, "(200, 200, 210, 210) or (0, 0, 100, 100)", box_px=box_px).correct
    items = [judged(judge_locpred, text, box_px=box_px) for text in ("(0, 0, 100, 100)", "no", "(0, 0, 300, 50)")]
    metrics = benchmarks.locpred_metrics(items)
    assert metrics["acc@0.5"] == 1 / 3 and metrics["no box"] == 1 / 3 and metrics["box outside image"] == 1 / 2
    assert metrics["mean IoU"] == pytest.approx((1 + 0 + 5000 / 20000) / 3)


def test_points_count_inside_the_true_box():
    item = Item("1", RECORD.image, RECORD.size, "?", {"box_px": (0, 0, 100, 100)}, "It is located at (50, 99)")
    judge_locpred(item, Wording(CoordFormat("ivb", 224), location="point"))
    assert item.correct


def test_negpred_wants_the_refusal():
    assert judged(judge_negpred, "There is no such object in the image", name="dog").correct
    assert not judged(judge_negpred, "It is located at (4, 52, 13, 63)", name="dog").correct


def test_revloc_takes_the_first_and_longest_name():
    names = ["dog", "hot dog", "cat", "person"]
    assert first_named("There is a hot dog next to a cat", names) == "hot dog"
    assert first_named("A personal catalogue", names) is None
    assert first_named("", names) is None


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
    second = next(o.name for o in record.objects if o.box_px == items["across"].truth["boxes_px"][1])
    assert (
        items["across"].question == f"Which side of the dog is the {second} located?"
        and items["across"].truth["word"] == "right"
    )
    third = "cup" if second == "cat" else "cat"
    examples = {
        f"Q: Which side of the dog is the {second} located? A: The {second} is located to the right of the dog.",
        f"Q: Which side of the {second} is the dog located? A: The dog is located to the left of the {second}.",
    }
    assert all(example in items["icl across"].question for example in examples)
    assert (
        items["icl across"].question.endswith(f"Q: Which side of the {third} is the dog located?")
        and items["icl across"].truth["word"] == "left"
    )
    assert items["icl verbatim"].question == (
        f"Q: Which side of the dog is the {second} located? A: The dog is located to the left of the {second}. "
        f"Q: Which side of the {second} is the dog located? A: The {second} is located to the right of the dog. "
        f"Q: Which side of the {third} is the dog located?"
    )


def test_a_word_counts_where_it_is_said_and_strictly_where_only_it_is():
    items = [
        judged(judge_spatial, text, setting="across", word="left")
        for text in ("To the left.", "left or right", "Right", "", "leftover")
    ]
    metrics = spatial_metrics(items)
    assert (
        metrics["across"] == 2 / 5
        and metrics["across strict"] == 1 / 5
        and metrics["across neither word"] == 2 / 5
        and metrics["across questions"] == 5
    )


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
    from data import read_coco

    folder = real("coco-sample")
    records, left_out = read_coco(folder / "annotations/instances_train2017.json", folder / "images")
    counts = {task: len(asked.items(records, WORDING, random.Random(0))) for task, asked in TASKS.items()}
    assert not left_out and len(records) == 178 and all(count > 50 for count in counts.values()), counts
    assert counts["locpred"] == counts["revloc"] == sum(len(r.objects) for r in records)


def result_of(folder, task):
    """A result without what differs from one run to the next."""
    result = json.loads((folder / f"{task}.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert result.pop("seconds") >= 0 and result.pop("questions_per_second", None) != 0
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
    first = {task: result_of(folder, task) for task in TASKS}
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
    assert first == {task: result_of(folder, task) for task in TASKS}


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
