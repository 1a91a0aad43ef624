"""The shapes world in motion: boxes, masks, pictures and questions of a clip agree."""

import json
import random

import numpy as np
import pytest
from conftest import ROOT, mask_of, write_panoptic

from clip_vit import open_image
from formats.files import read_json
from llama import Tokenizer
from tiny.moving import draw_clip, write_clips
from tiny.shapes import NAMES, are_apart
from tools.panoptic import boxes_from_panoptic, panoptic


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
            does["moves" if clip.is_moving(shape) else "comes or goes" if None in track else "stays"] += 1
            assert len(track) == 8 and any(track)
            if clip.is_moving(shape):
                way = np.array(track) - track[0]
                straight = np.linspace(0, 1, 8)[:, None] * way[-1]
                assert abs(way - straight).max() <= 0.5 and np.hypot(*way[-1][:2]) >= 0.3 * min(width, height)
        for index in range(8):
            boxes = [box_px for _, _, box_px in clip.boxes(index)]
            assert all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in boxes)
            assert all(are_apart(a, b, 0) for a in boxes for b in boxes if a is not b)
    assert 0.45 < does["stays"] / sum(does.values()) < 0.65 and min(does.values()) > 20, does


def test_boxes_of_clips_are_those_of_the_pixels(monkeypatch):
    """To the pixel: every mask fills its box, and outside of the masks there is background under grain, nothing else."""
    monkeypatch.setattr("tiny.moving.FLAKES", 0)
    for clip, rng in clips(12):
        for index, image in enumerate(clip.render(rng)):
            mask = mask_of(clip, index)
            ids = {int(i) for i in np.unique(np.asarray(mask).astype(np.int32) @ [1, 256, 65536])} - {0}
            found = boxes_from_panoptic([{"id": i, "category_id": 1} for i in sorted(ids)], mask)
            boxes = [[x1, y1, x2 - x1, y2 - y1] for _, _, (x1, y1, x2, y2) in clip.boxes(index)]
            assert [b["bbox"] for b in found] == boxes
            over = np.asarray(image) - 0.95 * np.array(clip.scene.background)  # what grain added, 0 to 0.05 x 255
            grain_alone = ((over > -2) & (over < 15)).all(-1)
            assert grain_alone[np.asarray(mask).max(-1) == 0].all()


def test_snow_falls_before_the_shapes_and_hides_another_part_in_each_frame(monkeypatch):
    for clip, rng in clips(3):
        state = rng.getstate()
        snowed = np.array([np.asarray(image, float) for image in clip.render(rng)])
        rng.setstate(state)
        with monkeypatch.context() as patch:
            patch.setattr("tiny.moving.FLAKES", 0)
            clear = np.array([np.asarray(image, float) for image in clip.render(rng)])
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
    assert len(written) == 4 + 5 * 8
    for path in written:
        if path.parent.name:  # not the files about all clips
            assert (tmp_path / path).read_bytes() == (moving / path).read_bytes(), path
    few, many = (read_json(folder / "clips_train.json") for folder in (tmp_path, moving))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])] and few["videos"] == many["videos"][:5]
    write_clips(tmp_path / "other", {"train": 1}, seed=4)
    assert read_json(tmp_path / "other/clips_train.json")["annotations"] != few["annotations"]


def test_what_is_told_of_clips_on_disk_is_there(moving):
    """Frames of the annotated size, one category per track."""
    content = read_json(moving / "clips_val.json")
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    for video in content["videos"]:
        frames = sorted((moving / "clips" / video["file_name"]).iterdir())
        assert [frame.name for frame in frames] == [f"{i:02d}.png" for i in range(video["frames"])]
        assert all(open_image(frame).size == (video["width"], video["height"]) for frame in frames)
    tracks = {}
    for a in content["annotations"]:
        assert tracks.setdefault((a["video_id"], a["track_id"]), a["category_id"]) == a["category_id"]
    with pytest.raises(ValueError, match="1 frames per clip; use 2 to 100"):
        write_clips(moving, {"train": 1}, frames=1)


def test_panoptic_masks_of_clips_give_the_boxes_told(moving, tmp_path, capsys):
    """tools.panoptic makes of the masks, pixel by pixel, the boxes of clips_*.json."""
    content = read_json(moving / "clips_train.json")
    write_panoptic(tmp_path / "masks", (0, 4, 8), seed=3)
    for path in sorted((tmp_path / "masks").glob("*.json")):
        panoptic(path, tmp_path / path.name, path.with_suffix(""), check=True)
        found = read_json(tmp_path / path.name)["annotations"]
        wanted = [a for a in content["annotations"] if a["video_id"] == path.stem]
        assert [(a["image_id"] - 1, a["category_id"], a["bbox"]) for a in found] == [
            (a["frame"], a["category_id"], a["bbox"]) for a in wanted
        ]
        areas = {s["area"] for frame in read_json(path)["annotations"] for s in frame["segments_info"]}
        assert areas == {a["area"] for a in found} and "boxes equal" in capsys.readouterr().out


def test_questions_about_clips_are_true_and_in_the_tiny_llamas_words(moving):
    """Sides only of shapes that stay, as their boxes say; what moves, moves; no word needs byte pieces."""
    tokenizer = Tokenizer(ROOT / "tiny/llama")
    kinds = {"left": 0, "right": 0, "No object moves.": 0, "moves.": 0, "move.": 0, "Yes.": 0, "No.": 0}
    for clip, rng in clips(150):
        shapes = {f"the {s.colour} {s.name}": s for s in clip.scene.shapes}
        pairs = {question: answer for question, answer, _ in clip.quiz(rng)}
        assert not any(tokenizer.is_byte(i) for qa in pairs.items() for text in qa for i in tokenizer.encode(text))
        moved = pairs.pop("Which object moves?")
        for words, shape in shapes.items():
            assert clip.is_moving(shape) == (words in moved.lower())
            side = pairs.pop(f"Which side of the image is {words} located?", None)
            centre = (shape.box_px[0] + shape.box_px[2]) / 2 / clip.scene.size[0]
            assert (side is not None) == (not clip.is_moving(shape) and abs(centre - 0.5) > 0.1)
            if side:
                where = "left" if centre < 0.5 else "right"
                assert side.lower() == f"{words} is located at the {where} side."
                kinds[where] += 1
            if answer := pairs.pop(f"Does {words} move?", None):
                assert answer == ("Yes." if clip.is_moving(shape) else "No.")
                kinds[answer] += 1
        kinds[moved if moved in kinds else moved.split()[-1]] += 1
        assert not any("side" in q or "move" in q for q in pairs), "the others are those of a scene"
        assert not any("image" in q for q in pairs), "and ask about the video"
    assert min(kinds.values()) >= 8, kinds
    rows = json.loads((moving / "conversations_val.json").read_text())
    assert all(set(row) == {"q", "a", "video_id"} for row in rows)
    videos = read_json(moving / "clips_val.json")["videos"]
    assert {row["video_id"] for row in rows} == {video["id"] for video in videos}
