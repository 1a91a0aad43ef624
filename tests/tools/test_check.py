"""Each problem of annotations and images is named before training."""

import json
import re

import pytest
from conftest import LLAVA, LOCALIZE
from PIL import Image

from formats.annotations import read_file
from formats.files import write_json
from tools import check as check_command
from tools import show
from tools.check import check


def test_check_names_each_problem(coco):
    """Missing, truncated and resized images, bad boxes, unknown ids, a path that leaves the folder."""
    instances = json.loads((coco / "instances.json").read_text())
    Image.effect_noise((90, 90), 90).convert("RGB").save(coco / "3.jpg")
    (coco / "3.jpg").write_bytes((coco / "3.jpg").read_bytes()[:800])
    instances["images"] += [
        {"id": 20, "file_name": "3.jpg", "width": 90, "height": 90},
        {"id": 21, "file_name": "gone.jpg", "width": 9, "height": 9},
        {"id": 22, "file_name": "../x.jpg", "width": 9, "height": 9},
        {"id": 23, "file_name": "1.png", "width": 80, "height": 100},
    ]
    instances["annotations"] += [
        {"id": 7, "image_id": 7, "category_id": 5, "bbox": [1, 1, 2, 2]},
        {"id": 8, "image_id": 99, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 9, "image_id": 7, "category_id": 1, "bbox": [1, float("nan"), 2, 2]},
    ]
    (coco / "instances.json").write_text(json.dumps(instances))
    problems = check(coco / "instances.json", coco)
    for words in (
        "annotation 5",
        "annotation 6",
        "annotation 7: no category 5",
        "annotation 8: no image 99",
        "annotation 9",
        "3.jpg cannot be read",
        "gone.jpg",
        "../x.jpg leaves",
        "image 23",
    ):
        assert any(words in problem for problem in problems), words
    assert len([problem for problem in problems if not problem.startswith("note")]) == 9


def test_check_finds_real_photos_clean(real):
    folder = real("coco-sample")
    assert check(folder / "annotations/instances_train2017.json", folder / "images") == []


def test_check_compares_every_size_that_rows_state(tmp_path):
    """A row without a size does not hide the wrong size of the next row about the same image."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    talk = {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]}
    for first, words in (({}, "is 64 x 48, but the annotations say 48 x 64"), ({"size": [64, 48]}, "has two sizes")):
        write_json(tmp_path / "rows.json", [{**talk, "id": "1", **first}, {**talk, "id": "2", "size": [48, 64]}])
        [problem] = check(tmp_path / "rows.json", tmp_path)
        assert "a.png" in problem and words in problem


def test_the_exit_status_of_check_says_whether_there_are_problems(coco, capsys):
    (coco / "llava.json").write_text(json.dumps(LLAVA))
    for arguments, status in (("--coco {0}/instances.json", 1), ("--data {0}/llava.json,{0}/llava.json@{0}", 0)):
        with pytest.raises(SystemExit) as end:
            check_command.main([*arguments.format(coco).split(), "--images", str(coco)])
        assert end.value.code == status
    printed = capsys.readouterr().out
    assert "instances.json: 2 lines of problems" in printed and printed.count("llava.json: no lines of problems") == 2


def test_check_names_what_training_would_refuse_or_misread(tmp_path):
    """No annotations at all; corners in the place of width and height, inside the image all the same."""
    Image.new("RGB", (400, 400)).save(tmp_path / "1.png")
    images, categories = [{"id": 1, "file_name": "1.png", "width": 400, "height": 400}], [{"id": 1, "name": "cat"}]
    boxes = [[10 * i, 20 * i, 10 * i + 30, 20 * i + 40] for i in range(1, 7)]
    annotations = [{"id": i, "image_id": 1, "category_id": 1, "bbox": bbox} for i, bbox in enumerate(boxes)]
    for rows, problem in (([], "^nothing to train on"), (annotations, "^note: in all 6, .* is bbox x, y, width, height, not x1")):
        write_json(tmp_path / "x.json", {"images": images, "annotations": rows, "categories": categories})
        assert any(re.search(problem, text) for text in check(tmp_path / "x.json", tmp_path))
    for row, bbox in zip(annotations, ([100, 9, 20, 30], [300, 9, 20, 30]), strict=False):
        row["bbox"] = bbox
    write_json(tmp_path / "x.json", {"images": images, "annotations": annotations, "categories": categories})
    assert not any("bbox x, y" in text for text in check(tmp_path / "x.json", tmp_path))
    write_json(tmp_path / "x.json", {"images": images, "annotations": annotations})
    assert "it holds the keys images, annotations; is it" in check(tmp_path / "x.json", tmp_path)[0]


def test_show_prints_what_carries_loss_and_what_is_skipped(coco, capsys):
    (coco / "localize.json").write_text(json.dumps(LOCALIZE))
    options = ["--images", str(coco), "--words", "description", "--side", "28", "--number", "9"]
    show.main(["--data", f"{coco}/instances.json,{coco}/localize.json", *options])
    printed = capsys.readouterr().out
    assert "1.png  100 x 80 px -> (3, 28, 28)" in printed and "<image x 4>" in printed
    show.main(["--data", f"{coco}/instances.json", *options, "--objectives", "rev"])
    assert "It is located" in printed and "It is located" not in capsys.readouterr().out
    assert "«There is a cat that is grey.</s>»" in printed and "skipped: 1 boxes where bbox has no area" in printed


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "human and gpt in turn"),
        ({"image": 7}, "not a text"),
        ({"image": "../1.png"}, "leaves its folder"),
        ({"image": None}, 'no "image" key'),
        ({"objective": "loc", "names": ["cat"], "box_px": [[0, 0, 5, 5]], "descriptions": [None]}, "lacks its size"),
        (LOCALIZE[0] | {"box_px": [[0, 0, 5, 500]]}, "inside its image"),
        ({"objective": "loc", "names": ["cat"], "box_px": [[0, float("nan"), 5, 5]], "size": [9, 9]}, "lacks its size"),
        (LOCALIZE[0] | {"box_px": [[0, float("nan"), 5, 5]]}, "inside its image"),
        (LOCALIZE[0] | {"box_px": ["10.5 20 40.5 60"]}, "inside its image"),
        (LOCALIZE[0] | {"size": [9]}, "lacks its size"),
        (LOCALIZE[0] | {"descriptions": None}, "of one length"),
        (LOCALIZE[0] | {"names": None}, "of one length"),
        (LOCALIZE[0] | {"names": [7]}, "not a text"),
        (LOCALIZE[0] | {"objective": ["loc"]}, "not a text"),
        (LOCALIZE[1] | {"names": None}, "lacks its size"),
        ({"objective": "caption", "size": [9, 9], "box_px": [0, 0, 5, 5], "name": "cat"}, "not a text"),
    ],
)
def test_a_bad_row_is_named_by_check_and_skipped_and_counted(coco, damage, words):
    (coco / "x.json").write_text(json.dumps([*LLAVA, {**LLAVA[0], **damage}]))
    (problem,) = check(coco / "x.json", coco)
    assert problem.startswith("row 2: ") and words in problem
    records, skipped = read_file(coco / "x.json", coco)
    assert len(records) == 2 and skipped.total() == 1 and words in next(iter(skipped))


def test_an_error_about_a_file_of_notes_is_no_note(tmp_path, capsys):
    (tmp_path / "notes.json").write_text("[{")
    with pytest.raises(SystemExit) as stopped:
        check_command.check_all(str(tmp_path / "notes.json"), str(tmp_path))
    assert stopped.value.code == 1 and "1 lines of problems" in capsys.readouterr().out


def test_a_row_about_a_missing_clip_among_images_is_named(coco):
    clip = {"id": "v", "video": "v.mp4", "conversations": LLAVA[0]["conversations"]}
    (coco / "x.json").write_text(json.dumps([LLAVA[0], clip]))
    (problem,) = check(coco / "x.json", coco)
    records, skipped = read_file(coco / "x.json", coco)
    assert "1 clips of" in problem and "(v.mp4)" in problem and len(records) == skipped.total() == 1


def test_captions_are_checked_and_what_is_wrong_with_them_counted(coco):
    images = [
        {"id": i, "file_name": name, "width": 100, "height": 80}
        for i, name in enumerate(("1.png", "../1.png", "3.png"))
    ]
    said = [(0, "A cat."), (0, None), (0, " "), (1, "A cat."), (2, "A dog."), (9, "Nothing.")]
    captions = {"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in said]}
    (coco / "captions.json").write_text(json.dumps(captions))
    records, skipped = read_file(coco / "captions.json", coco)
    assert [record.captions for record in records] == [("A cat.",), ("A dog.",)]
    assert {reason.partition(" (")[0]: count for reason, count in skipped.items()} == {
        "captions that are not text": 2,
        "captions of unknown images": 1,
        "images whose path leaves their folder": 1,
    }
    problems = check(coco / "captions.json", coco)
    assert len(problems) == 2 + 3 and any("leaves" in problem for problem in problems), problems
