"""Each benchmark is read from its original files, and each published figure has a hand-counted case."""

import doctest
import json
import math
import pickle
import random
import shutil
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import benchmarks
import numpy as np
import pytest
import scores
from benchmarks import (
    BENCHMARKS,
    PAPER,
    PAPER_ROWS,
    TASKS,
    Item,
    flip_consistency,
    judge_locpred,
    judge_spatial,
    keywords,
    spatial_items,
    spatial_metrics,
)
from PIL import Image
from scores import SHORT, ask_judge, judge_requests, parse_judgement, read_judgements, vqa_normal, vqa_scores

from coords import CoordFormat, iou
from data import Object, Record, Wording, box_from_xywh

WORDING = Wording(CoordFormat("ivb", 224))
LONG = "left right no 12 ... 1,2 don't " * 33_000  # a megabyte


def answered(name, items, *answers):
    """Put answers to items, judge them and give the benchmark's figures."""
    for item, answer in zip(items, answers, strict=True):
        item.answer = answer
        BENCHMARKS[name].judge(item, WORDING)
    return BENCHMARKS[name].metrics(items)


def write(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def touch(folder, *names):
    """Make files of which only the names matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_the_examples_in_docstrings_hold():
    assert not doctest.testmod(benchmarks).failed and not doctest.testmod(scores).failed


def test_every_benchmark_says_what_it_reads_and_the_papers_rows_are_of_tasks():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.files.startswith("questions: ") and benchmark.prompts, name
    assert PAPER.keys() | PAPER_ROWS.keys() <= TASKS.keys() | BENCHMARKS.keys()
    assert PAPER.keys() == {"spatial", "gqa", "vqa", "hal", "hal-ade"}, "one row of LocVLM-B, of the same input"
    assert (
        len(PAPER["spatial"]) == 12
        and PAPER["spatial"]["icl along below"] == 74.4
        and PAPER["hal"] == {"accuracy": 88.3}
    )


# ----- GQA


def gqa(**more):
    row = {"question": "Is it overcast?", "answer": "yes", "imageId": "n161313", "isBalanced": True}
    return {"201307251": row, "20": row | {"answer": "left", "imageId": "n2"} | more}


def test_gqa_is_read_from_its_official_file_and_counted_by_exact_match(tmp_path):
    questions, images = write(tmp_path / "q.json", gqa()), touch(tmp_path / "images", "n161313.jpg", "n2.jpg")
    items, left_out = BENCHMARKS["gqa"].read(questions, None, images)
    assert [(i.id, i.question, i.image.name) for i in items][0] == ("201307251", "Is it overcast?", "n161313.jpg")
    assert not left_out and BENCHMARKS["gqa"].read(questions, None, images, short=True)[0][0].question.endswith(SHORT)
    metrics = answered("gqa", items, "Yes.", "It is on the left side.")
    assert metrics == {"exact match": 0.5, "contains": 1.0, "questions": 2}
    metrics = answered("gqa", items, "Yes, it is.", "leftover")
    assert metrics["exact match"] == 0 and metrics["contains"] == 0.5
    assert BENCHMARKS["gqa"].submission(items)[1] == {"questionId": "20", "prediction": "leftover"}


def test_gqa_asks_balanced_questions_only_and_finds_images_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("images/n161313.jpg", "")
    items, left_out = BENCHMARKS["gqa"].read(
        write(tmp_path / "q.json", gqa(isBalanced=False)), None, tmp_path / "images.zip"
    )
    assert len(items) == 1 and left_out == {"questions that are not balanced": 1}


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
        BENCHMARKS["gqa"].read(path, None, tmp_path / "images")
    answers = write(tmp_path / "official.json", official)
    items, left_out = BENCHMARKS["gqa"].read(path, answers, tmp_path / "images")
    assert len(items) == 4000 and not left_out and all(item.truth["answer"] == item.id for item in items)
    assert items[0].question == "Is it overcast?"
    del official[rows[7]["question_id"]]
    with pytest.raises(ValueError, match=f"no answer to 1 of the 4000 .*{rows[7]['question_id']}"):
        BENCHMARKS["gqa"].read(path, write(answers, official), tmp_path / "images")


# ----- VQAv2


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


def test_nothing_is_normalised_where_all_annotators_agree():
    assert vqa_scores("Yes.", ["yes"] * 10)[0] == 0 and vqa_scores("yes", ["yes"] * 10)[0] == 1
    assert vqa_scores("Yes.", ["yes"] * 9 + ["no"])[0] == 1
    assert vqa_scores("stop\tsign\n", ["stop\nsign"] * 10)[0] == 1, "but line ends and tabs, on both sides"


def test_vqa_is_counted_by_type_and_submitted_whole(tmp_path):
    said = [("yes/no", ["yes"] * 10), ("number", ["2"] * 3 + ["3"] * 7), ("other", ["red"] * 10)]
    files = vqa(tmp_path, said)
    items, _ = BENCHMARKS["vqa"].read(*files)
    assert [item.truth["answers"][0] for item in items] == ["yes", "2", "red"], "joined by id: annotations are reversed"
    metrics = answered("vqa", items, "Yes.", "two", "It is red")
    assert metrics["accuracy"] == pytest.approx(0.9 / 3) and metrics["contains"] == pytest.approx(2.9 / 3)
    assert metrics["accuracy, normalised first"] == pytest.approx(1.9 / 3)
    assert metrics["answer type number"] == pytest.approx(0.9) and metrics["answer type other"] == 0
    assert metrics["question type what"] == metrics["accuracy"] and metrics["questions"] == 3
    assert BENCHMARKS["vqa"].submission(items)[0] == {"question_id": 0, "answer": "yes"}


def test_vqas_test_split_has_no_score_but_a_submission(tmp_path):
    questions, _, images = vqa(tmp_path, [("other", ["x"] * 10)] * 2, data_subtype="test-dev2015")
    touch(images, "COCO_test2015_000000000042.jpg")
    items, _ = BENCHMARKS["vqa"].read(questions, None, images)
    assert answered("vqa", items, "Red.", "") == {"questions without annotations": 2} and items[0].correct is None
    assert BENCHMARKS["vqa"].submission(items) == [
        {"question_id": 0, "answer": "red"},
        {"question_id": 1, "answer": ""},
    ]


def test_what_is_wrong_with_files_is_said_before_anything_is_asked(tmp_path):
    questions, answers, images = vqa(tmp_path, [("other", ["x"] * 10)])
    read = BENCHMARKS["vqa"].read
    rows = json.loads(questions.read_text())["questions"]
    for content, error in {
        "{": "neither JSON nor JSON lines",
        "[]": "no list 'questions'",
        json.dumps({"questions": []}): "holds nothing",
        json.dumps({"questions": rows * 2}): "question_id 0 twice",
        json.dumps({"questions": [{"question_id": "0"}]}): "is this another file",
        json.dumps({"questions": [rows[0] | {"question_id": 5}]}): "no answer to 1 of the 1",
        json.dumps({"questions": [rows[0] | {"image_id": 43}]}): "1 of the 1 images",
    }.items():
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            read(path, answers, images)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not text"):
        read(tmp_path / "bad.json", answers, images)
    with pytest.raises(FileNotFoundError, match="no .*absent.json"):
        read(tmp_path / "absent.json", answers, images)
    with pytest.raises(ValueError, match="leads out"):
        BENCHMARKS["pope"].read(
            write(tmp_path / "p.json", [{"question_id": 1, "image": "../x.jpg", "text": "?", "label": "no"}]),
            None,
            images,
        )


# ----- questions about videos


def test_activitynet_qas_real_files_are_joined_and_counted_by_type(real, tmp_path):
    folder = real("formats/activitynet-qa")
    rows = json.loads((folder / "test_q.json").read_text())
    names = sorted({row["video_name"] for row in rows})
    clips = touch(tmp_path / "clips", *[f"v_{name}.mp4" for name in names[1:]])
    items, left_out = BENCHMARKS["activitynet-qa"].read(folder / "test_q.json", folder / "test_a.json", clips)
    gone = sum(row["video_name"] == names[0] for row in rows)
    assert len(rows) == 8000 and len(names) == 800 and len(items) == 8000 - gone
    [(reason, count)] = left_out.items()
    assert "1 clips that are not in" in reason and names[0] in reason and count == gone
    truth = {row["question_id"]: row["answer"] for row in json.loads((folder / "test_a.json").read_text())}
    metrics = answered("activitynet-qa", items, *[truth[item.id].upper() + "." for item in items])
    assert metrics["exact match"] == metrics["contains"] == 1 and metrics["exact match, temporal relationship"] == 1
    assert len([name for name in metrics if name.startswith("exact match, ")]) == 9
    with pytest.raises(FileNotFoundError, match="none of the 800 clips"):
        BENCHMARKS["activitynet-qa"].read(
            folder / "test_q.json", folder / "test_a.json", touch(tmp_path / "no", "a.mp4")
        )
    with pytest.raises(ValueError, match="holds no answers"):
        BENCHMARKS["activitynet-qa"].read(folder / "test_q.json", None, clips)


def test_tgif_qas_real_table_is_read(real, tmp_path):
    path = real("formats/tgif-qa/Test_frameqa_question.csv")
    gifs = {line.split("\t")[0] for line in path.read_text().splitlines()[1:]}
    clips = touch(tmp_path, *[f"{name}.gif" for name in gifs])
    items, left_out = BENCHMARKS["tgif-qa"].read(path, None, clips)
    assert len(items) == 12623 and len(gifs) == 6861 and not left_out
    assert items[0].truth == {"answer": "cookie", "type": "object"} and items[0].id == "FRAMEQA1159"
    for content in (b"gif_name\tanswer\n\xff", b"x" * 200_000):  # of another encoding; a field beyond csv's limit
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(ValueError, match="bad.csv cannot be read"):
            BENCHMARKS["tgif-qa"].read(tmp_path / "bad.csv", None, clips)


def test_msvd_and_msrvtt_clips_go_by_their_numbers(tmp_path):
    rows = [{"id": 7, "video_id": 1451, "question": "what is it?", "answer": "dog", "category_id": 3}]
    path = write(tmp_path / "val_qa.json", rows)
    for name, clip in (("msvd-qa", "vid1451.avi"), ("msrvtt-qa", "video1451.mp4")):
        [item], _ = BENCHMARKS[name].read(path, None, touch(tmp_path / name, clip))
        assert item.id == "7" and item.image.name == clip and item.truth == {"answer": "dog"}
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1451\n")
    [item], _ = BENCHMARKS["msvd-qa"].read(path, None, touch(tmp_path / "tube", "-4wsuPCjDBc_5_15.avi"))
    assert item.image.name == "-4wsuPCjDBc_5_15.avi"
    metrics = answered("msvd-qa", [item], "A hot dog!")
    assert metrics == {"exact match": 0.0, "contains": 1.0, "questions": 1}
    told = [{"question_id": "9", "answer": "x", "type": "\u00b2"}]  # a digit, and no number
    questions = [{"video_name": "video1451", "question": "what?", "question_id": "9"}]  # as Video-LLaVA repacks it
    files = write(tmp_path / "test_q.json", questions), write(tmp_path / "a.json", told)
    assert BENCHMARKS["activitynet-qa"].read(*files, tmp_path / "msrvtt-qa")[0][0].truth == {"answer": "x"}
    files = write(tmp_path / "test_q.json", questions), write(tmp_path / "a.json", [{"answer": "x", "question_id": 9}])
    [item], _ = BENCHMARKS["msrvtt-qa"].read(*files, tmp_path / "msrvtt-qa", short=True)
    assert item.truth == {"answer": "x"} and item.question == "what?" + SHORT


# ----- the judge


def talked(count=3):
    return [Item(f"q{n}", None, None, f"What {n}?{SHORT}", {"answer": "dog"}, "a {'pred'} dog") for n in range(count)]


def reply(name, text):
    return {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": text}}]}}}


def test_judge_requests_are_video_chatgpts_prompts_in_openais_batch_format():
    [row] = judge_requests(talked(1), "judge-1")
    assert (row["custom_id"], row["method"], row["url"]) == ("q0", "POST", "/v1/chat/completions")
    system, user = row["body"]["messages"]
    assert system["content"].startswith("You are an intelligent chatbot") and row["body"]["model"] == "judge-1"
    assert "Question: What 0?\nCorrect Answer: dog\nPredicted Answer: a {'pred'} dog\n\n" in user["content"]
    assert user["content"].endswith("your response should look like this: {'pred': 'yes', 'score': 4.8}.")


def test_judgements_are_joined_by_id_and_what_cannot_be_read_is_counted():
    items = talked(6)
    rows = [
        reply("q3", "{'pred': 'no', 'score': 1}"),
        reply("q0", "{'pred': 'yes', 'score': 4.8}"),
        reply("q1", "Sure! Yes, 5 of 5"),
        reply("q4", "```python\n{'pred': 'Yes', 'score': 5}\n```"),
        {"custom_id": "q5", "response": None, "error": {"message": "rate limit"}},
        {"custom_id": "q3", "response": None, "error": {"message": "asked again in vain"}},
    ]
    metrics = read_judgements(rows, items)
    assert metrics == {
        "judge accuracy": 2 / 3,
        "judge score, as a share of 5": pytest.approx((1 + 4 + 5) / 15),
        "judged": 3,
        "judge unparsable": 1,
        "judge missing": 2,
    }
    assert items[0].truth["judged"] == {"right": True, "score": 4} and "judged" not in items[1].truth
    with pytest.raises(ValueError, match="q0 comes twice"):
        read_judgements([*rows, rows[1]], items)
    with pytest.raises(ValueError, match="'q9', which no question has"):
        read_judgements([reply("q9", "")], items)
    assert math.isnan(read_judgements([], items)["judge accuracy"])


def test_no_reply_breaks_the_parser():
    for text in (
        "",
        "{",
        "}{",
        "{'pred': 'yes'}",
        "{'pred': 1, 'score': 2}",
        "{'pred': 'yes', 'score': 'x'}",
        "{1, 2}",
    ):
        assert parse_judgement(text) is None
    for text in ("{'pred': 'yes', 'score': 1e999}", "{'pred': 'maybe', 'score': 3}", "{'pred': 'yes', 'score': -1}"):
        assert parse_judgement(text) is None
    for text in ("{" + "[" * 9000 + "}", "{'pred': " + "-" * 9000 + "}", "{" + LONG + "}", "{'a': __import__('os')}"):
        assert parse_judgement(text) is None


@pytest.fixture
def endpoint():
    """An endpoint that answers with the codes it is told, then 200: gives (address, codes, what was asked, with which key)."""
    codes, asked, keys = [], [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            keys.append(self.headers["Authorization"])
            code = codes.pop(0) if codes else 200
            content = {"choices": [{"message": {"content": "{'pred': 'yes', 'score': 3}"}}]}
            if code == 0:
                code, content = 200, {"choices": []}
            cut_short, code = code == 1, 200 if code == 1 else code
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            if cut_short:
                self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", codes, asked, keys
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_again_where_it_failed_and_not_where_it_answered(endpoint):
    url, codes, asked, keys = endpoint
    codes += [500, 429, 0, 1]  # and a reply that breaks off
    items = talked(4)
    done = list(ask_judge(url, "secret", "judge-1", items[:2], workers=1, wait=0.001))
    assert [row["custom_id"] for row in done] == ["q0", "q1"] and len(asked) == 6
    assert asked[0][0] == "/v1/chat/completions" and set(keys) == {"Bearer secret"}
    done += ask_judge(url + "/", "secret", "judge-1", items, done, wait=0.001)
    assert sorted(row["custom_id"] for row in done) == ["q0", "q1", "q2", "q3"] and len(asked) == 8
    assert read_judgements(done, items)["judge accuracy"] == 1
    assert list(ask_judge(url, None, "judge-1", items, done)) == [] and len(asked) == 8


def test_what_is_judged_while_one_question_fails_is_kept(endpoint):
    """Two at a time: the first is refused for good, the other's judgement comes before the error, and no third is asked."""
    url, codes, asked, _ = endpoint
    codes += [401]
    told = []
    with pytest.raises(ValueError, match="401"):
        for row in ask_judge(url, "secret", "judge-1", talked(40), workers=2, wait=0.001):
            told.append(row)
    assert len(told) == len(asked) - 1 < 39


def test_a_key_that_no_header_can_hold_is_refused_unseen(endpoint):
    for key in ("sk-secret\r", "sk secret", "sk-\u00e9"):
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
            list(ask_judge(endpoint[0], key, "judge-1", talked(1)))
        assert "sk" not in str(error.value)


def test_an_endpoint_that_refuses_or_never_answers_is_an_error_that_names_it(endpoint):
    url, codes, asked, _ = endpoint
    for code in (401, 404, 302):
        codes += [code]
        with pytest.raises(ValueError, match=f"{code} .*expected a judgement; check address, key and model"):
            list(ask_judge(url, "secret", "judge-1", talked(1), wait=0.001))
    assert len(asked) == 3, "what is refused for good is asked once"
    codes += [503] * 9
    with pytest.raises(ValueError, match="in 3 tries .503"):
        list(ask_judge(url, "k", "judge-1", talked(1), retries=3, wait=0.001))
    with pytest.raises(ValueError, match="in 2 tries"):
        list(ask_judge("http://127.0.0.1:9/v1", "k", "judge-1", talked(1), retries=2, wait=0.001))
    with pytest.raises(ValueError, match="expected http"):
        list(ask_judge("ftp://host", "k", "judge-1", talked(1)))


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
    items, left_out = BENCHMARKS["pope"].read(path, None, tmp_path / "val2014.zip")
    assert len(items) == 3000 and not left_out and items[0].question == rows[0]["text"]
    metrics = answered("pope", items, *[item.truth["label"] for item in items])
    assert metrics["accuracy"] == metrics["F1"] == 1 and metrics["questions (the present files)"] == 3000
    if name.startswith("coco"):
        assert metrics["says yes"] == 0.5


def test_popes_figures_and_version(tmp_path):
    """2 true yes, 1 false yes, 1 false no, 1 true no; an empty answer reads as yes."""
    said = [("yes", "Yes."), ("yes", ""), ("yes", "No, there is no cup."), ("no", "Both yes"), ("no", "There is not.")]
    rows = [{"question_id": n, "image": "a.jpg", "text": "?", "label": label} for n, (label, _) in enumerate(said)]
    items, _ = BENCHMARKS["pope"].read(write(tmp_path / "p.json", rows, True), None, touch(tmp_path, "a.jpg"))
    metrics = answered("pope", items, *[text for _, text in said])
    assert [metrics[name] for name in benchmarks.FIVE] == [3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5]
    assert metrics["neither yes nor no"] == 1 / 5
    assert metrics["questions (as many as in neither released version)"] == 5
    old = benchmarks.pope_metrics(items * 582)
    assert old["questions (the old random file, LLaVA's)"] == 2910
    one = write(tmp_path / "one.json", rows[:1], True)
    assert len(BENCHMARKS["pope"].read(one, None, tmp_path)[0]) == 1, "a single line is not an object"
    with pytest.raises(ValueError, match="label 'maybe'"):
        BENCHMARKS["pope"].read(write(tmp_path / "p.json", [rows[0] | {"label": "maybe"}]), None, tmp_path)


# ----- RefCOCO


def refs_pickle(folder, protocol=2, **changes):
    """RefCOCO's files in little: two refs of one image, in two splits."""

    def sentences(*texts):
        return [{"sent_id": 10 * len(texts) + n, "sent": text, "tokens": text.split()} for n, text in enumerate(texts)]

    base = {"image_id": 9, "file_name": "COCO_train2014_000000000009_1.jpg", "category_id": 1}
    refs = [
        base | {"ref_id": 5, "ann_id": 1, "split": "testB", "sentences": sentences("left zebra", "zebra caf\xe9")},
        base | {"ref_id": 6, "ann_id": 2, "split": "train", "sentences": sentences("right zebra")} | changes,
    ]
    instances = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 448, "height": 224}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 1, "bbox": [0, 0, 224, 112]},
            {"id": 2, "image_id": 9, "category_id": 1, "bbox": [224, 0, 224.001, 224]},
        ],
        "categories": [],
    }
    write(folder / "instances.json", instances)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    touch(folder / "images", "train2014/COCO_train2014_000000000009.jpg")
    return folder / "refs(unc).p", folder / "images"


@pytest.fixture
def no_meteor(monkeypatch):
    monkeypatch.setattr(scores, "require_meteor", lambda: None)


def test_refs_are_read_from_the_pickle_once_and_from_json_after(tmp_path, no_meteor):
    path, images = refs_pickle(tmp_path)
    [item], left_out = BENCHMARKS["refcoco"].read(path, None, images, split="testB", wording=WORDING)
    assert item.id == "5" and item.size == (448, 224) and item.truth["box_px"] == (0, 0, 224, 112) and not left_out
    assert "(0, 0, 112, 112)" in item.question and item.truth["sentences"] == ["left zebra", "zebra caf\xe9"]
    benchmarks.main(["refs", str(path), str(tmp_path / "refs.json")])
    path.unlink()
    for name in ("refcoco", "rec"):
        again, _ = BENCHMARKS[name].read(tmp_path / "refs.json", None, images, split="testB", wording=WORDING)
        assert name == "rec" or vars(again[0]) == vars(item)
    assert [i.truth["name"] for i in again] == ["left zebra", "zebra caf\xe9"] and len({i.id for i in again}) == 2
    metrics = answered("rec", again, "It is located at (0, 0, 112, 112)", "It is located at (nan, 0, 112, 112)")
    assert metrics["acc@0.5"] == 0.5 and metrics["no box"] == 0.5
    with pytest.raises(ValueError, match=r"split None .* testB \(1\), train \(1\)"):
        BENCHMARKS["rec"].read(tmp_path / "refs.json", None, images, wording=WORDING)


def test_rec_counts_in_original_pixels(tmp_path):
    """Half of the true box in an image of 448 x 224, as the model's square of 224 x 224 writes it."""
    path, images = refs_pickle(tmp_path)
    [item], _ = BENCHMARKS["rec"].read(path, None, images, split="train", wording=WORDING)
    assert item.truth["box_px"] == (224, 0, 448, 224)
    for text, right in (("(112, 0, 168, 224)", True), ("(112, 0, 167, 224)", False), ("", False), (LONG, False)):
        assert answered("rec", [item], text)["acc@0.5"] == right


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path, images = refs_pickle(tmp_path, protocol, category_id=Evil())
        with pytest.raises(ValueError, match="could run any code, so it is not run"):
            BENCHMARKS["rec"].read(path, None, images, split="train", wording=WORDING)
    assert "run" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        BENCHMARKS["rec"].read(path, None, images, split="train", wording=WORDING)
    path, images = refs_pickle(tmp_path, ann_id=77)
    with pytest.raises(ValueError, match="annotation 77"):
        BENCHMARKS["rec"].read(path, None, images, split="train", wording=WORDING)


def test_boxes_that_are_none_are_left_out_and_counted(tmp_path):
    path, images = refs_pickle(tmp_path)
    instances = json.loads((tmp_path / "instances.json").read_text())
    for bbox, why in (([math.nan, 0, 9, 9], "finite"), ([440, 0, 99, 9], "outside"), ([0, 0, 0, 9], "no area")):
        instances["annotations"][0]["bbox"] = bbox
        write(tmp_path / "instances.json", instances)
        _, left_out = benchmarks.refs_of(path, None, images, "testB")
        [(reason, count)] = left_out.items()
        assert why in reason and count == 1
        with pytest.raises(ValueError, match="gives no question"):
            BENCHMARKS["rec"].read(path, None, images, split="testB", wording=WORDING)


def test_other_forms_of_refcoco_are_read(tmp_path, no_meteor):
    picture(tmp_path / "a.jpg", (100, 80))
    shikra = [{"img_path": "a.jpg", "expression": text, "bbox": [10, 20, 50, 60]} for text in ("the cup", "red cup")]
    mdetr = {
        "images": [
            {"id": n, "file_name": "a.jpg", "width": 100, "height": 80, "caption": t} for n, t in enumerate("xy")
        ],
        "annotations": [{"id": n, "image_id": n, "bbox": [10, 20, 40, 40 - n]} for n in range(2)],
    }
    for content, lines, count in ((shikra, True, 1), (mdetr, False, 2)):
        path = write(tmp_path / "refs.json", content, lines)
        items, _ = BENCHMARKS["refcoco"].read(path, None, tmp_path, wording=WORDING)
        assert len(items) == count and items[0].truth["box_px"] == (10, 20, 50, 60) and items[0].size == (100, 80)
        assert len(BENCHMARKS["rec"].read(path, None, tmp_path, wording=WORDING)[0]) == 2
    own = {
        "ref_id": "1",
        "file_name": "a.jpg",
        "bbox": [10, 20, 40, 40],
        "sentences": [[7, "cup"]],
    }  # by hand: no split
    for content, lines in (({"refs": [own]}, False), (shikra[:1], True)):
        [item], _ = BENCHMARKS["rec"].read(write(path, content, lines), None, tmp_path, wording=WORDING)
        assert item.size == (100, 80) and item.truth["box_px"] == (10, 20, 50, 60) and isinstance(item.id, str)
    odd = [shikra[0] | {"bbox": [1, 2, 3]}], mdetr | {"images": [mdetr["images"][0] | {"width": None}]}
    odd += {"refs": [own | {"sentences": ["cup"]}]}, {"refs": [own | {"size": [9]}]}, {"refs": [own | {"split": []}]}
    for content in ([{"a": 1}], {"images": [{}], "annotations": []}, {"refs": [{"ref_id": "1"}]}, [1], [[]], *odd):
        with pytest.raises(ValueError, match="is this another file"):
            BENCHMARKS["rec"].read(write(tmp_path / "bad.json", content), None, tmp_path, wording=WORDING)


def test_real_samples_of_refcoco(real, tmp_path):
    """MAttNet's detections: sentences and true boxes are read, its best boxes judged. Descriptions are written as theirs."""
    path = real("formats/refcoco/testA_refcoco_unc_dets.json")
    rows = json.loads(path.read_text())
    for number in {row["pred_boxes_img_id"][0][15:27] for row in rows}:
        picture(tmp_path / f"{number}.jpg", (640, 640))
    items, left_out = BENCHMARKS["rec"].read(path, None, tmp_path, wording=WORDING)
    assert len(rows) == len(items) == 50 and not left_out
    x, y, w, h = rows[0]["gt_box"]
    assert items[0].truth["box_px"] == (x, y, x + w, y + h) and items[0].truth["name"] == rows[0]["sent"]
    fmt, right = CoordFormat("nfp", 224), 0
    for item, row in zip(items, rows, strict=True):
        found_px = max(map(box_from_xywh, row["pred_boxes"]), key=lambda box_px: iou(box_px, item.truth["box_px"]))
        item.answer = fmt.encode_box(found_px, item.size)
        judge_locpred(item, Wording(fmt))
        right += iou(found_px, box_from_xywh(row["gt_box"])) >= 0.5
    assert BENCHMARKS["rec"].metrics(items)["acc@0.5"] == right / 50 and right == 45
    for name in ("testA", "testB"):
        sample = real(f"formats/refcoco/sample_expressions_{name}.json")
        with pytest.raises(ValueError, match="holds a model's descriptions"):
            BENCHMARKS["rec"].read(sample, None, tmp_path, wording=WORDING)
    [theirs, *_] = json.loads(sample.read_text())["predictions"]
    [ours] = BENCHMARKS["refcoco"].submission([Item("25", None, None, "?", {}, "car on left")])["predictions"]
    assert ours == theirs


def test_meteors_absence_is_named_before_anything_is_asked(tmp_path, monkeypatch):
    path, images = refs_pickle(tmp_path)
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no pycocoevalcap.*pip install pycocoevalcap, and install Java 1.8"):
        BENCHMARKS["refcoco"].read(path, None, images, split="testB", wording=WORDING)


def test_meteor_is_pycocoevalcaps(no_meteor):
    """Two refs against Meteor itself, tokens made by hand; odd white space, empty answers and ||| shift nothing."""
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pip install pycocoevalcap to compare METEOR")
    if not shutil.which("java"):
        pytest.skip("no java: METEOR 1.5 needs it")
    told = {"1": ["Man in black.", "guy, black shirt"], "2": ["left zebra"], "3": ["the donut"]}
    said = {
        "3": "There is a donut\r\nthat is on \u2028 the\x85left ||| side",
        "1": "the man in a black shirt!",
        "2": "",
    }
    tokens = {"1": ["man in black", "guy black shirt"], "2": ["left zebra"], "3": ["the donut"]}
    spoken = {"1": ["the man in a black shirt"], "2": [""], "3": ["there is a donut that is on the left side"]}
    expected, each = meteor.Meteor().compute_score(tokens, spoken)
    assert expected > 0.2 and each[1] == 0
    items = [Item(name, None, None, "?", {"sentences": told[name]}) for name in told]
    metrics = answered("refcoco", items, *[said[name] for name in told])
    assert metrics["METEOR 1.5"] == pytest.approx(expected) and metrics["empty answers"] == 1
    assert metrics['METEOR 1.5 without "There is a"'] > expected and metrics["sentences"] == 4
    assert items[0].correct is None
    assert answered("refcoco", items, "", "\ud83d", "")["METEOR 1.5"] == 0, "half of a character, as a file may hold it"


# ----- which side


def test_left_and_right_are_asked_of_the_mirror_image_too():
    objects = tuple(Object(n, (x, 10, x + 10, 20)) for n, x in (("dog", 0), ("cat", 70), ("cup", 80)))
    record = Record("1", "x.png", (100, 100), objects, ("dog",), ())
    items = spatial_items([record], WORDING, random.Random(0))
    direct, flipped = [item for item in items if item.truth["setting"].startswith("across")]
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
        assert metrics["across"] == across and metrics["across flip consistency"] == consistent, (said, mirror)
        assert metrics["across questions"] == 1 and metrics["across right"] == across
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
        assert metrics["across questions"] == 1 and metrics["across questions, whole in their halves"] == whole
        assert len(list(benchmarks.spatial_triplets([record(x1)], random.Random(0), 0, strict=True))) == whole


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
    touch(folder, "val2014/COCO_val2014_000000000009.jpg")
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    return write(folder / "coco_spatial.json", {"categories": categories, "data": data}), None, folder


def test_the_authors_coco_spatial_is_balanced_by_mirror_images(tmp_path):
    (one, flipped), left_out = BENCHMARKS["coco-spatial"].read(*coco_spatial(tmp_path))
    assert one.question == "Which side of the dog is the cat?" and left_out == {"images without pairs": 1}
    assert one.truth == {"word": "right", "boxes_px": [(0, 0, 10, 10), (60, 0, 70, 10)]}
    assert flipped.truth == {"word": "left", "boxes_px": [(90, 0, 100, 10), (30, 0, 40, 10)]} and flipped.mirrored
    always = answered("coco-spatial", [one, flipped], "right", "right")
    assert always["accuracy"] == 0.5 and always["right (the image)"] == 1 and always["left (its mirror image)"] == 0
    assert always["flip consistency"] == 0 and always["strict"] == 0.5 and always["questions"] == 2
    assert answered("coco-spatial", [one, flipped], "left", "right")["flip consistency"] == 1
    for changes, error in (
        ({"good_pairs": [[0, 7]]}, "IndexError"),
        ({"good_pairs": [[0]]}, "amiss"),
        ({"width": None}, "amiss"),
        ({"width": math.inf}, "amiss"),
    ):
        with pytest.raises(ValueError, match=error):
            BENCHMARKS["coco-spatial"].read(*coco_spatial(tmp_path, **changes))
    content = json.loads(coco_spatial(tmp_path)[0].read_text())
    with pytest.raises(ValueError, match="rows with id, name"):
        BENCHMARKS["coco-spatial"].read(write(tmp_path / "x.json", content | {"categories": [{}]}), None, tmp_path)
    with pytest.raises(ValueError, match="no dictionary 'data'"):
        BENCHMARKS["coco-spatial"].read(write(tmp_path / "x.json", []), None, tmp_path)


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
    images = touch(tmp_path / "images", *[f"ADE_val_{n:08d}.jpg" for n in (1, 2, 3)])
    items, left_out = BENCHMARKS["hal-ade"].read(tmp_path / "objectInfo150.txt", None, images)
    asked = {(i.id[:16], i.truth["label"]): {} for i in items}
    for item in items:
        asked[item.id[:16], item.truth["label"]][item.truth["name"]] = item.question
    assert asked["ADE_val_00000001", "yes"].keys() == {"wall", "sky"}
    assert asked["ADE_val_00000001", "no"].keys() <= {"water", "screen door", "blind"} and len(items) == 6
    assert asked["ADE_val_00000003", "yes"] == {"screen door": "Is there a screen door in the image?"}
    assert left_out == {"images with no such object": 1}, "the second shows COCO's person and a table alone"
    drawn = {
        name
        for n in range(9)
        for i in BENCHMARKS["hal-ade"].read(tmp_path / "objectInfo150.txt", None, images, seed=n)[0]
        for name in [i.truth["name"]]
        if "3:no" in i.id
    }
    assert drawn == {"wall", "sky", "water"}, "a blind is a screen, as what is there is"
    metrics = answered("hal-ade", items, *[item.truth["label"] for item in items])
    assert metrics["accuracy"] == 1
    (tmp_path / "wrong.txt").write_text("x" * 200_000)
    with pytest.raises(ValueError, match="wrong.txt lists no objects"):
        benchmarks.read_hal_ade(tmp_path / "wrong.txt", None, tmp_path)
    Image.fromarray(np.array([[200]], np.uint8)).save(folder / "ADE_val_00000001.png")
    with pytest.raises(ValueError, match="ADE_val_00000001.png has shape .1, 1. and values 200"):
        BENCHMARKS["hal-ade"].read(tmp_path / "objectInfo150.txt", None, images)
    (tmp_path / "objectInfo150.txt").write_text("no table\n")
    with pytest.raises(ValueError, match="lists no objects"):
        BENCHMARKS["hal-ade"].read(tmp_path / "objectInfo150.txt", None, images)


def test_hal_act_says_video_of_clips_to_a_model_of_video():
    clip, still = (Record("1", name, (9, 9), (), ("cup",), ("dog",)) for name in ("clip.mp4", "photo.jpg"))
    video = Wording(CoordFormat("ivb", 224), medium="video")
    for wording, record, medium in ((video, clip, "video"), (video, still, "image"), (WORDING, clip, "image")):
        for item in benchmarks.hal_items([record], wording, random.Random(0)):
            assert item.question == f"Is there a {item.truth['name']} in the {medium}?"


# ----- words


def test_keywords_are_counted_once_a_conversation_over_both_denominators(tmp_path, capsys):
    talks = [
        ["Who is there?", "A cat on the left, to the LEFT of a dog. On the left side, too."],
        ["What is right?", "You are right.", "And left?", "The leftovers."],
        ["Nothing?", "Nothing: rightly so, upright."],
        ["q", "a"],
    ]
    table = keywords(talks)
    assert table["left"] == (2, 2 / 4, 2 / 10) and table["right"] == (1, 1 / 4, 1 / 10)
    assert table["the left"][0] == table["left side"][0] == table["to the left"][0] == 1
    assert table["the right"][0] == 0
    rows = [{"conversations": [{"from": "human", "value": text} for text in talk]} for talk in talks]
    benchmarks.main(["keywords", str(write(tmp_path / "llava.json", rows))])
    out = capsys.readouterr().out
    assert "4 conversations, 10 turns" in out
    assert ["left", "2", "50.00", "20.000"] in [line.split() for line in out.splitlines()]


def test_keywords_of_real_llava_samples(real):
    talks = benchmarks.read_talk(real("formats/llava/coco2014_val_gpt4_qa_30x3.jsonl"))
    table = keywords(talks)
    assert len(talks) == 90 and table["left"][0] == 11 and table["to the right"][0] == 3
    with pytest.raises(ValueError, match="expected conversations, or instruction and output"):
        benchmarks.read_talk(real("formats/llava/qa90_gpt4_answer.jsonl"))


def test_a_turn_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 0 is .*expected conversations"):
        benchmarks.read_talk(write(tmp_path / "talk.json", [{"conversations": [{"value": None}]}]))


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
        BENCHMARKS[name].judge(item, WORDING)
        assert item.correct in (True, False) or name == "vqa"
    assert time.monotonic() - start < 5
