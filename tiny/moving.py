"""The shapes world in motion, written to disk in the formats of clips.

    python -m tiny.moving FOLDER      see `write_clips`

Functions of a seed, as in tiny.shapes: `draw_clip` moves the shapes of a scene, `render_clip` paints the frames, `paint_mask`
their panoptic masks, `quiz_clip` asks about the clip. Unlike conversations about images, these also ask for sides ("Which side
..."), of shapes that stay.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from formats.files import write_json
from tiny import shapes as world

CLIPS = {"train": 600, "val": 100}
QA_TYPES = {"Which side": 1, "Is": 3, "Does": 3, "What colour": 4, "How many": 7}  # ActivityNet-QA's; 8 is the rest
FLAKES = 12
WHITE = (245, 245, 245)
TRAVEL = 0.3  # least distance that a moving shape covers, of the shorter edge: far more than a static object may


@dataclass(frozen=True)
class Clip:
    """A scene in time. Boxes are whole pixels, so that annotations, masks and pictures agree exactly."""

    scene: world.Scene  # all its shapes, each with the box where it first appears
    tracks: tuple  # for each of scene.shapes, its box_px in every frame, None where it is absent

    def boxes(self, index):
        """List the shapes in a frame: (number in scene.shapes, shape, box_px)."""
        shapes = zip(self.scene.shapes, self.tracks, strict=True)
        return [(number, shape, track[index]) for number, (shape, track) in enumerate(shapes) if track[index]]

    def is_moving(self, shape):
        return len(set(self.tracks[self.scene.shapes.index(shape)]) - {None}) > 1


def draw_clip(rng, frames=8):
    """Draw a clip: about half of its shapes stay; the others move in a straight line, or come or go. None overlap."""
    scene, shapes = world.draw_scene(rng), []
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box_px
        box_px = round(x1), round(y1), round(x1) + round(x2 - x1), round(y1) + round(y2 - y1)
        shapes.append(replace(shape, box_px=box_px))
    tracks = [[shape.box_px] * frames for shape in shapes]
    for number in rng.sample(range(len(shapes)), len(shapes)):  # the first has the most room to move
        behaviour = rng.choices(("stays", "moves", "comes or goes"), (4, 3, 3))[0]
        if behaviour == "moves":
            others = tracks[:number] + tracks[number + 1 :]
            tracks[number] = draw_path(shapes[number].box_px, others, scene.size, frames, rng) or tracks[number]
        elif behaviour == "comes or goes":
            change = rng.randrange(max(1, frames // 3), frames - frames // 3)  # near the middle
            present = rng.choices((range(change), range(change, frames), range(change, change + 1)), (4, 4, 1))[0]
            tracks[number] = [box_px if i in present else None for i, box_px in enumerate(tracks[number])]
    return Clip(world.Scene(scene.size, tuple(shapes), scene.background), tuple(map(tuple, tracks)))


def draw_path(box_px, others, size, frames, rng):
    """Draw a straight path for a box, clear of the other tracks in every frame: its boxes, or None if there is no room."""
    x1, y1, x2, y2 = box_px
    for _ in range(100):
        dx, dy = rng.randint(1, size[0] - (x2 - x1) - 1) - x1, rng.randint(1, size[1] - (y2 - y1) - 1) - y1
        steps = [(round(dx * i / (frames - 1)), round(dy * i / (frames - 1))) for i in range(frames)]
        track = [(x1 + x, y1 + y, x2 + x, y2 + y) for x, y in steps]
        is_clear = all(world.are_apart(a, b, 0) for other in others for a, b in zip(track, other, strict=True) if b)
        if is_clear and math.hypot(dx, dy) >= TRAVEL * min(size):
            return track
    return None


def draw_flake(width, height, rng):
    """Draw a snowflake: x, y, radius, and how far it falls from one frame to the next, all in pixels."""
    r = rng.uniform(0.02, 0.06) * min(width, height)
    return rng.uniform(0, width), rng.uniform(0, height), r, rng.uniform(0.1, 0.3) * height


def on_canvas(box_px):
    """Scale a box in whole pixels for `paint`, so that no pixel beside it is touched."""
    x1, y1, x2, y2 = box_px
    return x1 * world.SCALE, y1 * world.SCALE, x2 * world.SCALE - 1, y2 * world.SCALE - 1


def render_clip(clip, rng):
    """Paint the frames of a clip: list of PIL RGB images. A shape keeps its shade; each frame has its own grain.

    Snow falls in front of the shapes, so that a single frame shows less than the clip. Masks and boxes ignore the snow.
    """
    shades, frames = [world.shade(shape.colour, rng) for shape in clip.scene.shapes], []
    width, height = clip.scene.size
    snow = [draw_flake(width, height, rng) for _ in range(FLAKES)]
    for index in range(len(clip.tracks[0])):
        image, pen = world.canvas("RGB", clip.scene.size, clip.scene.background)
        for number, shape, box_px in clip.boxes(index):
            world.paint(pen, shape.name, on_canvas(box_px), shades[number])
        for x, y, r, fall in snow:
            y = (y + fall * index) % (height + 2 * r) - r  # a flake that left at the bottom returns at the top
            pen.ellipse([v * world.SCALE for v in (x - r, y - r, x + r, y + r)], fill=WHITE)
        frames.append(world.finish(image, rng))
    return frames


def segment_id(number, shape):
    """Return a segment's id in the masks, the same in all frames, and so large that it fills all three bytes of a pixel."""
    return 70_000 * (number + 1) + world.CATEGORY_IDS[shape.name]


def paint_mask(clip, index):
    """Paint the segments of a frame as COCO's panoptic PNGs encode them: id = R + 256 G + 65536 B, 0 for no segment."""
    image, pen = world.canvas("L", clip.scene.size, 0)
    for number, shape, box_px in clip.boxes(index):
        world.paint(pen, shape.name, on_canvas(box_px), number + 1)
    width, height = clip.scene.size
    numbers = np.asarray(image).reshape(height, world.SCALE, width, world.SCALE).max((1, 3))  # (H, W): touched at all
    ids = np.array([0] + [segment_id(n, shape) for n, shape in enumerate(clip.scene.shapes)])[numbers]
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def quiz_clip(clip, rng):
    """Draw (question, answer, short answer) rows about a clip, as `quiz`: about its scene, what moves, sides of what stays."""

    def name_of(shape):
        return f"the {shape.colour} {shape.name}"  # no two shapes share both

    def sentence(subject, predicate):
        return f"{subject[0].upper()}{subject[1:]} {predicate}."

    scene = clip.scene
    moving = [shape for shape in scene.shapes if clip.is_moving(shape)]
    names, verb = [name_of(shape) for shape in moving], "moves" if len(moving) == 1 else "move"
    one = rng.choice(scene.shapes)
    rows = [(question.replace("image", "video"), *answers) for question, *answers in world.quiz(scene, rng)]
    rows.append(("Which object moves?", sentence(world.enumerate_words(names), verb) if moving else "No object moves.", None))
    rows.append((f"Does {name_of(one)} move?", *(("Yes.", "yes") if one in moving else ("No.", "no"))))
    for shape in scene.shapes:
        centre = (shape.box_px[0] + shape.box_px[2]) / 2 / scene.size[0]
        if shape not in moving and not 0.4 <= centre <= 0.6:  # the paper skips the central 20 % (App. C)
            side = "left" if centre < 0.5 else "right"
            question = f"Which side of the image is {name_of(shape)} located?"
            rows.append((question, sentence(name_of(shape), f"is located at the {side} side"), side))
    rng.shuffle(rows)
    return rows


# ----- to disk


def write_clips(folder, clips=CLIPS, frames=8, seed=0):
    """Write the world in motion with so many clips per split. It is complete once every clips_*.json exists.

    clips/CLIP/00.png ...         frames; for every tenth val clip also clips/CLIP.gif, its colours slightly off
    clips_SPLIT.json              videos [{id, file_name, width, height, frames}], categories, annotations
                                  [{video_id, frame, category_id, bbox, track_id, iscrowd}]: COCO's, one box per frame
    conversations_SPLIT.json      [{q, a, video_id}], as Video-ChatGPT's VideoInstruct_Dataset.json
    {q,a}_SPLIT.json              ActivityNet-QA's questions and answers: those of the above that one word answers
    panoptic_SPLIT/CLIP.json      for every fourth clip: COCO's panoptic format, one annotation per frame,
    panoptic_SPLIT/CLIP/00.png    and its masks
    """
    if not 2 <= frames <= 100:
        raise ValueError(f"{frames} frames per clip; use 2 to 100, because file names have two digits")
    folder = Path(folder)
    categories = [{"id": i, "name": name, "supercategory": "shape", "isthing": 1} for name, i in world.CATEGORY_IDS.items()]
    for split, count in clips.items():
        info, files = {"description": "shapes world in motion", "seed": seed}, {"conversations": [], "q": [], "a": []}
        files["clips"] = {"info": info, "videos": [], "annotations": [], "categories": categories}
        for index in range(count):
            rng = random.Random(f"{seed} clip {split} {index}")
            clip, clip_id = draw_clip(rng, frames), f"{world.number_of(split, index):012d}"
            write_frames(folder / "clips" / clip_id, render_clip(clip, rng), gif=split == "val" and index % 10 == 0)
            if index % 4 == 0:
                write_panoptic(folder / f"panoptic_{split}", clip_id, clip, categories)
            add_clip(files, clip, clip_id, rng)
        world.write_split(folder, split, files)


def write_frames(folder, images, gif):
    """Write the frames of a clip as PNGs, and with `gif` as an animation beside their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):  # grain does not compress: level 1 is five times faster, and no larger
        image.save(folder / f"{i:02d}.png", compress_level=1)
    if gif:
        images[0].save(folder.with_suffix(".gif"), save_all=True, append_images=images[1:], duration=125, loop=0)


def add_clip(files, clip, clip_id, rng):
    """Add what the JSON files say about one clip."""
    (width, height), frames = clip.scene.size, len(clip.tracks[0])
    row = {"id": clip_id, "file_name": clip_id, "width": width, "height": height, "frames": frames}
    files["clips"]["videos"].append(row)
    for i in range(frames):
        for number, shape, (x1, y1, x2, y2) in clip.boxes(i):
            row = {"video_id": clip_id, "frame": i, "category_id": world.CATEGORY_IDS[shape.name]}
            row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "track_id": number + 1, "iscrowd": 0}
            files["clips"]["annotations"].append(row)
    for number, (question, answer, short) in enumerate(quiz_clip(clip, rng)):
        files["conversations"].append({"q": question, "a": answer, "video_id": clip_id})
        if short:
            name = f"{clip_id}_{number}"
            kind = next((kind for words, kind in QA_TYPES.items() if question.startswith(words)), 8)
            files["q"].append({"question_id": name, "question": question, "video_name": clip_id})
            files["a"].append({"question_id": name, "answer": short, "type": kind})


def write_panoptic(folder, clip_id, clip, categories):
    """Write a clip as a segmenter would: one mask per frame, and one JSON beside their folder."""
    (folder / clip_id).mkdir(parents=True, exist_ok=True)
    annotations = []
    for index in range(len(clip.tracks[0])):
        mask, segments = paint_mask(clip, index), []
        mask.save(folder / clip_id / f"{index:02d}.png")
        ids = np.asarray(mask).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        for number, shape, (x1, y1, x2, y2) in clip.boxes(index):
            segment, bbox = segment_id(number, shape), [x1, y1, x2 - x1, y2 - y1]
            row = {"id": segment, "category_id": world.CATEGORY_IDS[shape.name], "bbox": bbox}
            segments.append(row | {"area": int((ids == segment).sum()), "iscrowd": 0})
        annotations.append({"file_name": f"{index:02d}.png", "segments_info": segments})
    write_json(folder / f"{clip_id}.json", {"annotations": annotations, "categories": categories})


def ensure_clips(folder="data/moving"):
    """Return the folder of the default clips; write them if they are missing."""
    if not (Path(folder) / "clips_val.json").exists():
        print(f"writing the shapes world in motion to {folder}")
        write_clips(folder)
    return Path(folder)


if __name__ == "__main__":
    world.run(write_clips)
