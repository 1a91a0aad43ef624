"""Each benchmark is read from its original files, and each published figure has a hand-counted case."""

import doctest
import importlib
import json
import math
import pkgutil
import random
import time
import zipfile

import numpy as np
import pytest
from benchmark_helpers import LONG, WORDING, answered, options, picture, read, touch, write
from PIL import Image

import evaluate
import tasks
from coords import CoordFormat
from data import Object, Record, Wording
from evaluate import Item, flip_consistency, hal_items, judge_spatial, spatial_items, spatial_metrics, spatial_triplets
from formats.eval_folder import read_jobs
from tasks import TASKS, hal_ade, pope
from tasks.files import find_image
from tasks.words import SHORT, spaced


def test_the_examples_in_docstrings_hold():
    for module in pkgutil.iter_modules(tasks.__path__, "tasks."):
        assert not doctest.testmod(importlib.import_module(module.name)).failed, module.name


def test_every_benchmark_says_what_it_reads_and_the_papers_rows_are_of_tasks():
    for name, benchmark in TASKS.items():
        assert benchmark.files.startswith("questions: ") and benchmark.prompts, name
    papers = {name: dict(task.paper) for name, task in (evaluate.TASKS | TASKS).items()}
    papers = {name: rows["LocVLM-B"] for name, rows in papers.items() if "LocVLM-B" in rows}
    assert papers.keys() == {"spatial", "gqa", "vqa", "hal", "hal-ade"}, "one row of LocVLM-B, of the same input"
    assert len(papers["spatial"]) == 12 and papers["spatial"]["icl above/below, below"] == 74.4
    assert papers["hal"] == {"accuracy": 88.3}


def test_each_benchmark_is_explained_in_its_own_file():
    for module in pkgutil.iter_modules(tasks.__path__, "tasks."):
        module = importlib.import_module(module.name)
        if hasattr(module, "TASKS") and module.__name__ != "tasks.__main__":
            for word in ("Files ", "Questions ", "Score ", "python -m tasks ", ">>> "):
                assert word in module.__doc__, (module.__name__, word)


# ----- GQA


def gqa(**more):
    row = {"question": "Is it overcast?", "answer": "yes", "imageId": "n161313", "isBalanced": True}
    return {"201307251": row, "20": row | {"answer": "left", "imageId": "n2"} | more}


def test_gqa_is_read_from_its_official_file_and_counted_by_exact_match(tmp_path):
    questions, images = write(tmp_path / "q.json", gqa()), touch(tmp_path / "images", "n161313.jpg", "n2.jpg")
    items, skipped = read("gqa", questions, None, images)
    assert [(i.id, i.question, i.image.name) for i in items][0] == ("201307251", "Is it overcast?", "n161313.jpg")
    assert not skipped and read("gqa", questions, None, images, short=True)[0][0].question.endswith(SHORT)
    metrics = answered("gqa", items, "Yes.", "It is on the left side.")
    assert metrics == {"exact match": 0.5, "contains": 1.0, "questions": 2}
    metrics = answered("gqa", items, "Yes, it is.", "leftover")
    assert metrics["exact match"] == 0 and metrics["contains"] == 0.5
    assert TASKS["gqa"].submission(items)[1] == {"questionId": "20", "prediction": "leftover"}


@pytest.mark.parametrize("answer, truth, right", [
    ("yes", "yes", True), ("Yes.", "yes", True), (" YES...\n", "yes", True), ("yes!", "yes", False), ("yes, it is", "yes", False),
    ("", "yes", False), (".", "yes", False), ("the left", "left", False), ("T-Shirt.", "t-shirt", True), ("yes .", "yes", False),
    ("lefts", "left", False), ("2.", "2", True),
])  # fmt: skip
def test_gqas_exact_match_is_the_official_one_after_llavas_conversion(answer, truth, right):
    """Fixed values: lower case without full stops at the end, then equality, as convert_gqa_for_eval.py and GQA's eval.py."""
    item = Item("1", None, None, "?", {"answer": truth, "types": []}, answer)
    TASKS["gqa"].judge(item, WORDING)
    assert item.correct == right


def test_gqa_is_counted_by_the_official_types(tmp_path):
    """Binary are all questions that are no query; an official file without types gives no figures by type."""
    kinds = ("verify", "query", "choose", "query")
    rows = {
        str(n): gqa()["20"] | {"types": {"structural": kind, "semantic": "rel", "detailed": f"d{n % 2}"}}
        for n, kind in enumerate(kinds)
    }
    items, _ = read("gqa", write(tmp_path / "q.json", rows), None, touch(tmp_path, "n2.jpg"))
    metrics = answered("gqa", items, "left", "left", "right", "right")
    by_type = {name.removeprefix("exact match, "): value for name, value in metrics.items() if name.startswith("exact match, ")}
    assert by_type == {
        "binary": 0.5, "open": 0.5, "structural verify": 1, "structural query": 0.5, "structural choose": 0,
        "semantic rel": 0.5, "detailed d0": 0.5, "detailed d1": 0.5,
    }  # fmt: skip
    assert metrics["exact match"] == 0.5 and metrics["questions"] == 4


def test_gqa_asks_balanced_questions_only_and_finds_images_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("images/n161313.jpg", "")
    items, skipped = read("gqa", write(tmp_path / "q.json", gqa(isBalanced=False)), None, tmp_path / "images.zip"
    )
    assert len(items) == 1 and skipped == {"questions that are not balanced": 1}


def test_gqas_real_questions_in_llavas_form_are_joined_by_id(real, tmp_path):
    path = real("formats/gqa/llava_gqa_testdev_balanced.first4000.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    touch(tmp_path / "images", *{row["image"] for row in rows})
    official = {
        row["question_id"]: {
            "question": row["text"].removesuffix(SHORT),
            "answer": row["question_id"],
            "imageId": row["image"].removesuffix(".jpg"),
            "isBalanced": True,
        }
        for row in reversed(rows)
    }
    with pytest.raises(ValueError, match="holds no answers"):
        read("gqa", path, None, tmp_path / "images")
    answers = write(tmp_path / "official.json", official)
    items, skipped = read("gqa", path, answers, tmp_path / "images")
    assert len(items) == 4000 and not skipped and all(item.truth["answer"] == item.id for item in items)
    assert items[0].question == "Is it overcast?"
    del official[rows[7]["question_id"]]
    with pytest.raises(ValueError, match=f"no answer to 1 of the 4000 .*{rows[7]['question_id']}"):
        read("gqa", path, write(answers, official), tmp_path / "images")


# ----- POPE


@pytest.mark.parametrize(
    "name", ["coco_pope_random", "coco_pope_popular", "coco_pope_adversarial", "gqa_pope_seem_random"]
)
def test_popes_real_files_are_read_lines_or_array(real, tmp_path, name):
    path = real(f"formats/pope/{name}.json")
    text = path.read_text()
    rows = json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as file:
        for image in sorted({row["image"] for row in rows}):
            file.writestr(f"val2014/{image}", "")
    items, skipped = read("pope", path, None, tmp_path / "val2014.zip")
    assert len(items) == 3000 and not skipped and items[0].question == rows[0]["text"]
    metrics = answered("pope", items, *[item.truth["label"] for item in items])
    release = "the present files" if name.startswith("coco") else "about GQA's images"
    assert metrics["accuracy"] == metrics["F1"] == 1 and metrics[f"questions ({release})"] == 3000
    assert metrics["says yes"] == 0.5 or not name.startswith("coco")


def test_popes_figures_and_version(tmp_path):
    """2 true yes, 1 false yes, 1 false no, 1 true no; an empty answer reads as yes."""
    said = [("yes", "Yes."), ("yes", ""), ("yes", "No, there is no cup."), ("no", "Both yes"), ("no", "There is not.")]
    name = "COCO_val2014_000000000042.jpg"
    rows = [{"question_id": n, "image": name, "text": "?", "label": label} for n, (label, _) in enumerate(said)]
    items, _ = read("pope", write(tmp_path / "p.json", rows, True), None, touch(tmp_path, name))
    metrics = answered("pope", items, *[text for _, text in said])
    five = ("accuracy", "precision", "recall", "F1", "says yes")
    assert [metrics[name] for name in five] == [3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5]
    assert metrics["neither yes nor no"] == 1 / 5
    assert metrics["questions (as many as in no release)"] == 5
    one = write(tmp_path / "one.json", rows[:1], True)
    assert len(read("pope", one, None, tmp_path)[0]) == 1, "a single line is not an object"
    with pytest.raises(ValueError, match="label 'maybe'"):
        read("pope", write(tmp_path / "p.json", [rows[0] | {"label": "maybe"}]), None, tmp_path)


def test_a_file_of_pope_about_other_objects_is_no_cocos(tmp_path):
    """POPE's A-OKVQA files ask about SEEM's objects in COCO's images, 3,000 times as well."""
    name = "COCO_val2014_000000000042.jpg"
    rows = [{"question_id": n, "image": name, "text": f"Is there a {thing} in the image?", "label": "no"} for n, thing in enumerate(["cup", "sky"])]
    items, _ = read("pope", write(tmp_path / "p.json", rows, True), None, touch(tmp_path, name))
    assert "questions (about other objects than COCO's)" in answered("pope", items, "No.", "No.") and not pope.is_about_coco(items)
    assert pope.is_about_coco(items[:1])


def test_popes_release_is_told_by_content(tmp_path):
    """Of the older files, one has 2,910 rows and two have 3,000, some of which say "imange"; the paper's rows are of COCO."""
    def release(image, count, misspelt=0, **more):
        texts = ["Is there a cup in the imange?"] * misspelt + ["Is there a cup in the image?"] * (count - misspelt)
        rows = [{"question_id": n, "image": image, "text": text, "label": "no"} for n, text in enumerate(texts)]
        write(tmp_path / "p.json", rows, True)
        args = options(tmp_path / "p.json", None, tmp_path, **more)
        [job] = read_jobs({"pope": TASKS["pope"]}, args, WORDING)
        return [pope.release_of(job.items), bool(job.paper)]

    touch(tmp_path, coco := "COCO_val2014_000000000042.jpg", "2405722.jpg", "other.jpg")
    assert release(coco, 2910, 144) == release(coco, 3000, 44) == release(coco, 3000, 58) == ["the older files, LLaVA's", True]
    assert release(coco, 3000) == release(coco, 3000, short=True) == ["the present files", True]
    assert release("2405722.jpg", 3000) == release("2405722.jpg", 2910) == ["about GQA's images", False]
    assert release("other.jpg", 3000) == ["about other images than COCO's", False]


def test_popes_short_questions_end_in_the_request_once(tmp_path):
    """LLaVA's and lmms-eval's texts hold it already."""
    touch(tmp_path, "a.jpg")
    for end in ("", SHORT, SHORT.replace("\n", " ") + "\n"):
        row = {"question_id": 1, "image": "a.jpg", "text": f"Is there a cup in the image?{end}", "label": "no"}
        for short in (True, False):
            [item], _ = read("pope", write(tmp_path / "p.json", [row]), None, tmp_path, short=short)
            assert item.question == "Is there a cup in the image?" + SHORT * short


@pytest.mark.parametrize("answer, yes", [
    ("No", False), ("no.", False), ("No, there is", False), ("not", False), ("There is no cup", False), ("", True), ("NO", True),
    ("Nope", True), ("None", True), ("no!", True), ("no\n", True), ("Yes. No", True), (". no", True), ("yes,no", True),
    ("isn't", True), ("There is not, I think. Yes", False), ("It cannot", True), ("no\u00a0cup", True), ("a,no b", True),
    ("yes no", False), ("0.5 no", True),
])  # fmt: skip
def test_answers_are_read_as_popes_own_script_reads_them(answer, yes):
    """Fixed values, from evaluate.py of RUCAIBox/POPE."""
    [item] = [Item("1", None, None, "?", {"label": "yes"}, answer)]
    TASKS["pope"].judge(item, WORDING)
    assert item.correct == yes


# ----- which side


def test_left_and_right_are_asked_of_the_mirror_image_too():
    objects = tuple(Object(n, (x, 10, x + 10, 20)) for n, x in (("dog", 0), ("cat", 70), ("cup", 80)))
    record = Record("1", "x.png", (100, 100), objects, ("dog",), ())
    items = spatial_items([record], WORDING, random.Random(0))
    direct, flipped = [item for item in items if item.truth["setting"].startswith("left/right")]
    assert flipped.mirrored and not direct.mirrored and flipped.question == direct.question
    assert flipped.id == direct.id + ":mirrored" and len({item.id for item in items}) == len(items)
    assert (direct.truth["word"], flipped.truth["word"]) == ("right", "left")
    assert flipped.truth["boxes_px"][0] == (90, 10, 100, 20), "the dog, at the right now"
    for said, mirror, across, consistent in (
        ("It is on the right.", "left", 1, 1),
        ("left", "right", 0, 1),  # wrong, and consistent
        ("right", "right", 1, 0),
        ("right", "left or right", 1, 0),
        ("", "", 0, 0),
    ):
        for item in items:
            item.answer = mirror if item.mirrored else said
            judge_spatial(item, WORDING)
        metrics = spatial_metrics(items)
        assert metrics["left/right"] == across and metrics["left/right, flip consistency"] == consistent, (said, mirror)
        assert metrics["left/right, questions"] == 1 and metrics["left/right, right"] == across
    assert math.isnan(flip_consistency([flipped])), "a mirror image without its image is no pair"


def test_the_papers_two_rules_of_a_half_are_both_counted():
    """A cat whose centre is far from the middle and whose box is not: a triplet by the centres, none by whole boxes."""

    def record(x1):
        objects = Object("dog", (0, 0, 9, 9)), Object("cat", (x1, 0, 99, 9)), Object("cup", (80, 0, 99, 9))
        return Record("1", "x.png", (100, 100), objects, ("dog",), ())

    for x1, whole in ((40, 0), (60, 1)):
        items = spatial_items([record(x1)], WORDING, random.Random(0))
        for item in items:
            judge_spatial(item, WORDING)
        metrics = spatial_metrics(items)
        assert metrics["left/right, questions"] == 1 and metrics["left/right, images with whole boxes"] == whole
        assert len(list(spatial_triplets([record(x1)], random.Random(0), 0, strict=True))) == whole


def coco_spatial(folder, **changes):
    box = {"area": 1, "id": 1, "image_id": 9, "iscrowd": 0}
    entry = {"file_name": "COCO_val2014_000000000009.jpg", "width": 100, "height": 50}
    entry |= {
        "annotations": [
            box | {"bbox": [0, 0, 10, 10], "category_id": 1},
            box | {"bbox": [60, 0, 10, 10], "category_id": 2},
        ]
    }
    data = {"9": entry | {"good_pairs": [[0, 1]]} | changes, "10": entry}
    picture(folder / "val2014/COCO_val2014_000000000009.jpg", (100, 50))
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    return write(folder / "coco_spatial.json", {"categories": categories, "data": data}), None, folder


def test_the_authors_coco_spatial_is_balanced_by_mirror_images(tmp_path):
    (one, flipped), skipped = read("coco-spatial", *coco_spatial(tmp_path))
    assert one.question == "Which side of the dog is the cat?" and skipped == {"images without pairs": 1}
    assert one.truth == {"word": "right", "boxes_px": [(0, 0, 10, 10), (60, 0, 70, 10)]}
    assert flipped.truth == {"word": "left", "boxes_px": [(90, 0, 100, 10), (30, 0, 40, 10)]} and flipped.mirrored
    always = answered("coco-spatial", [one, flipped], "right", "right")
    assert always["accuracy"] == 0.5 and always["right (the image)"] == 1 and always["left (its mirror image)"] == 0
    assert always["flip consistency"] == 0 and always["strict"] == 0.5 and always["questions"] == 2
    assert answered("coco-spatial", [one, flipped], "left", "right")["flip consistency"] == 1
    for changes, error in (
        ({"good_pairs": [[0, 7]]}, "IndexError"),
        ({"good_pairs": [[0]]}, "invalid"),
        ({"width": None}, "invalid"),
        ({"width": math.inf}, "invalid"),
    ):
        with pytest.raises(ValueError, match=error):
            read("coco-spatial", *coco_spatial(tmp_path, **changes))
    content = json.loads(coco_spatial(tmp_path)[0].read_text())
    with pytest.raises(ValueError, match="rows with id, name"):
        read("coco-spatial", write(tmp_path / "x.json", content | {"categories": [{}]}), None, tmp_path)
    with pytest.raises(ValueError, match="no rows under 'data'"):
        read("coco-spatial", write(tmp_path / "x.json", []), None, tmp_path)


# ----- hallucination

ADE = """Idx\tRatio\tTrain\tVal\tName
1\t0.1576\t11664\t1172\twall
3\t0.0878\t8265\t796\tsky
8\t0.0231\t1906\t199\tbed\x20
13\t0.0160\t5075\t526\tperson, individual, someone, somebody, mortal, soul
22 \t0.0074\t709\t75\twater
59\t0.0015\t139\t18\tscreen door, screen
64\t0.0014\t335\t60\tblind, screen
65\t0.0014\t792\t75\tcoffee table, cocktail table
"""


def test_hal_ade_asks_for_two_that_are_there_and_two_that_are_not_none_of_cocos(tmp_path):
    folder = tmp_path / "annotations/validation"
    folder.mkdir(parents=True)
    (tmp_path / "objectInfo150.txt").write_text(ADE)
    for number, values in enumerate(([0, 1, 3, 8, 13], [13, 65], [59]), 1):
        Image.fromarray(np.array([values], np.uint8)).save(folder / f"ADE_val_{number:08d}.png")
    (folder / "._ADE_val_00000001.png").write_bytes(b"a Mac was here")
    images = touch(tmp_path / "images", *[f"ADE_val_{n:08d}.jpg" for n in (1, 2, 3)])
    items, skipped = read("hal-ade", tmp_path / "objectInfo150.txt", None, images)
    asked = {(i.id[:16], i.truth["label"]): {} for i in items}
    for item in items:
        asked[item.id[:16], item.truth["label"]][item.truth["name"]] = item.question
    assert asked["ADE_val_00000001", "yes"].keys() == {"wall", "sky"}
    assert asked["ADE_val_00000001", "no"].keys() <= {"water", "screen door", "blind"} and len(items) == 6
    assert asked["ADE_val_00000003", "yes"] == {"screen door": "Is there a screen door in the image?"}
    assert skipped == {"images with no such object": 1}, "the second shows COCO's person and a table alone"
    drawn = {
        name
        for n in range(9)
        for i in read("hal-ade", tmp_path / "objectInfo150.txt", None, images, seed=n)[0]
        for name in [i.truth["name"]]
        if "3:no" in i.id
    }
    assert drawn == {"wall", "sky", "water"}, "a blind is a screen, as what is there is"
    metrics = answered("hal-ade", items, *[item.truth["label"] for item in items])
    assert metrics["accuracy"] == 1
    (tmp_path / "wrong.txt").write_text("x" * 200_000)
    with pytest.raises(ValueError, match="wrong.txt cannot be read"):
        read("hal-ade", tmp_path / "wrong.txt", None, tmp_path)
    Image.fromarray(np.array([[200]], np.uint8)).save(folder / "ADE_val_00000001.png")
    with pytest.raises(ValueError, match="ADE_val_00000001.png has shape .1, 1. and values 200"):
        read("hal-ade", tmp_path / "objectInfo150.txt", None, images)
    (tmp_path / "objectInfo150.txt").write_text("no table\n")
    with pytest.raises(ValueError, match="has no rows; .* should be ADEChallengeData2016/objectInfo150.txt"):
        read("hal-ade", tmp_path / "objectInfo150.txt", None, images)


def test_hal_act_says_video_of_clips_to_a_model_of_video():
    clip, still = (Record("1", f"x{n}", (9, 9), (), ("cup",), ("dog",), is_clip=not n) for n in range(2))
    video = Wording(CoordFormat("ivb", 224), medium="video")
    for wording, record, medium in ((video, clip, "video"), (video, still, "image"), (WORDING, clip, "image")):
        for item in hal_items([record], wording, random.Random(0)):
            assert item.question == f"Is there a {item.truth['name']} in the {medium}?"


# ----- words and images


def test_words_are_compared_whole():
    assert spaced("It's a Dog.") == " it s a dog " and spaced("...") == " "


def test_a_coco_image_has_three_names(tmp_path):
    name = "COCO_val2014_000000000042.jpg"
    assert find_image(tmp_path, name, "val2014") == tmp_path / name, "the first if all are missing"
    for other in ("000000000042.jpg", f"val2014/{name}", name):
        assert find_image(touch(tmp_path, other), name, "val2014") == tmp_path / other


def test_hal_ade_skips_objects_with_a_coco_name_or_last_word():
    for names, taken in ((("sofa", "couch"), True), (("coffee table",), True), (("sky",), False)):
        assert any({name, name.split()[-1]} & hal_ade.TAKEN for name in names) == taken


@pytest.mark.parametrize(
    "text",
    [LONG, "a" * 1_000_000, "." * 1_000_000, "1," * 500_000, " " * 1_000_000, "(1, " * 250_000],
    ids=["words", "a", "stops", "commas", "spaces", "brackets"],
)
def test_a_megabyte_is_judged_in_no_time(text):
    truths = {
        "gqa": {"answer": "left"},
        "vqa": {"answers": ["left"] * 9 + ["right"]},
        "msvd-qa": {"answer": "left"},
        "pope": {"label": "no"},
        "rec": {"box_px": (0, 0, 9, 9)},
        "coco-spatial": {"word": "left"},
    }
    start = time.monotonic()
    for name, truth in truths.items():
        item = Item("1", None, (99, 99), "?", truth, text)
        TASKS[name].judge(item, WORDING)
        assert item.correct in (True, False) or name == "vqa"
    assert time.monotonic() - start < 5
