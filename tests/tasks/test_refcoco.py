"""RefCOCO's files in four forms, its boxes in original pixels, METEOR."""

import json
import math
import pickle
import shutil

import pytest
from benchmark_helpers import LONG, answered, options, picture, read, write

from coords import CoordFormat, iou
from data import Wording, judge_loc
from evaluate import Item
from tasks import TASKS, refcoco, words
from tasks.refcoco import read_pickle, read_split


def refs_pickle(folder, protocol=2, **changes):
    """RefCOCO's files in little: two refs of one image, in two splits."""

    def sentences(*texts):
        return [{"sent_id": 10 * len(texts) + n, "sent": text, "tokens": text.split()} for n, text in enumerate(texts)]

    base = {"image_id": 9, "file_name": "COCO_train2014_000000000009_1.jpg", "category_id": 1}
    refs = [
        base | {"ref_id": 5, "ann_id": 1, "split": "testB", "sentences": sentences("left zebra", "zebra caf\xe9")},
        base | {"ref_id": 6, "ann_id": 2, "split": "train", "sentences": sentences("right zebra")} | changes,
    ]
    instances = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 448, "height": 224}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "bbox": [0, 0, 224, 112]},
            {"id": 2, "image_id": 9, "category_id": 1, "bbox": [224, 0, 224.001, 224]},
        ],
        "categories": [],
    }
    write(folder / "instances.json", instances)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    picture(folder / "images/train2014/COCO_train2014_000000000009.jpg", (448, 224))
    return folder / "refs(unc).p", folder / "images"


@pytest.fixture
def no_meteor(monkeypatch):
    monkeypatch.setattr(refcoco, "require_meteor", lambda: None)


def test_refs_are_read_from_the_pickle_and_from_json(tmp_path, no_meteor):
    path, images = refs_pickle(tmp_path)
    [item], skipped = read("refcoco", path, None, images, split="testB")
    assert item.id == "5" and item.size == (448, 224) and item.truth["box_px"] == (0, 0, 224, 112) and not skipped
    assert "(0, 0, 112, 112)" in item.question and item.truth["sentences"] == ["left zebra", "zebra caf\xe9"]
    write(tmp_path / "refs.json", {"refs": read_pickle(path)})
    path.unlink()
    for name in ("refcoco", "rec"):
        again, _ = read(name, tmp_path / "refs.json", None, images, split="testB")
        assert name == "rec" or vars(again[0]) == vars(item)
    assert [i.truth["name"] for i in again] == ["left zebra", "zebra caf\xe9"] and len({i.id for i in again}) == 2
    metrics = answered("rec", again, "It is located at (0, 0, 112, 112)", "It is located at (nan, 0, 112, 112)")
    assert metrics["acc@0.5"] == 0.5 and metrics["no box"] == 0.5
    with pytest.raises(ValueError, match=r"has the splits testB \(1\), train \(1\)"):
        read("rec", tmp_path / "refs.json", None, images)


def test_rec_counts_in_original_pixels(tmp_path):
    """Half of the true box in an image of 448 x 224, as the model's square of 224 x 224 writes it."""
    path, images = refs_pickle(tmp_path)
    [item], _ = read("rec", path, None, images, split="train")
    assert item.truth["box_px"] == (224, 0, 448, 224)
    for text, right in (("(112, 0, 168, 224)", True), ("(112, 0, 167, 224)", False), ("", False), (LONG, False)):
        assert answered("rec", [item], text)["acc@0.5"] == right


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path, images = refs_pickle(tmp_path, protocol, category_id=Evil())
        with pytest.raises(ValueError, match="could run any code, so it is not run"):
            read("rec", path, None, images, split="train")
    assert "run" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        read("rec", path, None, images, split="train")
    path, images = refs_pickle(tmp_path, ann_id=77)
    with pytest.raises(ValueError, match="annotation 77"):
        read("rec", path, None, images, split="train")


def test_boxes_that_are_none_are_skipped_and_counted(tmp_path):
    path, images = refs_pickle(tmp_path)
    instances = json.loads((tmp_path / "instances.json").read_text())
    for bbox, why in (([math.nan, 0, 9, 9], "finite"), ([440, 0, 99, 9], "over the edge"), ([0, 0, 0, 9], "no area")):
        instances["annotations"][0]["bbox"] = bbox
        write(tmp_path / "instances.json", instances)
        _, skipped = read_split(options(path, None, images, split="testB"))
        [(reason, count)] = skipped.items()
        assert why in reason and count == 1
        with pytest.raises(ValueError, match="yields no question"):
            read("rec", path, None, images, split="testB")


def test_other_forms_of_refcoco_are_read(tmp_path, no_meteor):
    picture(tmp_path / "a.jpg", (100, 80))
    shikra = [{"img_path": "a.jpg", "expression": text, "bbox": [10, 20, 50, 60]} for text in ("the cup", "red cup")]
    mdetr = {
        "images": [
            {"id": n, "file_name": "a.jpg", "width": 100, "height": 80, "caption": t} for n, t in enumerate("xy")
        ],
        "annotations": [{"id": n, "image_id": n, "bbox": [10, 20, 40, 40 - n]} for n in range(2)],
    }
    for content, lines, count in ((shikra, True, 1), (mdetr, False, 2)):
        path = write(tmp_path / "refs.json", content, lines)
        items, _ = read("refcoco", path, None, tmp_path)
        assert len(items) == count and items[0].truth["box_px"] == (10, 20, 50, 60) and items[0].size == (100, 80)
        assert len(read("rec", path, None, tmp_path)[0]) == 2
    own = {
        "ref_id": "1",
        "file_name": "a.jpg",
        "bbox": [10, 20, 40, 40],
        "sentences": [[7, "cup"]],
    }  # by hand: no split
    for content, lines in (({"refs": [own]}, False), (shikra[:1], True)):
        [item], _ = read("rec", write(path, content, lines), None, tmp_path)
        assert item.size == (100, 80) and item.truth["box_px"] == (10, 20, 50, 60) and isinstance(item.id, str)
    odd = [shikra[0] | {"bbox": [1, 2, 3]}], mdetr | {"images": [mdetr["images"][0] | {"width": None}]}
    odd += {"refs": [own | {"sentences": ["cup"]}]}, {"refs": [own | {"size": [9]}]}, {"refs": [own | {"split": []}]}
    for content in ([{"a": 1}], {"images": [{}], "annotations": []}, {"refs": [{"ref_id": "1"}]}, [1], [[]], *odd):
        with pytest.raises(ValueError, match="is this another file"):
            read("rec", write(tmp_path / "bad.json", content), None, tmp_path)


def test_real_samples_of_refcoco(real, tmp_path):
    """MAttNet's detections: sentences and true boxes are read, its best boxes judged. Descriptions are written as theirs."""
    rows = json.loads(real("formats/refcoco/testA_refcoco_unc_dets.json").read_text())
    refs = [{"ref_id": f"{n}", "file_name": f"{row['pred_boxes_img_id'][0][15:27]}.jpg", "bbox": row["gt_box"],
             "sentences": [(n, row["sent"])]} for n, row in enumerate(rows)]  # fmt: skip
    path = write(tmp_path / "refs.json", {"refs": refs})
    for number in {row["pred_boxes_img_id"][0][15:27] for row in rows}:
        picture(tmp_path / f"{number}.jpg", (640, 640))
    items, skipped = read("rec", path, None, tmp_path)
    assert len(rows) == len(items) == 50 and not skipped
    x, y, w, h = rows[0]["gt_box"]
    assert items[0].truth["box_px"] == (x, y, x + w, y + h) and items[0].truth["name"] == rows[0]["sent"]
    corners = lambda bbox: (bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3])  # noqa: E731
    fmt, right = CoordFormat("nfp", 224), 0
    for item, row in zip(items, rows, strict=True):
        found_px = max(map(corners, row["pred_boxes"]), key=lambda box_px: iou(box_px, item.truth["box_px"]))
        item.answer = fmt.encode_box(found_px, item.size)
        judge_loc(item, Wording(fmt))
        right += iou(found_px, corners(row["gt_box"])) >= 0.5
    assert TASKS["rec"].metrics(items)["acc@0.5"] == right / 50 and right == 45
    for name in ("testA", "testB"):
        sample = real(f"formats/refcoco/sample_expressions_{name}.json")
        with pytest.raises(ValueError, match="'annotations'.*is this another file"):
            read("rec", sample, None, tmp_path)
    [theirs, *_] = json.loads(sample.read_text())["predictions"]
    [ours] = TASKS["refcoco"].submission([Item("25", None, None, "?", {}, "car on left")])["predictions"]
    assert ours == theirs


def test_meteors_absence_is_named_before_anything_is_asked(tmp_path, monkeypatch):
    path, images = refs_pickle(tmp_path)
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="METEOR.*: pip install pycocoevalcap, and install Java 1.8"):
        read("refcoco", path, None, images, split="testB")


def test_meteor_is_pycocoevalcaps(no_meteor):
    """Two refs against Meteor itself, tokens made by hand; odd white space, empty answers and ||| shift nothing."""
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pip install pycocoevalcap to compare METEOR")
    if not shutil.which("java"):
        pytest.skip("no java: METEOR 1.5 needs it")
    told = {"1": ["Man in black.", "guy, black shirt"], "2": ["left zebra"], "3": ["the donut"]}
    said = {
        "3": "There is a donut\r\nthat is on \u2028 the\x85left ||| side",
        "1": "the man in a black shirt!",
        "2": "",
    }
    tokens = {"1": ["man in black", "guy black shirt"], "2": ["left zebra"], "3": ["the donut"]}
    spoken = {"1": ["the man in a black shirt"], "2": [""], "3": ["there is a donut that is on the left side"]}
    expected, each = meteor.Meteor().compute_score(tokens, spoken)
    assert expected > 0.2 and each[1] == 0
    items = [Item(name, None, None, "?", {"sentences": told[name]}) for name in told]
    metrics = answered("refcoco", items, *[said[name] for name in told])
    assert metrics["METEOR 1.5"] == pytest.approx(expected) and metrics["empty answers"] == 1
    assert metrics['METEOR 1.5 without "There is a"'] > expected and metrics["sentences"] == 4
    assert items[0].correct is None
    curly = [Item("1", None, None, "?", {"sentences": ["the man’s café shirt"]})]  # officially, references lose such letters
    assert answered("refcoco", curly, "the mans caf shirt")["METEOR 1.5"] == 1
    assert answered("refcoco", items, "", "\ud83d", "")["METEOR 1.5"] == 0, "half of a character, as a file may hold it"
