"""TODO tiny.moving."""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from formats.files import write_json
from tiny.shapes import CATEGORY_IDS, SCALE, Scene, apart, canvas, draw_scene, finish, listed, paint, quiz, shade

CLIPS = {"train": 600, "val": 100}
QA_TYPES = {"Which side": 1, "Is": 3, "Does": 3, "What colour": 4, "How many": 7}  # ActivityNet-QA's; 8 is the rest
FLAKES = 12
WHITE = (245, 245, 245)
TRAVEL = 0.3  # least way of a shape that moves, of the shorter edge: well over what counts as static


# ----- clips: the same world in motion


@dataclass(frozen=True)
class Clip:
    """A scene in time. Boxes are in whole pixels: what is told, what a mask holds and what is seen agree exactly."""

    scene: Scene  # every shape that is ever there, with its box where it is first seen
    tracks: tuple  # for each of scene.shapes its box_px in every frame, None where it is not there

    def boxes(self, index):
        """What is there in a frame: (number in scene.shapes, shape, box_px) each."""
        return [
            (number, shape, track[index])
            for number, (shape, track) in enumerate(zip(self.scene.shapes, self.tracks, strict=True))
            if track[index]
        ]

    def moving(self, shape):
        return len(set(self.tracks[self.scene.shapes.index(shape)]) - {None}) > 1


def draw_clip(rng, frames=8):
    """Draw a clip: about half of its shapes stay, the others cross it in a straight line, or come or go; none overlap."""
    scene = draw_scene(rng)
    shapes = []
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box_px
        box_px = round(x1), round(y1), round(x1) + round(x2 - x1), round(y1) + round(y2 - y1)
        shapes.append(replace(shape, box_px=box_px))
    tracks = [[shape.box_px] * frames for shape in shapes]
    for number in rng.sample(range(len(shapes)), len(shapes)):  # whoever comes first has most room to move
        does = rng.choices(("stays", "moves", "comes or goes"), (4, 3, 3))[0]
        if does == "moves":
            others = tracks[:number] + tracks[number + 1 :]
            tracks[number] = draw_way(shapes[number].box_px, others, scene.size, frames, rng) or tracks[number]
        elif does == "comes or goes":
            at = rng.randrange(max(1, frames // 3), frames - frames // 3)  # about the middle
            there = rng.choices((range(at), range(at, frames), range(at, at + 1)), (4, 4, 1))[0]
            tracks[number] = [box_px if i in there else None for i, box_px in enumerate(tracks[number])]
    return Clip(Scene(scene.size, tuple(shapes), scene.background), tuple(map(tuple, tracks)))


def draw_way(box_px, others, size, frames, rng):
    """Draw a straight way for a box, clear of the other tracks in every frame: its boxes, or None where there is no room."""
    x1, y1, x2, y2 = box_px
    for _ in range(100):
        dx, dy = rng.randint(1, size[0] - (x2 - x1) - 1) - x1, rng.randint(1, size[1] - (y2 - y1) - 1) - y1
        steps = [(round(dx * i / (frames - 1)), round(dy * i / (frames - 1))) for i in range(frames)]
        track = [(x1 + x, y1 + y, x2 + x, y2 + y) for x, y in steps]
        clear = all(apart(a, b, 0) for other in others for a, b in zip(track, other, strict=True) if b)
        if clear and math.hypot(dx, dy) >= TRAVEL * min(size):
            return track
    return None


def draw_flake(width, height, rng):
    """Draw a flake of snow, all in pixels: x, y, radius, and how far it falls from one frame to the next."""
    r = rng.uniform(0.02, 0.06) * min(width, height)
    return rng.uniform(0, width), rng.uniform(0, height), r, rng.uniform(0.1, 0.3) * height


def on_canvas(box_px):
    """A box in whole pixels as `paint` takes it, so that no pixel beside it is touched."""
    x1, y1, x2, y2 = box_px
    return x1 * SCALE, y1 * SCALE, x2 * SCALE - 1, y2 * SCALE - 1


def render_clip(clip, rng):
    """Paint the frames of a clip: list of PIL RGB. A shape keeps its shade; the grain is another in each frame.

    It snows before the shapes, so that a frame alone shows less than the clip. Masks and boxes know nothing of the snow.
    """
    shades, frames = [shade(shape.colour, rng) for shape in clip.scene.shapes], []
    width, height = clip.scene.size
    snow = [draw_flake(width, height, rng) for _ in range(FLAKES)]
    for index in range(len(clip.tracks[0])):
        image, pen = canvas("RGB", clip.scene.size, clip.scene.background)
        for number, shape, box_px in clip.boxes(index):
            paint(pen, shape.name, on_canvas(box_px), shades[number])
        for x, y, r, fall in snow:
            y = (y + fall * index) % (height + 2 * r) - r  # what falls out below comes in above
            pen.ellipse([v * SCALE for v in (x - r, y - r, x + r, y + r)], fill=WHITE)
        frames.append(finish(image, rng))
    return frames


def segment_id(number, shape):
    """A segment's id in the masks, the same in all frames; so spread that it needs all three bytes of a pixel."""
    return 70_000 * (number + 1) + CATEGORY_IDS[shape.name]


def paint_mask(clip, index):
    """Paint the segments of a frame as COCO's panoptic PNGs spell them: id = R + 256 G + 65536 B, 0 where none is."""
    image, pen = canvas("L", clip.scene.size, 0)
    for number, shape, box_px in clip.boxes(index):
        paint(pen, shape.name, on_canvas(box_px), number + 1)
    width, height = clip.scene.size
    numbers = np.asarray(image).reshape(height, SCALE, width, SCALE).max((1, 3))  # (H, W): touched at all
    ids = np.array([0] + [segment_id(n, shape) for n, shape in enumerate(clip.scene.shapes)])[numbers]
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def converse_clip(clip, rng):
    """Draw question-and-answer pairs about a whole clip: those of a scene, what moves, and the side of what stays."""
    return [(question, answer) for question, answer, _ in quiz_clip(clip, rng)]


def quiz_clip(clip, rng):
    """The pairs of `converse_clip`, each with its answer in a word, or None, as `quiz`."""

    def named(shape):
        return f"the {shape.colour} {shape.name}"  # no two shapes have both

    def said(words, rest):
        return f"{words[0].upper()}{words[1:]} {rest}."

    scene = clip.scene
    moving = [shape for shape in scene.shapes if clip.moving(shape)]
    moved = said(listed([named(s) for s in moving]), "moves" if len(moving) == 1 else "move") if moving else None
    one = rng.choice(scene.shapes)
    asked = [(question.replace("image", "video"), *answers) for question, *answers in quiz(scene, rng)]
    moves = one in moving
    asked += [
        ("Which object moves?", moved or "No object moves.", None),
        (f"Does {named(one)} move?", "Yes." if moves else "No.", "yes" if moves else "no"),
    ]
    for shape in scene.shapes:
        centre = (shape.box_px[0] + shape.box_px[2]) / 2 / scene.size[0]
        if shape not in moving and not 0.4 <= centre <= 0.6:  # the paper's central 20 % (App. C)
            side = "left" if centre < 0.5 else "right"
            question = f"Which side of the image is {named(shape)} located?"
            asked.append((question, said(named(shape), f"is located at the {side} side"), side))
    rng.shuffle(asked)
    return asked


def write_clips(folder, clips=CLIPS, frames=8, seed=0):
    """Write the world in motion: `clips` says how many in each split. Complete when clips_*.json stand there.

    clips/CLIP/00.png ...         frames; of every tenth val clip clips/CLIP.gif as well, its colours a little off
    clips_SPLIT.json              videos [{id, file_name, width, height, frames}], categories, annotations
                                  [{video_id, frame, category_id, bbox, track_id, iscrowd}]: COCO's, a box a frame
    conversations_SPLIT.json      [{q, a, video_id}], as Video-ChatGPT's VideoInstruct_Dataset.json
    {q,a}_SPLIT.json              ActivityNet-QA's questions and answers: what of these is answered in a word
    panoptic_SPLIT/CLIP.json      for every fourth clip: COCO's panoptic format, an annotation a frame,
    panoptic_SPLIT/CLIP/00.png    and its masks
    """
    if not 2 <= frames <= 100:
        raise ValueError(f"{frames} frames a clip; expected 2 to 100, two digits in a file's name; change frames")
    folder = Path(folder)
    categories = [{"id": i, "name": name, "supercategory": "shape", "isthing": 1} for name, i in CATEGORY_IDS.items()]
    for split, count in clips.items():
        told = {"info": {"description": "shapes world in motion", "seed": seed}, "videos": [], "annotations": []}
        told["categories"], conversations, questions, answers = categories, [], [], []
        for index in range(count):
            rng = random.Random(f"{seed} clip {split} {index}")
            clip = draw_clip(rng, frames)
            clip_id = f"{index + 1 + (1_000_000 if split == 'val' else 0):012d}"
            images = render_clip(clip, rng)
            (folder / "clips" / clip_id).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                # grain does not compress: level 1 is five times faster, and no larger
                image.save(folder / "clips" / clip_id / f"{i:02d}.png", compress_level=1)
            if split == "val" and index % 10 == 0:
                images[0].save(
                    folder / f"clips/{clip_id}.gif", save_all=True, append_images=images[1:], duration=125, loop=0
                )
            width, height = clip.scene.size
            told["videos"].append(
                {"id": clip_id, "file_name": clip_id, "width": width, "height": height, "frames": frames}
            )
            for i in range(frames):
                for number, shape, (x1, y1, x2, y2) in clip.boxes(i):
                    told["annotations"].append(
                        {
                            "video_id": clip_id,
                            "frame": i,
                            "category_id": CATEGORY_IDS[shape.name],
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "track_id": number + 1,
                            "iscrowd": 0,
                        }
                    )
            if index % 4 == 0:
                write_panoptic(folder / f"panoptic_{split}", clip_id, clip, categories)
            for number, (q, a, short) in enumerate(quiz_clip(clip, rng)):
                conversations.append({"q": q, "a": a, "video_id": clip_id})
                if short:
                    kind = next((kind for words, kind in QA_TYPES.items() if q.startswith(words)), 8)
                    questions.append({"question_id": f"{clip_id}_{number}", "question": q, "video_name": clip_id})
                    answers.append({"question_id": f"{clip_id}_{number}", "answer": short, "type": kind})
        write_json(folder / f"conversations_{split}.json", conversations)
        write_json(folder / f"q_{split}.json", questions)
        write_json(folder / f"a_{split}.json", answers)
        write_json(folder / f"clips_{split}.json", told)


def write_panoptic(folder, clip_id, clip, categories):
    """Write a clip as a segmenter would: a mask a frame, and one JSON beside their folder."""
    (folder / clip_id).mkdir(parents=True, exist_ok=True)
    annotations = []
    for index in range(len(clip.tracks[0])):
        mask, segments = paint_mask(clip, index), []
        mask.save(folder / clip_id / f"{index:02d}.png")
        ids = np.asarray(mask).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        for number, shape, (x1, y1, x2, y2) in clip.boxes(index):
            segment = segment_id(number, shape)
            segments.append(
                {
                    "id": segment,
                    "category_id": CATEGORY_IDS[shape.name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int((ids == segment).sum()),
                    "iscrowd": 0,
                }
            )
        annotations.append({"file_name": f"{index:02d}.png", "segments_info": segments})
    write_json(folder / f"{clip_id}.json", {"annotations": annotations, "categories": categories})


def ensure_clips(folder="data/moving"):
    """Give the folder of the default clips, written first where they are not there."""
    if not (Path(folder) / "clips_val.json").exists():
        print(f"writing the shapes world in motion to {folder}")
        write_clips(folder)
    return Path(folder)
