"""The shapes world is what it says it is."""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np

from data import Wording
from formats.annotations import read_file, read_records
from model import VARIANTS
from tiny.shapes import CATEGORY_IDS, NAMES, draw_scene, write_side_texts, write_world


def scenes(count):
    for i in range(count):
        rng = random.Random(i)
        yield draw_scene(rng), rng


def test_boxes_are_tight_around_what_is_painted():
    """All that differs from the background lies in a box, and touches the box's four sides, within two pixels."""
    for scene, rng in scenes(60):
        pixels = np.asarray(scene.render(rng)).astype(int)
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
    """Of the files that models train on, only coordinates and descriptions may tell of left and right."""
    for scene, rng in scenes(300):
        text = scene.caption(rng) + " ".join(q + a for q, a, _ in scene.quiz(rng))
        words = set(text.replace(".", " ").replace("?", " ").split())
        assert not {"left", "right", "above", "below", "top", "bottom", "side"} & words
        phrases = [scene.phrase(shape) for shape in scene.shapes]
        order = [text.index(words) for words in phrases]
        bigness = [scene.bigness(s) for s in scene.shapes]
        assert bigness == sorted(bigness, reverse=True) and order == sorted(order)


def test_descriptions_are_true_of_one_shape():
    for scene, rng in scenes(200):
        for shape in scene.shapes:
            words = scene.describe(shape, rng)
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
    records, skipped = read_records([(world / file, world / "images", 1.0) for file in files])
    assert len(records) == 12 and not skipped
    assert all(record.captions and record.conversations for record in records)
    assert all(set(record.present) | set(record.absent) == set(NAMES) for record in records)


def test_a_world_of_fewer_shapes_never_names_another(tmp_path):
    """A shape outside `names` is not drawn, not mentioned, not asked for, and no category."""
    write_world(tmp_path, {"val": 40}, names=("star", "heart", "ring"))
    text = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert "heart" in text and not any(name in text for name in set(NAMES) - {"star", "heart", "ring"})


def test_a_word_answers_what_a_sentence_does(tmp_path):
    """GQA's file: the short answer is in the full one, but for numbers of a kind that a sentence says as well."""
    write_world(tmp_path, {"val": 30})
    rows = json.loads((tmp_path / "gqa_val.json").read_text())
    images = {path.stem for path in (tmp_path / "images").iterdir()}
    assert len(rows) > 150 and all(row["imageId"] in images for row in rows.values())
    assert all(row["answer"] in row["fullAnswer"].lower().strip(".").replace(",", "").split() for row in rows.values())
    starts = {row["question"].split()[0] for row in rows.values()}
    assert starts == {"How", "What", "Is", "Which"} and "What is in" not in str(rows)


def test_questions_about_sides_are_true_and_gqas_alone(tmp_path):
    """As many are answered yes as no. Their generator is their own: the other files are those of a world without them."""
    for scene, rng in scenes(200):
        shapes = {shape.name: shape.box_px for shape in scene.unique()}
        rows = scene.side_quiz(rng)
        assert [short for *_, short in rows].count("yes") == [short for *_, short in rows].count("no") == len(rows) / 3
        for question, answer, short in rows:
            one, sides, other = re.fullmatch(r"Is the (\w+) (.+?)(?: of)? the (\w+)\?", question).groups()
            (x1, y1, x2, y2), (u1, v1, u2, v2) = shapes[one], shapes[other]
            truths = {"left" if x1 + x2 < u1 + u2 else "right", "above" if y1 + y2 < v1 + v2 else "below"}
            assert (sides in truths) == (short == "yes") and (short in truths or short in ("yes", "no"))
            assert answer == "Yes." or truths & set(answer.split()) and short in answer.lower()
    write_world(tmp_path, {"val": 30})
    types = [row["types"]["detailed"] for row in json.loads((tmp_path / "gqa_val.json").read_text()).values()]
    assert types.count("side") > 15 and types.count("side, yes or no") == 2 * types.count("side") and types.count("number") == 30
    assert not re.search("left|right|above|below", (tmp_path / "conversations_val.json").read_text())
    contents = [json.loads((tmp_path / f"{name}_val.json").read_text()) for name in ("conversations", "refs")]
    digest = hashlib.sha256("".join(json.dumps(content, indent=2) + "\n" for content in contents).encode())
    assert digest.hexdigest()[:16] == "d2e2fd12d15ee2ee"


def centres_and_question(text):
    """Split the user's turn of a text about sides: ({name: centres of the boxes of that name, doubled}, the question)."""
    text, asked = re.fullmatch(r"(.+)\. ((?:Which side|Is the) .+)", text).groups()
    centres = {}
    for part in text.split(". "):
        numbers = [int(v) for v in re.findall(r"\d+", part)]
        name = next(name for name in NAMES if name in part)
        centres.setdefault(name, []).append((numbers[0] + numbers[2], numbers[1] + numbers[3]))
    return centres, asked


def test_every_other_text_may_ask_as_gqa_does(tmp_path):
    rows = []
    for has_quiz in (False, True):
        write_side_texts(tmp_path / "text.json", 60, has_quiz=has_quiz)
        rows.append(json.loads((tmp_path / "text.json").read_text()))
    assert rows[0][::2] == rows[1][::2], "the others are App. E's"
    kinds = Counter()
    for row in rows[1][1::2]:
        question, answer = (turn["value"] for turn in row["conversations"])
        centres, asked = centres_and_question(question)
        if "side of" in asked or "located" in asked:
            continue  # no such question about this scene
        one, sides, two = re.fullmatch(r"Is the (\w+) (.+?)(?: of)? the (\w+)\?", asked).groups()
        dx, dy = (a - b for a, b in zip(centres[one][0], centres[two][0], strict=True))
        truths = {"left" if dx < 0 else "right", "above" if dy < 0 else "below"}
        assert (answer == "Yes.") == (sides in truths) and (answer == "Yes." or truths & set(answer.split()))
        kinds[answer.split()[0]] += 1
    assert min(kinds["Yes."], kinds["No,"], kinds["The"]) > 3 and kinds.total() > 25


def test_texts_say_where_shapes_are_and_ask_for_a_side(tmp_path):
    """The answer follows from the boxes in the text; no image is needed. Another way to write places changes nothing else."""
    rows = []
    for name, location in (("boxes", "box"), ("points", "point")):
        wording = Wording(VARIANTS["tiny"].coord_format(), location=location)
        write_side_texts(tmp_path / f"{name}.json", 60, wording)
        rows.append(json.loads((tmp_path / f"{name}.json").read_text()))
    for row, same in zip(*rows, strict=True):
        (question, answer), (other, same_answer) = ([turn["value"] for turn in r["conversations"]] for r in (row, same))
        assert answer == same_answer and "image" not in row
        assert re.sub(r"\([\d, ]+\)", "", question) == re.sub(r"\([\d, ]+\)", "", other)
        centres, asked = centres_and_question(question)
        one, side, two = re.fullmatch(r"The (\w+) is located (?:to the )?(\w+)(?: of)? the (\w+)\.", answer).groups()
        assert len(centres[one]) == len(centres[two]) == 1 and one in asked and two in asked
        dx, dy = (a - b for a, b in zip(centres[one][0], centres[two][0], strict=True))
        assert side == {"Which": "left" if dx < 0 else "right", "Is": "above" if dy < 0 else "below"}[asked.split()[0]]
    records, skipped = read_file(tmp_path / "boxes.json", tmp_path)
    assert len(records) == 60 and not skipped and all(record.image is None for record in records)
    cropped = Wording(replace(VARIANTS["tiny"], geometry="crop").coord_format(), location="point")
    write_side_texts(tmp_path / "crop.json", 20, cropped)  # of scenes whose shapes the crop shows
    write_side_texts(tmp_path / "none.json", 20, names=NAMES[:1])
    assert [len(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("crop", "none")] == [20, 0]


def test_refs_call_a_shape_what_it_is(tmp_path):
    write_world(tmp_path, {"val": 30})
    annotations = json.loads((tmp_path / "instances_val.json").read_text())["annotations"]
    names = {number: name for name, number in CATEGORY_IDS.items()}
    refs = json.loads((tmp_path / "refs_val.json").read_text())["refs"]
    assert len(refs) == len(annotations)
    for ref, shape in zip(refs, annotations, strict=True):
        sentences, name = [sentence for _, sentence in ref["sentences"]], names[shape["category_id"]]
        assert len(set(sentences)) == len(sentences) >= 1 and all(name in sentence for sentence in sentences)
        assert ref["bbox"] == shape["bbox"] and ref["file_name"] == f"{shape['image_id']:012d}.png"
