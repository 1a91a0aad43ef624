"""`python -m tasks`: a benchmark asked from its files, answers made elsewhere, the judge, options that do not go together."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT
from PIL import ImageOps

import evaluate
import tasks
from clip_vit import preprocess
from coords import CoordFormat
from data import Wording
from evaluate import Item, LocVLM, Task
from formats.files import read_json, write_json, write_rows
from formats.images import open_image
from tasks import TASKS, judge
from tasks.__main__ import main, parse
from tasks.words import SHORT
from tiny.shapes import write_world

WORDING = Wording(CoordFormat("ivb", 224))


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """Write an empty page: making it takes a process of its own."""
    monkeypatch.setattr(evaluate, "write_page", lambda run: (Path(run) / "eval/report.html").touch())


@pytest.fixture
def run(make_model, tmp_path):
    """A run folder and a world of 12 images: the words of a command line that evaluates it on locpred."""
    write_world(tmp_path / "world", {"val": 12})
    make_model().save_pretrained(tmp_path / "run")
    data = ["--coco", str(tmp_path / "world/instances_val.json"), "--images", str(tmp_path / "world/images")]
    return ["locpred", str(tmp_path / "run"), *data, "--max-new-tokens", "6", "--batch", "4"]


@pytest.fixture
def only_shapes(monkeypatch):
    """Refuse to load weights: only the shapes of a model can be read."""
    made = LocVLM.from_pretrained
    monkeypatch.setattr(LocVLM, "from_pretrained", lambda folder, vision, device: made(folder, vision, device=device))


def result_of(folder, task, timed=True):
    """A result without what differs from one run to the next."""
    result = json.loads((folder / f"{task}.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not timed or result.pop("seconds") >= 0 and result.pop("questions_per_second") >= 0
    return {key: value for key, value in result.items() if key not in ("asked", "world_size")}


def test_images_that_give_no_question_are_an_error(run, tmp_path):
    words = ["spatial", *run[1:]]
    write_json(tmp_path / "bare.json", read_json(run[3]) | {"annotations": []})
    words[words.index("--coco") + 1] = str(tmp_path / "bare.json")
    for more in ([], ["--score", "x"]):
        with pytest.raises(ValueError, match="bare.json yields no question for spatial; it needs boxes"):
            main([*words, *more])


def test_files_of_pope_have_a_mean_and_every_model_of_the_paper_a_row(run, tmp_path, capsys):
    """Two files beside each other, each with its results; of a benchmark with figures of LocVLM-B, those of the others too."""
    image = next((Path(run[3]).parent / "images").iterdir()).name
    for name in ("random", "popular"):
        rows = [{"question_id": n, "image": image, "text": "Is there a cup?", "label": "yes"} for n in range(2)]
        write_rows(tmp_path / f"coco_pope_{name}.json", rows)
        main(["pope", run[1], "--questions", str(tmp_path / f"coco_pope_{name}.json"), *run[4:6]])
    out = capsys.readouterr().out
    results = [read_json(Path(run[1]) / f"eval/pope-coco_pope_{name}.json") for name in ("random", "popular")]
    mean = sum(result["metrics"]["F1"] for result in results) / 2
    assert out.count("mean F1 of the 2 files") == 1 and f": {100 * mean:.1f} %" in out
    main(["hal", *run[1:]])
    out = capsys.readouterr().out
    assert "paper, Shikra: accuracy 86.2 %" in out and "paper, LocVLM-Vid-B+, Hal-Act: accuracy 72.4 %" in out


# ----- answers made elsewhere


def test_answers_are_scored_without_a_model_in_any_order(run, tmp_path, monkeypatch, capsys, request):
    main(run)
    folder = Path(run[1]) / "eval"
    own = folder / "locpred-instances_val.jsonl"
    before, rows = result_of(folder, "locpred-instances_val"), [json.loads(line) for line in own.read_bytes().splitlines()]
    assert list(rows[0]) == "id image size question answer correct boxes_px mirrored is_clip truth measured".split()
    monkeypatch.setattr(evaluate, "weights_sha256", None)
    request.getfixturevalue("only_shapes")
    main([*run, "--score", str(own)])
    assert result_of(folder, "locpred-instances_val") == before, "a run's own answers stay its own"

    (folder / "report.html").unlink()
    main([*run, "--score", os.path.relpath(own)])
    assert result_of(folder, "locpred-instances_val") == before, "by another spelling of its path"
    assert (folder / "report.html").exists(), "the page follows the figures"

    def score(rows, name="elsewhere.jsonl"):
        write_rows(tmp_path / name, rows)
        main([*run, "--score", str(tmp_path / name)])
        return result_of(Path(run[1]) / "eval_scored", "locpred-instances_val", timed=False)

    scored = score(rows[::-1])
    assert scored["metrics"] == before["metrics"] and "weights_sha256" not in scored and scored["scored"]["sha256"]
    right = [
        {"id": row["id"], "answer": f"It is located at {WORDING.place(row['truth']['box_px'], row['size'])}"}
        for row in rows
    ]
    write_json(tmp_path / "none" / "x.json", 0)
    write_rows(tmp_path / "right.jsonl", right)
    main(["locpred", str(tmp_path / "none"), *run[2:], "--score", str(tmp_path / "right.jsonl")])  # as LocVLM-B writes boxes
    result = json.loads((tmp_path / "none/eval_scored/locpred-instances_val.json").read_text())
    with monkeypatch.context() as patch:  # a folder made for a name on the hub would hide it
        patch.chdir(tmp_path)
        main(["locpred", "org/model", *run[2:], "--score", str(tmp_path / "right.jsonl")])
        assert (tmp_path / "runs/org--model/eval_scored/locpred-instances_val.json").exists() and not Path("org").exists()
    assert result["metrics"]["acc@0.5"] == 1 and "holds no model" in capsys.readouterr().out
    hostile = ["", "9" * 10**6, "(nan, nan, nan, nan)", "(\u0663, \u0664, 5, 6)", "(0, 0, 0, 0)", "x" * 10**6]
    hostile += ["\ud83d\ude00\u2028(", "(1e999, 0, 1, 1)"]
    rows_of_them = [{**row, "answer": hostile[i % len(hostile)]} for i, row in enumerate(rows)]
    assert score(rows_of_them)["metrics"]["acc@0.5"] == 0
    for wrong, message in (
        (rows[1:], r"1 ids are missing"),
        (rows + rows[:2], r"elsewhere.jsonl has id .* twice"),
        ([{**rows[0], "answer": 5}, *rows[1:]], r"row 0 is .*; is this another file.*: rows with id, answer"),
        ([rows[0] | {"question": "Where?"}, *rows[1:]], f"the question of {rows[0]['id']} is 'Where\\?', not"),
        ([row | {"answer": row["question"]} for row in rows], "its 'answer' holds the questions"),
    ):
        with pytest.raises(ValueError, match=message):
            score(wrong)


@pytest.fixture
def pope(tmp_path):
    """Two files of POPE under the same ids, and no image: score(rows, name, *options) gives the figures of answers."""
    def score(rows, name="random", *more):
        write_rows(tmp_path / "rows.jsonl", rows)
        main(["pope", str(tmp_path / "run"), "--questions", str(tmp_path / f"{name}.json"), "--score", str(tmp_path / "rows.jsonl"), *more])
        return read_json(tmp_path / f"run/eval_scored/pope-{name}.json")

    for name, thing in (("random", "cup"), ("popular", "dog")):
        images = [f"COCO_val2014_{n:012}.jpg" for n in range(4)]
        rows = [{"question_id": n, "image": images[n // 2], "text": f"Is there a {thing}{n} in it?", "label": "no"} for n in range(8)]
        write_rows(tmp_path / f"{name}.json", rows)
    return score


def rows_of(thing="cup", count=8, **more):
    return [{"question_id": n, "prompt": f"<image>\nIs there a {thing}{n} in it?"} | more for n in range(count)]


def test_the_models_answer_is_read_from_the_key_that_others_use(pope, capsys):
    """Beside Video-ChatGPT's pred, "answer" is the truth: all-wrong predictions must not score 100 %."""
    for key in ("pred", "text", "prediction", "answer"):
        others = {other: "No." for other in ("text", "prediction", "answer")} if key == "pred" else {}
        assert pope(rows_of(**others | {key: "Yes."}))["metrics"]["accuracy"] == 0, key
        assert f"answers are read from {key!r}, ids from 'question_id'" in capsys.readouterr().out
    for name in ("id", "questionId"):
        rows = [{name: str(n), "pred": "No.", "answer": "Yes."} for n in range(8)]
        assert pope(rows)["metrics"]["accuracy"] == 1
    rows[0].pop("pred")
    with pytest.raises(ValueError, match="row 0 is .*rows with questionId, pred"):
        pope(rows)


def test_rows_about_other_questions_are_refused_and_surplus_ones_counted(pope, capsys):
    """POPE's three files share their ids, and LLaVA's numbers begin elsewhere: the texts tell."""
    with pytest.raises(ValueError, match="the question of 0 is .*dog0 in it.* not 'Is there a cup0 in it.'"):
        pope(rows_of("dog", text="No."))
    rows = [row | {"prompt": f"{row['prompt']}  {SHORT} "} for row in rows_of(count=11, text="No.")]
    assert pope(rows)["metrics"]["accuracy"] == 1
    assert "3 answers are to questions that are not asked" in capsys.readouterr().out
    assert pope(rows, "random", "--limit", "2", "--short", "--fresh")["questions"] == 4
    with pytest.raises(ValueError, match="1 ids are missing"):
        pope(rows[1:])


def test_scored_files_of_pope_have_a_mean_f1(pope, capsys, tmp_path):
    for name, thing in (("random", "cup"), ("popular", "dog")):
        result = pope(rows_of(thing, text="Yes."), name)
    out = capsys.readouterr().out
    assert out.count(f"mean F1 of the 2 files of POPE in {tmp_path / 'run/eval_scored'}") == 1 and "paper, LocVLM-B, random" in out
    assert result["images"] == 4 and not list(tmp_path.rglob("*.png")), "no image is opened"


def test_answers_about_annotated_images_and_clips_are_scored_without_them(run, tmp_path):
    main(["spatial", *run[1:]])
    rows = [json.loads(line) for line in (Path(run[1]) / "eval/spatial-instances_val.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "rows.jsonl", rows[::-1])
    main(["spatial", run[1], *run[2:4], "--score", str(tmp_path / "rows.jsonl")])
    before, after = (read_json(Path(run[1]) / f"{name}/spatial-instances_val.json") for name in ("eval", "eval_scored"))
    assert before["metrics"] == after["metrics"]
    main(["spatial", run[1], *run[2:4], "--score", str(tmp_path / "rows.jsonl"), "--limit", "3", "--fresh"])
    assert 0 < read_json(Path(run[1]) / "eval_scored/spatial-instances_val.json")["questions"] < before["questions"]
    with pytest.raises(ValueError, match="the question of .* is .*--seed"):
        main(["spatial", run[1], *run[2:4], "--score", str(tmp_path / "rows.jsonl"), "--seed", "1"])
    videos = [{"id": 1, "file_name": "a.mp4", "width": 9, "height": 9, "frames": 1}]
    boxes = [{"id": 1, "video_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "frame": 0}]
    write_json(tmp_path / "clips.json", {
        "videos": videos, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]})  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", [{"id": f"1:{name}", "answer": "Yes"} for name in ("cup", "dog")])
    main(["hal", str(tmp_path / "act"), "--coco", str(tmp_path / "clips.json"), "--score", str(tmp_path / "rows.jsonl")])
    assert read_json(tmp_path / "act/eval_scored/hal-clips.json")["metrics"]["accuracy"] == 0.5


def test_judged_answers_may_be_long(capsys):
    for name, more, tokens in (("pope", [], 64), ("msvd-qa", [], None), ("msvd-qa", ["--max-new-tokens", "9"], 9)):
        assert parse([name, "r", "--questions", "q", "--images", "i", *more]).max_new_tokens == tokens
    assert parse(["hal", "r"]).max_new_tokens == evaluate.parse(["r"]).max_new_tokens == 64


# ----- public benchmarks


@pytest.fixture
def fake(run, tmp_path, monkeypatch):
    """A benchmark of two questions about a picture and its mirror image, and the command line that asks them."""
    images = Path(run[3]).parent / "images"
    image = sorted(images.iterdir())[0]
    write_json(tmp_path / "questions.json", ["Is there a circle in the image?", "What is it?"])

    def read(args, wording):
        texts = read_json(args.questions)
        truth = {"answer": args.split or "val"}
        items = [
            Item(f"{n}-{mirrored}", image, None, text, dict(truth), mirrored=mirrored)
            for n, text in enumerate(texts)
            for mirrored in (False, True)
        ]
        return items, {"questions of clips that are not there": 3}

    def judge(item, wording):
        item.correct = None

    def metrics(items):
        return {"exact": float("nan"), "questions of split " + items[0].truth["answer"]: len(items)}

    files, submission = "questions: questions.json", lambda items: [i.id for i in items]
    task = Task(read, judge, metrics, ("{question}",), files, ("split",), submission=submission)
    monkeypatch.setitem(TASKS, "fake", task)
    return ["fake", run[1], "--questions", str(tmp_path / "questions.json"), "--images", str(images)]


def test_a_benchmark_is_asked_from_its_own_files(fake, monkeypatch, capsys):
    seen = []
    generate = LocVLM.generate
    monkeypatch.setattr(
        LocVLM, "generate", lambda self, images, *a, **k: seen.extend(images) or generate(self, images, *a, **k)
    )
    main([*fake, "--split", "testB"])
    folder = Path(fake[1]) / "eval"
    result = result_of(folder, "fake-questions-testB")
    assert result["metrics"] == {"exact": None, "questions of split testB": 4} and result["split"] == "testB"
    assert result["skipped"] == {"questions of clips that are not there": 3} and result["images"] == 1
    assert read_json(folder / "fake-questions-testB.submission.json") == ["0-False", "0-True", "1-False", "1-True"]
    assert [path.name for path in sorted(folder.iterdir())] == [
        "fake-questions-testB.json",
        "fake-questions-testB.jsonl",
        "fake-questions-testB.png",
        "fake-questions-testB.submission.json",
        "report.html",
    ]
    out = capsys.readouterr().out
    assert (
        "fake-questions-testB: 4 questions about 1 images\n  skipped: 3 questions of clips" in out
        and out.splitlines()[-2].split()[-1] == "-"
    )
    config, image = LocVLM.from_pretrained(fake[1]).config, open_image(sorted(Path(fake[-1]).iterdir())[0])
    expected = [preprocess(part, config.vision_config, config.geometry) for part in (image, ImageOps.mirror(image))]
    assert len(seen) == 2 and all(map(torch.equal, seen, expected)) and not torch.equal(*seen)
    assert tuple(seen[0].shape) == (3, 28, 28), "small before they wait for the model"


def test_a_benchmark_that_would_give_wrong_results_is_refused(fake, monkeypatch):
    task = TASKS["fake"]
    for changes, words in (
        ({"judge": lambda item, wording: True}, "the judge of fake returns True; it must set item.correct"),
        ({"judge": evaluate.judge_hal}, "has the label 'Yes'; it must be yes or no"),
        ({"read": lambda *given: ([replace(i, id=7) for i in task.read(*given)[0]], {})}, "the id 7 of a question is no text"),
    ):
        read = changes.get("read", lambda *given: ([i for i in task.read(*given)[0] if not i.truth.update(label="Yes")], {}))
        monkeypatch.setitem(TASKS, "fake", replace(task, **changes | {"read": read}))
        with pytest.raises(ValueError, match=words):
            main(fake)
    for name, changes, words in (
        ("pope", {}, "there is a benchmark pope already"),
        ("new", {"prompts": "{question}"}, "prompts of new are a text"),
        ("new", {"files": ""}, "new has no files="),
    ):
        with pytest.raises(ValueError, match=f"tasks/mine.py: {words}"):
            tasks.add("mine", {name: replace(task, **changes)})


def test_only_the_first_images_of_a_benchmark_are_asked_about(run, tmp_path):
    images = sorted((Path(run[3]).parent / "images").iterdir())
    rows = [
        {"question_id": f"{image.stem} {n}", "image": image.name, "text": "Is there a cup?", "label": "yes"}
        for n in range(2)
        for image in images[::-1]
    ]
    write_rows(tmp_path / "coco_pope_random.json", rows)
    main(["pope", run[1], "--questions", str(tmp_path / "coco_pope_random.json"), *run[4:], "--limit", "3"])
    asked = (Path(run[1]) / "eval/pope-coco_pope_random.jsonl").read_text().splitlines()
    assert len(asked) == 6 and {json.loads(row)["image"] for row in asked} == set(map(str, images[-3:]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["gqa-like"], "invalid choice"),
        (["all", "--score", "x"], "invalid choice"),
        (["fake"], "fake needs --questions FILE (questions: questions.json)"),
        (["fake", "--coco", "x", "--images", "y"], "not --coco"),
        (["fake", "--questions", "x"], "fake needs --images"),
        (["fake", "--questions", "x", "--images", "y", "--short"], "fake takes --questions, --split, but not --short"),
        (["fake", "--questions", "x", "--images", "y", "--answers", "z"], "but not --answers"),
        (["hal", "--questions", "x"], "hal takes --coco, but not --questions"),
        (["hal", "--split", "val"], "but not --split"),
        (["hal", "--images", "x"], "--images needs --coco"),
        (["hal", "--coco", "x"], "--coco needs --images"),
        (["hal", "--score", "x", "--blind"], "--score asks no model"),
        (["hal", "--score", "x", "--with-blind"], "--score asks no model"),
        (["hal", "--judgements", "x", "--with-blind"], "--judgements are about one run"),
        (["hal", "--judgements", "x"], "but not --judgements"),
        (["fake", "--questions", "x", "--images", "y", "--judge-url", "z"], "but not --judge-url"),
        (["hal", "--judgements", "x", "--judge-url", "y"], "not allowed with"),
        (["hal", "--blind", "--with-blind"], "not allowed with"),
        (["hal", "--batch", "0"], "--batch below 1"),
        (["hal", "--temperature", "nan"], "--temperature nan"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, fake, capsys):
    with pytest.raises(SystemExit):
        main([words[0], "no run is read", *words[1:]])
    assert message in capsys.readouterr().err


def test_answers_are_scored_in_one_process(fake, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main([*fake, "--score", "x"])
    assert "--score runs in one process only" in capsys.readouterr().err


def test_what_is_missing_is_told_before_the_weights_are_read(run, fake, only_shapes):
    with pytest.raises(FileNotFoundError, match="no file x; expected the judge's replies"):
        main(["msvd-qa", *fake[1:], "--judgements", "x"])
    sorted((Path(run[3]).parent / "images").iterdir())[0].unlink()
    for words, count in ((run, 8), (fake, 1)):
        with pytest.raises(FileNotFoundError, match=rf"1 of the {count} images of .* are not in .* \(000001000001.png\)"):
            main(words)


def test_two_processes_answer_as_one_from_the_command_line(fake, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    # the fake benchmark exists in this process only; POPE reads the same images
    rows = [{"question_id": n, "image": "000001000001.png", "text": f"What is {n}?", "label": "no"} for n in range(6)]
    write_rows(tmp_path / "q.json", rows)
    words = ["pope", fake[1], "--questions", str(tmp_path / "q.json"), *fake[4:], "--max-new-tokens", "4", "--batch", "2"]
    main([*words, "--into", str(tmp_path / "one")])
    with socket.socket() as free:  # a port of another test would make both fail
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as torchrun sets them
    command = [sys.executable, "-m", "tasks", *words, "--into", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, **two, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in processes:
        process.communicate(timeout=300)
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "one/pope-q.jsonl").read_bytes() == (tmp_path / "two/pope-q.jsonl").read_bytes()
    assert read_json(tmp_path / "two/pope-q.json")["world_size"] == 2


# ----- the judge


def test_a_judge_is_asked_once_about_each_answer(run, tmp_path, monkeypatch):
    """Requests for any run about clips; replies from a file or an address; what was said of the same answer is kept."""
    clip = tmp_path / "clips" / "a"
    clip.mkdir(parents=True)
    shutil.copy(sorted((Path(run[3]).parent / "images").iterdir())[0], clip / "1.png")
    items = [Item(str(i), clip, None, f"What is it, {i}?", {"answer": "dog"}, is_clip=True) for i in range(3)]
    task = Task(
        lambda args, wording: (copy.deepcopy(items), {}), lambda item, wording: None, lambda items: {"exact": 0.0},
        files="questions: any", after=judge.judge_answers,
    )  # fmt: skip
    monkeypatch.setitem(TASKS, "clips-qa", task)
    (tmp_path / "q.json").write_text("[]")
    words = ["clips-qa", run[1], "--questions", str(tmp_path / "q.json"), "--images", str(tmp_path / "clips")]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("formats.eval_folder.run_jobs", lambda args, jobs, wording, model, processes: asked.append(model.decoding))
        main([*words, "--into", str(tmp_path / "into")])
    assert asked[0]["max_new_tokens"] == TEXT.max_position_embeddings // 2, "1,024 in a model that has room for them"
    main([*words, "--into", str(tmp_path / "long")])
    words += ["--max-new-tokens", "3"]
    main(words)
    folder = Path(run[1]) / "eval"
    requests = [json.loads(line) for line in (folder / "clips-qa-q.requests.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in requests] == ["0", "1", "2"]
    assert result_of(folder, "clips-qa-q")["judge"] is None
    reply = {"body": {"choices": [{"message": {"content": "{'pred': 'yes', 'score': 4}"}}]}}
    write_rows(tmp_path / "replies.jsonl", [{"custom_id": i, "response": reply} for i in ("2", "0")])
    own = str(folder / "clips-qa-q.jsonl")
    main([*words, "--score", own, "--judgements", str(tmp_path / "replies.jsonl"), "--judge-model", "gpt-x"])
    result = result_of(folder, "clips-qa-q")
    assert result["judge"] == {"model": "gpt-x", "file": str(tmp_path / "replies.jsonl")} and result["weights_sha256"]
    assert result["metrics"]["judge accuracy"] == 1 and result["metrics"]["judge missing"] == 1
    asked = []

    def ask_judge(url, key, model, items, done):
        assert (url, key) == ("http://localhost/v1", "secret") and model in ("gpt-x", "gpt-y")
        for item in items:
            if item.id not in {row["custom_id"] for row in done}:
                asked.append(item.id)
                yield {"custom_id": item.id, "response": reply}
                if len(asked) == 2:
                    raise ValueError("no more")

    monkeypatch.setattr(judge, "ask_judge", ask_judge)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    by_address = [*words, "--score", own, "--judge-url", "http://localhost/v1", "--judge-model", "gpt-x"]
    with pytest.raises(ValueError, match="no more"):
        main(by_address)
    for _ in range(2):
        main(by_address)
    result = result_of(folder, "clips-qa-q")
    assert asked == ["0", "1", "2"] and result["metrics"]["judge missing"] == 0
    assert result["judge"] == {"model": "gpt-x", "url": "http://localhost/v1"} and "secret" not in json.dumps(result)
    main([*by_address[:-1], "gpt-y"])
    assert asked == ["0", "1", "2"] * 2, "another judge"
    main(by_address)
    assert asked == ["0", "1", "2"] * 2, "the first one's judgements are still there"
    items[1].question = "What else?"
    with pytest.raises(ValueError, match="the question of 1 is"):
        main(by_address)
