"""The shapes world in motion, written to disk in the formats of clips: `python -m tiny.moving FOLDER`, a minute.

Functions of a seed, as in tiny.shapes. Questions about clips also ask which side a shape is on, if it does not move.
"""

import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from formats.files import run_command, write_json
from tiny import shapes as world

CLIPS = {"train": 600, "val": 100}
QA_TYPES = {"Which side": 1, "Is": 3, "Does": 3, "What colour": 4, "How many": 7}  # ActivityNet-QA's; 8 is the rest
FLAKES, WHITE = 12, (245, 245, 245)
TRAVEL = 0.3  # least distance that a moving shape covers, of the shorter edge: far more than a static object may


@dataclass(frozen=True)
class Clip:
    """A scene in time. Boxes are whole pixels, so that annotations and pictures agree exactly."""

    scene: world.Scene  # all its shapes, each with the box where it first appears
    tracks: tuple  # for each of scene.shapes, its box_px in every frame, None where it is absent

    def boxes(self, index):
        """List the shapes in a frame: (number in scene.shapes, shape, box_px)."""
        shapes = zip(self.scene.shapes, self.tracks, strict=True)
        return [(number, shape, track[index]) for number, (shape, track) in enumerate(shapes) if track[index]]

    def is_moving(self, shape):
        return len(set(self.tracks[self.scene.shapes.index(shape)]) - {None}) > 1

    def parts(self, index, fills):
        """List the shapes in a frame for `Scene.paint`. They touch no pixel beside their boxes."""
        k, boxes = world.SCALE, self.boxes(index)
        return [(shape.name, (k * x1, k * y1, k * x2 - 1, k * y2 - 1), fills[i]) for i, shape, (x1, y1, x2, y2) in boxes]

    def render(self, rng):
        """Yield the frames, PIL RGB images. A shape keeps its shade; each frame has its own grain. Snow falls in front of the
        shapes, so that a single frame shows less than the clip. Boxes ignore the snow."""
        (width, height), shades = self.scene.size, [shape.shade(rng) for shape in self.scene.shapes]
        snow = [(rng.uniform(0.02, 0.06), rng.random(), rng.random(), rng.uniform(0.1, 0.3)) for _ in range(FLAKES)]
        for index in range(len(self.tracks[0])):
            parts = self.parts(index, shades)
            for radius, left, start, fall in snow:  # a flake that leaves at the bottom returns at the top
                x, r = left * width, radius * min(width, height)
                y = (start * height + fall * height * index) % (height + 2 * r) - r
                parts.append(("circle", [v * world.SCALE for v in (x - r, y - r, x + r, y + r)], WHITE))
            yield self.scene.render(rng, parts)

    def quiz(self, rng):
        """Draw (question, answer, short answer) rows, as `Scene.quiz`: about the scene, what moves, sides of what stays."""
        moving = [shape for shape in self.scene.shapes if self.is_moving(shape)]
        moved = world.enumerate_words([f"the {shape}" for shape in moving]) if moving else "no object"
        one = rng.choice(self.scene.shapes)
        rows = [(question.replace("image", "video"), *answers) for question, *answers in self.scene.quiz(rng)]
        rows.append(("Which object moves?", f"{moved} {'move' if moving[1:] else 'moves'}.".capitalize(), None))
        rows.append((f"Does the {one} move?", *(("Yes.", "yes") if one in moving else ("No.", "no"))))
        for shape in self.scene.shapes:
            centre = (shape.box_px[0] + shape.box_px[2]) / 2 / self.scene.size[0]
            if shape not in moving and not 0.4 <= centre <= 0.6:  # the paper skips the central 20 % (App. C)
                question, side = f"Which side of the image is the {shape} located?", "left" if centre < 0.5 else "right"
                rows.append((question, f"The {shape} is located at the {side} side.", side))
        rng.shuffle(rows)
        return rows


def draw_clip(rng, frames=8):
    """Draw a clip: about half of its shapes stay; the others move in a straight line, or come or go. None overlap."""
    scene, tracks = world.draw_scene(rng), []
    for x1, y1, x2, y2 in (shape.box_px for shape in scene.shapes):
        tracks.append([(round(x1), round(y1), round(x1) + round(x2 - x1), round(y1) + round(y2 - y1))] * frames)
    shapes = tuple(replace(shape, box_px=track[0]) for shape, track in zip(scene.shapes, tracks, strict=True))
    for number in rng.sample(range(len(shapes)), len(shapes)):  # the first has the most room to move
        behaviour = rng.choices(("stays", "moves", "comes or goes"), (4, 3, 3))[0]
        if behaviour == "moves":
            others = tracks[:number] + tracks[number + 1 :]
            tracks[number] = draw_path(shapes[number].box_px, others, scene.size, frames, rng) or tracks[number]
        elif behaviour == "comes or goes":
            change = rng.randrange(max(1, frames // 3), frames - frames // 3)  # near the middle
            present = rng.choices((range(change), range(change, frames), range(change, change + 1)), (4, 4, 1))[0]
            tracks[number] = [box_px if i in present else None for i, box_px in enumerate(tracks[number])]
    return Clip(replace(scene, shapes=shapes), tuple(map(tuple, tracks)))


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


def write_clips(folder, clips=CLIPS, frames=8, seed=0):
    """Write the world in motion with so many clips per split.

    clips/CLIP/00.png ...       frames
    conversations_SPLIT.json    [{q, a, video_id}], as Video-ChatGPT's VideoInstruct_Dataset.json
    {q,a}_SPLIT.json            ActivityNet-QA's questions and answers: those of the above that one word answers
    clips_SPLIT.json            COCO's, but of videos, with a frame and a track_id per box. Written last, completes a split
    """
    if not 2 <= frames <= 100:
        raise ValueError(f"{frames} frames per clip; use 2 to 100, because file names have two digits")
    categories = [{"id": i, "name": name, "supercategory": "shape", "isthing": 1} for name, i in world.CATEGORY_IDS.items()]
    for split, count in clips.items():
        videos, annotations, talks, questions, answers = [], [], [], [], []
        for index in tqdm(range(count), desc=split, disable=None):
            rng, clip_id = random.Random(f"{seed} clip {split} {index}"), f"{index + world.FIRST_IDS.get(split, 1):012d}"
            clip, into = draw_clip(rng, frames), Path(folder) / "clips" / clip_id
            images, (width, height) = list(clip.render(rng)), clip.scene.size
            videos.append({"id": clip_id, "file_name": clip_id, "width": width, "height": height, "frames": frames})
            into.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):  # grain does not compress: level 1 is five times faster, and no larger
                image.save(into / f"{i:02d}.png", compress_level=1)
                for number, shape, (x1, y1, x2, y2) in clip.boxes(i):
                    row = {"video_id": clip_id, "frame": i, "category_id": world.CATEGORY_IDS[shape.name]}
                    annotations.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1], "track_id": number + 1, "iscrowd": 0})
            for number, (question, answer, short) in enumerate(clip.quiz(rng)):
                talks.append({"q": question, "a": answer, "video_id": clip_id})
                if short:
                    kind = next((kind for words, kind in QA_TYPES.items() if question.startswith(words)), 8)
                    questions.append({"question_id": f"{clip_id}_{number}", "question": question, "video_name": clip_id})
                    answers.append({"question_id": f"{clip_id}_{number}", "answer": short, "type": kind})
        info = {"description": "shapes world in motion", "seed": seed}
        coco = {"info": info, "videos": videos, "annotations": annotations, "categories": categories}
        for name, content in {"conversations": talks, "q": questions, "a": answers, "clips": coco}.items():
            write_json(Path(folder) / f"{name}_{split}.json", content, indent=None)


def ensure_clips(folder="data/moving"):
    return world.ensure_world(folder, write_clips, "clips_val.json")


if __name__ == "__main__":
    run_command("tiny.moving", lambda: ensure_clips(*sys.argv[1:2]), "FOLDER")
