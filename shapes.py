"""A world of coloured shapes, written to disk as COCO is, so that everything after it is the path of real data.

    python shapes.py FOLDER                 images/, instances_{train,val}.json, captions_{train,val}.json, conversations_train.json

Pure functions of a seed: `draw_scene` places shapes, `render` paints them, `caption`, `describe` and `converse` tell
them in words. Captions and conversations never say left, right, above or below, nor follow the order of places (they
go from large to small), so whatever a model knows of sides after training it has from coordinates or descriptions.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from checkpoint import write_json

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


def draw_scene(rng):
    """Draw a scene: 2 to 4 shapes that keep apart, their names mostly different. `rng` is a random.Random."""
    width, height = rng.choice(SIZES)
    count = rng.randint(2, 4)
    names = rng.sample(NAMES, count)
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
            if all(
                box_px[0] > s.box_px[2] + 2
                or box_px[2] < s.box_px[0] - 2
                or box_px[1] > s.box_px[3] + 2
                or box_px[3] < s.box_px[1] - 2
                for s in shapes
            ):
                shapes.append(Shape(name, colour, box_px))
                break
    grey = rng.randint(120, 235)
    background = tuple(min(255, max(0, grey + rng.randint(-14, 14))) for _ in range(3))
    scene = Scene((width, height), tuple(shapes), background)
    return Scene(scene.size, tuple(sorted(shapes, key=scene.bigness, reverse=True)), background)


def render(scene, rng):
    """Paint a scene: PIL RGB of scene.size, smooth edges, shades a little off, grain."""
    scale = 3
    width, height = scene.size
    image = Image.new("RGB", (width * scale, height * scale), scene.background)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        colour = tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[shape.colour])
        x1, y1, x2, y2 = (v * scale for v in shape.box_px)
        if shape.name == "circle":
            pen.ellipse((x1, y1, x2, y2), fill=colour)
        elif shape.name == "ring":
            pen.ellipse((x1, y1, x2, y2), outline=colour, width=round((x2 - x1) * 0.17))
        else:
            corners = outline(shape.name)
            xs, ys = [x for x, _ in corners], [y for _, y in corners]
            to_x = (x2 - x1) / (max(xs) - min(xs))
            to_y = (y2 - y1) / (max(ys) - min(ys))
            pen.polygon([(x1 + (x - min(xs)) * to_x, y1 + (y - min(ys)) * to_y) for x, y in corners], fill=colour)
    grain = Image.frombytes("L", (width, height), rng.randbytes(width * height)).convert("RGB")
    return Image.blend(image.reduce(scale), grain, 0.05)


# ----- the same scene in words


def phrase(scene, shape):
    """'small red circle': the size word only where it is plain."""
    bigness = scene.bigness(shape)
    size = "small " if bigness < 0.23 else "large " if bigness > 0.34 else ""
    return f"{size}{shape.colour} {shape.name}"


def article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


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


def converse(scene, rng):
    """Draw question-and-answer pairs about a scene, as LLaVA-Instruct has them: no coordinates, no sides."""
    unique = scene.unique()
    pairs = [
        ("What is in the image?", f"There is {listed([article(phrase(scene, s)) for s in scene.shapes])}."),
        ("How many shapes are there?", f"There are {('no', 'one', 'two', 'three', 'four')[len(scene.shapes)]} shapes."),
    ]
    for shape in unique:
        pairs.append((f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}."))
        guess = rng.choice([shape.colour, rng.choice(list(COLOURS))])
        pairs.append(
            (
                f"Is the {shape.name} {guess}?",
                "Yes." if guess == shape.colour else f"No, the {shape.name} is {shape.colour}.",
            )
        )
    pairs += presence(scene, rng)
    if len(unique) > 1:
        a, b = rng.sample(unique, 2)
        if abs(scene.bigness(a) - scene.bigness(b)) > 0.04:
            larger = max(a, b, key=scene.bigness)
            pairs.append((f"Which is larger, the {a.name} or the {b.name}?", f"The {larger.name} is larger."))
    rng.shuffle(pairs)
    return pairs


def presence(scene, rng):
    """Ask for a shape that is there and for one that is not."""
    here = sorted({shape.name for shape in scene.shapes})
    return [
        (f"Is there {article(name)} in the image?", answer)
        for name, answer in ((rng.choice(here), "Yes."), (rng.choice([n for n in NAMES if n not in here]), "No."))
    ]


# ----- to disk


def write_world(folder, images, seed=0):
    """Write a world: `images` says how many in each split, as SPLITS. Complete when instances_*.json stand there."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name, "supercategory": "shape"} for name, i in CATEGORY_IDS.items()]
    for split, count in images.items():
        instances = {
            "info": {"description": "shapes world", "seed": seed},
            "images": [],
            "annotations": [],
            "categories": categories,
        }
        captions = {"images": instances["images"], "annotations": []}
        conversations = []
        for index in range(count):
            rng = random.Random(f"{seed} {split} {index}")
            scene = draw_scene(rng)
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
            captions["annotations"].append({"id": index + 1, "image_id": image_id, "caption": caption(scene, rng)})
            for number, (question, answer) in enumerate(converse(scene, rng)):
                turns = [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}]
                conversations.append({"id": f"{image_id}_{number}", "image": file_name, "conversations": turns})
        write_json(folder / f"captions_{split}.json", captions)
        write_json(folder / f"conversations_{split}.json", conversations)
        write_json(folder / f"instances_{split}.json", instances)


def ensure_world(folder="data/shapes"):
    """Give the folder of the default world, written first where it is not there."""
    if not (Path(folder) / "instances_val.json").exists():
        print(f"writing the shapes world to {folder}")
        write_world(folder, SPLITS)
    return Path(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python shapes.py FOLDER")
    write_world(sys.argv[1], SPLITS)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(Path(sys.argv[1]).glob("*.json"))}, indent=1))
