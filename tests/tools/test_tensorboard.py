"""TensorBoard reads back what a log holds, while it grows and after a run is resumed."""

import json
import os
import sys

import pytest

from tools.tensorboard import curves, main


def rows_of(stage, *steps, loss=2.0, since=0):
    same = {"stage": stage, "lr": 1e-3, "mfu": None, "faces_blurred": True}
    return [{**same, "step": s, "loss": loss / (s + 1), "seconds": 5.0 * (s + 1 - since)} for s in steps]


def read(run):
    """Return {curve: [(step, value, seconds since the run began)]} as TensorBoard reads them."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    events = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    begun = (run / "train.json").stat().st_mtime
    return {tag: [(e.step, e.value, e.wall_time - begun) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/train.json").write_text("{}")
    os.utime(tmp_path / "run/train.json", (1e9, 1e9))
    return tmp_path / "run"


def log(run, rows):
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_number_of_a_log_becomes_a_curve_of_its_stage(run, capsys):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    log(run, [*rows_of(1, 0, 1, 2), *rows_of(2, 0, 1)])
    (run / "log.jsonl").open("a").write('{"stage": 2, "st')  # what a kill leaves
    main([str(run)])
    main([str(run)])  # written anew, not twice
    assert "tensorboard: 5 rows" in capsys.readouterr().out
    found = read(run)
    assert found.keys() == {f"stage {stage}/{name}" for stage in (1, 2) for name in ("loss", "lr", "seconds")}
    assert found["stage 1/loss"] == [(0, 2, 5), (1, 1, 10), (2, pytest.approx(2 / 3), 15)]
    assert found["stage 2/loss"] == [(0, 2, 20), (1, 1, 25)]


def test_a_growing_log_grows_and_a_resumed_run_replaces_its_last_steps(run):
    """The log does not exist at first; rows arrive; the run is killed, resumed at step 2, and counts its seconds from 0."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    following = curves(run, waits=True)
    assert next(following) == 0
    for rows in (rows_of(2, 0, 1), rows_of(2, 0, 1, 2, 3), [*rows_of(2, 0, 1), *rows_of(2, 2, loss=9.0, since=2)]):
        log(run, rows)
        assert next(following) == len(rows)
    assert read(run)["stage 2/loss"] == [(0, 2, 5), (1, 1, 10), (2, 3, 15)]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_what_is_missing_is_said_first(run, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    with pytest.raises(FileNotFoundError, match="log.jsonl; expected the log of a run; pass what train.py"):
        main([str(run)])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        main([str(run)])
