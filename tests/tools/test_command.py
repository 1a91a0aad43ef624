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

from typing import Literal

import pytest

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


def test_exactly_one_of_either(capsys):
    main = command("not main", many, either=("out", "data"))
    assert main(["x", "--out", "o"]) == (("x",), "o", None)
    for words in (["x"], ["x", "--out", "o", "--data", "d"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "one of the arguments --out --data is required" in capsys.readouterr().err
