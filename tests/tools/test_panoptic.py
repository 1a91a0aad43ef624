"""Boxes from masks."""

import json

import numpy as np
import pytest
from PIL import Image

from formats.annotations import read_file
from tools.panoptic import boxes_from_panoptic, panoptic


def refused(words, function, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        function(*args, **options)



def mask_image(ids):
    """Segment ids (H, W) -> the PNG that spells them."""
    ids = np.asarray(ids)
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


IDS = [
    [0, 0, 7, 7, 16000000],
    [3000, 0, 7, 0, 16000000],
    [3000, 7, 7, 0, 3000],
]


def test_boxes_are_those_of_the_pixels():
    """A segment in two pieces, one at the edges, an id that needs all three bytes; no segment is id 0."""
    segments = [
        {"id": 16000000, "category_id": 1, "iscrowd": 1},
        {"id": 7, "category_id": 2},
        {"id": 3000, "category_id": 2},
    ]
    boxes = boxes_from_panoptic(segments, mask_image(IDS))
    assert boxes == [
        {"id": 16000000, "category_id": 1, "iscrowd": 1, "area": 2, "bbox": [4, 0, 1, 2]},
        {"id": 7, "category_id": 2, "iscrowd": 0, "area": 5, "bbox": [1, 0, 3, 3]},
        {"id": 3000, "category_id": 2, "iscrowd": 0, "area": 3, "bbox": [0, 1, 5, 2]},
    ]
    refused(
        r"segments \[9\] have no pixel", boxes_from_panoptic, [*segments, {"id": 9, "category_id": 1}], mask_image(IDS)
    )
    refused(r"pixels \[3000\] no segment", boxes_from_panoptic, segments[:2], mask_image(IDS))


@pytest.fixture
def video(tmp_path):
    """A per-video file of two frames: a kite alone, then a kite beside a dog, on sky."""
    (tmp_path / "masks").mkdir()
    mask_image(IDS).save(tmp_path / "masks/f1.png")
    mask_image([[7, 7, 3000]]).save(tmp_path / "masks/f2.png")
    content = {
        "categories": [
            {"id": 1, "name": "kite", "isthing": 1},
            {"id": 2, "name": "dog", "isthing": 1},
            {"id": 9, "name": "sky", "isthing": 0},
        ],
        "annotations": [
            {
                "file_name": "f1.jpg",
                "segments_info": [
                    {"id": 7, "category_id": 1}, {"id": 3000, "category_id": 9}, {"id": 16000000, "category_id": 9},
                ],
            },
            {"file_name": "f2.jpg", "segments_info": [{"id": 7, "category_id": 1}, {"id": 3000, "category_id": 2}]},
        ],
    }  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(content))
    return tmp_path, content


def test_frames_of_a_video_become_records(video):
    """No images list: frames go by file name and have the size of their masks; stuff only where it is wanted."""
    folder, _ = video
    panoptic(folder / "p.json", folder / "i.json", folder / "masks")
    first, second = read_file(folder / "i.json", folder)[0]
    assert (first.image.name, first.size, first.present, first.absent) == ("f1.jpg", (5, 3), ("kite",), ("dog",))
    assert [(o.name, o.box_px) for o in second.objects] == [("kite", (0, 0, 2, 1)), ("dog", (2, 0, 3, 1))]
    refused("i.json exists already", panoptic, folder / "p.json", folder / "i.json", folder / "masks")
    panoptic(folder / "p.json", folder / "stuff.json", folder / "masks", stuff=True)
    first = read_file(folder / "stuff.json", folder)[0][0]
    assert first.present == ("kite", "sky") and [o.name for o in first.objects] == ["kite"], "two pieces of sky"


def test_ids_of_images_may_be_text(video):
    folder, content = video
    image = {"id": "4", "file_name": "photo.jpg", "width": 3, "height": 1}
    second = {**content["annotations"][1], "image_id": 4}
    (folder / "p.json").write_text(json.dumps({**content, "annotations": [second], "images": [image]}))
    panoptic(folder / "p.json", folder / "i.json", folder / "masks")
    ((record,), _) = read_file(folder / "i.json", folder)
    assert record.image.name == "photo.jpg" and [o.name for o in record.objects] == ["kite", "dog"]


def test_bad_panoptic_files_are_named(video):
    folder, content = video

    def make(words, **changes):
        (folder / "p.json").write_text(json.dumps({**content, **changes}))
        refused(words, panoptic, folder / "p.json", folder / "i.json", folder / "masks", check=True)

    first, second = content["annotations"]
    segments = second["segments_info"]
    make("1 masks are not in .*f3.png", annotations=[first, {**second, "file_name": "f3.jpg"}])
    make(r"categories \[5\]", annotations=[first, {**second, "segments_info": [{"id": 7, "category_id": 5}]}])
    make("lacks annotations with", annotations=[{"file_name": "f1.jpg"}])
    make("lacks categories with", categories=None)
    make(r"f2.png: segments \[\] have no pixel, pixels \[7\]", annotations=[{**second, "segments_info": segments[1:]}])
    image = {"id": 4, "file_name": "f2.jpg", "width": 9, "height": 1}
    make(r"f2.png is \(3, 1\).*9", annotations=[{**second, "image_id": 4}], images=[image])
    make("f2.jpg have an image_id that its images lack", annotations=[second], images=[image])
    make("width is", annotations=[{**second, "image_id": 4}], images=[image | {"width": 0}])
    assert not (folder / "i.json").exists()
    wrong = [{**segments[0], "bbox": [0, 0, 3, 1]}, {**segments[1], "bbox": [2, 0, 1, 1]}]
    make("1 boxes differ", annotations=[{**second, "segments_info": wrong}])


def test_real_masks_bear_out_cocos_own_boxes(real, tmp_path, capsys):
    folder = real("coco-sample/annotations")
    panoptic(folder / "panoptic_train2017.json", tmp_path / "i.json", folder / "panoptic_train2017", check=True)
    assert "1111 of 1111 boxes equal" in capsys.readouterr().out
    records, skipped = read_file(tmp_path / "i.json", folder)
    annotated = {record.id: record for record in read_file(folder / "instances_train2017.json", folder)[0]}
    assert len(records) == 100 and not skipped
    assert all(record.size == annotated[record.id].size for record in records)
