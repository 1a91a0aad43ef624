"""Files as other tools write them, from public bug reports: read right, or refused by file, row and key."""

import gzip
import json
import re
import zipfile
from unicodedata import normalize

import numpy as np
import pytest
import torch
from conftest import LLAVA
from PIL import Image

import train
from clip_vit import CLIPVisionConfig, open_image
from coords import CoordFormat
from data import Examples, Wording, draw_questions
from formats.annotations import image_ids, parse_sources, read_file, read_records, unreadable
from formats.clips import find_clips
from formats.images import image_problem, is_clip, names_in
from formats.schema import HARMLESS, read_box
from model import LocVLMConfig
from tasks.files import read_rows
from tools.check import check
from tools.report import read_lines
from video import read_frames

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cup"}]
IMAGES = [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}, {"id": 2, "file_name": "b.png", "width": 64, "height": 64}]
BOXES = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 40]},
         {"id": 2, "image_id": 2, "category_id": 2, "bbox": [5, 5, 20, 20]}]  # fmt: skip


@pytest.fixture
def instances(tmp_path):
    """Return write(name, images=..., annotations=..., categories=...): the path of a COCO file beside its images."""
    for image in IMAGES:
        Image.new("RGB", (image["width"], image["height"]), "grey").save(tmp_path / image["file_name"])

    def write(name="x.json", images=IMAGES, annotations=BOXES, categories=CATEGORIES, **more):
        content = {"images": images, "annotations": annotations, "categories": categories, **more}
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return write


def read(path):
    """Read a file: ({image name: {object: box_px}}, {image name: absent names}, reasons)."""
    records, skipped = read_records([(path, path.parent, 1.0)])
    objects = {r.image.name: {o.name: o.box_px for o in r.objects} for r in records}
    return objects, {r.image.name: set(r.absent) for r in records}, " ".join(skipped)


def changed(row, **changes):
    return {**row, **changes}


def is_clean(path):
    return not [problem for problem in check(path, path.parent) if not problem.startswith("note")]


# ----- A: wrong in silence


def test_a_parent_category_without_boxes_is_never_absent(instances):
    """Roboflow's first category is the parent of the others. One that is annotated, or COCO's person of person, stays."""
    parent = [{"id": 0, "name": "animals", "supercategory": "none"}]
    children = [changed(row, supercategory="animals") for row in CATEGORIES]
    path = instances(categories=parent + children)
    _, absent, reasons = read(path)
    assert absent == {"a.png": {"dog", "cup"}, "b.png": {"cat", "cup"}} and "parent of others" in reasons and is_clean(path)
    used = instances(categories=parent + children, annotations=[*BOXES, changed(BOXES[0], category_id=0)])
    assert read(used)[1]["b.png"] == {"animals", "cat", "cup"}
    by_float = instances(categories=parent + children, annotations=[*BOXES, changed(BOXES[0], category_id=0.0)])
    assert read(by_float)[1]["b.png"] == {"animals", "cat", "cup"}
    person = instances(categories=[*CATEGORIES, {"id": 4, "name": "person", "supercategory": "person"}])
    assert "person" in read(person)[1]["a.png"]


@pytest.mark.parametrize("turn", range(2, 9))
def test_a_turned_photo_is_named_with_its_orientation(instances, tmp_path, turn):
    """Annotated upright, stored turned: refused by train, evaluate and check; where sizes agree, check notes it."""
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (100, 80)).save(tmp_path / "turned.jpg", exif=exif)
    rows = [changed(IMAGES[0], file_name="turned.jpg", width=80, height=100)]
    path = instances(images=rows, annotations=[changed(BOXES[0], bbox=[10, 10, 20, 20])])
    (problem,) = unreadable(read_records([(path, tmp_path, 1.0)])[0]).values()
    assert problem == check(path, tmp_path)[0].removeprefix("image 1: ")
    assert "is 100 x 80, but the annotations say 80 x 100" in problem and f"EXIF orientation is {turn}" in problem
    same = instances(images=[changed(rows[0], width=100, height=80)], annotations=BOXES[:1])
    assert [f"EXIF orientation {turn}" in line and line.startswith("note") for line in check(same, tmp_path)] == [True]
    assert not unreadable(read_records([(same, tmp_path, 1.0)])[0])


def test_two_images_under_one_id_are_refused(instances):
    """Merged files number their images from 1 each."""
    path = instances(images=[*IMAGES, changed(IMAGES[1], id=1)])
    with pytest.raises(ValueError, match="image 1 is two files, a.png and b.png"):
        read_file(path, path.parent)
    assert "two files" in check(path, path.parent)[0]
    with pytest.raises(ValueError, match="category 1 is cat and cow"):
        read(instances(categories=[*CATEGORIES, {"id": 1, "name": "cow"}]))


@pytest.mark.parametrize("as_other", (str, float))
def test_ids_are_compared_as_text(instances, as_other):
    rows = [changed(a, image_id=as_other(a["image_id"]), category_id=as_other(a["category_id"])) for a in BOXES]
    assert read(instances(annotations=rows))[:2] == read(instances())[:2] and is_clean(instances(annotations=rows))


def test_where_annotations_are_lost_nothing_they_may_say_is_absent(instances):
    """Of an unknown image: its category nowhere. Of an unknown category: nothing in its image. All lost: an error."""
    _, absent, reasons = read(instances(annotations=[*BOXES, changed(BOXES[0], image_id=9, category_id=3)]))
    assert absent == {"a.png": {"dog"}, "b.png": {"cat"}} and "unknown images" in reasons
    _, absent, _ = read(instances(annotations=[*BOXES, changed(BOXES[0], category_id=9)]))
    assert absent == {"a.png": set(), "b.png": {"cat", "cup"}}
    _, absent, _ = read(instances(annotations=[*BOXES, changed(BOXES[0], image_id=9, category_id=9)]))
    assert absent == {"a.png": set(), "b.png": set()}
    lost = instances(annotations=[changed(a, image_id=f"x{a['image_id']}") for a in BOXES])
    with pytest.raises(ValueError, match="none of its annotations belongs to its images.*annotation 1: no image x1"):
        read_file(lost, lost.parent)


def test_numbers_written_as_text_are_numbers(instances):
    rows = [changed(BOXES[0], bbox=["10", 10, "30.0", 40], iscrowd="0"), changed(BOXES[1], iscrowd=None)]
    images = [changed(IMAGES[0], width="100"), IMAGES[1]]
    path = instances(images=images, annotations=rows)
    assert read(path)[0] == {"a.png": {"cat": (10, 10, 40, 50)}, "b.png": {"dog": (5, 5, 25, 25)}} and is_clean(path)


@pytest.mark.parametrize(
    "change, words",
    [({"bbox": ["ten", 1, 2, 3]}, "annotation 1: bbox .*is not four finite numbers"), ({"iscrowd": "no"}, "annotation 1: iscrowd"),
     ({"bbox": {"x": 1}}, "is not four"), ({"bbox": [1, 2, 3, True]}, "is not four"), ({"bbox": [[1], 2, 3, 4]}, "is not four")],
)  # fmt: skip
def test_other_text_is_refused_by_annotation_and_key(instances, change, words):
    """The box is not asked for, and its category is not absent."""
    path = instances(annotations=[changed(BOXES[0], **change), BOXES[1]])
    objects, absent, reasons = read(path)
    assert objects["a.png"] == {} and "cat" not in absent["a.png"] and not reasons.startswith(HARMLESS)
    with pytest.raises(AssertionError if is_clean(path) else ValueError, match=words):
        raise ValueError("\n".join(check(path, path.parent)))


def test_a_box_a_little_outside_is_cut_and_counted():
    """Up to 2 px on any side; real exports round."""
    assert read_box([-1.5, -2, 30, 40], (100, 80)) == (0, 0, 28.5, 38)
    assert read_box([80, 50, 22, 31.3], (100, 80)) == (80, 50, 100, 80)
    for bbox in ([-2.1, 0, 30, 40], [0, -3, 30, 40], [80, 50, 22.5, 20], [80, 50, 20, 33]):
        with pytest.raises(ValueError, match="reaches more than 2 px over the edge"):
            read_box(bbox, (100, 80))


def test_cut_boxes_train_and_are_counted(instances):
    path = instances(annotations=[changed(BOXES[0], bbox=[-0.5, 0, 101, 80]), BOXES[1]])
    objects, _, reasons = read(path)
    assert objects["a.png"] == {"cat": (0, 0, 100, 80)} and reasons.startswith("parts of boxes") and is_clean(path)


def test_boxes_in_fractions_are_refused_by_name(instances):
    path = instances(annotations=[changed(a, bbox=[0.1, 0.2, 0.5, 0.5]) for a in BOXES])
    objects, _, reasons = read(path)
    assert objects == {"a.png": {}, "b.png": {}} and "looks like fractions" in reasons
    assert all("looks like fractions" in problem for problem in check(path, path.parent))


def examples(path, tokenizer, **wording):
    records, _ = read_records([(path, path.parent, 1.0)])
    vision = CLIPVisionConfig(image_size=28)
    return Examples(records, tokenizer, LocVLMConfig(vision), Wording(CoordFormat("ivb", 28), **wording), skip_bad=True)


def test_a_stage_of_boxes_without_one_box_is_an_error(instances, tokenizer):
    """Else it would learn "There is no such object in the image" alone."""
    path = instances(annotations=[changed(a, bbox=[0.1, 0.2, 0.5, 0.5]) for a in BOXES])
    with pytest.raises(ValueError, match="no box to ask for in 2 images"):
        examples(path, tokenizer)
    examples(path, tokenizer, objectives=("neg",))


def test_an_object_is_alone_only_if_every_source_says_so(instances):
    """One file or entry has one cat, another two; or one cat each, in different places."""
    one, two = instances("one.json"), [*BOXES, changed(BOXES[0], bbox=[60, 10, 30, 40])]
    sources = [(path, one.parent, 1.0) for path in (one, instances("two.json", annotations=two))]
    for order in (sources, sources[::-1], [*sources, sources[0]]):
        records, _ = read_records(order)
        assert [len(record.objects) for record in records] == [0, 1]
    other = instances("other.json", annotations=[changed(BOXES[0], bbox=[11, 10, 30, 40])])
    records, _ = read_records([sources[0], (other, one.parent, 1.0)])
    assert [len(record.objects) for record in records] == [0, 1]
    entries = instances(images=[*IMAGES, changed(IMAGES[0], id=5)], annotations=[*BOXES, changed(two[-1], image_id=5)])
    objects, _, reasons = read(entries)
    assert objects["a.png"] == {} and "entries of the same file" in reasons and is_clean(entries)


def test_one_name_under_two_category_ids_is_one_category(instances):
    for name in ("cat", "Cat", "cat "):
        path = instances(categories=[*CATEGORIES, {"id": 9, "name": name}],
                         annotations=[*BOXES, changed(BOXES[0], category_id=9, bbox=[60, 10, 30, 40])])  # fmt: skip
        objects, absent, _ = read(path)
        assert objects["a.png"] == {} and absent["b.png"] == {"cat", "cup"} and is_clean(path)
        assert any("is counted as cat" in line for line in check(path, path.parent))


def test_identical_annotations_are_one_and_counted(instances):
    path = instances(annotations=BOXES + [changed(a, id=a["id"] + 10) for a in BOXES])
    objects, _, reasons = read(path)
    assert objects == read(instances("y.json"))[0] and "annotations that repeat another one" in reasons and is_clean(path)


@pytest.mark.parametrize("answer", ["", "  ", "\n", "<image>"])
def test_an_empty_answer_is_a_bad_row(coco, answer):
    row = {**LLAVA[0], "conversations": [LLAVA[0]["conversations"][0], {"from": "gpt", "value": answer}]}
    (coco / "x.json").write_text(json.dumps([*LLAVA, row]))
    assert check(coco / "x.json", coco) == ["row 2: it has an empty answer"]
    records, skipped = read_file(coco / "x.json", coco)
    assert len(records) == 2 and list(skipped) == ["bad rows, each has an empty answer (the first: row 2: it has an empty answer)"]


def test_a_byte_order_mark_is_no_content(instances, tmp_path):
    plain = instances()
    for name, content in (("bom.json", plain.read_text()), ("ids.txt", "000000000007.jpg\n9\n"), ("ids.json", "[7, 9]")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path / "bom.json") == read(plain)
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2}\n', encoding="utf-8-sig")
    (tmp_path / "rows.csv").write_text("id,a\n1,b\n", encoding="utf-8-sig")
    assert read_lines(tmp_path / "rows.jsonl") == ([{"id": 1}, {"id": 2}], 0)
    assert read_rows(tmp_path / "rows.jsonl", "rows") == [{"id": 1}, {"id": 2}]
    assert read_rows(tmp_path / "rows.csv", "rows") == [{"id": "1", "a": "b"}]
    assert image_ids(tmp_path / "ids.txt") == image_ids(tmp_path / "ids.json") == {7, 9}


# ----- B: dies late, or cannot be used


@pytest.mark.parametrize("name", ["x.gif", "x.jfif", "x.jpe", "x", "x.webp"])
def test_in_a_file_of_images_a_name_is_an_image(coco, name):
    Image.new("RGB", (20, 10)).save(coco / name, "GIF" if name == "x.gif" else "JPEG")
    (coco / "x.json").write_text(json.dumps([{**LLAVA[0], "image": name}]))
    (record,), _ = read_file(coco / "x.json", coco)
    assert not record.is_clip and not unreadable([record]) and check(coco / "x.json", coco) == []
    (coco / name).write_bytes(b"damaged")
    assert "cannot be read" in unreadable([record])[coco / name]
    (coco / name).unlink()
    (coco / name).mkdir()
    assert "no image file" in unreadable([record])[coco / name]


def test_rows_about_images_clips_and_text_are_decided_row_by_row(coco):
    (coco / "v.mp4").write_bytes(b"")
    clip = {"id": "v", "video": "v.mp4", "conversations": LLAVA[0]["conversations"]}
    for rows in ([*LLAVA, clip], [clip, *LLAVA]):
        (coco / "x.json").write_text(json.dumps(rows))
        records, skipped = read_file(coco / "x.json", coco)
        assert {r.id: (r.is_clip, r.image and r.image.name) for r in records} == {
            "a": (False, "1.png"), "b": (False, None), "v": (True, "v.mp4")}  # fmt: skip
        assert not skipped
    config = train.parse_config(train.TrainConfig, ["--stages", "2", "--data", f"{coco}/x.json", "--images", str(coco), "--dry-run"])
    with pytest.raises(ValueError, match=r"1 records are about clips \(v\), stages 1 and 2 read images"):
        train.build_records(config, train.Processes.start(config))


def test_many_bad_rows_are_one_line_for_each_kind(coco):
    bad = [{**LLAVA[0], "image": f"../{i}.png"} for i in range(300)] + [{**LLAVA[0], "image": i} for i in range(1, 300)]
    (coco / "x.json").write_text(json.dumps([*LLAVA, *bad]))
    _, skipped = read_file(coco / "x.json", coco)
    assert sorted(skipped.values()) == [299, 300] and len("".join(skipped)) < 400
    assert "row 2: it names a file that leaves its folder: ../0.png" in min(skipped)


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_image_is_a_text_row(coco, empty):
    (coco / "x.json").write_text(json.dumps([LLAVA[0], {**LLAVA[1], "image": empty}]))
    records, skipped = read_file(coco / "x.json", coco)
    assert [record.image for record in records] == [coco / "1.png", None] and not skipped


def test_a_list_of_one_image_is_that_image_and_several_are_refused(coco):
    (coco / "x.json").write_text(json.dumps([{**LLAVA[0], "image": ["1.png"]}, {**LLAVA[0], "image": ["1.png", "2.png"]}]))
    (record,), skipped = read_file(coco / "x.json", coco)
    assert record.image == coco / "1.png" and "row 1: it names several images" in next(iter(skipped))


def test_an_empty_list_of_videos_and_a_caption_beside_a_box_leave_a_file_of_images(instances):
    for more in ({"videos": []}, {"videos": [{"id": 1, "name": "clip"}]}, {}):
        path = instances(annotations=[changed(a, caption="a cat") for a in BOXES], **more)
        assert read(path)[0] == read(instances("y.json"))[0] and is_clean(path)


# ----- C: values of another kind


@pytest.mark.parametrize(
    "part, change, words",
    [("images", {"width": None}, "image 1: width is 'None', not a number above 0"),
     ("images", {"width": "wide"}, "image 1: width is 'wide'"), ("images", {"height": -4}, "image 1: height is '-4'"),
     ("images", {"file_name": None}, "image 1: file_name is 'None', not the name of a file"),
     ("images", {"file_name": 7}, "image 1: file_name is '7'"), ("images", {"id": [1]}, r"id is '\[1\]', not a number or a text"),
     ("categories", {"name": None}, "category 0: name is 'None', not a text that is not blank"),
     ("categories", {"name": {"en": "cat"}}, "category 0: name is"), ("categories", {"id": None}, "category 0: id is 'None'"),
     ("annotations", {"image_id": [1]}, r"annotation 1: image_id is '\[1\]'"),
     ("annotations", {"category_id": None}, "annotation 1: category_id is 'None'")],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_file_row_and_key(instances, part, change, words):
    rows = {"images": IMAGES, "annotations": BOXES, "categories": CATEGORIES}
    path = instances(**{part: [changed(rows[part][0], **change), *rows[part][1:]]})
    with pytest.raises(ValueError, match=f"{path}: .*{words}"):
        read_file(path, path.parent)
    assert re.search(words, check(path, path.parent)[-1])


def test_a_value_whose_meaning_is_certain_is_read(instances):
    """A category called 7, annotations without an id, half of a surrogate pair in a name."""
    categories = [{"id": 1, "name": 7}, {"id": 2, "name": "dog\ud83d"}, CATEGORIES[2]]
    path = instances(categories=categories, annotations=[{k: v for k, v in a.items() if k != "id"} for a in BOXES])
    assert {name: list(of) for name, of in read(path)[0].items()} == {"a.png": ["7"], "b.png": ["dog\ufffd"]}


@pytest.mark.parametrize("size", [61234, "64x48", [640], None])
def test_a_column_called_size_is_not_the_images_size(coco, size):
    (coco / "x.json").write_text(json.dumps([{**LLAVA[0], "size": size}]))
    (record,), skipped = read_file(coco / "x.json", coco)
    assert record.size == (0, 0) and not skipped and check(coco / "x.json", coco) == []


def test_half_an_emoji_trains_as_a_replacement_character(coco, tokenizer):
    row = {**LLAVA[0], "conversations": [LLAVA[0]["conversations"][0], {"from": "gpt", "value": "A \ud83d cat."}]}
    (coco / "x.json").write_text(json.dumps([row]))
    (record,), _ = read_file(coco / "x.json", coco)
    assert record.conversations[0][0][1] == "A \ufffd cat."
    examples(coco / "x.json", tokenizer).batch([0])


@pytest.mark.parametrize("content", [{"data": LLAVA}, {"0": LLAVA[0]}])
def test_a_dictionary_of_rows_is_refused_with_what_it_holds(coco, content):
    (coco / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"x.json lacks images with .*it holds the keys {next(iter(content))};.*LLaVA's list"):
        read_file(coco / "x.json", coco)


# ----- D: messages


def test_json_lines_are_read_and_gzip_is_named(coco):
    (coco / "x.jsonl").write_text("\n".join(map(json.dumps, LLAVA)) + "\n\n")
    assert [record.id for record in read_file(coco / "x.jsonl", coco)[0]] == ["a", "b"]
    (coco / "cut.jsonl").write_text(json.dumps(LLAVA[0]) + '\n{"id": "b", "conv')
    with pytest.raises(ValueError, match="cut.jsonl: line 2 .*neither JSON nor JSON lines"):
        read_file(coco / "cut.jsonl", coco)
    (coco / "x.json").write_bytes(gzip.compress(json.dumps(LLAVA).encode()))
    with pytest.raises(ValueError, match="x.json is a gzip file; unpack it first"):
        read_file(coco / "x.json", coco)


@pytest.mark.parametrize("zip_name", ["train2017.zip", "TRAIN.ZIP"])
def test_a_zip_with_one_folder_is_read_as_that_folder(instances, tmp_path, zip_name):
    """COCO's own train2017.zip holds train2017/."""
    path = instances()
    with zipfile.ZipFile(tmp_path / zip_name, "w") as archive:
        archive.mkdir("train2017")
        for image in IMAGES:
            archive.write(tmp_path / image["file_name"], f"train2017/{image['file_name']}")
    assert check(path, tmp_path / zip_name) == [] and open_image(tmp_path / zip_name / "a.png").size == (100, 80)


def test_two_folders_of_a_zip_are_not_mixed_up(tmp_path):
    """With one folder, it need not be named, neither for files nor to list clips; of two, none stands for the other."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    for name, folders in (("one.zip", ("train",)), ("two.zip", ("train", "val"))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for folder in folders:
                archive.write(tmp_path / "1.png", f"{folder}/v_a/1.png")
                archive.writestr(f"__MACOSX/{folder}/v_a/._1.png", b"a Mac was here")
            archive.writestr("README.txt", "what this is")
            archive.writestr("annotations/instances.json", "{}")
    assert open_image(tmp_path / "one.zip/v_a/1.png").size == (8, 8) and names_in(tmp_path / "one.zip/v_a") == ["1.png"]
    assert is_clip(tmp_path / "one.zip/v_a") and read_frames(tmp_path / "one.zip/v_a", 1)[0].size == (8, 8)
    assert open_image(tmp_path / "two.zip/val/v_a/1.png").size == (8, 8) and not names_in(tmp_path / "two.zip/v_a")
    with pytest.raises(FileNotFoundError, match="no image file .*two.zip/v_a/1.png"):
        open_image(tmp_path / "two.zip/v_a/1.png")
    with pytest.raises(FileNotFoundError, match="no folder or zip .*two.zip/train of clips"):
        find_clips(tmp_path / "two.zip/train")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "1.png", "train2017/1.png")
        archive.writestr("README.txt", "what this is")
    assert names_in(tmp_path / "images.zip") == ["1.png"]


def test_an_image_of_a_zip_is_one_under_either_name(instances, tmp_path):
    """With or without the zip's one folder: two records would each take the other's objects for absent."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "x/a.png")
    short = instances(images=IMAGES[:1], annotations=BOXES[:1])
    cup = {"id": 2, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20]}
    long = instances("y.json", images=[changed(IMAGES[0], file_name="x/a.png")], annotations=[cup])
    (record,), _ = read_records([(path, tmp_path / "x.zip", 1.0) for path in (short, long)])
    assert set(record.present) == {"cat", "cup"} and record.absent == ("dog",)


def test_a_missing_folder_of_images_is_one_message(instances):
    path = instances()
    with pytest.raises(FileNotFoundError, match="no folder or zip .*nowhere"):
        read_file(path, path.parent / "nowhere")


def test_paths_with_other_signs_can_be_sources(tmp_path):
    (tmp_path / "me@lab").mkdir()
    (tmp_path / "me@lab/x.json").write_text("[]")
    name = f"{tmp_path}/me@lab/x.json"
    assert parse_sources(f"{name}@im@ges*2,{name}", "d") == [(name, "im@ges", 2.0), (name, "d", 1.0)]
    listed = [["a,b.json"], ["c*d.json", "e@f"], ["g.json", "h", 0.5]]
    assert parse_sources(json.dumps(listed), "d") == [("a,b.json", "d", 1), ("c*d.json", "e@f", 1), ("g.json", "h", 0.5)]
    for text in ("[[", "a.json@", "@images", "a.json@b*0", '[["a.json", "b", -1]]'):
        with pytest.raises(ValueError, match="--data"):
            parse_sources(text, "d")


@pytest.mark.parametrize("content, words", [(b"\x80\x04K\x01.", "ids.x cannot be read"), (b'{"image_id": 1}\n{"image', "ids.x cannot be read"),
    (b"image_id,split\n42,val\n43", r"2 of 3 lines name no COCO image \(the first: image_id,split\)"),
    (b"val2014\\000000000042.jpg\n43.jpg", r"1 of 2 lines name no COCO image \(the first: 43.jpg\)")])
def test_a_list_of_ids_that_cannot_be_read_is_named(tmp_path, content, words):
    (tmp_path / "ids.x").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        image_ids(tmp_path / "ids.x")


@pytest.mark.parametrize("content, words", [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"<svg xmlns=''/>", "SVG"), (b"<!DOCTYPE html>", "web page"),
    (b"\0\0\0\x18ftypheic", "HEIC"), (b"plain", "no image that Pillow knows")])
def test_what_an_image_file_is_instead_is_named(tmp_path, content, words):
    (tmp_path / "x.jpg").write_bytes(content)
    assert words in image_problem(tmp_path / "x.jpg")


def test_a_small_int32_tiff_is_not_black(tmp_path):
    Image.new("I", (4, 4), 200).save(tmp_path / "x.tif")
    assert open_image(tmp_path / "x.tif").getpixel((0, 0)) == (200, 200, 200)
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "x.png")  # 16 bits that hold 8
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (200, 200, 200)
    Image.new("I", (4, 4), 60000).save(tmp_path / "y.tif")
    assert open_image(tmp_path / "y.tif").getpixel((0, 0)) == (234, 234, 234)


# ----- what a newcomer brought


def test_images_without_an_annotation_are_noted_when_they_are_many(instances):
    """A file that is only partly labelled teaches that everything is absent in the rest."""
    path = instances(annotations=BOXES[:1])
    assert read(path)[1]["b.png"] == {"cat", "dog", "cup"} and "images without an annotation" in read(path)[2] and is_clean(path)


def test_lvis_says_which_categories_are_absent_and_which_are_not_all_boxed(instances):
    images = [changed(IMAGES[0], neg_category_ids=[3], not_exhaustive_category_ids=[1]), changed(IMAGES[1], neg_category_ids=[])]
    objects, absent, _ = read(instances(images=images))
    assert absent == {"a.png": {"cup"}, "b.png": set()} and objects["a.png"] == {} and objects["b.png"]


def test_boxes_that_contradict_their_area_are_noted(instances):
    """Per cent for pixels, or corners for width and height."""
    path = instances(annotations=[changed(a, area=5000.0) for a in BOXES])
    assert "boxes smaller than the area" in read(path)[2] and is_clean(path)


def test_names_in_other_case_in_two_files_are_one_category(instances):
    other = instances("other.json", categories=[changed(c, name=c["name"].upper()) for c in CATEGORIES])
    records, _ = read_records([(path, other.parent, 1.0) for path in (instances(), other)])
    assert [(set(r.present), set(r.absent)) for r in records] == [({"cat"}, {"dog", "cup"}), ({"dog"}, {"cat", "cup"})]
    assert [o.name for r in records for o in r.objects] == ["cat", "dog"]


def test_names_in_two_forms_of_unicode_are_one_category(instances):
    composed, decomposed = (instances(f"{form}.json", categories=[{"id": 1, "name": normalize(form, "café")}, *CATEGORIES[1:]]) for form in ("NFC", "NFD"))
    records, _ = read_records([(path, path.parent, 1.0) for path in (composed, decomposed)])
    assert [(set(r.present), set(r.absent)) for r in records] == [({"café"}, {"dog", "cup"}), ({"dog"}, {"café", "cup"})]


def test_regions_to_ignore_are_not_asked_for(instances):
    objects, absent, _ = read(instances(annotations=[changed(BOXES[0], ignore=1), BOXES[1]]))
    assert objects["a.png"] == {} and absent["a.png"] == {"dog", "cup"} and objects["b.png"]


def test_boxes_most_of_which_have_no_area_stop_a_run(instances):
    path = instances(annotations=[*BOXES[:1], *(changed(a, bbox=[5, 5, 0, 9]) for a in BOXES)])
    assert "most boxes, of which bbox has no area" in read(path)[2] and not read(path)[2].startswith(HARMLESS)
    assert "has a negative width" in read(instances(annotations=[*BOXES, changed(BOXES[0], bbox=[9, 9, -5, 5])]))[2]


@pytest.mark.parametrize("name", ["/home/me/a.png", "../images/a.png"])
def test_names_that_all_leave_the_folder_are_refused_with_the_fix(instances, name):
    path = instances(images=[changed(IMAGES[0], file_name=name)], annotations=BOXES[:1])
    with pytest.raises(ValueError, match="leaves the folder; write it relative to the folder of images"):
        read_file(path, path.parent)


def test_names_as_windows_writes_them_are_found(instances, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub/a.png")
    path = instances("y.json", images=[changed(IMAGES[0], file_name="sub\\a.png"), IMAGES[1]])
    (tmp_path / "a.png").unlink(missing_ok=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "sub/a.png")
    assert is_clean(path)


@pytest.mark.parametrize("key", ["image", "video"])
def test_a_name_as_windows_writes_it_leaves_no_folder(coco, key):
    (coco / "x.json").write_text(json.dumps([*LLAVA, {**LLAVA[1], key: "..\\1.png"}]))
    assert check(coco / "x.json", coco) == ["row 2: it names a file that leaves its folder: ../1.png"]


@pytest.mark.parametrize("wanted, there", [("a.jpg", "a.png"), ("A.PNG", "a.png"), ("train2017/a.png", "a.png"), ("e\u0301.png", "\u00e9.png")])
def test_a_missing_image_is_named_with_its_like(tmp_path, wanted, there):
    Image.new("RGB", (4, 4)).save(tmp_path / there)
    assert f"has {there!r}" in image_problem(tmp_path / wanted) and image_problem(tmp_path / "other.png").endswith("other.png")


@pytest.mark.parametrize("key", ["image_path", "videos", "image_url", "Image", "images_path", "picture"])
def test_a_row_that_names_its_image_otherwise_is_no_text(coco, key):
    row = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}], key: ["1.png"]}
    (coco / "x.json").write_text(json.dumps([*LLAVA, row]))
    assert check(coco / "x.json", coco) == [f'row 2: it has "{key}"; call it "image" or "video"']


def test_rows_as_other_trainers_write_them_are_read(coco):
    """images, messages, role and content, user and assistant."""
    row = {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}]}
    (coco / "x.json").write_text(json.dumps([row]))
    (record,), skipped = read_file(coco / "x.json", coco)
    assert record.image == coco / "1.png" and record.conversations == ((("What?", "A."),),) and not skipped


def test_a_clip_may_lie_in_a_sub_folder(coco):
    (coco / "part0").mkdir()
    (coco / "part0/v.mp4").write_bytes(b"")
    row = {"id": "v", "video": "part0/v.mp4", "conversations": LLAVA[0]["conversations"]}
    (coco / "x.json").write_text(json.dumps([row]))
    assert read_file(coco / "x.json", coco)[0][0].image == coco / "part0/v.mp4"


def test_a_missing_key_is_named_with_its_row(instances):
    path = instances(images=[IMAGES[0], {"id": 2, "file_name": "b.png"}])
    with pytest.raises(ValueError, match="lacks images with .*: row 1 has no height, width; is it COCO's"):
        read_file(path, path.parent)


# ----- layouts of other tools, as their documentation describes them


def test_exports_of_other_tools_are_clean_and_train(instances, tokenizer):
    """pycocotools' loadRes, Roboflow (parent, text numbers, license), CVAT (ids from 1, attributes), Label Studio (no iscrowd,
    ids from 0, paths with folders)."""
    folder = instances().parent
    (folder / "images/0").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(folder / "images/0/a.png")
    roboflow = instances(
        "roboflow.json", info={"year": "2024", "url": "https://public.roboflow.com"}, licenses=[{"id": 1}],
        categories=[{"id": 0, "name": "pets", "supercategory": "none"}, *({**c, "supercategory": "pets"} for c in CATEGORIES)],
        images=[{**image, "license": 1, "date_captured": "2024"} for image in IMAGES],
        annotations=[{**a, "bbox": [*a["bbox"][:2], *map(str, a["bbox"][2:])], "area": 1, "segmentation": [], "iscrowd": 0} for a in BOXES],
    )  # fmt: skip
    cvat = instances(
        "cvat.json", licenses=[{"name": "", "id": 0, "url": ""}],
        categories=[{**c, "supercategory": ""} for c in CATEGORIES],
        images=[{**image, "license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0} for image in IMAGES],
        annotations=[{**a, "segmentation": [], "area": 1.0, "iscrowd": 0, "attributes": {"occluded": False}} for a in BOXES],
    )  # fmt: skip
    studio = instances(
        "studio.json", info={"contributor": "Label Studio"}, categories=[{"id": i, "name": c["name"]} for i, c in enumerate(CATEGORIES)],
        images=[{**IMAGES[0], "id": 0, "file_name": "images/0/a.png"}],
        annotations=[{"id": 0, "image_id": 0, "category_id": 0, "segmentation": [], "bbox": [10.0, 10.0, 30.0, 40.0], "ignore": 0,
                      "iscrowd": 0, "area": 1200.0}],
    )  # fmt: skip
    results = instances("results.json", annotations=[{**a, "score": 0.9, "area": 1, "iscrowd": 0} for a in BOXES])
    for path in (roboflow, cvat, studio, results):
        assert is_clean(path), check(path, folder)
        batch, _ = examples(path, tokenizer).batch([0])
        assert torch.isfinite(batch["pixel_values"]).all()
        records, _ = read_file(path, folder)
        asked = draw_questions(records[0], Wording(CoordFormat("ivb", 28)), __import__("random").Random(0))
        assert {name for name, *_ in asked} == {"loc", "neg", "rev"}
