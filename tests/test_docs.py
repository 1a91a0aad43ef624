"""The commands in README.md and docs/ run: their programs exist and accept their options. What the pages point to exists."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from functools import partial

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser

import evaluate
import tasks.__main__ as benchmarks
import train
from clip_vit import open_image, preprocess
from data import IGNORE, collate, encode_prefix, encode_segment, pack
from formats.annotations import read_file
from tiny.shapes import write_world
from train import TrainConfig, build_model, parse_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKED = {"train": partial(parse_config, TrainConfig), "evaluate": evaluate.parse, "tasks.__main__": benchmarks.parse}
FOREIGN = {"lmms_eval"}  # modules of other projects


def commands_of(text):
    """Yield the commands in ``` blocks that start with python or torchrun, as lists of words. What && joins is split."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.search(r"(^|&& )\W*(python|torchrun) ", line) else []
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                command = command[1:] if command[:1] == ["$"] else command
                if command and command[0] in ("python", "torchrun"):
                    yield command


def program_of(command):
    """Return (is a module, its name or file, its arguments)."""
    if command[0] == "torchrun":
        args = torchrun_parser().parse_args(command[1:])
        return args.module, args.training_script, args.training_script_args
    is_module = command[1] == "-m"
    return is_module, command[1 + is_module], command[2 + is_module :]


def module_of(is_module, name):
    """Return the module that a program is, or None for other projects' modules. Fails if there is none."""
    if not is_module:
        assert (ROOT / name).is_file(), f"no file {name}"
        return name.removesuffix(".py").replace("/", ".")
    if name.split(".")[0] in FOREIGN:
        return None
    path = ROOT / name.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"no module {name}"
    return f"{name}.__main__" if path.is_dir() else name


class Accepted(Exception):
    """Raised instead of running a program whose command line was accepted."""


def parse(module, words, monkeypatch):
    """Let a program parse its command line, and stop it there. SystemExit: refused."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(*args, **kwargs):
        original(*args, **kwargs)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *words])
    program = importlib.import_module(module)
    if module == "train":
        program.parse_config(program.TrainConfig)
    else:
        program.main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_are_accepted(page, monkeypatch, capsys):
    for command in commands_of(page.read_text()):
        is_module, name, words = program_of(command)
        module = module_of(is_module, name)
        if module is None or module.startswith("tiny.") or not words:  # tiny's programs take no options
            continue
        try:
            if module in CHECKED:  # options that do not go together, too
                CHECKED[module](words)
                continue
            parse(module, words, monkeypatch)
        except Accepted:
            continue
        except SystemExit:
            pytest.fail(f"{shlex.join(command)}\n{capsys.readouterr().err}")
        finally:
            monkeypatch.undo()
        pytest.fail(f"{shlex.join(command)} parsed no command line")


def parameters_of(tree):
    """Return the parameters of the functions that tools.command makes commands of: their options."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "command"]
    functions = {argument.id for call in calls for argument in call.args if isinstance(argument, ast.Name)}
    signatures = [node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
    return {p.arg.replace("_", "-") for s in signatures for p in (*s.args, *s.kwonlyargs)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_in_its_sentences_exist(page):
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tasks/*.py")]
    declared = set(re.findall(r'"--([\w-]+)"', "\n".join(path.read_text() for path in programs)))
    declared |= {field.replace("_", "-") for field in train.TrainConfig.__dataclass_fields__}
    declared |= set().union(*(parameters_of(ast.parse(path.read_text())) for path in ROOT.glob("tools/*.py")))
    sentences = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", sentences):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code):
            assert flag in declared or flag.removeprefix("no-") in declared, f"{flag} in `{code}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_tests_that_it_points_to_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (page.parent / link).exists(), link
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests or f"/{name}.py" in text, name
    for path in re.findall(r"`([\w/]+/[\w/]+\.(?:py|md))`", text):
        assert (ROOT / path).is_file(), path


def test_a_command_that_a_program_refuses_is_found(monkeypatch, capsys):
    [command] = commands_of("```\ncd x && torchrun --nproc-per-node 8 train.py --variant b\n```")
    assert program_of(command) == (False, "train.py", ["--variant", "b"])
    with pytest.raises(SystemExit):
        parse("train", ["--variant", "b"], monkeypatch)
    with pytest.raises(AssertionError, match="no module tools.nothing"):
        module_of(True, "tools.nothing")


def test_the_example_that_the_readme_follows(tmp_path):
    """Its ids, shapes and loss are those of the default model before training, on the first picture of the shapes world."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    write_world(tmp_path, {"train": 1})
    config = TrainConfig(data=str(tmp_path / "instances_train.json"), images=str(tmp_path / "images"))
    model, ([record], _) = build_model(config), read_file(config.data, config.images)
    square = next(o for o in record.objects if o.name == "square")
    answer = f"It is located at {model.config.coord_format().encode_box(square.box_px, record.size)}"
    question = re.search(r"What is the location of object described square.*?bbox\?", text)[0]
    prefix = encode_prefix(model.tokenizer, "v1", model.config.visual_tokens)
    ids, labels = encode_segment(model.tokenizer, "v1", [(question, answer)])
    answered = [i for i in labels if i != IGNORE]
    batch = collate([pack(prefix, [(ids, labels)], 2048)])
    pixels = preprocess(open_image(record.image), model.config.vision_config, model.config.geometry)[None]
    loss = model(pixels, **{name: value for name, value in batch.items() if value is not None}).item()
    for line in (
        f"{answer}</s>", f"[{', '.join(map(str, ids[:11]))}, ...]",
        f"[{', '.join(map(str, answered[:10]))}, ..., {answered[-2]}, {answered[-1]}]",
        f"{len(ids) - len(answered)} ids, the answer {len(answered)} ", f"In all {len(prefix) + len(ids)} ids",
        f"picture (3, {pixels.shape[2]}, {pixels.shape[3]}) becomes {model.config.visual_tokens} patches", f"loss, {loss:.2f} before",
    ):  # fmt: skip
        assert line in text, line
    box_px = re.search(r"a yellow square at box_px\s\(([\d., ]+)\)", text)[1]
    assert [float(v) for v in box_px.split(",")] == pytest.approx(square.box_px, abs=0.051)
