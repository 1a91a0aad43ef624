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
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from data import article
from formats.files import write_json

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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tiny.shapes FOLDER")
    write_world(sys.argv[1], SPLITS)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(Path(sys.argv[1]).glob("*.json"))}, indent=1))
