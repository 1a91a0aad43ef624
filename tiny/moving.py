"""A world of coloured shapes, written to disk as COCO is, so that everything after it is the path of real data.

    python shapes.py FOLDER           the world in pictures: see `write_world`
    python shapes.py FOLDER clips     the same world in motion: see `write_clips`

Pure functions of a seed: `draw_scene` places shapes, `render` paints them, `caption`, `describe` and `converse` tell
them in words. Captions and conversations never say left, right, above or below, nor follow the order of places (they
go from large to small), so whatever a model knows of sides after training it has from coordinates or descriptions.
Clips alone are asked for sides as well ("Which side ..."), of shapes that stay.
"""

import json
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoint import write_json
from data import article

NAMES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (210, 45, 45),
    "green": (45, 150, 65),
    "blue": (50, 85, 205),
    "yellow": (228, 198, 50),
    "purple": (140, 60, 165),
    "orange": (238, 130, 40),
}
CATEGORY_IDS = dict(zip(NAMES, (1, 2, 3, 5, 8, 13, 21, 34), strict=True))  # with gaps, as COCO's
SIZES = ((112, 112), (144, 112), (112, 144), (160, 120), (120, 160), (128, 96))  # width, height in pixels
SPLITS = {"train": 4000, "val": 300}  # images
RADIUS = (0.14, 0.26)  # of the shorter edge
SCALE = 3  # pictures are painted so many times larger, then reduced: smooth edges
CLIPS = {"train": 600, "val": 100}
QA_TYPES = {"Which side": 1, "Is": 3, "Does": 3, "What colour": 4, "How many": 7}  # ActivityNet-QA's; 8 is the rest
FLAKES = 12
WHITE = (245, 245, 245)
TRAVEL = 0.3  # least way of a shape that moves, of the shorter edge: well over what counts as static


@dataclass(frozen=True)
class Shape:
    name: str
    colour: str
    box_px: tuple  # (x1, y1, x2, y2), tight around the painted shape


@dataclass(frozen=True)
class Scene:
    size: tuple  # (width, height) in pixels
    shapes: tuple  # the largest first
    background: tuple  # RGB

    def bigness(self, shape):
        """Side of a box relative to the image's: the root of the area fraction."""
        x1, y1, x2, y2 = shape.box_px
        return math.sqrt((x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1]))

    def unique(self):
        """The shapes whose name occurs once."""
        names = [shape.name for shape in self.shapes]
        return [shape for shape in self.shapes if names.count(shape.name) == 1]


# ----- a scene, and its picture


def outline(name):
    """Corners of a shape in a square from -1 to 1; round ones have none."""

    def polar(radii, start):
        return [
            (r * math.sin(start + 2 * math.pi * i / len(radii)), -r * math.cos(start + 2 * math.pi * i / len(radii)))
            for i, r in enumerate(radii)
        ]

    def heart(t):
        return (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )

    arm = 0.36
    return {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": polar([1.0] * 3, 0.0),
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
        "star": polar([1.0, 0.42] * 5, 0.0),
        "cross": [
            (-arm, -1),
            (arm, -1),
            (arm, -arm),
            (1, -arm),
            (1, arm),
            (arm, arm),
            (arm, 1),
            (-arm, 1),
            (-arm, arm),
            (-1, arm),
            (-1, -arm),
            (-arm, -arm),
        ],
        "heart": [heart(2 * math.pi * i / 40) for i in range(40)],
    }.get(name)


def draw_scene(rng, names=NAMES):
    """Draw a scene: 2 to 4 shapes that keep apart, their names mostly different. `rng` is a random.Random."""
    width, height = rng.choice(SIZES)
    names = rng.sample(names, min(rng.randint(2, 4), len(names)))
    if rng.random() < 0.25:
        names[-1] = names[0]  # two of a kind: the unique-instance filter has something to do
    shapes = []
    for name in names:
        colour = rng.choice([c for c in COLOURS if (name, c) not in {(s.name, s.colour) for s in shapes}])
        for _ in range(100):
            r = rng.uniform(*RADIUS) * min(width, height)
            cx, cy = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            corners = outline(name) or [(-1, -1), (1, 1)]
            xs, ys = [cx + r * x for x, _ in corners], [cy + r * y for _, y in corners]
            box_px = tuple(round(v, 2) for v in (min(xs), min(ys), max(xs), max(ys)))
            if all(apart(box_px, s.box_px, 2) for s in shapes):
                shapes.append(Shape(name, colour, box_px))
                break
    grey = rng.randint(120, 235)
    background = tuple(min(255, max(0, grey + rng.randint(-14, 14))) for _ in range(3))
    scene = Scene((width, height), tuple(shapes), background)
    return Scene(scene.size, tuple(sorted(shapes, key=scene.bigness, reverse=True)), background)


def apart(box_a, box_b, gap):
    """Say whether more than `gap` pixels lie between two boxes."""
    return (
        box_a[0] > box_b[2] + gap or box_a[2] < box_b[0] - gap or box_a[1] > box_b[3] + gap or box_a[3] < box_b[1] - gap
    )


def shade(colour, rng):
    """A colour as one shape has it: a little off."""
    return tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[colour])


def paint(pen, name, box, fill):
    """Paint a shape into a box of the canvas, (x1, y1, x2, y2) in its pixels, both ends included."""
    x1, y1, x2, y2 = box
    if name == "circle":
        pen.ellipse((x1, y1, x2, y2), fill=fill)
    elif name == "ring":
        pen.ellipse((x1, y1, x2, y2), outline=fill, width=round((x2 - x1) * 0.17))
    else:
        corners = outline(name)
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        to_x = (x2 - x1) / (max(xs) - min(xs))
        to_y = (y2 - y1) / (max(ys) - min(ys))
        pen.polygon([(x1 + (x - min(xs)) * to_x, y1 + (y - min(ys)) * to_y) for x, y in corners], fill=fill)


def canvas(mode, size, background):
    """An empty picture SCALE times as large as `size`, and a pen for it."""
    image = Image.new(mode, (size[0] * SCALE, size[1] * SCALE), background)
    return image, ImageDraw.Draw(image)


def finish(image, rng):
    """Reduce a painted canvas, and lay grain over it."""
    image = image.reduce(SCALE)
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height)).convert("RGB")
    return Image.blend(image, grain, 0.05)


def render(scene, rng):
    """Paint a scene: PIL RGB of scene.size, smooth edges, shades a little off, grain."""
    image, pen = canvas("RGB", scene.size, scene.background)
    for shape in scene.shapes:
        paint(pen, shape.name, tuple(v * SCALE for v in shape.box_px), shade(shape.colour, rng))
    return finish(image, rng)


# ----- the same scene in words


def phrase(scene, shape):
    """'small red circle': the size word only where it is plain."""
    bigness = scene.bigness(shape)
    size = "small " if bigness < 0.23 else "large " if bigness > 0.34 else ""
    return f"{size}{shape.colour} {shape.name}"


def listed(parts):
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def caption(scene, rng):
    """Tell what is there, from large to small, without places."""
    start = rng.choice(("a picture of ", "this image shows ", "there is ", ""))
    return start + listed([article(phrase(scene, shape)) for shape in scene.shapes])


def side_of(shape, other, scene):
    """Which side of `other` a shape lies on: (left | right | None, above | below | None), None where they are close."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = shape.box_px, other.box_px
    dx, dy = (x1 + x2 - u1 - u2) / 2 / scene.size[0], (y1 + y2 - v1 - v2) / 2 / scene.size[1]
    return ("left" if dx < -0.15 else "right" if dx > 0.15 else None), (
        "above" if dy < -0.15 else "below" if dy > 0.15 else None
    )


def describe(scene, shape, rng):
    """Describe one shape so that its neighbours are needed, in the form of a pseudo-caption: 'circle that is ...'."""
    words = f"{shape.name} that is {phrase(scene, shape).removesuffix(' ' + shape.name)}"
    others = [other for other in scene.shapes if other is not shape]
    rng.shuffle(others)
    for other in others:
        across, along = side_of(shape, other, scene)
        relations = [r for r in (f"{across} of" if across else None, along) if r]
        if relations:
            return f"{words}, {rng.choice(relations)} the {other.colour} {other.name}"
    return words


def converse(scene, rng, names=NAMES):
    """Draw question-and-answer pairs about a scene, as LLaVA-Instruct has them: no coordinates, no sides."""
    return [(question, answer) for question, answer, _ in quiz(scene, rng, names)]


def quiz(scene, rng, names=NAMES):
    """The pairs of `converse`, each with its answer in a word, as GQA has it; None where a word is not enough."""
    unique = scene.unique()
    number = ("no", "one", "two", "three", "four")[len(scene.shapes)]
    asked = [
        ("What is in the image?", f"There is {listed([article(phrase(scene, s)) for s in scene.shapes])}.", None),
        ("How many shapes are there?", f"There are {number} shapes.", number),
    ]
    for shape in unique:
        asked.append((f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}.", shape.colour))
        guess = rng.choice([shape.colour, rng.choice(list(COLOURS))])
        right = guess == shape.colour
        said = "Yes." if right else f"No, the {shape.name} is {shape.colour}."
        asked.append((f"Is the {shape.name} {guess}?", said, "yes" if right else "no"))
    asked += [(question, answer, answer.lower()[:-1]) for question, answer in presence(scene, rng, names)]
    if len(unique) > 1:
        a, b = rng.sample(unique, 2)
        if abs(scene.bigness(a) - scene.bigness(b)) > 0.04:
            larger = max(a, b, key=scene.bigness).name
            asked.append((f"Which is larger, the {a.name} or the {b.name}?", f"The {larger} is larger.", larger))
    rng.shuffle(asked)
    return asked


def presence(scene, rng, names=NAMES):
    """Ask for a shape that is there and for one that is not."""
    here = sorted({shape.name for shape in scene.shapes})
    asked = [(rng.choice(here), "Yes.")]
    if missing := [name for name in names if name not in here]:
        asked.append((rng.choice(missing), "No."))
    return [(f"Is there {article(name)} in the image?", answer) for name, answer in asked]


# ----- to disk


def write_world(folder, images, seed=0, names=NAMES):
    """Write a world: `images` says how many in each split, as SPLITS. Complete when instances_*.json stand there.

    images/ID.png                 the pictures
    instances_SPLIT.json          COCO's; each annotation with a `description`, of the form of a pseudo-caption
    captions_SPLIT.json           COCO's
    conversations_SPLIT.json      LLaVA's
    gqa_SPLIT.json                GQA's: what of the conversations is answered in a word
    refs_SPLIT.json               RefCOCO's refs, as benchmarks.py makes them JSON: what people might call each shape

    names: the shapes that there are; to any other, the world's files are blind.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": CATEGORY_IDS[name], "name": name, "supercategory": "shape"} for name in names]
    for split, count in images.items():
        instances = {
            "info": {"description": "shapes world", "seed": seed},
            "images": [],
            "annotations": [],
            "categories": categories,
        }
        captions = {"images": instances["images"], "annotations": []}
        conversations, questions, refs = [], {}, []
        for index in range(count):
            rng = random.Random(f"{seed} {split} {index}")
            scene = draw_scene(rng, names)
            image_id = index + 1 + (1_000_000 if split == "val" else 0)
            file_name = f"{image_id:012d}.png"
            render(scene, rng).save(folder / "images" / file_name)
            instances["images"].append(
                {"id": image_id, "file_name": file_name, "width": scene.size[0], "height": scene.size[1]}
            )
            for shape in scene.shapes:
                x1, y1, x2, y2 = shape.box_px
                box_xywh = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
                instances["annotations"].append(
                    {
                        "id": len(instances["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORY_IDS[shape.name],
                        "iscrowd": 0,
                        "bbox": box_xywh,
                        "area": round(box_xywh[2] * box_xywh[3], 2),
                        "description": describe(scene, shape, rng),
                    }
                )
                refs.append(refer(scene, shape, instances["annotations"][-1], file_name, split))
            captions["annotations"].append({"id": index + 1, "image_id": image_id, "caption": caption(scene, rng)})
            for number, (question, answer, short) in enumerate(quiz(scene, rng, names)):
                turns = [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}]
                conversations.append({"id": f"{image_id}_{number}", "image": file_name, "conversations": turns})
                if short:
                    said = {"question": question, "answer": short, "fullAnswer": answer}
                    questions[f"{image_id}_{number}"] = said | {"imageId": f"{image_id:012d}", "isBalanced": True}
        write_json(folder / f"captions_{split}.json", captions)
        write_json(folder / f"conversations_{split}.json", conversations)
        write_json(folder / f"gqa_{split}.json", questions)
        write_json(folder / f"refs_{split}.json", {"refs": refs})
        write_json(folder / f"instances_{split}.json", instances)


def refer(scene, shape, annotation, file_name, split):
    """A ref as RefCOCO has them: what people might call a shape, from plain to with its neighbours."""
    words, rng = phrase(scene, shape), random.Random(f"{annotation['id']} {split}")
    relation = describe(scene, shape, rng).partition(", ")[2]
    sentences = dict.fromkeys([f"{shape.colour} {shape.name}", words, f"{words} {relation}".strip()])
    name = str(annotation["id"])
    return {
        "ref_id": name,
        "file_name": file_name,
        "size": scene.size,
        "split": split,
        "bbox": annotation["bbox"],
        "sentences": [(f"{name}-{i}", sentence) for i, sentence in enumerate(sentences)],
    }


def ensure_world(folder="data/shapes"):
    """Give the folder of the default world, written first where it is not there."""
    if not (Path(folder) / "instances_val.json").exists():
        print(f"writing the shapes world to {folder}")
        write_world(folder, SPLITS)
    return Path(folder)


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


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["clips"]):
        sys.exit("usage: python shapes.py FOLDER [clips]")
    if sys.argv[2:]:
        write_clips(sys.argv[1])
    else:
        write_world(sys.argv[1], SPLITS)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(Path(sys.argv[1]).glob("*.json"))}, indent=1))
