"""A function's parameters become options; whatever does not fit them is refused with exit status 2.

data   files
count  how many, 100 % of them
kind   which
fast   hurry
out    where
files  several
source  a file
share, part  of all
"""

import json
import runpy
import signal
import subprocess
import sys
from typing import Literal

import pytest
import torch
from conftest import ROOT

from formats.annotations import read_file
from formats.files import WriteError, read_json, require_file, run_command, write_json
from formats.journal import open_journal, read_journal, write_line
from tiny.shapes import write_world
from tools import command, positive


def one(source, /, data, count: positive = 3, kind: Literal["a", "b"] = "a", fast=False, share=0.5, images=""):
    """Not a line about an option:  two spaces."""
    return source, data, count, kind, fast, share, images


def many(*files, out=None, data=None):
    return files, out, data


def test_parameters_become_options():
    main = command("not main", one)
    assert main(["x", "--data", "d"]) == ("x", "d", 3, "a", False, 0.5, "")
    words = ["--count", "1", "--kind", "b", "--fast", "--part", "1", "--images", "i", "--data", "d", "x"]
    assert main(words) == ("x", "d", 1, "b", True, 1.0, "i")


@pytest.mark.parametrize("words", ["x", "--data d", "x --data d --count 0", "x --data d --kind c", "x --data d --share y"])
def test_what_does_not_fit_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        command("not main", one)(words.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_several_functions_are_sub_commands_and_help_shows_each_line(capsys):
    main = command("not main", one, many)
    assert main(["many", "x", "y", "--out", "o"]) == (("x", "y"), "o", None)
    with pytest.raises(SystemExit):
        main(["one", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--share SHARE, --part SHARE of all (default: 0.5)" in printed and "how many, 100 % of them (default: 3)" in printed
    assert "folder or zip of the images" in printed, "the package's line"


# ----- how a program ends


def program(main):
    """Start a program whose main function is the expression `main`."""
    text = f"import os, sys, time\nfrom formats.files import run_command\nrun_command('it', lambda: {main})"
    words = [sys.executable, "-c", text]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_gpu_without_memory_ends_a_program_in_one_line():
    """Other RuntimeErrors are bugs, and keep their traceback."""
    def fail(error):
        raise error

    text = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
    with pytest.raises(SystemExit, match="it: CUDA out of memory. Tried to allocate 20.00 GiB; lower --batch, or in"):
        run_command("it", lambda: fail(torch.OutOfMemoryError(text)))
    with pytest.raises(RuntimeError, match="shape"):
        run_command("it", lambda: fail(RuntimeError("shape")))


@pytest.mark.parametrize("main", ["[print('a' * 99) for _ in range(9999)]", "[print('a'), time.sleep(1), sys.exit(0)]"])
def test_a_closed_pipe_ends_a_program_in_silence(main):
    """While it prints, and when only its last words are left to print."""
    process = program(main)
    process.stdout.read(100) if "99" in main else None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_ctrl_c_ends_a_program_in_one_line():
    process = program("[print('begun', flush=True), time.sleep(60)]")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "it: interrupted; the same command continues, or starts again\n")
    assert process.returncode == 130


def test_an_error_that_no_line_of_this_code_raises_says_where_it_came_from(tmp_path):
    """int() and unpacking say nothing of the place; our own messages need none."""
    with pytest.raises(SystemExit, match=r"^it: invalid literal .*'x' \(tests/tools/test_command.py, line \d+: .*int\(\"x\"\)\)\)$"):
        run_command("it", lambda: int("x"))
    with pytest.raises(SystemExit, match="^it: .*is a Git LFS pointer, not the file itself; run `git lfs pull` there$"):
        (tmp_path / "x.json").write_text("version https://git-lfs.github.com/spec/v1")
        run_command("it", lambda: read_json(require_file(tmp_path / "x.json", "a file")))


def test_output_that_cannot_be_written_is_one_line():
    main = "[os.dup2(os.open('/dev/full', os.O_WRONLY), 1), print('a')]"
    assert program(main).communicate()[1] == "it: [Errno 28] No space left on device\n"


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch):
    """The file before, and whole lines of a journal; an option says where else to write."""
    write_json(tmp_path / "x.json", 1)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SystemExit, match=r"^it: .*x.json cannot be written \(No space left.*; make room, .* with --into$"):
            run_command("it", lambda: write_json(tmp_path / "x.json", 2), "--into")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and (tmp_path / "x.json").read_text() == "1\n"
    with open_journal(tmp_path / "j") as journal:
        write_line(journal, ["ä" * 9999])
    assert read_journal(tmp_path / "j") == [["ä" * 9999]]
    with open("/dev/full", "ab", buffering=0) as journal, pytest.raises(WriteError, match="/dev/full cannot be written"):
        write_line(journal, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # these modules are imported already
@pytest.mark.parametrize(
    "words, place",
    [
        ("evaluate.py RUN --ask x --image {image} --max-new-tokens 1", "--out for --ask"),
        ("evaluate.py RUN --task hal --coco {world}/instances_val.json --images {world}/images --into {file}/x", "--into"),
        ("tiny/shapes.py {file}/x", "FOLDER"),
        ("tiny/moving.py {file}/x", "FOLDER"),
        ("tools/blur.py --images {world}/images --faces {world}/faces.json --out {file}/x", "--out"),
        ("tools/prefcoco.py localize --prefcoco {world}/p.json --coco {world}/instances_val.json --out {file}/x", "--out"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, make_model, monkeypatch, words, place):
    """A file lies where a folder would be made: so tests of every user can see it, root too."""
    world, file = tmp_path / "world", tmp_path / "file"
    write_world(world, {"val": 4})
    file.write_text("")
    instances = read_json(world / "instances_val.json")
    (world / "faces.json").write_text(json.dumps({image["file_name"]: [] for image in instances["images"]}))
    (record, *_), _ = read_file(world / "instances_val.json", world / "images")
    row = {"image": record.image.name, "name": record.objects[0].name, "description": "x", "box_px": record.objects[0].box_px}
    (world / "p.json").write_text(json.dumps([row]))
    if words.startswith("evaluate"):
        make_model().save_pretrained(tmp_path / "run")
        (tmp_path / "run/eval").write_text("")
    path, *words = words.replace("RUN", str(tmp_path / "run")).format(image=record.image, world=world, file=file).split()
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"cannot be written .*; make room, or choose another place with .*{place}"):
        if "/" in path:
            runpy.run_module(path.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=False)
        else:  # pytest's own loader, which collects doctests of the modules at the top, is none that runpy can use
            runpy.run_path(str(ROOT / path), run_name="__main__")
