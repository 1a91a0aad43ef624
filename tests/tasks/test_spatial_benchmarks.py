"""VSR and What's Up: read from their own files, asked, chosen by likelihood, counted by group, pair and set."""

import json
import math
from itertools import product

import pytest
from benchmark_helpers import answered, options, read, touch, write
from PIL import Image

from formats.files import read_json
from tasks import TASKS
from tasks.__main__ import main
from tasks.vsr import GROUP_OF, ask
from tasks.whats_up import PROMPT, likeliest

# ----- VSR


def caption(text, label, relation, **more):
    return {"image": "000000000001.jpg", "caption": text, "label": label, "relation": relation} | more


def vsr(folder, *rows):
    touch(folder, "val2017/000000000001.jpg", "train2017/000000000002.jpg")
    return read("vsr", write(folder / "test.jsonl", rows, lines=True), None, folder)[0]


@pytest.mark.parametrize("split, count, right", [("random", 2195, 1181), ("zeroshot", 1222, 629)])
def test_vsrs_real_files_are_asked_as_questions_of_the_seven_groups(real, split, count, right):
    items, skipped = TASKS["vsr"].read(options(real(f"formats/vsr/{split}_test.jsonl"), None, ""), None)
    assert len({item.id for item in items}) == count and not skipped
    assert all(item.question.startswith(("Is the ", "Is it true that the ")) and item.question.endswith("?") for item in items)
    assert all(item.truth["group"] == GROUP_OF[item.truth["relation"]] for item in items)
    metrics = answered("vsr", items, *["Yes."] * count)
    assert metrics["accuracy"] == metrics["captions that are right"] == right / count and metrics["accuracy, balanced"] == 0.5
    assert len([name for name in metrics if name.startswith("group ")]) == 7 and metrics["says yes"] == 1
    assert dict(TASKS["vsr"].paper)["people"] == {"accuracy": 95.4} and dict(TASKS["vsr"].paper)["chance"] == {"accuracy": 50.0}


def test_a_caption_becomes_a_question():
    assert ask("The potted plant is at the right side of the bench.") == "Is the potted plant at the right side of the bench?"
    assert ask("The bed has as a part the couch.") == "Is it true that the bed has as a part the couch?"


def test_vsr_is_counted_by_relation_and_group_and_images_lie_in_two_folders(tmp_path):
    link = "http://images.cocodataset.org/val2017/000000000001.jpg"
    rows = [caption("The cat is behind the car.", 1, "behind", image_link=link),
            caption("The cat is in the car.", 0, "in", image_link=link),
            caption("The car contains the cat.", 1, "contains", image="000000000002.jpg")]  # fmt: skip
    items = vsr(tmp_path, *rows, caption("The cat is amid cars.", 1, "amid", image_link=link))
    assert items[1].image == tmp_path / "val2017/000000000001.jpg" and items[2].image == tmp_path / "train2017/000000000002.jpg"
    metrics = answered("vsr", items, "Yes", "Yes", "Yes", "No, it is not.")
    assert metrics["group projective"] == 1 and metrics["group topological"] == 0.5 and metrics["relation in"] == 0
    assert metrics["accuracy"] == 0.5 and metrics["accuracy, balanced"] == 1 / 3 and metrics["group none of the seven"] == 0
    for row, message in ((caption("A cat.", 2, "in"), "label 2, neither 0 nor 1"), ({"caption": "x"}, "should be VSR's")):
        with pytest.raises(ValueError, match=message):
            vsr(tmp_path, row)


# ----- What's Up

WORDS = {"left_of": "to the left of", "right_of": "to the right of", "on": "on", "under": "under"}


def controlled(folder, *objects):
    """Write A's file, four photos of each pair of objects, and return it."""
    rows = []
    for (one, two), name in product(objects, WORDS):
        touch(folder, f"photos/{one}_{name}_{two}.jpeg")
        captions = [f"A {one} {words} a {two}" for words in (WORDS[name], *(WORDS[other] for other in WORDS if other != name))]
        rows.append({"image_path": f"data/photos/{one}_{name}_{two}.jpeg", "caption_options": captions})
    return write(folder / "controlled_images_dataset.json", rows)


def test_captions_are_chosen_and_counted_by_preposition_pair_and_set(tmp_path):
    """Of two sets, one photo is wrong: 7 of 8 rows, 3 of 4 pairs, 1 of 2 sets; per token all choose "on"."""
    items, _ = read("whats-up", controlled(tmp_path, ("mug", "table"), ("beer-bottle", "chair")), None, tmp_path / "photos")
    assert items[0].question.split("\n")[:2] == [PROMPT, "A mug to the left of a table"] and len(items) == 16
    answers = [item.truth["caption"] if item.truth["by"] == "likelihood" else item.question.split("\n")[-2] for item in items]
    answers[0] = items[0].question.split("\n")[2]
    metrics = answered("whats-up", items, *answers)
    assert metrics["likelihood"] == 7 / 8 and metrics["likelihood, pairs"] == 3 / 4 and metrics["likelihood, sets"] == 1 / 2
    assert metrics["likelihood, left"] == 1 / 2 and metrics["likelihood, under"] == 1 and metrics["chance"] == 1 / 4
    assert metrics["rows"] == 8 and metrics["per token, sets"] == 0
    metrics = TASKS["whats-up"].metrics(items[:6])
    assert "likelihood, sets" not in metrics and metrics["likelihood, pairs"] == 0


def test_a_likelihood_that_is_no_number_chooses_nothing(tmp_path):
    """The right caption comes first, and max would take it."""
    items, _ = read("whats-up", controlled(tmp_path, ("mug", "table")), None, tmp_path / "photos")
    log_p = dict.fromkeys(items[0].question.split("\n")[1:], [-1.0, math.nan])
    with pytest.raises(ValueError, match=f"question {items[0].id}: a caption's log-likelihood is not a number"):
        likeliest(items[0], log_p)


def test_captions_of_coco_are_asked_as_yes_and_no(tmp_path):
    """A row is right if the right caption is affirmed and the other is not."""
    touch(tmp_path, "val2017/000000000139.jpg")
    rows = [[139, "A photo of a dog above a cat", "A photo of a dog below a cat"],
            ["139", "A photo of a bench on the left", "A photo of a bench on the right"]]  # fmt: skip
    path = write(tmp_path / "coco_qa_two_obj.json", rows)
    items, _ = read("whats-up-asked", path, None, tmp_path)
    assert items[1].question == "Is there a dog below a cat in the image?"
    assert items[2].question == "Is there a bench on the left in the image?"
    metrics = answered("whats-up-asked", items, "Yes", "No.", "Yes", "Yes")
    assert metrics["yes and no"] == 0.5 and metrics["yes and no, above"] == 1 and metrics["yes and no, left"] == 0
    assert metrics["chance"] == 0.25 and metrics["questions to answer no"] == 0.5 and metrics["says yes"] == 0.75
    assert "yes and no, pairs" not in metrics
    for wrong in ([[139, "A dog", "A dog"]], [[139, "A"]], [{"image_path": "x"}], [5], ["x"], {"a": 1}, [], [[None, "a", "b"]]):
        with pytest.raises(ValueError, match="It should be What's Up's"):
            read("whats-up", write(path, wrong), None, tmp_path)


def test_the_command_chooses_the_caption_with_the_highest_likelihood(make_model, tmp_path, monkeypatch):
    """Each item's answer is the caption of the least loss, in sum and per token; an image is read once for all of them."""
    model, path = make_model(), controlled(tmp_path, ("red", "circle"))
    model.save_pretrained(tmp_path / "run")
    for number, photo in enumerate(sorted((tmp_path / "photos").iterdir())):
        Image.new("RGB", (30, 20), (60 * number, 0, 99)).save(photo, "PNG")
    main(["whats-up", str(tmp_path / "run"), "--questions", str(path), "--images", str(tmp_path / "photos"), "--batch", "3"])
    result = tmp_path / "run/eval/whats-up-controlled_images_dataset.json"
    rows = [json.loads(line) for line in result.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        captions = row["question"].split("\n")[1:]
        [scored] = model.log_likelihood([row["image"]], [[(PROMPT, caption) for caption in captions]])
        scores = [sum(log_p) / (1 if row["truth"]["by"] == "likelihood" else len(log_p)) for log_p in scored]
        assert row["answer"] == captions[scores.index(max(scores))] and row["correct"] == (row["answer"] == captions[0])
    metrics = read_json(result)["metrics"]
    assert metrics["rows"] == 4 and {"likelihood, sets", "per token, pairs"} <= metrics.keys()
