"""`python -m tools.show` prints rows as training would draw them."""

import pytest

from tiny.shapes import write_world
from tools.show import main


def test_objectives_are_those_of_training(tmp_path, capsys):
    write_world(tmp_path, {"train": 2})
    argv = ["--data", str(tmp_path / "instances_train.json"), "--images", str(tmp_path / "images"), "--side", "112"]
    main([*argv, "--objectives", "loc, rev", "--geometry", "pad"])
    out = capsys.readouterr().out
    assert "It is located at" in out and "no such object" not in out
    with pytest.raises(ValueError, match="--objectives side unknown; choose of loc, neg, rev, or none"):
        main([*argv, "--objectives", "side"])
