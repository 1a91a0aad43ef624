"""Annotation files of several formats, image files and zips."""

import json
import zipfile

import pytest
from conftest import LLAVA, LOCALIZE
from PIL import Image

from data import Object
from formats.annotations import image_ids, image_ids_of, parse_sources, read_file, read_records
from formats.images import image_size, open_image
from formats.schema import llava_row
from tools import overlap


def test_what_several_files_say_of_an_image_becomes_one_record(coco):
    """Boxes, captions, conversations and descriptions share the image's prefix; text alone stays a record of its own."""
    captions = {"images": [{"id": 7, "file_name": "1.png", "width": 100, "height": 80}]}
    captions["annotations"] = [{"image_id": 7, "caption": "A grey cat. "}]
    for name, content in (("captions", captions), ("llava", LLAVA), ("localize", LOCALIZE)):
        (coco / f"{name}.json").write_text(json.dumps(content))
    sources = parse_sources(f"{coco}/localize.json@{coco}*2,{coco}/instances.json,{coco}/captions.json", coco)
    records, _ = read_records([*sources, (coco / "llava.json", coco, 1.0)])
    assert [record.image and record.image.name for record in records] == ["1.png", "2.png", None]
    cat = records[0]
    assert cat.objects == (Object("cat", (10.5, 20, 40.5, 60), "cat that is grey"),)
    assert cat.captions == ("A grey cat.",) and cat.conversations == ((("What?", "A."),),)
    assert "kite" in cat.absent and "cat" not in cat.absent and cat.weight == 2
    assert records[2].conversations == ((("Say hi.", "Hi."),),)


def test_images_are_read_out_of_a_zip(coco):
    with zipfile.ZipFile(coco / "images.zip", "w") as archive:
        archive.write(coco / "1.png", "sub/1.png")
        archive.writestr("2.png", b"no image")
    assert open_image(coco / "images.zip/sub/1.png").size == image_size(coco / "images.zip/sub/1.png") == (100, 80)
    with pytest.raises(FileNotFoundError, match="no image file .*zip/3.png"):
        image_size(coco / "images.zip/3.png")
    with pytest.raises(ValueError, match="zip/2.png cannot be read"):
        image_size(coco / "images.zip/2.png")
    with zipfile.ZipFile(coco / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(coco / "1.png", "1.png")
    whole = bytearray((coco / "packed.zip").read_bytes())
    whole[50:60] = b"damaged..."
    (coco / "packed.zip").write_bytes(whole)
    for look in (open_image, image_size):
        with pytest.raises(ValueError, match="packed.zip/1.png cannot be read"):
            look(coco / "packed.zip/1.png")
    (coco / "cut.zip").write_bytes((coco / "images.zip").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.zip is not a whole zip"):
        open_image(coco / "cut.zip/2.png")


def test_an_image_of_two_hundred_megapixels_is_refused_by_its_head(tmp_path):
    """Neither look decodes it: a small file can stand for gigabytes."""
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    for look in (open_image, image_size):
        with pytest.raises(ValueError, match="large.png cannot be read.*decompression bomb"):
            look(tmp_path / "large.png")


def test_benchmarks_images_are_found_in_any_schema_and_excluded(coco, capsys):
    """COCO's ids agree across years, whatever the file is called."""
    (coco / "pope.json").write_text(
        '{"image": "COCO_val2014_000000000007.jpg"}\n{"image": "COCO_val2014_000000000009.jpg"}\n'
    )
    (coco / "vqa.json").write_text(json.dumps({"questions": [{"image_id": 9, "question_id": 1}]}))
    (coco / "ids.txt").write_text("000000000012.jpg\n7\n")
    assert image_ids(coco / "pope.json") == {7, 9} and image_ids(coco / "vqa.json") == {9}
    assert image_ids_of(f"{coco}/vqa.json,{coco}/ids.txt") == {7, 9, 12}
    (coco / "null.json").write_text('[{"image": null, "image_id": 9}, {"imageId": "2405722"}]')
    assert image_ids(coco / "null.json") == {9}, "GQA's ids are Visual Genome's"
    (coco / "none.json").write_text('{"image": "GCC_train_000000001.jpg"}')
    with pytest.raises(ValueError, match="names no COCO image"):
        image_ids(coco / "none.json")

    instances = json.loads((coco / "instances.json").read_text())
    for image in instances["images"]:
        image["file_name"] = f"{image['id']:012d}.jpg"
    (coco / "train.json").write_text(json.dumps(instances))
    records, skipped = read_records([(coco / "train.json", coco, 1.0)], {9})
    assert [record.id for record in records] == ["7"] and skipped["images that --exclude lists"] == 1
    overlap.main(["--data", f"{coco}/train.json@{coco}", f"{coco}/pope.json", f"{coco}/vqa.json"])
    out = capsys.readouterr().out
    assert "pope.json: 2 of its 2" in out and "vqa.json: 1 of its 1" in out


@pytest.mark.parametrize("content", ["5", "null", '"text"', "[5]", "[]", "{}", '{"annotations": [5]}'])
def test_json_of_no_schema_is_refused_by_name(coco, content):
    (coco / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        read_file(coco / "x.json", coco)


def test_a_text_that_speaks_of_an_image_names_one(coco):
    row = {"id": "c", "conversations": LLAVA[0]["conversations"]}
    with pytest.raises(ValueError, match='has no "image" key'):
        llava_row(row, 0)
