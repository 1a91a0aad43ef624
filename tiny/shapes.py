"""A world of coloured shapes, written to disk in COCO's formats, so that it is read as real data is.

    python -m tiny.shapes FOLDER      see `write_world`; `tiny.moving` sets the same shapes in motion

Everything is a function of a seed: `draw_scene` places shapes, `render` paints them; `caption`, `describe`, `quiz` and `refer`
put them into words. Captions and conversations never say left, right, above or below, and their order says nothing of places
(shapes go from large to small). So a model learns sides from coordinates and descriptions alone.
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
    "red": (210, 45, 45), "green": (45, 150, 65), "blue": (50, 85, 205),
    "yellow": (228, 198, 50), "purple": (140, 60, 165), "orange": (238, 130, 40),
}  # fmt: skip
CATEGORY_IDS = dict(zip(NAMES, (1, 2, 3, 5, 8, 13, 21, 34), strict=True))  # with gaps, as COCO's
SIZES = ((112, 112), (144, 112), (112, 144), (160, 120), (120, 160), (128, 96))  # width, height in pixels
SPLITS = {"train": 4000, "val": 300}  # images
RADIUS = (0.14, 0.26)  # as fractions of the shorter edge
SCALE = 3  # pictures are painted this many times larger, then reduced: smooth edges


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
        """Return the root of the area fraction: the side of a box relative to the image's."""
        x1, y1, x2, y2 = shape.box_px
        return math.sqrt((x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1]))

    def unique(self):
        """List the shapes whose name occurs once."""
        names = [shape.name for shape in self.shapes]
        return [shape for shape in self.shapes if names.count(shape.name) == 1]


# ----- a scene, and its picture


def polar(radii):
    """Place corners around the centre at equal angles, clockwise from the top."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def heart(t):
    return math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17


S, A = 0.88, 0.36  # half a side of the square, half the width of the cross's arms
OUTLINES = {  # corners in a square from -1 to 1, y down
    "square": [(-S, -S), (S, -S), (S, S), (-S, S)],
    "triangle": polar([1.0] * 3),
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "star": polar([1.0, 0.42] * 5),
    "cross": [(-A, -1), (A, -1), (A, -A), (1, -A), (1, A), (A, A), (A, 1), (-A, 1), (-A, A), (-1, A), (-1, -A), (-A, -A)],
    "heart": [heart(2 * math.pi * i / 40) for i in range(40)],
}
ROUND = [(-1, -1), (1, 1)]  # the extent of circle and ring, which have no corners


def draw_scene(rng, names=NAMES):
    """Draw 2 to 4 shapes that do not touch, with mostly different names. `rng` is a random.Random."""
    width, height = rng.choice(SIZES)
    names = rng.sample(names, min(rng.randint(2, 4), len(names)))
    if rng.random() < 0.25:
        names[-1] = names[0]  # a name that occurs twice: work for the unique-instance filter
    shapes = []
    for name in names:
        colour = rng.choice([c for c in COLOURS if (name, c) not in {(s.name, s.colour) for s in shapes}])
        for _ in range(100):
            r = rng.uniform(*RADIUS) * min(width, height)
            cx, cy = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            corners = OUTLINES.get(name, ROUND)
            xs, ys = [cx + r * x for x, _ in corners], [cy + r * y for _, y in corners]
            box_px = tuple(round(v, 2) for v in (min(xs), min(ys), max(xs), max(ys)))
            if all(are_apart(box_px, s.box_px, 2) for s in shapes):
                shapes.append(Shape(name, colour, box_px))
                break
    grey = rng.randint(120, 235)
    background = tuple(min(255, max(0, grey + rng.randint(-14, 14))) for _ in range(3))
    scene = Scene((width, height), tuple(shapes), background)
    return Scene(scene.size, tuple(sorted(shapes, key=scene.bigness, reverse=True)), background)


def are_apart(a, b, gap):
    """Return True if more than `gap` pixels lie between two boxes."""
    return a[0] > b[2] + gap or a[2] < b[0] - gap or a[1] > b[3] + gap or a[3] < b[1] - gap


def shade(colour, rng):
    """Return the RGB of one shape: a colour, slightly off."""
    return tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[colour])


def paint(pen, name, box, fill):
    """Paint a shape into a box of the canvas, (x1, y1, x2, y2) in its pixels, both ends included."""
    x1, y1, x2, y2 = box
    if name == "circle":
        pen.ellipse(box, fill=fill)
    elif name == "ring":
        pen.ellipse(box, outline=fill, width=round((x2 - x1) * 0.17))
    else:
        corners = OUTLINES[name]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        to_x, to_y = (x2 - x1) / (max(xs) - min(xs)), (y2 - y1) / (max(ys) - min(ys))
        pen.polygon([(x1 + (x - min(xs)) * to_x, y1 + (y - min(ys)) * to_y) for x, y in corners], fill=fill)


def canvas(mode, size, background):
    """Return an empty picture, SCALE times as large as `size`, and a pen for it."""
    image = Image.new(mode, (size[0] * SCALE, size[1] * SCALE), background)
    return image, ImageDraw.Draw(image)


def finish(image, rng):
    """Reduce a painted canvas and add grain."""
    image = image.reduce(SCALE)
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height)).convert("RGB")
    return Image.blend(image, grain, 0.05)


def render(scene, rng):
    """Paint a scene: a PIL RGB image of scene.size, with smooth edges, colours slightly off, and grain."""
    image, pen = canvas("RGB", scene.size, scene.background)
    for shape in scene.shapes:
        paint(pen, shape.name, tuple(v * SCALE for v in shape.box_px), shade(shape.colour, rng))
    return finish(image, rng)


# ----- the same scene in words


def phrase(scene, shape):
    """Name a shape: 'small red circle', with a size word only if the shape is clearly small or large."""
    bigness = scene.bigness(shape)
    size = "small " if bigness < 0.23 else "large " if bigness > 0.34 else ""
    return f"{size}{shape.colour} {shape.name}"


def enumerate_words(words):
    """Join words as in a sentence: 'a, b and c'."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def contents(scene):
    """Name all shapes, from large to small: 'a large red circle and a blue star'."""
    return enumerate_words([article(phrase(scene, shape)) for shape in scene.shapes])


def caption(scene, rng):
    """Write a caption, without places."""
    return rng.choice(("a picture of ", "this image shows ", "there is ", "")) + contents(scene)


def side_of(shape, other, scene):
    """Return the side of `other` that a shape lies on: (left | right | None, above | below | None), None if they are close."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = shape.box_px, other.box_px
    dx, dy = (x1 + x2 - u1 - u2) / 2 / scene.size[0], (y1 + y2 - v1 - v2) / 2 / scene.size[1]
    return (
        "left" if dx < -0.15 else "right" if dx > 0.15 else None,
        "above" if dy < -0.15 else "below" if dy > 0.15 else None,
    )


def describe(scene, shape, rng):
    """Write a pseudo-caption that relates a shape to a neighbour: 'circle that is small red, left of the blue star'."""
    words = f"{shape.name} that is {phrase(scene, shape).removesuffix(' ' + shape.name)}"
    others = [other for other in scene.shapes if other is not shape]
    rng.shuffle(others)
    for other in others:
        left_right, above_below = side_of(shape, other, scene)
        relations = [relation for relation in (f"{left_right} of" if left_right else None, above_below) if relation]
        if relations:
            return f"{words}, {rng.choice(relations)} the {other.colour} {other.name}"
    return words


def converse(scene, rng, names=NAMES):
    """Draw (question, answer) pairs about a scene, in the style of LLaVA-Instruct: no coordinates, no sides."""
    return [(question, answer) for question, answer, _ in quiz(scene, rng, names)]


def quiz(scene, rng, names=NAMES):
    """Draw the pairs of `converse`, each with GQA's short answer: one word, or None if one word cannot answer."""
    unique, number = scene.unique(), ("no", "one", "two", "three", "four")[len(scene.shapes)]
    rows = [
        ("What is in the image?", f"There is {contents(scene)}.", None),
        ("How many shapes are there?", f"There are {number} shapes.", number),
    ]
    for shape in unique:
        rows.append((f"What colour is the {shape.name}?", f"The {shape.name} is {shape.colour}.", shape.colour))
        guess = rng.choice([shape.colour, rng.choice(list(COLOURS))])
        is_right = guess == shape.colour
        answer = "Yes." if is_right else f"No, the {shape.name} is {shape.colour}."
        rows.append((f"Is the {shape.name} {guess}?", answer, "yes" if is_right else "no"))
    rows += [(question, answer, answer.lower()[:-1]) for question, answer in presence(scene, rng, names)]
    if len(unique) > 1:
        a, b = rng.sample(unique, 2)
        if abs(scene.bigness(a) - scene.bigness(b)) > 0.04:
            larger = max(a, b, key=scene.bigness).name
            rows.append((f"Which is larger, the {a.name} or the {b.name}?", f"The {larger} is larger.", larger))
    rng.shuffle(rows)
    return rows


def presence(scene, rng, names=NAMES):
    """Ask whether a shape is in the image: once for a present one, once for an absent one."""
    present = sorted({shape.name for shape in scene.shapes})
    rows = [(rng.choice(present), "Yes.")]
    if absent := [name for name in names if name not in present]:
        rows.append((rng.choice(absent), "No."))
    return [(f"Is there {article(name)} in the image?", answer) for name, answer in rows]


def refer(scene, shape, annotation, file_name, split):
    """Return a ref as RefCOCO has them: what people might call a shape, from its plain name to one with a neighbour."""
    name, words, rng = str(annotation["id"]), phrase(scene, shape), random.Random(f"{annotation['id']} {split}")
    relation = describe(scene, shape, rng).partition(", ")[2]
    sentences = dict.fromkeys([f"{shape.colour} {shape.name}", words, f"{words} {relation}".strip()])
    return {
        "ref_id": name, "file_name": file_name, "size": scene.size, "split": split, "bbox": annotation["bbox"],
        "sentences": [(f"{name}-{i}", sentence) for i, sentence in enumerate(sentences)],
    }  # fmt: skip


# ----- to disk


def write_world(folder, images, seed=0, names=NAMES):
    """Write a world with so many images per split, as SPLITS. It is complete once every instances_*.json exists.

    images/ID.png                 the pictures
    instances_SPLIT.json          COCO's; each annotation with a `description`, in the form of a pseudo-caption
    captions_SPLIT.json           COCO's
    conversations_SPLIT.json      LLaVA's
    gqa_SPLIT.json                GQA's: the conversations' questions that one word answers
    refs_SPLIT.json               RefCOCO's refs, as tasks.refcoco writes them: what people might call each shape

    names: shapes to draw; the files never mention any other.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": CATEGORY_IDS[name], "name": name, "supercategory": "shape"} for name in names]
    for split, count in images.items():
        info, pictures = {"description": "shapes world", "seed": seed}, []
        captions = {"images": pictures, "annotations": []}
        instances = {"info": info, "images": pictures, "annotations": [], "categories": categories}
        files = {"captions": captions, "conversations": [], "gqa": {}, "refs": {"refs": []}, "instances": instances}
        for index in range(count):
            rng = random.Random(f"{seed} {split} {index}")
            scene, image_id = draw_scene(rng, names), number_of(split, index)
            render(scene, rng).save(folder / "images" / f"{image_id:012d}.png")
            add_scene(files, scene, image_id, split, rng, names)
        write_split(folder, split, files)


def number_of(split, index):
    """Return the id of an image or a clip. Those of train and val differ, as COCO's do."""
    return index + 1 + (1_000_000 if split == "val" else 0)


def add_scene(files, scene, image_id, split, rng, names):
    """Add what a world's JSON files say about one image."""
    file_name, (width, height), instances = f"{image_id:012d}.png", scene.size, files["instances"]
    instances["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height})
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box_px
        box_xywh = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        annotation = {
            "id": len(instances["annotations"]) + 1, "image_id": image_id, "category_id": CATEGORY_IDS[shape.name],
            "iscrowd": 0, "bbox": box_xywh, "area": round(box_xywh[2] * box_xywh[3], 2),
            "description": describe(scene, shape, rng),
        }  # fmt: skip
        instances["annotations"].append(annotation)
        files["refs"]["refs"].append(refer(scene, shape, annotation, file_name, split))
    captions = files["captions"]["annotations"]
    captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption(scene, rng)})
    for number, (question, answer, short) in enumerate(quiz(scene, rng, names)):
        turns = [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}]
        files["conversations"].append({"id": f"{image_id}_{number}", "image": file_name, "conversations": turns})
        if short:
            row = {"question": question, "answer": short, "fullAnswer": answer, "imageId": f"{image_id:012d}"}
            files["gqa"][f"{image_id}_{number}"] = row | {"isBalanced": True}


def write_split(folder, split, files):
    """Write {name: content} as NAME_SPLIT.json, in order: the last file means that the split is complete."""
    for name, content in files.items():
        write_json(folder / f"{name}_{split}.json", content)


def ensure_world(folder="data/shapes"):
    """Return the folder of the default world; write the world if it is missing."""
    if not (Path(folder) / "instances_val.json").exists():
        print(f"writing the shapes world to {folder}")
        write_world(folder, SPLITS)
    return Path(folder)


def run(write):
    """Write a world to the folder named on the command line, and print the sizes of its JSON files."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m tiny.{Path(sys.argv[0]).stem} FOLDER")
    write(sys.argv[1])
    print(json.dumps({path.name: path.stat().st_size for path in sorted(Path(sys.argv[1]).glob("*.json"))}, indent=1))


if __name__ == "__main__":
    run(lambda folder: write_world(folder, SPLITS))
