"""The paper's training data, from COCO; what a kill interrupts ends in the same files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port
from PIL import Image

import data
from coords import CoordFormat
from formats.annotations import merge, read_file
from formats.files import read_json, write_json
from tools import prefcoco as tool
from tools.prefcoco import caption, clean_caption, localize


def files(folder):
    """Relative name -> bytes of everything below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(words, function, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        function(*args, **options)


# ----- caption


@pytest.mark.parametrize(
    ("caption", "category", "description"),
    [
        # the form of the paper's Fig. 4
        ("The dog is brown and white, lying on a couch.", "dog", "dog that is brown and white, lying on a couch"),
        ("The dog (in the image) is brown.", "dog", "dog that is brown"),
        ("The cup in the image is a tall glass, placed on a table.", "cup", "cup that is a tall glass, placed on a table"),
        ("In the image, the cow is lying down. It looks calm.", "cow", "cow that is lying down"),
        ("  The\n dog  is\tbrown ", "dog", "dog that is brown"),
        ("The dining table is round!", "dining table", "dining table that is round"),
        ("The TV is on the wall.", "tv", "tv that is on the wall"),
        ("The dogs are brown.", "dog", "dogs that are brown"),
        # other verbs, and words before them
        ("The dog has a red collar.", "dog", "dog that has a red collar"),
        ("The dog can be seen lying on a couch.", "dog", "dog that can be seen lying on a couch"),
        ("A dog sits to the left of a cat.", "dog", "dog that sits to the left of a cat"),
        ("The dog on the left is brown.", "dog", "dog on the left that is brown"),
        ("The dog, which is brown, lies on a rug.", "dog", "dog that is brown, lies on a rug"),
        ("The dog looks at St. Paul's church.", "dog", "dog that looks at St. Paul's church"),
        # the category elsewhere: kept, less its article
        ("The man in the image is riding a horse.", "person", "man that is riding a horse"),
        ("A brown dog on a couch.", "dog", "brown dog on a couch"),
        ("There is a small dog next to a chair.", "dog", "small dog next to a chair"),
        ("The image shows a dog on grass.", "dog", "dog on grass"),
        ("Under the lamp, a dog sleeps.", "dog", "under the lamp, a dog sleeps"),
        ("TVs and a dog.", "dog", "TVs and a dog"),
        ("Grand Central has a clock.", "clock", "Grand Central has a clock"),
        ("A Dalmatian dog on grass", "dog", "Dalmatian dog on grass"),
    ],
)  # fmt: skip
def test_a_caption_becomes_a_description(caption, category, description):
    assert clean_caption(caption, category) == (description, None)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        (" . ", "empty"),
        ("I'm sorry, I see no dog.", "refusal"),
        ("There is no dog in this image.", "refusal"),
        ("The dog is not visible in the image.", "refusal"),
        ("I cannot describe the dog.", "refusal"),
        ("The image does not contain a dog.", "refusal"),
        ("The cat is on a couch.", "names another thing"),
        ("A hotdogger on a couch.", "names another thing"),
        ("The dog is at [0.1, 0.2, 0.3, 0.4].", "brackets or coordinates"),
        ("The dog is at 12, 40 in it.", "brackets or coordinates"),
        ("The dog (left) is brown.", "brackets or coordinates"),
        (tool.PROMPT.format(category="dog"), "repeats the prompt"),
        ("The dog is " + "very " * 5 + "big.", "repeats itself"),
        ("The dog is next to the dog is next to the dog is next to", "repeats itself"),
        ("The dog is " + " ".join(f"w{i}" for i in range(60)), "too long"),
    ],
)
def test_a_caption_that_is_none_is_rejected_with_the_reason(caption, reason):
    assert clean_caption(caption, "dog") == (None, reason)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder of ten images: a dog and a cat in each, two cups in every second, one image without a lone object."""
    rng = np.random.default_rng(1)
    images, annotations = [], []
    for number in range(10):
        name = f"{number:012}.png"
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / name)
        images.append({"id": 50 + number, "file_name": name, "width": 80, "height": 60})
        for category, box in [(1, [10.1, 20.2, 30.3, 10.4]), (2, [40, 5, 20, 50])] * (number != 3) + [
            (3, [x, 1, 9, 9]) for x in (1, 30)[: 1 + number % 2]
        ] * (number != 3):
            annotations.append({"id": len(annotations), "image_id": 50 + number, "category_id": category, "bbox": box})
    names = ("dog", "cat", "cup", "kite", "bus")
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return tmp_path


DECODING = {"max_new_tokens": 24, "temperature": 0.0, "seed": 0}


@pytest.fixture
def run(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def captions_in(folder):
    return {name: content for name, content in files(folder).items() if name.startswith("pref")}


def caption_command(run, coco, out):
    flags = {"--model": run, "--coco": coco / "instances.json", "--images": coco, "--out": out, "--batch": 2}
    return ["caption", *(str(word) for pair in flags.items() for word in pair), "--max-new-tokens", "24"]


def start(command, **environment):
    """Start the command in a process of its own, whose sums are made in the same order as here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    command = [sys.executable, "-m", "tools.prefcoco", *command]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def kill_captions(command, out, after):
    """Start a run, and kill it when it has appended so many chunks."""
    process = start(command)
    part = out.with_name(out.name + ".parts") / "part-0.jsonl"
    lines = part.read_bytes().count(b"\n") if part.exists() else 0
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") >= lines + after:
            break
        time.sleep(0.001)
    process.kill()
    process.communicate()


def test_killed_and_resumed_on_two_processes_equals_one(run, coco, tmp_path):
    """kill -9 after a chunk, a torn line, then two processes: the files of one run left alone."""
    whole, out = tmp_path / "whole" / "pref.json", tmp_path / "killed" / "pref.json"
    tool.main(caption_command(run, coco, whole))
    assert len(read_json(whole)) + len(read_json(tmp_path / "whole/pref.rejected.json")["rejected"]) == 18 + 5
    command = caption_command(run, coco, out)
    kill_captions(command, out, 1)
    part = tmp_path / "killed/pref.json.parts/part-0.jsonl"
    assert 1 <= part.read_bytes().count(b"\n") < 5 and not out.exists()
    with open(part, "ab") as file:
        file.write(b'[8, [["The')
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # what torchrun tells its processes
    processes = [start(command, **two, RANK=str(rank)) for rank in (0, 1)]
    printed, _ = processes[0].communicate(timeout=240)
    assert processes[0].returncode == processes[1].wait(timeout=240) == 0
    assert b"(the paper: 95,899 images and 402,686 pairs)" in printed and b"rejected: " in printed
    assert captions_in(tmp_path / "killed") == captions_in(tmp_path / "whole")


def test_a_finished_file_stays_and_other_options_are_refused(run, coco, tmp_path, capsys):
    out = tmp_path / "out" / "pref.json"
    common = {"model": run, "coco": coco / "instances.json", "images": coco, "out": out, "limit": 2}
    caption(**common, **DECODING)
    before = files(tmp_path / "out")
    caption(**common, **DECODING)
    assert files(tmp_path / "out") == before and "is complete" in capsys.readouterr().out
    (tmp_path / "out/pref.json.parts").mkdir()  # killed while they were removed
    caption(**common, **DECODING)
    assert not (tmp_path / "out/pref.json.parts").exists()
    refused("batch was 8, is 3", caption, **common, **DECODING, batch=3)
    refused(r"decoding\.seed was 0, is 1", caption, **common, **{**DECODING, "seed": 1})
    (tmp_path / "out/pref.rejected.json").unlink()
    refused("model was None", caption, **common, **DECODING)


def told(records):
    """What a captioner says that knows the colours; of cups it says nothing."""
    return [[f"The {o.name} is brown." if o.name != "cup" else "A cat." for o in record.objects] for record in records]


def test_what_is_left_of_a_killed_run_is_gone_on_with(coco, tmp_path, monkeypatch):
    """Killed before its options were written, or while its last file was; only chunks that are not there are asked again."""
    asked = []
    monkeypatch.setattr(tool, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(tool, "captioner", lambda *_: (list, lambda records: asked.append(records[0].id) or told(records)))
    common = {"model": "m", "coco": coco / "instances.json", "images": coco, "batch": 4}
    caption(**common, out=tmp_path / "a" / "pref.json")
    (tmp_path / "b" / "pref.json.parts").mkdir(parents=True)
    (tmp_path / "b" / "pref.json.tmp5").write_text("half")
    caption(**common, out=tmp_path / "b" / "pref.json")
    assert files(tmp_path / "a") == files(tmp_path / "b") and asked == ["50", "55", "59"] * 2
    monkeypatch.setattr(tool, "prefcoco_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        caption(**common, out=tmp_path / "c" / "pref.json")
    monkeypatch.undo()
    monkeypatch.setattr(tool, "weights_sha256", lambda path: "x")
    refused("parts was made with other options: batch was 4, is 3", caption, **{**common, "batch": 3}, out=tmp_path / "c/pref.json")
    caption(**common, out=tmp_path / "c" / "pref.json")
    assert files(tmp_path / "c") == files(tmp_path / "a")


@pytest.fixture
def prefcoco(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(tool, "captioner", lambda *_: (list, told))
    caption("m", coco / "instances.json", coco, tmp_path / "prefcoco.json")
    return tmp_path / "prefcoco.json"


def test_a_row_holds_caption_description_and_box(prefcoco, coco):
    rows = read_json(prefcoco)
    assert rows[0] == {
        "id": "50-dog",
        "image": "000000000000.png",
        "size": [80, 60],
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nDescribe the dog in this image using one short sentence, referring to its visual features "
                "and spatial position relative to other objects in image.",
            },
            {"from": "gpt", "value": "The dog is brown."},
        ],
        "objective": "caption",
        "name": "dog",
        "box_px": [10.1, 20.2, 40.4, 30.6],
        "description": "dog that is brown",
    }
    records, skipped = read_file(prefcoco, prefcoco.parent)
    assert len(rows) == len(records) == 18 and not skipped
    assert records[0].objects == (data.Object("dog", tuple(rows[0]["box_px"]), rows[0]["description"]),)
    rejected = read_json(prefcoco.with_name("prefcoco.rejected.json"))["rejected"]
    assert {(row["name"], row["reason"]) for row in rejected} == {("cup", "names another thing")} and len(rejected) == 5


def test_a_damaged_image_is_a_rejected_row(run, coco, tmp_path):
    (coco / "000000000001.png").write_bytes((coco / "000000000001.png").read_bytes()[:300])
    caption(run, coco / "instances.json", coco, tmp_path / "out/pref.json", limit=2, **DECODING)
    rejected = read_json(tmp_path / "out/pref.rejected.json")["rejected"]
    assert [row["id"] for row in rejected if row["reason"] == "damaged image"] == ["51-dog", "51-cat"]


def test_a_model_of_clips_describes_images_too(run, coco, tmp_path):
    """It reads a still image as a clip, whose frames are that image."""
    config = read_json(tmp_path / "run/config.json")
    write_json(tmp_path / "run/config.json", config | {"locvlm": config["locvlm"] | {"frames": 2}})
    caption(run, coco / "instances.json", coco, tmp_path / "pref.json", **DECODING, limit=2)
    assert (tmp_path / "pref.json").exists()


def test_ids_are_excluded_and_missing_images_told_before_any_work(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(tool, "captioner", lambda *_: (list, told))
    (tmp_path / "ids.txt").write_text("0\n9\n1234\n")
    common = {"model": "m", "coco": coco / "instances.json", "exclude": f"{tmp_path}/ids.txt"}
    caption(**common, images=coco, out=tmp_path / "pref.json")
    assert {row["image"][10:12] for row in read_json(tmp_path / "pref.json")} == {
        "01",
        "02",
        "04",
        "05",
        "06",
        "07",
        "08",
    }
    assert "skipped: 2 images that --exclude lists" in capsys.readouterr().out
    refused("no folder or zip .*gone", caption, **common, images=tmp_path / "gone", out=tmp_path / "b.json")
    (tmp_path / "gone").mkdir()
    refused("7 of the 7 images of .* are not in .*gone", caption, **common, images=tmp_path / "gone", out=tmp_path / "b.json")
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(10))))
    refused("leaves no image", caption, **common, images=coco, out=tmp_path / "b.json")
    assert not list(tmp_path.glob("b.json*"))


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_of_another_size_is_refused_before_any_work(prefcoco, coco, tmp_path, turn):
    """A photo stored turned, annotated upright. localize looks where it is told the images."""
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (60, 80)).save(coco / "000000000002.png", exif=exif)
    words = "1 images of .*000000000002.png is 60 x 80, but the annotations say 80 x 60"
    words += f".*EXIF orientation is {turn}" * (turn > 1)
    refused(words, caption, "m", coco / "instances.json", coco, tmp_path / "b.json")
    refused(words, localize, prefcoco, coco / "instances.json", tmp_path / "b.json", images=str(coco))
    assert not [*tmp_path.glob("b.*")]
    localize(prefcoco, coco / "instances.json", tmp_path / "b.json")


def test_a_folder_without_a_model_is_named(coco, tmp_path):
    refused("no .*config.json", caption, tmp_path, coco / "instances.json", coco, tmp_path / "out.json")


# ----- localize


def test_localize_writes_the_papers_conversations(prefcoco, coco, tmp_path, capsys):
    """One conversation for each image and objective; LocPred and RevLoc use the description, and say where it is."""
    localize(prefcoco, coco / "instances.json", tmp_path / "localize.json")
    rows = read_json(tmp_path / "localize.json")
    names = list(data.OBJECTIVES)
    assert [row["objective"] for row in rows] == 9 * names
    assert "loc: 9 conversations of 18 questions" in capsys.readouterr().out
    fmt = CoordFormat("ivb")
    records, skipped = read_file(tmp_path / "localize.json", tmp_path)
    assert not skipped and len(merge(records)) == 9, (
        "our own reader takes it, and makes one record of an image's three"
    )
    assert merge(records)[0].objects[0].description and merge(records)[0].absent
    for row, record in zip(rows, records, strict=True):
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        turns = list(zip(texts[0::2], texts[1::2], strict=True))
        assert (
            record.image == Path(tmp_path, row["image"])
            and row["id"] == f"{50 + int(row['image'][:12])}-{row['objective']}"
        )
        assert [turn["value"].startswith("<image>\n") for turn in row["conversations"]] == [True] + [False] * 3
        for index, ((question, answer), name) in enumerate(zip(turns, row["names"], strict=True)):
            text = row["descriptions"][index] or name
            if row["objective"] == "neg":
                assert name in ("kite", "bus", "cup") and answer == data.NEG_ANSWER and f"described {text}" in question
                continue
            where = fmt.encode_box(row["box_px"][index], row["size"])
            if row["objective"] == "loc":
                assert f"described {name} that is brown" in question and answer == f"It is located at {where}"
            else:
                assert where in question and answer == f"There is a {name} that is brown."
        assert (row["box_px"] is None) == (row["objective"] == "neg")
    assert {tuple(row["names"]) for row in rows if row["objective"] == "loc"} == {("dog", "cat"), ("cat", "dog")}


def test_negatives_are_absent_and_half_of_them_borrow_a_description(coco, tmp_path):
    """A category of the image, even one whose caption was rejected, is never asked for as absent."""
    instances = read_json(coco / "instances.json")
    rows = [
        {"image": image["file_name"], "name": name, "description": f"{name} that is red", "box_px": [1, 1, 9, 9]}
        for image, name in zip(instances["images"], ["dog", "kite"] * 5, strict=True)
    ]
    instances["annotations"] += [
        {"id": 100 + i, "image_id": 50 + i, "category_id": 4, "bbox": [1, 1, 8, 8]} for i in range(1, 10, 2)
    ]
    instances["images"], rows = instances["images"][:2] + instances["images"][4:], rows[:2] + rows[4:]  # 3 has nothing else
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] not in (52, 53)]
    instances["categories"].append({"id": 6, "name": "sheep"})
    (coco / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    present = {r.image.name: r.present for r in read_file(coco / "instances.json", coco)[0]}
    negatives = []
    for seed in range(20):
        localize(tmp_path / "p.json", coco / "instances.json", tmp_path / f"{seed}.json", neg_ratio=1.5, seed=seed)
        negatives += [row for row in read_json(tmp_path / f"{seed}.json") if row["objective"] == "neg"]
    assert all(name not in present[row["image"]] for row in negatives for name in row["names"])
    kites = [
        d for row in negatives for name, d in zip(row["names"], row["descriptions"], strict=True) if name == "kite"
    ]
    assert set(kites) == {None, "kite that is red"} and 0.35 < kites.count(None) / len(kites) < 0.65
    assert not any(d for row in negatives for n, d in zip(row["names"], row["descriptions"], strict=True) if n == "bus")
    assert 1.4 < sum(len(row["names"]) for row in negatives) / len(negatives) < 1.6
    localize(tmp_path / "p.json", coco / "instances.json", tmp_path / "again.json", neg_ratio=1.5, seed=19)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "19.json").read_bytes()


def test_an_objective_of_ones_own_is_written_under_its_name(prefcoco, coco, tmp_path, monkeypatch):
    """About pairs of objects: the row lists both of each pair, and our own reader takes it."""

    def ask(pair, record, wording, rng):
        return f"Which is further left, {pair[0].name} or {pair[1].name}?", min(pair, key=lambda o: o.box_px[0]).name

    monkeypatch.setitem(data.OBJECTIVES, "order", data.Objective("order", "pair", ask, None))
    localize(prefcoco, coco / "instances.json", tmp_path / "localize.json")
    rows = read_json(tmp_path / "localize.json")
    assert [row["objective"] for row in rows] == 9 * list(data.OBJECTIVES)
    for row in rows:
        is_order = ["further left" in turn["value"] for turn in row["conversations"][::2]]
        assert set(is_order) == {row["objective"] == "order"}
    names, boxes_px = ([sorted(row[key]) for row in rows if row["objective"] == "order"] for key in ("names", "box_px"))
    assert names == [["cat", "dog"]] * 9 and boxes_px == [[[10.1, 20.2, 40.4, 30.6], [40, 5, 60, 55]]] * 9
    records, skipped = read_file(tmp_path / "localize.json", tmp_path)
    assert not skipped and [o.name for o in records[3].objects] == rows[3]["names"]


def test_other_files_are_refused_by_localize(prefcoco, coco, tmp_path):
    instances = coco / "instances.json"
    refused("no .*gone.json", localize, tmp_path / "gone.json", instances, tmp_path / "l.json")
    refused("a row is .*images", localize, instances, instances, tmp_path / "l.json")
    rows = read_json(prefcoco)
    prefcoco.write_text(json.dumps([{**rows[0], "image": "other.jpg"}]))
    refused("describes other.jpg", localize, prefcoco, instances, tmp_path / "l.json")
    for damage in ({"description": None}, {"box_px": "1 2 3 4"}, {"box_px": None}):
        prefcoco.write_text(json.dumps([{**rows[0], **damage}]))
        refused("a row is .*50-dog", localize, prefcoco, instances, tmp_path / "l.json")


AT_EDGE = {"image": "000000000000.png", "name": "dog", "description": "x", "box_px": [0, 20, 8, 30]}


@pytest.mark.parametrize("content", [[], {}, 3, [AT_EDGE]])
def test_descriptions_that_leave_nothing_to_ask_are_an_error(coco, tmp_path, content):
    """None at all, or of an object at the edge, which the middle square does not show."""
    (tmp_path / "p.json").write_text(json.dumps(content))
    refused("p.json", localize, tmp_path / "p.json", coco / "instances.json", tmp_path / "l.json", geometry="crop")
    assert not (tmp_path / "l.json").exists()


