"""The README is true of the tree."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_setup_commands_are_the_ones_that_ci_runs():
    for command in (
        "pip install -r requirements.txt && torchrun train.py",
        "pip install -r requirements.txt && pytest",
    ):
        assert f"```\n{command}\n```" in README
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "-r requirements.txt" in ci and "torchrun train.py" in ci and "\npytest\n" in ci


def test_it_is_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1600


def test_every_link_to_a_file_leads_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_and_function_it_points_to_exists():
    everything = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("tests/**/*.py")])
    section = README.split("## Change one thing")[1].split("\n## ")[0]
    names = re.findall(r"`(?:\w+\.)?(\w+)`", section)
    assert len(names) > 8
    for name in names:
        assert name in everything, name
    for path in re.findall(r"`(tests/[\w/]+\.py)`", section):
        assert (ROOT / path).is_file(), path
