"""RefCOCO's refs as training rows: what a run reads of them."""

import json
import pickle

import pytest
from PIL import Image

from formats.annotations import read_records
from formats.files import read_json, write_json
from tools.refs import main


def test_refs_of_a_split_train_both_ways(tmp_path, capsys):
    """Every sentence about one box is asked for and told. Articles go, and what two boxes then share is dropped."""
    texts = {
        1: ["left zebra", "The  striped one.", "The animal"], 2: ["right zebra", "the striped one", "The zebra", "animal"],
        3: ["test zebra"], 4: ["gone"],
    }  # fmt: skip
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": 9, "split": "testB" if n == 3 else "train", "file_name": "wrong_1.jpg",
         "sentences": [{"sent_id": 10 * n + i, "sent": text} for i, text in enumerate(texts[n])]}
        for n in texts
    ]  # fmt: skip
    name, bboxes = "COCO_train2014_000000000009.jpg", {1: [0, 0, 9, 9], 2: [20, 0, 20.5, 9], 3: [5, 5, 5, 5], 4: [0, 0, 0, 9]}
    annotations = [{"id": n, "image_id": 9, "category_id": 1, "bbox": bbox} for n, bbox in bboxes.items()]
    images = [{"id": 9, "file_name": name, "width": 40, "height": 30}]
    write_json(tmp_path / "instances.json", {"images": images, "annotations": annotations, "categories": []})
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (tmp_path / "train2014").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "train2014" / name)
    main([str(tmp_path / "refs(unc).p"), str(out := tmp_path / "refs_train.json")])
    told = capsys.readouterr().out
    assert "1 refs where the box has no area" in told and "2 sentences about two objects of an image" in told
    rows = read_json(out)
    assert {row["objective"] for row in rows} == {"loc", "rev"} and all(len(row["conversations"]) == 6 for row in rows)
    assert "There is a left zebra." in json.dumps(rows) and "There is a the" not in json.dumps(rows)
    [record], skipped = read_records([(str(out), str(tmp_path / "train2014"), 1.0)])
    assert record.image.is_file() and record.size == (40, 30) and not skipped
    assert {(o.name, o.description, o.box_px) for o in record.objects} == {
        ("left zebra", "left zebra", (0, 0, 9, 9)), ("right zebra", "right zebra", (20, 0, 40, 9)),
        ("The zebra", "zebra", (20, 0, 40, 9)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no ref of split val, but train \(3\), testB \(1\)"):
        main([str(tmp_path / "refs(unc).p"), str(tmp_path / "x.json"), "--split", "val"])
