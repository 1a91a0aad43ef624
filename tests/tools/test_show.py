"""`python -m tools.show` prints rows as training would draw them."""

import pytest

from tiny.moving import write_clips
from tiny.shapes import write_world
from tools.show import main


def test_objectives_are_those_of_training(tmp_path, capsys):
    write_world(tmp_path, {"train": 2})
    argv = ["--data", str(tmp_path / "instances_train.json"), "--images", str(tmp_path / "images"), "--side", "112"]
    main([*argv, "--objectives", "loc, rev", "--geometry", "pad"])
    out = capsys.readouterr().out
    assert "It is located at" in out and "no such object" not in out
    write_clips(tmp_path / "moving", {"train": 1})
    with pytest.raises(ValueError, match="1 records are about clips .000000000001.; train.py --stages 4 --dry-run shows one"):
        main(["--data", str(tmp_path / "moving/clips_train.json"), "--images", str(tmp_path / "moving/clips")])
    with pytest.raises(ValueError, match="--objectives side unknown; choose of loc, neg, rev, or none"):
        main([*argv, "--objectives", "side"])
