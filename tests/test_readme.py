"""The README is true of the tree."""

import re

from conftest import ROOT

import train

README = (ROOT / "README.md").read_text()


def test_the_map_of_files_names_every_module():
    modules = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE)} == modules


def test_the_setup_commands_are_the_ones_that_ci_runs():
    for command in (
        "pip install -r requirements.txt && torchrun train.py",
        "pip install -r requirements.txt && pytest",
    ):
        assert f"```\n{command}\n```" in README
    ci = (ROOT / ".ci/run").read_text()
    assert "-r requirements.txt" in ci and "torchrun train.py" in ci and "\npytest\n" in ci


def test_the_flags_of_its_commands_exist():
    for command in re.findall(
        r"^(?:torchrun[^\n]*?)?train\.py((?:[^`\n]|\\\n)*)", README.replace("\\\n", " "), re.MULTILINE
    ):
        for flag in re.findall(r"--([\w-]+)", command):
            assert flag.replace("-", "_") in train.TrainConfig.__dataclass_fields__, flag


def test_every_test_and_function_it_points_to_exists():
    everything = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    section = README.split("## Change one thing")[1].split("\n## ")[0]
    for name in re.findall(r"`(?:\w+\.)?(\w+)`", section):
        assert name in everything or (ROOT / "tests" / f"{name}.py").exists(), name
