"""The tables in miniature: what would be trained and asked exists, and what is printed is mean and spread."""

import json
import math

import pytest

import evaluate
import tasks
import train
from formats.eval_folder import name_of
from tools import tables


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Everything that takes time is noted and done at once: a run is its config.json, an evaluation its figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "ensure_worlds", lambda: None)
    trained, asked = [], []

    def train_main(config):
        trained.append(config)
        (tmp_path / config.out).mkdir(parents=True, exist_ok=True)
        (tmp_path / config.out / "config.json").write_text("{}")

    def ask(run, task, argv):
        asked.append(argv)
        into = argv[argv.index("--into") + 1] + "_blind" * ("--blind" in argv)
        questions = next(argv[argv.index(flag) + 1] for flag in ("--coco", "--questions") if flag in argv)
        metrics = {metric: int(run[-1]) / 10 for other, metric, _ in tables.MEASURES.values() if other == task}
        (tmp_path / into).mkdir(exist_ok=True)
        (tmp_path / into / f"{name_of(task, questions)}.json").write_text(json.dumps({"metrics": metrics}))

    def evaluate_main(argv):
        assert argv[1] == "--task" and argv[2] in evaluate.TASKS
        ask(argv[0], argv[2], argv)

    def tasks_main(argv):
        assert argv[0] in tasks.TASKS
        ask(argv[1], argv[0], argv)

    monkeypatch.setattr(tables.train, "main", train_main)
    monkeypatch.setattr(tables.evaluate, "main", evaluate_main)
    monkeypatch.setattr(tables.benchmarks, "main", tasks_main)
    monkeypatch.setattr(tables, "caption", lambda model, seed: None)
    monkeypatch.setattr(tables, "features", lambda *args, **how: None)
    return trained, asked


def test_every_setting_is_one_that_train_takes():
    for name, (begins_from, flags) in tables.SETTINGS.items():
        stage = flags.split()[1]
        argv = flags.split() + ["--init-from", "run"]
        config = train.parse_config(train.TrainConfig, argv)
        assert config.stages == stage and (begins_from in tables.SETTINGS or name == "stage-1")


def test_every_measure_is_one_that_evaluate_takes():
    for task, _, flags in tables.MEASURES.values():
        assert task in evaluate.TASKS or task in tasks.TASKS
        if task in evaluate.TASKS:
            assert evaluate.parse(["run", "--task", task, *flags.split()]).task == task
        else:
            assert tables.benchmarks.parse([task, "run", *flags.split()]).task == task


def test_every_row_and_column_of_the_tables_exists():
    for table in tables.TABLES.values():
        assert set(table["measures"]) <= set(tables.MEASURES)
        for _, name, paper in table["rows"]:
            assert name.removesuffix(", blind") in tables.SETTINGS and len(paper) in (0, len(table["paper_measures"]))


def test_a_table_is_mean_and_spread_and_is_trained_once(fake, capsys):
    trained, asked = fake
    tables.main(["4", "--seeds", "1,2"])
    outs = [config.out for config in trained]
    assert len(outs) == len(set(outs)) == 6, "stage 1, and two settings that begin from it, of two seeds"
    assert [config.seed for config in trained] == [1, 1, 2, 2, 1, 2] and trained[1].init_from == outs[0]
    text = capsys.readouterr().out
    assert "| LocVLM-B |" + 6 * " 15.0 ± 7.1 |" + " 69.5 | 65.4 | 76.5 | 74.1 |" in text
    assert (tables.OUT / "table-4.md").read_text().strip() in text
    assert sum("--blind" in argv for argv in asked) == 2, "the last row, of two seeds"
    count = len(trained), len(asked)
    tables.main(["4", "--seeds", "1,2"])
    assert (len(trained), len(asked)) == count, "asked again, it is only read"


def test_a_killed_run_resumes(fake):
    trained, _ = fake
    (tables.OUT / "stage-1-0").mkdir(parents=True)
    (tables.OUT / "stage-1-0/train.json").write_text("{}")
    tables.tuned("none", 0)
    assert [config.resume for config in trained] == [True, False]


def test_points_are_asked_for_points(fake):
    """Evaluation takes the location from the run's config."""
    trained, asked = fake
    tables.figure("boxes", "point", 0)
    assert trained[-1].location == "point" and trained[-1].settings()["location"] == "point"
    assert "--location" not in asked[-1]


def test_objects_are_asked_for_by_name_whatever_the_model_was_trained_with(fake):
    trained, asked = fake
    for heading in ("boxes", "QA"):
        tables.figure(heading, "captions", 0)
        assert asked[-1][asked[-1].index("--words") + 1] == "name"
    assert trained[-1].words == "description"


def test_cells():
    assert tables.cell([50.0]) == "50.0" and tables.cell([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert tables.cell([math.nan]) == tables.cell([math.nan, 1.0]) == "nan"


def test_what_meteor_needs_is_asked_for_before_anything_is_trained(fake, monkeypatch):
    def lacking():
        raise ValueError("no java")

    trained, _ = fake
    monkeypatch.setattr(tables, "require_meteor", lacking)
    for number in ("10", "all"):
        with pytest.raises(ValueError, match="no java"):
            tables.main([number, "--seeds", "0"])
    assert not trained
    tables.main(["8", "--seeds", "0"])
    assert {config.out for config in trained} == {
        f"{tables.OUT}/{name}-0" for name in ("stage-1", "seen-none", "seen-all", "silent-none", "silent-all")
    }


def test_invalid_seeds_and_tables_are_refused():
    with pytest.raises(ValueError, match="--seeds a: write whole numbers"):
        tables.main(["8", "--seeds", "a"])
    with pytest.raises(SystemExit):
        tables.main(["9"])
