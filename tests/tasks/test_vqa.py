"""VQAv2: its normalisation, its score, its files."""

import json

import pytest
from benchmark_helpers import answered, read, touch, write

from tasks import TASKS
from tasks.words import vqa_normal, vqa_scores


def vqa(tmp_path, answers, **changes):
    questions = [{"question_id": n, "image_id": 42, "question": f"What {n}?"} for n in range(len(answers))]
    annotations = [
        {
            "question_id": n,
            "question_type": "what",
            "answer_type": kind,
            "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(texts)],
        }
        for n, (kind, texts) in enumerate(answers)
    ]
    touch(tmp_path / "images", "val2014/COCO_val2014_000000000042.jpg")
    content = {"data_subtype": "val2014", "questions": questions} | changes
    path = write(tmp_path / "q.json", content)
    return path, write(tmp_path / "a.json", {"annotations": annotations[::-1]}), tmp_path / "images"


def test_three_of_ten_annotators_make_nine_tenths():
    """The three who agree see two others (2/3 each), the other seven see three (1 each)."""
    assert vqa_scores("cat", ["cat"] * 3 + ["dog"] * 7)[0] == pytest.approx((3 * 2 / 3 + 7) / 10) == pytest.approx(0.9)
    assert vqa_scores("cat", ["cat"] + ["dog"] * 9)[0] == pytest.approx(0.3)
    assert vqa_scores("cat", ["cat"] * 2 + ["dog"] * 8)[0] == pytest.approx(0.6)
    assert vqa_scores("cat", ["cat"] * 4 + ["dog"] * 6)[0] == 1 and vqa_scores("", ["cat"] * 9 + ["dog"])[0] == 0
    assert vqa_scores("There is a cat.", ["cat"] * 3 + ["dog"] * 7) == (0, pytest.approx(0.9))


def test_the_official_normalisation_is_kept_with_its_slips():
    for text, normal in {
        "The man's dog": "man's dog",
        "two": "2",
        "None": "0",
        "dont": "don't",
        "couldnt've": "couldn't've",
        "somebody'd": "somebodyd",
        "red/white": "red white",  # no space beside the mark: it becomes one
        "red / white": "red white",  # a space beside it: it goes, and the spaces stay
        "1,000": "1000",
        "1,000 red-hot": "1000 redhot",  # a comma between digits has every mark deleted
        "it's 3.5 p.m.": "it's 3.5 pm",
        "a.5": "a.5",  # a full stop before a digit stays
        "." * 40 + "x": "." * 8 + "x",  # 32 go
        "\tA\nbig   dog ": "big dog",
        "": "",
        "٣": "٣",
    }.items():
        assert vqa_normal(text) == normal, text


CAT, RED = ["cat"] * 4 + ["dog"] * 6, ["red white"] * 6 + ["red"] * 4


@pytest.mark.parametrize("answer, annotators, score", [
    ("Cat.", CAT, 1), ("a  CAT!", ["cat"] * 2 + ["the cat"] + ["dog"] * 7, 0.9), ("none", ["0"] * 3 + ["1"] * 7, 0.9),
    ("two", ["2"] * 3 + ["two"] * 2 + ["3"] * 5, 1), ("dont know", ["don't know"] * 5 + ["x"] * 5, 1), ("", ["the"] * 4 + CAT[4:], 1),
    ("1,000", ["1000"] * 4 + ["100"] * 6, 1), ("10,5 a-b", ["105 ab"] * 3 + ["no"] * 7, 0.9), ("red/white", RED, 1),
    ("red / white", RED, 1), ("t-shirt", ["t shirt"] * 2 + ["tshirt"] * 8, 0.6), ("t - shirt", ["t shirt"] * 2 + ["tshirt"] * 8, 0.6),
    ("3.5 m.", ["3.5 m"] * 9 + ["3"], 1), ("yes, it is", ["yes"] * 9 + ["no"], 0), ("Yes", ["yes"] * 10, 0), ("yes\n", ["yes"] * 10, 1),
    ("ten", ["10", "ten"] + ["9"] * 8, 0.6), ("a.b", ["ab"] * 3 + ["x"] * 7, 0.9), ("cat", ["cat"] + ["dog"] * 9, 0.3),
])  # fmt: skip
def test_hostile_answers_score_as_officially(answer, annotators, score):
    """Fixed values, from vqaEval.py of GT-Vision-Lab/VQA."""
    assert vqa_scores(answer, annotators)[0] == pytest.approx(score)


def test_nothing_is_normalised_where_all_annotators_agree():
    assert vqa_scores("Yes.", ["yes"] * 10)[0] == 0 and vqa_scores("yes", ["yes"] * 10)[0] == 1
    assert vqa_scores("Yes.", ["yes"] * 9 + ["no"])[0] == 1
    assert vqa_scores("stop\tsign\n", ["stop\nsign"] * 10)[0] == 1, "but line ends and tabs, on both sides"


def test_vqa_is_counted_by_type_and_submitted_whole(tmp_path):
    said = [("yes/no", ["yes"] * 10), ("number", ["2"] * 3 + ["3"] * 7), ("other", ["red"] * 10)]
    files = vqa(tmp_path, said)
    items, _ = read("vqa", *files)
    assert [item.truth["answers"][0] for item in items] == ["yes", "2", "red"], "joined by id: annotations are reversed"
    metrics = answered("vqa", items, "Yes.", "two", "It is red")
    assert metrics["accuracy"] == pytest.approx(0.9 / 3) and metrics["contains"] == pytest.approx(2.9 / 3)
    assert metrics["accuracy, normalised first"] == pytest.approx(1.9 / 3)
    assert metrics["answer type number"] == pytest.approx(0.9) and metrics["answer type other"] == 0
    assert metrics["question type what"] == metrics["accuracy"] and metrics["questions"] == 3
    assert TASKS["vqa"].submission(items)[0] == {"question_id": 0, "answer": "yes"}


def test_vqas_test_split_has_no_score_but_a_submission(tmp_path):
    questions, _, images = vqa(tmp_path, [("other", ["x"] * 10)] * 2, data_subtype="test-dev2015")
    touch(images, "COCO_test2015_000000000042.jpg")
    items, _ = read("vqa", questions, None, images)
    assert answered("vqa", items, "Red.", "") == {"questions without annotations": 2} and items[0].correct is None
    assert TASKS["vqa"].submission(items) == [
        {"question_id": 0, "answer": "red"},
        {"question_id": 1, "answer": ""},
    ]


def test_what_is_wrong_with_files_is_said_before_anything_is_asked(tmp_path):
    questions, answers, images = vqa(tmp_path, [("other", ["x"] * 10)])
    rows = json.loads(questions.read_text())["questions"]
    for content, error in {
        "{": "neither JSON nor JSON lines",
        "[]": "no rows under 'questions'",
        json.dumps({"questions": []}): "no rows under 'questions'",
        json.dumps({"questions": rows * 2}): "question_id 0 twice",
        json.dumps({"questions": [{"question_id": "0"}]}): "is this another file",
        json.dumps({"questions": [rows[0] | {"question_id": 5}]}): "no answer to 1 of the 1",
        json.dumps({"questions": [rows[0] | {"image_id": 43}]}): "1 of the 1 images",
    }.items():
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            read("vqa", path, answers, images)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bad.json cannot be read"):
        read("vqa", tmp_path / "bad.json", answers, images)
    with pytest.raises(FileNotFoundError, match="no .*absent.json"):
        read("vqa", tmp_path / "absent.json", answers, images)
    with pytest.raises(ValueError, match="leads out"):
        read("pope", write(tmp_path / "p.json", [{"question_id": 1, "image": "../x.jpg", "text": "?", "label": "no"}]),
            None,
            images,
        )
