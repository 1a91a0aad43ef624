"""From annotated clips to Records: what stays is asked for, what moves is not, what is nowhere is absent."""

import json
import re
import shutil

import pytest
from conftest import write_panoptic
from PIL import Image

from formats.annotations import find_clips, merge, read_file, static_objects
from formats.files import read_json
from formats.schema import Box
from tiny.moving import write_clips
from tiny.shapes import NAMES
from tools.check import check
from tools.panoptic import clips_from_panoptic, panoptic


def refused(words, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=words):
        function(*args, **options)


def at(cx, cy, half=10):
    return (cx - half, cy - half, cx + half, cy + half)


def static(*frames, size=(224, 224), **options):
    """The names and boxes of what stays; each frame a dict of name -> box, or a list of pairs."""
    frames = [list(frame.items()) if isinstance(frame, dict) else frame for frame in frames]
    boxes = [Box(name, box_px, index) for index, frame in enumerate(frames) for name, box_px in frame]
    return {o.name: o.box_px for o in static_objects(boxes, size, **options)}


# ----- what stays


def test_five_pixels_from_the_mean_are_static_and_more_are_not():
    """Each axis for itself; centres 5 px to either side of their mean. Half a pixel more, and the object moves."""
    assert static({"cup": at(100, 50)}, {"cup": at(110, 60)}) == {"cup": at(105, 55)}
    assert static({"cup": at(100, 50)}, {"cup": at(110.1, 50)}) == {}
    assert static({"cup": at(100, 50)}, {"cup": at(100, 60.1)}) == {}
    assert static({"cup": at(100, 50)}, {"cup": at(100, 50)}, {"cup": at(100, 57.6)}) == {}, "5.07 from a mean of three"
    assert static({"cup": at(100, 50, 10)}, {"cup": at(100, 50, 20)}) == {"cup": at(100, 50, 15)}, "it may grow"


def test_pixels_are_those_of_a_square_of_224():
    """640 x 480 squashed to it: 5 px are 14.29 across and 10.71 down."""
    wide = {"size": (640, 480)}
    assert static({"cup": at(300, 200)}, {"cup": at(328.5, 200)}, **wide)
    assert not static({"cup": at(300, 200)}, {"cup": at(328.6, 200)}, **wide)
    assert static({"cup": at(300, 200)}, {"cup": at(300, 221.4)}, **wide)
    assert not static({"cup": at(300, 200)}, {"cup": at(300, 221.5)}, **wide)
    for width, step in ((112, 5), (160, 50 / 7), (144, 45 / 7)):  # 10 px of 224: on the edge, whatever rounding does
        assert static({"cup": at(30, 30)}, {"cup": at(30 + step, 30)}, size=(width, 112)), width


def test_what_is_in_one_frame_alone_is_static():
    assert static({}, {"cup": at(30, 40)}, {}) == {"cup": at(30, 40)}
    assert static({"dog": at(90, 90)}, {"cup": at(30, 40), "dog": at(91, 90)}) == {
        "dog": at(90.5, 90),
        "cup": at(30, 40),
    }
    assert static() == static({}, {}) == {}


def test_two_of_a_kind_in_any_frame_are_not_asked_for():
    """Nor a crowd, nor a category one of whose boxes cannot be used; one here and another there is no object that stays."""
    pair = [("cup", at(30, 40)), ("cup", at(90, 40)), ("dog", at(60, 60))]
    assert static({"cup": at(30, 40)}, pair) == {"dog": at(60, 60)}
    assert static({"cup": at(30, 40)}, [("cup", None)]) == {}
    assert static({"cup": at(30, 40)}, {"cup": at(90, 40)}) == {}


# ----- our own format


def clips_json(**changes):
    content = {
        "videos": [{"id": 7, "file_name": "v_a", "width": 224, "height": 112, "frames": 3}],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}, {"id": 4, "name": "sky"}],
        "annotations": [
            {"video_id": 7, "frame": 0, "category_id": 1, "bbox": [10, 10, 20, 20]},
            {"video_id": 7, "frame": 2, "category_id": 1, "bbox": [14, 10, 20, 20]},
            {"video_id": 7, "frame": 0, "category_id": 2, "bbox": [100, 10, 20, 20]},
            {"video_id": 7, "frame": 1, "category_id": 2, "bbox": [150, 10, 20, 20]},
        ],
    }
    return {**content, **changes}


@pytest.fixture
def read(tmp_path):
    """Give read(content): it becomes a file beside two clips, v_a of frames and v_b.mp4, and is read."""
    (tmp_path / "clips/v_a").mkdir(parents=True)
    Image.new("RGB", (224, 112)).save(tmp_path / "clips/v_a/00.png")
    (tmp_path / "clips/v_b.mp4").write_bytes(b"")

    def read(content):
        (tmp_path / "c.json").write_text(json.dumps(content))
        return read_file(tmp_path / "c.json", tmp_path / "clips")

    read.folder = tmp_path
    return read


def test_a_clip_is_found_by_any_ending_that_video_reads(read):
    for name in ("v_c.npy", "v_d.MOV"):
        (read.folder / "clips" / name).write_bytes(b"")
        (record,), _ = read(clips_json(videos=[clips_json()["videos"][0] | {"file_name": name[:3]}]))
        assert record.image.name == name


def test_what_moves_is_present_and_not_asked_for(read):
    (record,), skipped = read(clips_json())
    assert record.id == "7" and record.image == read.folder / "clips/v_a" and record.size == (224, 112)
    assert [(o.name, o.box_px) for o in record.objects] == [("cup", (12, 10, 32, 30))]
    assert record.present == ("cup", "dog") and record.absent == ("sky",) and not skipped


def test_what_cannot_be_used_is_counted(read):
    """A bad box takes its category out of the questions, not out of the clip: NegPred must not deny it."""
    first = clips_json()["annotations"][0]
    changes = (
        {"bbox": [10, 10, 300, 20]},
        {"bbox": None},
        {"frame": 3},
        {"frame": None},
        {"category_id": 3},
        {"video_id": 8},
    )
    bad = [{**first, **change} for change in changes]
    (record,), skipped = read(clips_json(annotations=clips_json()["annotations"] + bad))
    assert record.objects == () and record.present == ("cup", "dog") and record.absent == (), "the unknown one may be sky"
    assert {reason.partition(" (")[0]: count for reason, count in skipped.items()} == {
        "boxes where bbox reaches more than 2 px over the edge of its image": 1,
        "boxes where bbox is not four finite numbers": 1,
        "annotations of frames beyond their clip's last": 2,
        "annotations of unknown categories": 1,
        "annotations of unknown videos": 1,
    }
    (record,), _ = read(clips_json(annotations=[{**first, "iscrowd": 1}]))
    assert record.objects == () and record.present == ("cup",)
    assert read(clips_json(annotations=[]))[0][0].absent == ("cup", "dog", "sky")


def test_another_schema_is_refused_by_name(read):
    refused(r"lacks videos with .*'width'.*is it a clips_", read, {"videos": [{}], "annotations": [], "categories": []})
    refused("lacks annotations with", read, clips_json(annotations=[{"image_id": 7}]))
    refused("lacks videos with", read, clips_json(videos=[{"id": 7, "file_name": "v_a"}]))
    refused("lacks images with", read, {"v_a": {}})
    refused(
        "no .*nothing.json; expected an annotation file",
        read_file,
        read.folder / "nothing.json",
        read.folder,
        error=FileNotFoundError,
    )
    (_,), skipped = read(
        clips_json(videos=[*clips_json()["videos"], {**clips_json()["videos"][0], "id": 8, "file_name": "../x"}])
    )
    assert list(skipped.values()) == [1] and "videos whose path leaves their folder" in next(iter(skipped))


def test_missing_clips_are_listed_and_where_all_are_missing_refused(read):
    video = clips_json()["videos"][0]
    missing = [{**video, "id": i, "file_name": f"v_{i}"} for i in range(10, 17)]
    records, skipped = read(clips_json(videos=[video, *missing]))
    assert len(records) == 1 and list(skipped.values()) == [7]
    assert "v_10, v_11, v_12, v_13, v_14 and 2 more" in next(iter(skipped))
    refused(
        "none of the 7 clips of .*v_10.*as a .mp4",
        read,
        clips_json(videos=missing, annotations=[]),
        error=FileNotFoundError,
    )
    refused("no folder .*nowhere", find_clips, read.folder / "nowhere", error=FileNotFoundError)


def test_a_clip_is_found_under_any_ending(tmp_path):
    """The name as it is goes first, then a folder of frames, then the endings in their order."""
    for name in ("a.gif", "a.mp4", "b.gif", "c.WebM", "d.mkv", "d.txt", "e.avi"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b").mkdir()
    found = {name: path.name for name, path in find_clips(tmp_path).items()}
    assert [found[name] for name in "abcde"] == ["a.mp4", "b", "c.WebM", "d.mkv", "e.avi"]
    assert found["a.gif"] == "a.gif" and "d.txt" not in found


# ----- conversations


def test_both_forms_of_video_chatgpts_file_are_read(read):
    """One record a row; `merge` makes one of a clip's. The tag may stand anywhere, and the converter's .pkl is no clip."""
    raw = [{"q": "What is it?", "a": "A cup.", "video_id": "v_a"}, {"q": "Who?", "a": "A dog. ", "video_id": "v_b"}]
    records, skipped = read(raw)
    assert [r.image.name for r in records] == ["v_a", "v_b.mp4"] and not skipped
    assert [r.conversations for r in records] == [((("What is it?", "A cup."),),), ((("Who?", "A dog."),),)]
    turns = [("human", "What is <video>\nit?"), ("gpt", "A cup."), ("human", "Sure?"), ("gpt", "Yes.")]
    said = [{"from": who, "value": text} for who, text in turns]
    converted = [
        {"id": "x", "video": "v_a.pkl", "conversations": [{**said[0], "value": "What is it?\n<video>"}, said[1]]},
        {"id": "y", "video": "v_a.pkl", "conversations": said},
    ]
    records, _ = read(converted)
    assert records[0].conversations == ((("What is it?", "A cup."),),)
    assert records[1].conversations == ((("What is \nit?", "A cup."), ("Sure?", "Yes.")),)
    (record,) = merge(records)
    assert len(record.conversations) == 2 and record.image.name == "v_a"


def test_rows_that_are_none_are_counted_or_refused(read):
    good = {"q": "What is it?", "a": "A cup.", "video_id": "v_a"}
    turns = [{"from": "human", "value": "<video> Who?"}, {"from": "gpt", "value": "A dog."}]
    bad = [
        ({**good, "a": ""}, "has an empty answer"),
        ({**good, "video_id": 5}, "not a text"),
        ({**good, "video_id": "../v_a"}, "leaves its folder"),
        ({"video": "v_a", "conversations": turns[:1]}, "human and gpt in turn"),
        ({"conversations": turns}, 'has no "video" key'),
        (5, "is no dictionary"),
    ]
    records, skipped = read([good] + [row for row, _ in bad])
    assert len(records) == 1 and skipped.total() == len(bad)
    for index, (row, words) in enumerate(bad, start=1):
        assert any(f"row {index}: " in what and words in what for what in skipped), row
        refused("no usable row.*" + re.escape(words), read, [row])
    refused("list is empty", read, [])


# ----- the moving shapes, and masks


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_clips(folder, {"train": 16}, seed=1)
    return folder


def test_the_moving_shapes_are_read_as_they_were_drawn(moving):
    """What is asked for has one box in all its frames; all categories are named, once; questions come along."""
    records, skipped = read_file(moving / "clips_train.json", moving / "clips")
    told = read_json(moving / "clips_train.json")
    names = {c["id"]: c["name"] for c in told["categories"]}
    assert len(records) == 16 and not skipped
    moved = 0
    for record in records:
        assert sorted(record.present + record.absent) == sorted(NAMES) and record.image.is_dir()
        here = [a for a in told["annotations"] if a["video_id"] == record.id]
        for name in record.present:
            tracks, boxes, frames = zip(
                *((a["track_id"], tuple(a["bbox"]), a["frame"]) for a in here if names[a["category_id"]] == name),
                strict=True,
            )
            stays = len(set(boxes)) == 1 and len(set(frames)) == len(frames)
            moved += len(set(tracks)) == 1 and len(set(boxes)) > 1
            x, y, w, h = boxes[0]
            assert [o.box_px for o in record.objects if o.name == name] == [(x, y, x + w, y + h)] * stays
    assert moved > 3 and sum(len(r.objects) for r in records) > 16
    talks, skipped = read_file(moving / "conversations_train.json", moving / "clips")
    assert not skipped and len(merge(records + talks)) == 16 and all(r.conversations for r in merge(records + talks))


def test_check_opens_every_clip(moving, tmp_path):
    assert check(moving / "clips_train.json", moving / "clips") == []
    shutil.copytree(moving / "clips", tmp_path / "clips")
    first, second, *_ = sorted((tmp_path / "clips").iterdir())
    for frame in first.iterdir():
        frame.write_bytes(frame.read_bytes()[:99])
    shutil.rmtree(second)
    problems = check(moving / "clips_train.json", tmp_path / "clips")
    assert len(problems) == 2 and "are not in" in problems[0] and "cannot be read" in problems[1]


def test_masks_make_the_records_that_boxes_make(moving, tmp_path, capsys):
    """Pseudo-ActNet's way: a folder of panoptic JSONs, through the masks, gives the same objects, present and absent."""
    of_boxes = {r.id: r for r in read_file(moving / "clips_train.json", moving / "clips")[0]}
    write_panoptic(tmp_path / "masks", (0, 4, 8, 12), seed=1)
    (tmp_path / "masks/._000000000001.json").write_bytes(b"a Mac was here")
    panoptic(tmp_path / "masks", moving / "masks.json", check=True)
    assert "boxes equal" in capsys.readouterr().out
    of_masks, skipped = read_file(moving / "masks.json", moving / "clips")
    assert [r.id for r in of_masks] == [f"{i:012d}" for i in (1, 5, 9, 13)] and not skipped
    assert of_masks == [of_boxes[r.id] for r in of_masks]
    refused("leave out --masks", panoptic, tmp_path / "masks", tmp_path / "out.json", masks=tmp_path)
    path = tmp_path / "masks/000000000005.json"
    content = read_json(path)
    content["annotations"][3]["segments_info"][0]["bbox"] = [0, 0, 1, 1]
    path.write_text(json.dumps(content))
    refused("1 boxes differ from their masks", panoptic, tmp_path / "masks", tmp_path / "out.json", check=True)
    assert "000000000005/03.png: segment" in capsys.readouterr().out


def test_bad_masks_are_named(tmp_path):
    """Stuff is no object and no negative, unless wanted; a mask that is missing or of another size is named."""
    refused("no panoptic JSON in .*; each clip needs one", clips_from_panoptic, tmp_path, False, [], error=FileNotFoundError)
    categories = [{"id": 1, "name": "kite", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]
    segments = [{"id": 7, "category_id": 1}, {"id": 8, "category_id": 9}]
    frames = [{"file_name": f"{i}.jpg", "segments_info": segments} for i in (0, 1)]

    def write(name="v_a", **changes):
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotations": frames, "categories": categories, **changes}))
        return tmp_path

    refused("2 masks are not in .*v_a .0.png, 1.png", clips_from_panoptic, write(), False, [], error=FileNotFoundError)
    (tmp_path / "v_a").mkdir()
    for name, size in (("0", (3, 2)), ("1", (4, 2))):
        mask = Image.new("RGB", size, (7, 0, 0))
        mask.putpixel((2, 1), (8, 0, 0))
        mask.save(tmp_path / f"v_a/{name}.png")
    refused(r"v_a.json has masks of sizes \[\(3, 2\), \(4, 2\)\]", clips_from_panoptic, tmp_path, False, [])
    content = clips_from_panoptic(write(annotations=frames[:1]), False, [])
    assert content["categories"] == categories[:1] and content["annotations"] == [
        {"video_id": "v_a", "frame": 0, "track_id": 7, "category_id": 1, "iscrowd": 0, "area": 5, "bbox": [0, 0, 3, 2]}
    ]
    content = clips_from_panoptic(tmp_path, True, [])
    assert len(content["categories"]) == len(content["annotations"]) == 2
    refused("0.png: segments .* have no pixel, pixels .8. no segment", clips_from_panoptic,
            write(annotations=[{**frames[0], "segments_info": segments[:1]}]), False, [])  # fmt: skip
    refused("lacks categories", clips_from_panoptic, write(categories=None), False, [])
    write(annotations=frames[:1])
    (tmp_path / "v_b").mkdir()
    Image.new("RGB", (3, 2), (7, 0, 0)).save(tmp_path / "v_b/0.png")
    other = [{"id": 1, "name": "dog"}]
    refused("v_b.json: category 1 is dog, but kite in an earlier file", clips_from_panoptic,
            write("v_b", categories=other, annotations=[{**frames[0], "segments_info": segments[:1]}]), False, [])  # fmt: skip
