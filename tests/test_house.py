"""The layout that README.md promises: eight files, read in the order of their imports, of functions that fit a screen."""

import ast
import re

import pytest
from conftest import ROOT

READING_ORDER = ["coords", "clip_vit", "llama", "data", "video", "model", "evaluate", "train"]
ROOMS = ["formats", "tiny", "tasks", "tools"]
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(tree):
    """Return the first part of every module name that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_the_top_level_is_the_eight_files_and_readme_lists_them_in_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(READING_ORDER)
    rows = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == READING_ORDER


def test_the_eight_files_stay_short():
    """A page added to one of them needs a page taken out."""
    lines = {name: len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in READING_ORDER}
    assert sum(lines.values()) <= 2900, lines


@pytest.mark.parametrize("name", READING_ORDER)
def test_reading_from_top_to_bottom_needs_no_file_below(name):
    later = READING_ORDER[READING_ORDER.index(name) + 1 :]
    assert not {*later, "tools", "tasks"} & set(imported(TREES[f"{name}.py"]))


def test_rooms_import_only_what_they_may():
    """formats/ serves everybody, so it needs none of what comes after the model; only tools and tasks use tools and tasks."""
    for path, tree in TREES.items():
        room = path.split("/")[0]
        forbidden = {"formats": {"evaluate", "train", "tasks", "tools", "tiny"}, "tiny": {"evaluate", "train", "tasks", "tools"}}
        assert not forbidden.get(room, set()) & set(imported(tree)), path


@pytest.mark.parametrize("path", TREES)
def test_functions_fit_a_screen_and_calls_name_their_arguments(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"
        if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
            assert len(node.args) <= 7, f"{path}:{node.lineno}"


def test_train_has_few_options_and_numbers_are_numbers():
    import train

    fields = train.TrainConfig.__dataclass_fields__.values()
    assert len(fields) <= 32
    for name in ("batch", "steps", "questions", "lr", "micro_batch"):
        assert train.TrainConfig.__dataclass_fields__[name].type in (int, float)
