"""lmms-lab's parquet files: each benchmark reads what it reads from its own files, and finds the images inside."""

import io
import json
import sys

import pytest
from PIL import Image

from clip_vit import open_image
from coords import CoordFormat
from data import Wording
from formats.eval_folder import name_of
from formats.files import read_json
from formats.images import has_image, image_size
from formats.parquet import key_of, shards
from tasks import TASKS
from tasks.__main__ import main, parse

pa = pytest.importorskip("pyarrow", reason="parquet files need a package: pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
WORDING = Wording(CoordFormat("ivb", 224))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` packs one


def embed(colour, path=None, size=(40, 30)):
    """Pack an image of one colour, from 0 to 255."""
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": path}


def pack(path, rows, count=1):
    """Write rows as `count` shards of row groups of two; return the path of the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.Table.from_pylist(rows).schema
    if "image" in schema.names and not isinstance(rows[0]["image"], str):
        schema = schema.set(schema.get_field_index("image"), pa.field("image", IMAGE))
    for number in range(count):
        shard = path.with_name(f"{path.name}-{number:05d}-of-{count:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[number::count], schema), shard, row_group_size=2)
    return shard


def read(name, questions, *words):
    """Read a benchmark's questions as its command does."""
    args = parse([name, "none", "--questions", str(questions), *map(str, words)])
    return TASKS[name].read(args, WORDING)[0]


def facts(items):
    return [(item.id, item.image.name, item.size, item.question, item.truth) for item in items]


def colour(path):
    return open_image(path).getpixel((0, 0))[0]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


# ----- each benchmark


def pope_rows():
    """Of two images and three categories, which repeat the ids, the columns of lmms-lab/POPE."""
    return [{"id": str(6 * c + n), "question_id": str(n + 1), "question": f"Is there a {thing}?", "answer": answer,
             "image_source": f"COCO_val2014_{581857 + n // 2:012}", "image": embed(100 + n // 2), "category": category}
            for c, category in enumerate(("adversarial", "popular", "random"))
            for n, (thing, answer) in enumerate((("cup", "yes"), ("dog", "no"), ("cat", "yes"), ("car", "no")))]  # fmt: skip


def test_pope_is_asked_from_all_shards_with_the_images_inside(make_model, tmp_path):
    """The same questions as in POPE's own file; results are named by file and split, and every shard is hashed."""
    path = pack(tmp_path / "data/test", pope_rows(), 3)
    own = [{"question_id": int(row["question_id"]), "image": f"{row['image_source']}.jpg",
            "text": row["question"], "label": row["answer"]}
           for row in pope_rows()[:4]]  # fmt: skip
    items = read("pope", path, "--split", "popular")
    assert sorted(facts(items)) == facts(read("pope", write(tmp_path / "pope.json", own), "--images", tmp_path))
    assert {int(item.id) > 2: colour(item.image) for item in items} == {False: 100, True: 101}
    with pytest.raises(ValueError, match=r"has the splits adversarial \(4\), popular \(4\), random \(4\); choose one of them"):
        read("pope", path)
    with pytest.raises(ValueError, match="pope.json has no splits; leave out --split"):
        read("pope", tmp_path / "pope.json", "--images", tmp_path, "--split", "popular")
    make_model().save_pretrained(tmp_path / "run")
    main(["pope", str(tmp_path / "run"), "--questions", str(path), "--split", "random", "--max-new-tokens", "4"])
    result = read_json(tmp_path / "run/eval/pope-test-random.json")
    assert len(result["data_sha256"]) == 3 and result["questions"] == 4 and result["images"] == 2
    assert (tmp_path / "run/eval/pope-test-random.png").is_file()


def test_vqa_has_questions_annotations_and_images_in_one_file(tmp_path):
    answers = [{"answer": "cat", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    about = {"question_type": "what", "answer_type": "other"}
    rows = [{"question_id": 5 + n, "image_id": 42, "question": f"What {n}?", **about, "answers": answers} for n in range(3)]
    path = pack(tmp_path / "validation", [row | {"multiple_choice_answer": "cat", "image": embed(7)} for row in rows])
    items = read("vqa", path)
    write(tmp_path / "q.json", {"questions": rows, "data_subtype": "val2014"})
    write(tmp_path / "a.json", {"annotations": rows})
    assert facts(items) == facts(read("vqa", tmp_path / "q.json", "--answers", tmp_path / "a.json", "--images", tmp_path))
    assert {item.image.name for item in items} == {"COCO_val2014_000000000042.jpg"} and colour(items[0].image) == 7
    path = pack(tmp_path / "test", [row | {"answers": None, "image": embed(7)} for row in rows])
    assert "answers" not in read("vqa", path)[0].truth


def test_gqas_images_are_in_another_file(tmp_path):
    row = {"imageId": "n161313", "question": "Is it overcast?", "answer": "yes", "isBalanced": True, "fullAnswer": "Yes."}
    row["types"] = {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"}
    path = pack(tmp_path / "instructions/testdev", [{"id": "20130", **row}, {"id": "20131", **row}])
    images = pack(tmp_path / "images/testdev", [{"id": "n2", "image": embed(1)}, {"id": "n161313", "image": embed(2)}])
    items = read("gqa", path, "--images", images)
    assert facts(items) == facts(read("gqa", write(tmp_path / "gqa.json", {"20130": row, "20131": row}), "--images", tmp_path))
    assert colour(items[1].image) == 2
    with pytest.raises(ValueError, match="00000-of-00001.parquet holds no images; pass the folder, zip or parquet"):
        read("gqa", path)


def test_refs_have_boxes_and_sentences_once_and_share_images(tmp_path):
    """A file may hold a ref twice, of two releases; the number of the object ends each file name."""
    def row(question_id, answer, file_name, bbox=(1.5, 2.0, 10.0, 20.0)):
        return {"question_id": question_id, "image": embed(9), "question": "Please observe ...", "answer": answer,
                "segmentation": [1.0, 2.0], "bbox": list(bbox), "iscrowd": 0, "file_name": file_name}  # fmt: skip

    path = pack(tmp_path / "testB", [row("71", ["bowl", "bowl"], "COCO_train2014_000000580957_4.jpg"),
                                     row("1537681", ["dish"], "COCO_train2014_000000580957_12.jpg"),
                                     row("71", ["bowl", "left bowl"], "COCO_train2014_000000580957_4.jpg")])  # fmt: skip
    items = read("rec", path)
    sentences = [("71-0", "bowl"), ("71-1", "bowl"), ("71-2", "left bowl"), ("1537681-0", "dish")]
    assert [(item.id, item.truth["name"]) for item in items] == sentences
    assert items[0].truth["box_px"] == (1.5, 2, 11.5, 22) and items[0].size == (40, 30)
    assert {item.image.name for item in items} == {"COCO_train2014_000000580957.jpg"} and colour(items[0].image) == 9


@pytest.mark.parametrize("column", ["image_link", "path", None])
def test_vsrs_images_are_named_by_a_link_their_path_or_their_row(tmp_path, column):
    names = [f"{n:012}.jpg" for n in (1, 2, 3)]
    rows = [{"image": embed(n, name if column == "path" else None), "caption": "The cat is behind the car.", "label": n % 2,
             "relation": "behind"} | ({"image_link": f"http://images/val2017/{name}"} if column == "image_link" else {})
            for n, name in enumerate(names)]  # fmt: skip
    items = read("vsr", pack(tmp_path / "test", rows))
    assert [item.image.name for item in items] == (names if column else ["row-0.jpg", "row-1.jpg", "row-2.jpg"])
    assert [(colour(item.image), item.truth["label"]) for item in items] == [(0, "no"), (1, "yes"), (2, "no")]


# ----- files


def test_an_images_names_have_one_key_and_others_are_not_found(tmp_path):
    assert {key_of(name) for name in ("COCO_train2014_000000581857_16.jpg", "000000581857.jpg", "581857")} == {"581857"}
    assert key_of("n161313.jpg") == "n161313" and key_of("beach_12.jpg") == "beach_12"
    path = pack(tmp_path / "test", [{"file_name": "000000000042.jpg", "image": embed(7, size=(8, 6))}])
    assert has_image(path / "COCO_val2014_000000000042.jpg") and image_size(path / "000000000042.jpg") == (8, 6)
    assert not has_image(path / "43.jpg") and not has_image(path / "deep/000000000042.jpg")
    with pytest.raises(FileNotFoundError, match="no image file .*43.jpg"):
        open_image(path / "43.jpg")


def test_two_images_of_one_name_are_refused(tmp_path):
    """Of foldered images only the base names are packed. An image that several questions repeat is no such case."""
    same, other = ({"file_name": "1.png", "image": embed(colour)} for colour in (7, 9))
    assert has_image(pack(tmp_path / "same", [same] * 5) / "1.png")
    with pytest.raises(ValueError, match="two images are named 1"):
        has_image(pack(tmp_path / "other", [same, same, other]) / "1.png")


def test_what_is_wrong_with_a_file_is_said(tmp_path, monkeypatch):
    first = pack(tmp_path / "test", pope_rows(), 2)
    first.unlink()
    with pytest.raises(FileNotFoundError, match="lacks test-00001-of-00002.parquet of 2 shards; download the whole split"):
        read("pope", first.with_name("test-00000-of-00002.parquet"))
    for name in ("0000", "0002"):  # as the hub converts
        pq.write_table(pa.Table.from_pylist(pope_rows()), tmp_path / f"{name}.parquet")
    with pytest.raises(FileNotFoundError, match="lacks 0001.parquet of 3 shards"):
        read("pope", tmp_path / "0000.parquet")
    for number in (0, 1):  # as the hub named them in 2023
        name = f"old-{number:05d}-of-00002-{number}d1165eecfd8ca6a.parquet"
        pq.write_table(pa.Table.from_pylist(pope_rows()[number::2]), tmp_path / name)
    old = tmp_path / "old-00000-of-00002-0d1165eecfd8ca6a.parquet"
    assert len(shards(old)) == 2 and name_of("pope", old) == "pope-old"
    shards(old)[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks old-00001-of-00002.parquet of 2 shards"):
        shards(old)
    path = pack(tmp_path / "paths", [row | {"image": {"bytes": None, "path": "x.jpg"}} for row in pope_rows()])
    [item, *_] = read("pope", path, "--split", "random")
    with pytest.raises(ValueError, match="names COCO_val2014_000000581857.jpg, but does not hold it; pass the folder"):
        open_image(item.image)
    (tmp_path / "half.parquet").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="half.parquet cannot be read"):
        read("pope", tmp_path / "half.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="paths-00000-of-00001.parquet needs a package: pip install pyarrow"):
        read("pope", path)
