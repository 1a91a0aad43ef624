"""The shapes world is what it says it is."""

import json
import random

import numpy as np
import pytest
from checkpoint import read_json
from conftest import ROOT
from prepare import boxes_from_panoptic, panoptic
from shapes import (
    CATEGORY_IDS,
    NAMES,
    apart,
    caption,
    converse,
    converse_clip,
    describe,
    draw_clip,
    draw_scene,
    paint_mask,
    phrase,
    render,
    render_clip,
    write_clips,
    write_world,
)

from clip_vit import open_image
from data import read_records
from llama import Tokenizer


def scenes(count):
    for i in range(count):
        rng = random.Random(i)
        yield draw_scene(rng), rng


def test_boxes_are_tight_around_what_is_painted():
    """All that differs from the background lies in a box, and touches the box's four sides, within two pixels."""
    for scene, rng in scenes(60):
        pixels = np.asarray(render(scene, rng)).astype(int)
        painted = abs(pixels - np.array(scene.background)).max(-1) > 40
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box_px
            inside = np.zeros_like(painted)
            inside[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3] = True
            rows, columns = np.nonzero(painted & inside)
            if len(rows) > 50:  # else its colour is close to the background's
                found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert np.abs(np.subtract(found, shape.box_px)).max() < 5, (shape, found)
        everything = np.zeros_like(painted)
        for x1, y1, x2, y2 in (shape.box_px for shape in scene.shapes):
            everything[max(0, int(y1) - 1) : int(y2) + 2, max(0, int(x1) - 1) : int(x2) + 2] = True
        assert not (painted & ~everything).any()


def test_captions_and_conversations_say_nothing_of_sides():
    """What a model knows of left and right must come from coordinates or descriptions."""
    for scene, rng in scenes(300):
        told = caption(scene, rng) + " ".join(q + a for q, a in converse(scene, rng))
        assert not {"left", "right", "above", "below", "top", "bottom", "side"} & set(
            told.replace(".", " ").replace("?", " ").split()
        )
        listed = [phrase(scene, shape) for shape in scene.shapes]
        order = [told.index(words) for words in listed]
        assert [scene.bigness(s) for s in scene.shapes] == sorted(
            (scene.bigness(s) for s in scene.shapes), reverse=True
        ) and len(order) == len(listed)


def test_descriptions_are_true_of_one_shape():
    for scene, rng in scenes(200):
        for shape in scene.shapes:
            words = describe(scene, shape, rng)
            assert words.startswith(f"{shape.name} that is ") and shape.colour in words
            if " left of the " in words:
                other = next(s for s in scene.shapes if words.endswith(f"left of the {s.colour} {s.name}"))
                assert shape.box_px[0] < other.box_px[0]


def test_the_world_on_disk_is_a_coco_folder(tmp_path):
    """The same seed writes the same world; every category is named; an image's conversations come along."""
    for name in ("a", "b"):
        write_world(tmp_path / name, {"train": 12, "val": 3}, seed=5)
    assert (tmp_path / "a/instances_train.json").read_bytes() == (tmp_path / "b/instances_train.json").read_bytes()
    world = tmp_path / "a"
    files = (f"{what}_train.json" for what in ("instances", "captions", "conversations"))
    records, left_out = read_records([(world / file, world / "images", 1.0) for file in files])
    assert len(records) == 12 and not left_out
    assert all(
        record.captions and record.conversations and set(record.present) | set(record.absent) == set(NAMES)
        for record in records
    )


def test_a_world_of_fewer_shapes_never_names_another(tmp_path):
    """What is not in `names` is not drawn, not told, not asked for, and no category."""
    write_world(tmp_path, {"val": 40}, names=("star", "heart", "ring"))
    told = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert "heart" in told and not any(name in told for name in set(NAMES) - {"star", "heart", "ring"})


def test_a_word_answers_what_a_sentence_does(tmp_path):
    """GQA's file: the short answer is in the full one, but for numbers of a kind that a sentence says as well."""
    write_world(tmp_path, {"val": 30})
    rows = json.loads((tmp_path / "gqa_val.json").read_text())
    images = {path.stem for path in (tmp_path / "images").iterdir()}
    assert len(rows) > 150 and all(row["imageId"] in images for row in rows.values())
    assert all(row["answer"] in row["fullAnswer"].lower().strip(".").replace(",", "").split() for row in rows.values())
    starts = {row["question"].split()[0] for row in rows.values()}
    assert starts == {"How", "What", "Is", "Which"} and "What is in" not in str(rows)


def test_refs_call_a_shape_what_it_is(tmp_path):
    write_world(tmp_path, {"val": 30})
    annotations = json.loads((tmp_path / "instances_val.json").read_text())["annotations"]
    names = {number: name for name, number in CATEGORY_IDS.items()}
    refs = json.loads((tmp_path / "refs_val.json").read_text())["refs"]
    assert len(refs) == len(annotations)
    for ref, shape in zip(refs, annotations, strict=True):
        said = [sentence for _, sentence in ref["sentences"]]
        assert len(set(said)) == len(said) >= 1 and all(names[shape["category_id"]] in sentence for sentence in said)
        assert ref["bbox"] == shape["bbox"] and ref["file_name"] == f"{shape['image_id']:012d}.png"


# ----- clips


def clips(count):
    for i in range(count):
        rng = random.Random(f"clip {i}")
        yield draw_clip(rng), rng


def test_half_of_what_a_clip_shows_stays_and_the_rest_moves_or_comes_or_goes():
    """No two boxes of a frame overlap, all are in the picture, a way is straight and long enough to be seen."""
    does = {"stays": 0, "moves": 0, "comes or goes": 0}
    for clip, _ in clips(200):
        width, height = clip.scene.size
        for shape, track in zip(clip.scene.shapes, clip.tracks, strict=True):
            does["moves" if clip.moving(shape) else "comes or goes" if None in track else "stays"] += 1
            assert len(track) == 8 and any(track)
            if clip.moving(shape):
                way = np.array(track) - track[0]
                straight = np.linspace(0, 1, 8)[:, None] * way[-1]
                assert abs(way - straight).max() <= 0.5 and np.hypot(*way[-1][:2]) >= 0.3 * min(width, height)
        for index in range(8):
            boxes = [box_px for _, _, box_px in clip.boxes(index)]
            assert all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in boxes)
            assert all(apart(a, b, 0) for a in boxes for b in boxes if a is not b)
    assert 0.45 < does["stays"] / sum(does.values()) < 0.65 and min(does.values()) > 20, does


def test_boxes_of_clips_are_those_of_the_pixels(monkeypatch):
    """To the pixel: every mask fills its box, and outside of the masks there is background under grain, nothing else."""
    monkeypatch.setattr("shapes.FLAKES", 0)
    for clip, rng in clips(12):
        for index, image in enumerate(render_clip(clip, rng)):
            mask = paint_mask(clip, index)
            ids = {int(i) for i in np.unique(np.asarray(mask).astype(np.int32) @ [1, 256, 65536])} - {0}
            found = boxes_from_panoptic([{"id": i, "category_id": 1} for i in sorted(ids)], mask)
            assert [b["bbox"] for b in found] == [
                [x1, y1, x2 - x1, y2 - y1] for _, _, (x1, y1, x2, y2) in clip.boxes(index)
            ]
            over = np.asarray(image) - 0.95 * np.array(clip.scene.background)  # what grain added, 0 to 0.05 x 255
            grain_alone = ((over > -2) & (over < 15)).all(-1)
            assert grain_alone[np.asarray(mask).max(-1) == 0].all()


def test_snow_falls_before_the_shapes_and_hides_another_part_in_each_frame(monkeypatch):
    for clip, rng in clips(3):
        state = rng.getstate()
        snowed = np.array([np.asarray(image, float) for image in render_clip(clip, rng)])
        rng.setstate(state)
        with monkeypatch.context() as patch:
            patch.setattr("shapes.FLAKES", 0)
            clear = np.array([np.asarray(image, float) for image in render_clip(clip, rng)])
        hidden = (abs(snowed - clear) > 30).any(-1)  # (frames, H, W); grain is less
        assert 0.01 < hidden.mean() < 0.2 and (snowed - clear > -20).all(), "snow is white"
        assert hidden.all(0).mean() < 0.3 * hidden.mean(), "hardly a pixel is under snow in every frame"


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_clips(folder, {"train": 9, "val": 11}, seed=3)
    return folder


def test_the_same_seed_writes_the_same_clips(moving, tmp_path):
    write_clips(tmp_path, {"train": 5}, seed=3)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 4 + 5 * 8 + 2 * 9
    for path in written:
        if path.parent.name:  # not the two files that tell of all clips
            assert (tmp_path / path).read_bytes() == (moving / path).read_bytes(), path
    few, many = (read_json(folder / "clips_train.json") for folder in (tmp_path, moving))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])] and few["videos"] == many["videos"][:5]
    write_clips(tmp_path / "other", {"train": 1}, seed=4)
    assert read_json(tmp_path / "other/clips_train.json")["annotations"] != few["annotations"]


def test_what_is_told_of_clips_on_disk_is_there(moving):
    """Frames of the size told, a track's category and the box in every frame; GIFs of every tenth val clip alone."""
    told = read_json(moving / "clips_val.json")
    assert [c["name"] for c in told["categories"]] == list(NAMES)
    for video in told["videos"]:
        frames = sorted((moving / "clips" / video["file_name"]).iterdir())
        assert [frame.name for frame in frames] == [f"{i:02d}.png" for i in range(video["frames"])]
        assert all(open_image(frame).size == (video["width"], video["height"]) for frame in frames)
    tracks = {}
    for a in told["annotations"]:
        assert tracks.setdefault((a["video_id"], a["track_id"]), a["category_id"]) == a["category_id"]
    assert [path.stem for path in sorted((moving / "clips").glob("*.gif"))] == ["000001000001", "000001000011"]
    with pytest.raises(ValueError, match="1 frames a clip; expected 2 to 100"):
        write_clips(moving, {"train": 1}, frames=1)


def test_panoptic_masks_of_clips_give_the_boxes_told(moving, tmp_path, capsys):
    """`prepare.py panoptic` makes of the masks, pixel by pixel, what clips_*.json tells: every fourth clip."""
    told = read_json(moving / "clips_train.json")
    files = sorted((moving / "panoptic_train").glob("*.json"))
    assert [path.stem for path in files] == ["000000000001", "000000000005", "000000000009"]
    for path in files:
        panoptic(path, path.with_suffix(""), tmp_path / path.name, check=True)
        found = read_json(tmp_path / path.name)["annotations"]
        here = [a for a in told["annotations"] if a["video_id"] == path.stem]
        assert [(a["image_id"] - 1, a["category_id"], a["bbox"]) for a in found] == [
            (a["frame"], a["category_id"], a["bbox"]) for a in here
        ]
        content = read_json(path)
        areas = {s["area"] for frame in content["annotations"] for s in frame["segments_info"]}
        assert areas == {a["area"] for a in found} and "boxes equal" in capsys.readouterr().out


def test_questions_about_clips_are_true_and_in_the_tiny_llamas_words(moving):
    """Sides of what stays only, as its box has them; what moves, moves; no word needs byte pieces."""
    tokenizer = Tokenizer(ROOT / "tiny/llama")
    kinds = {"left": 0, "right": 0, "No object moves.": 0, "moves.": 0, "move.": 0, "Yes.": 0, "No.": 0}
    for clip, rng in clips(150):
        known = {f"the {s.colour} {s.name}": s for s in clip.scene.shapes}
        pairs = dict(converse_clip(clip, rng))
        assert not any(
            tokenizer.pieces.is_byte(i) for qa in pairs.items() for text in qa for i in tokenizer.encode(text)
        )
        moved = pairs.pop("Which object moves?")
        for words, shape in known.items():
            assert clip.moving(shape) == (words in moved.lower())
            side = pairs.pop(f"Which side of the image is {words} located?", None)
            centre = (shape.box_px[0] + shape.box_px[2]) / 2 / clip.scene.size[0]
            assert (side is not None) == (not clip.moving(shape) and abs(centre - 0.5) > 0.1)
            if side:
                where = "left" if centre < 0.5 else "right"
                assert side.lower() == f"{words} is located at the {where} side."
                kinds[where] += 1
            if answer := pairs.pop(f"Does {words} move?", None):
                assert answer == ("Yes." if clip.moving(shape) else "No.")
                kinds[answer] += 1
        kinds[moved if moved in kinds else moved.split()[-1]] += 1
        assert not any("side" in q or "move" in q for q in pairs), "the others are those of a scene"
        assert not any("image" in q for q in pairs), "and ask about the video"
    assert min(kinds.values()) >= 8, kinds
    rows = json.loads((moving / "conversations_val.json").read_text())
    assert all(set(row) == {"q", "a", "video_id"} for row in rows)
    assert {row["video_id"] for row in rows} == {
        video["id"] for video in read_json(moving / "clips_val.json")["videos"]
    }
