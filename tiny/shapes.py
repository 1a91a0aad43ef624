"""A world of coloured shapes, written in COCO's formats, so that it is read as real data is: `python -m tiny.shapes FOLDER`.

Everything is a function of a seed. Captions and conversations go from large shapes to small ones, and never say left, right,
above or below: about the sides of an image, these files teach only coordinates and descriptions. Texts about other scenes ask
for sides, so that LLaMA does not forget the words (the tiny one has read of sides before).
"""

import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from data import SIDE_ANSWERS, SIDE_PROMPTS, Wording, article
from formats.files import read_json, run_command, write_json, writing
from formats.processes import prefetched
from model import VARIANTS

# RGB; ids with gaps, as COCO's; (width, height) in pixels; corners in a square from -1 to 1, y down (round ones: of their box)
COLOURS, CATEGORY_IDS, SIZES, OUTLINES = read_json(Path(__file__).with_name("shapes.json")).values()
EXTENTS = {name: [end(axis) for end in (min, max) for axis in zip(*outline, strict=True)] for name, outline in OUTLINES.items()}
NAMES = tuple(CATEGORY_IDS)
FOLDER, LAST = "data/shapes", "text_val.json"  # the default world, and the file that is written last
FIRST_IDS = {"train": 1, "val": 1_000_001}  # of images and clips: those of train and val differ, as COCO's do
SPLITS = {"train": 4000, "val": 300}  # images
TEXT_SHARE = 3 / 8  # text-only conversations, per image
NUMBERS = ("no", "one", "two", "three", "four")
GQA_TYPES = {"How": "number", "What colour": "colour", "Is there": "presence", "Is the": "colour, yes or no", "Which": "size"}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
SCALE = 3  # pictures are painted this many times larger, then reduced: smooth edges


@dataclass(frozen=True)
class Shape:
    name: str
    colour: str
    box_px: tuple  # (x1, y1, x2, y2), tight around the painted shape

    def __str__(self):
        return f"{self.colour} {self.name}"

    def shade(self, rng):
        """Return an RGB: its colour, slightly off."""
        return tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[self.colour])


@dataclass(frozen=True)
class Scene:
    size: tuple  # (width, height) in pixels
    shapes: tuple  # the largest first
    background: tuple  # RGB

    def bigness(self, shape):
        """Return the root of the area fraction: the side of a box relative to the image's."""
        x1, y1, x2, y2 = shape.box_px
        return sqrt((x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1]))

    def unique(self):
        """List the shapes whose name occurs once."""
        names = [shape.name for shape in self.shapes]
        return [shape for shape in self.shapes if names.count(shape.name) == 1]

    def absent(self, names=NAMES):
        """List the names that do not occur."""
        return [name for name in names if all(name != shape.name for shape in self.shapes)]

    def paint(self, mode, background, parts):
        """Paint (name, box, fill) parts on a canvas, SCALE times as large. Boxes are in its pixels, both ends included."""
        image = Image.new(mode, (self.size[0] * SCALE, self.size[1] * SCALE), background)
        pen = ImageDraw.Draw(image)
        for name, (x1, y1, x2, y2), fill in parts:
            if name in ("circle", "ring"):
                pen.ellipse((x1, y1, x2, y2), fill if name == "circle" else None, outline=fill, width=round((x2 - x1) * 0.17))
                continue
            left, top, right, bottom = EXTENTS[name]
            to_x, to_y = (x2 - x1) / (right - left), (y2 - y1) / (bottom - top)
            pen.polygon([(x1 + (x - left) * to_x, y1 + (y - top) * to_y) for x, y in OUTLINES[name]], fill=fill)
        return image

    def render(self, rng, parts=None):
        """Paint the scene, colours slightly off, or the given parts, with smooth edges and grain: a PIL RGB image."""
        if parts is None:
            parts = [(shape.name, [v * SCALE for v in shape.box_px], shape.shade(rng)) for shape in self.shapes]
        image = self.paint("RGB", self.background, parts).reduce(SCALE)
        grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height)).convert("RGB")
        return Image.blend(image, grain, 0.05)

    def phrase(self, shape):
        """Name a shape: 'small red circle', with a size word only if the shape is clearly small or large."""
        return "small " * (self.bigness(shape) < 0.23) + "large " * (self.bigness(shape) > 0.34) + str(shape)

    def contents(self):
        """Name all shapes, from large to small: 'a large red circle and a blue star'."""
        return enumerate_words([article(self.phrase(shape)) for shape in self.shapes])

    def caption(self, rng):
        return rng.choice(("a picture of ", "this image shows ", "there is ", "")) + self.contents()

    def side_of(self, shape, other):
        """Return the side of `other` that a shape lies on: [left | right, above | below], or None where they are close."""
        (x1, y1, x2, y2), (u1, v1, u2, v2) = shape.box_px, other.box_px
        dx, dy = (x1 + x2 - u1 - u2) / 2 / self.size[0], (y1 + y2 - v1 - v2) / 2 / self.size[1]
        sides = (dx, ("right", "left")), (dy, ("below", "above"))
        return [names[distance < 0] if abs(distance) > 0.15 else None for distance, names in sides]

    def tell(self, wording, rng):
        """Write the scene with its boxes, or points, once, in random order: 'there is a red circle at (12, 30, 50, 66). ...'"""
        form = rng.choice(("{a} at {loc}", "there is {a} at {loc}", "at {loc} there is {a}", "{p}: {loc}"))
        shapes = rng.sample(self.shapes, len(self.shapes))
        places = [(self.phrase(shape), wording.place(shape.box_px, self.size)) for shape in shapes]
        return ". ".join(form.format(a=article(words), p=words, loc=loc) for words, loc in places) + "."

    def ask_sides(self, rng):
        """Ask App. E's questions about two shapes: (question, answer) for each axis on which they are apart."""
        a, b = rng.sample(self.unique(), 2)
        names = {"obj_1": f"the {a.name}", "obj_2": f"the {b.name}"}
        sides = zip(SIDE_PROMPTS.values(), self.side_of(b, a), strict=True)
        return [(prompt.format(**names), SIDE_ANSWERS[side].format(**names).capitalize()) for prompt, side in sides if side]

    def describe(self, shape, rng):
        """Write a pseudo-caption that relates a shape to a neighbour: 'circle that is small red, left of the blue star'."""
        words = f"{shape.name} that is {self.phrase(shape).removesuffix(' ' + shape.name)}"
        others = [other for other in self.shapes if other is not shape]
        rng.shuffle(others)
        for other in others:
            if sides := [side for side in self.side_of(shape, other) if side]:
                return f"{words}, {RELATIONS[rng.choice(sides)]} the {other}"
        return words

    def presence(self, rng, names=NAMES):
        """Ask whether a shape is in the image: once for a present one, once for an absent one."""
        rows, absent = [(rng.choice(sorted({shape.name for shape in self.shapes})), "Yes.")], self.absent(names)
        rows += [(rng.choice(absent), "No.")] if absent else []
        return [(f"Is there {article(name)} in the image?", answer) for name, answer in rows]

    def quiz(self, rng, names=NAMES):
        """Draw (question, answer, GQA's one-word answer or None) rows, as LLaVA-Instruct's: no coordinates, no sides."""
        unique, number = self.unique(), NUMBERS[len(self.shapes)]
        rows = [("What is in the image?", f"There is {self.contents()}.", None)]
        rows.append(("How many shapes are there?", f"There are {number} shapes.", number))
        for shape in unique:
            guess, truth = rng.choice([shape.colour, rng.choice(list(COLOURS))]), f"the {shape.name} is {shape.colour}."
            answers = ("Yes.", "yes") if guess == shape.colour else (f"No, {truth}", "no")
            rows.append((f"What colour is the {shape.name}?", truth.capitalize(), shape.colour))
            rows.append((f"Is the {shape.name} {guess}?", *answers))
        rows += [(question, answer, answer.lower()[:-1]) for question, answer in self.presence(rng, names)]
        if len(unique) > 1:
            a, b = rng.sample(unique, 2)
            if abs(self.bigness(a) - self.bigness(b)) > 0.04:
                larger = max(a, b, key=self.bigness).name
                rows.append((f"Which is larger, the {a.name} or the {b.name}?", f"The {larger} is larger.", larger))
        rng.shuffle(rows)
        return rows

    def side_quiz(self, rng):
        """Draw such rows about a pair's sides, which no conversation has: the true side, the false one, and which it is."""
        if len(unique := self.unique()) < 2:
            return []
        (a, b), rows = rng.sample(unique, 2), []
        choices = ("left or right of", "above or below")
        for choice, true, false in zip(choices, self.side_of(a, b), self.side_of(b, a), strict=True):
            if true:
                truth = f"the {a.name} is {RELATIONS[true]} the {b.name}."
                rows.append((f"Is the {a.name} {RELATIONS[true]} the {b.name}?", "Yes.", "yes"))
                rows.append((f"Is the {a.name} {RELATIONS[false]} the {b.name}?", f"No, {truth}", "no"))
                rows.append((f"Is the {a.name} {choice} the {b.name}?", truth.capitalize(), true))
        return rows


def enumerate_words(words):
    """Join words as in a sentence: 'a, b and c'."""
    return ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1]


def are_apart(a, b, gap):
    """Return True if more than `gap` pixels lie between two boxes."""
    return a[0] > b[2] + gap or a[2] < b[0] - gap or a[1] > b[3] + gap or a[3] < b[1] - gap


def draw_scene(rng, names=NAMES):
    """Draw 2 to 4 shapes that do not touch, with mostly different names. `rng` is a random.Random."""
    width, height = rng.choice(SIZES)
    names = rng.sample(names, min(rng.randint(2, 4), len(names)))
    if rng.random() < 0.25:
        names[-1] = names[0]  # a name that occurs twice: work for the unique-instance filter
    shapes = []
    for name in names:
        colour = rng.choice([colour for colour in COLOURS if (name, colour) not in {(s.name, s.colour) for s in shapes}])
        for _ in range(100):
            r = rng.uniform(0.14, 0.26) * min(width, height)
            cx, cy = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            x1, y1, x2, y2 = EXTENTS[name]
            box_px = tuple(round(v, 2) for v in (cx + r * x1, cy + r * y1, cx + r * x2, cy + r * y2))
            if all(are_apart(box_px, shape.box_px, 2) for shape in shapes):
                shapes.append(Shape(name, colour, box_px))
                break
    grey = rng.randint(120, 235)
    scene = Scene((width, height), tuple(shapes), tuple(grey + rng.randint(-14, 14) for _ in range(3)))
    return replace(scene, shapes=tuple(sorted(shapes, key=scene.bigness, reverse=True)))


def write_side_texts(path, count=int(TEXT_SHARE * SPLITS["train"]), wording=None, names=NAMES, seed="0 train", has_quiz=False):
    """Write text-only conversations in LLaVA's format: a scene in words and boxes, then one of App. E's questions about it.
    With `has_quiz`, every other one asks as gqa_SPLIT.json does."""
    wording, rows = wording or Wording(VARIANTS["tiny"].coord_format()), []
    for index in range(count if len(names) > 1 else 0):  # a question needs two shapes
        rng, pairs = random.Random(f"{seed} text {index}"), []
        while not pairs:
            scene = draw_scene(rng, names)
            is_shown = all(wording.can_place(shape.box_px, scene.size) for shape in scene.shapes)  # crop shows a part
            pairs = scene.ask_sides(rng) if is_shown and len(scene.unique()) > 1 else []
        quiz = [row[:2] for row in scene.side_quiz(rng)] if has_quiz and index % 2 else []
        question, answer = rng.choice(quiz or pairs)
        turns = [{"from": "human", "value": f"{scene.tell(wording, rng)} {question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"text_{index}", "conversations": turns})
    write_json(path, rows, indent=None)


def ensure_side_texts(folder, wording):
    """Return the name of a world's texts about sides, with places in this wording, for training. Write the file if it is missing.
    Its name says what differs from the tiny model's: text_nfp_train.json."""
    own, usual = ((fmt.kind, fmt.side, fmt.geometry, fmt.patch) for fmt in (wording.fmt, VARIANTS["tiny"].coord_format()))
    differing = [str(value) for value, other in zip(own, usual, strict=True) if value != other]
    name = "_".join(["text", *differing, *["point"] * (wording.location == "point"), "train.json"])
    if not (Path(folder) / name).exists():
        write_side_texts(Path(folder) / name, wording=wording)
    return name


def write_world(folder, images=SPLITS, seed=0, names=NAMES):
    """Write a world with so many images per split. No file mentions a shape that is not in `names`.

    images/ID.png                                   the pictures
    captions_SPLIT.json, conversations_SPLIT.json   COCO's and LLaVA's
    gqa_SPLIT.json          GQA's: the conversations' questions that one word answers, and others about sides
    refs_SPLIT.json         RefCOCO's refs, in JSON: three things that people might call a shape
    instances_SPLIT.json    COCO's, and a pseudo-caption for each annotation
    text_SPLIT.json         LLaVA's, without images; see `write_side_texts`. Written last: a split that has it is complete
    """
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": CATEGORY_IDS[name], "name": name, "supercategory": "shape"} for name in names]

    def paint(split, index):
        rng, image_id = random.Random(f"{seed} {split} {index}"), index + FIRST_IDS.get(split, 1)
        scene, file_name = draw_scene(rng, names), f"{image_id:012d}.png"
        scene.render(rng).save(Path(folder) / "images" / file_name, compress_level=1)  # as in tiny.moving
        return rng, image_id, scene, file_name

    for split, count in images.items():
        pictures, annotations, captions, talks, gqa, refs = [], [], [], [], {}, []
        painted = tqdm(prefetched(partial(paint, split), 0, count), total=count, desc=split, disable=None)
        for index, (rng, image_id, scene, file_name) in enumerate(painted):
            pictures.append({"id": image_id, "file_name": file_name, "width": scene.size[0], "height": scene.size[1]})
            for number, shape in enumerate(scene.shapes, start=len(annotations) + 1):
                x1, y1, x2, y2 = shape.box_px
                bbox = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
                row = {"id": number, "image_id": image_id, "category_id": CATEGORY_IDS[shape.name], "iscrowd": 0, "bbox": bbox}
                annotations.append(row | {"area": round(bbox[2] * bbox[3], 2), "description": scene.describe(shape, rng)})
                relation = scene.describe(shape, random.Random(f"{number} {split}")).partition(", ")[2]
                calls = dict.fromkeys((str(shape), scene.phrase(shape), f"{scene.phrase(shape)} {relation}".strip()))
                row = {"ref_id": str(number), "file_name": file_name, "size": scene.size, "split": split, "bbox": bbox}
                refs.append(row | {"sentences": [(f"{number}-{i}", text) for i, text in enumerate(calls)]})
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": scene.caption(rng)})
            quiz, sides = scene.quiz(rng, names), scene.side_quiz(random.Random(f"{seed} {split} {index} sides"))
            for number, (question, answer, short) in enumerate(quiz + sides):
                kind = "side" + ", yes or no" * (short in ("yes", "no"))
                if number < len(quiz):
                    turns = [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}]
                    talks.append({"id": f"{image_id}_{number}", "image": file_name, "conversations": turns})
                    kind = next((kind for start, kind in GQA_TYPES.items() if question.startswith(start)), None)
                if short:
                    row = {"question": question, "answer": short, "fullAnswer": answer, "imageId": f"{image_id:012d}"}
                    gqa[f"{image_id}_{number}"] = row | {"isBalanced": True, "types": {"detailed": kind}}
        instances = {"info": {"description": "shapes world", "seed": seed}, "images": pictures, "annotations": annotations}
        files = {"captions": {"images": pictures, "annotations": captions}, "conversations": talks, "gqa": gqa}
        for name, content in (files | {"refs": {"refs": refs}, "instances": instances | {"categories": categories}}).items():
            write_json(Path(folder) / f"{name}_{split}.json", content, indent=None)
        write_side_texts(Path(folder) / f"text_{split}.json", int(TEXT_SHARE * count), names=names, seed=f"{seed} {split}")


def ensure_world(folder=FOLDER, write=write_world, last=LAST, **options):
    """Return the folder of a world; write the world if the file that completes it is missing."""
    if not (Path(folder) / last).exists():
        print(f"writing a world of shapes to {folder}")
        with writing(folder):
            write(folder, **options)
    return Path(folder)


if __name__ == "__main__":
    run_command("tiny.shapes", lambda: ensure_world(*sys.argv[1:2]), "FOLDER")
