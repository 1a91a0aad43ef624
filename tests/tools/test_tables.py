"""The tables in miniature: what is trained and asked exists, runs of another recipe are made again, differences are paired."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import tasks
import train
from data import NEG_ANSWER, Wording
from formats.annotations import read_records
from formats.eval_folder import name_of
from formats.files import read_json, write_json, write_rows
from llama import Llama, Tokenizer
from model import VARIANTS, LocVLM
from tiny.moving import write_clips
from tiny.shapes import write_side_texts, write_world
from tools import tables

AXES = ("left/right", "above/below")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Everything that takes time is noted and done at once: a run is its config.json, an evaluation its figures and rows.

    Half of the rows are right. METEOR is the seed in tenths. The content of a file is its entry in `content`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "require_meteor", lambda: None)
    trained, asked, content = [], [], Counter()

    def train_main(config):
        trained.append(config)
        write_json(tmp_path / config.out / "config.json", {})

    def ask(run, task, argv):
        asked.append((run, task, argv))
        folder = argv[argv.index("--into") + 1] + "_blind" * ("--blind" in argv)
        name = name_of(task, next(argv[argv.index(flag) + 1] for flag in ("--coco", "--questions") if flag in argv))
        metrics = {score: int(run[-1]) / 10 for other, score, *_ in tables.MEASURES.values() if other == task}
        truths = [{"setting": i + axis, "word": word} for i in ("", "icl ") for axis in AXES for word in ("left", "right")]
        more = {"box_px": [0, 0, 9, 9], "types": ["detailed side"]}
        write_rows(f"{folder}/{name}.jsonl", [
            {"correct": right, "boxes_px": [], "truth": truth | more, "measured": {"contains": True}} for right in (False, True) for truth in truths
        ])
        write_json(f"{folder}/{name}.json", {"metrics": metrics, "questions": 7})

    def caption(run, coco, images, out, **how):
        asked.append((str(run), "caption", how))
        write_json(out, {})

    def localize(prefcoco, coco, out):
        content[str(out)] += 1  # another captioner writes other captions
        write_json(out, {})

    monkeypatch.setattr(tables, "ensure_worlds", lambda: None)
    monkeypatch.setattr(tables, "sides_in_text", lambda run: [True, False])
    monkeypatch.setattr(tables, "sha256", lambda path: f"{path} {content[str(path)]}")
    monkeypatch.setattr(tables.train, "main", train_main)
    monkeypatch.setattr(tables.evaluate, "main", lambda argv: ask(argv[0], argv[2], argv))
    monkeypatch.setattr(tables.benchmarks, "main", lambda argv: ask(argv[1], argv[0], argv))
    monkeypatch.setattr(tables.prefcoco, "caption", caption)
    monkeypatch.setattr(tables.prefcoco, "localize", localize)
    monkeypatch.setattr(tables, "features", lambda data, out, vision, frames: write_json(out / "features.json", [frames]))
    return trained, asked, content


@pytest.fixture
def settings(monkeypatch):
    """A copy of the settings, for a test to change."""
    monkeypatch.setattr(tables, "SETTINGS", {**tables.SETTINGS})
    return tables.SETTINGS


def test_every_setting_is_one_that_train_takes():
    for name, (begins_from, flags) in tables.SETTINGS.items():
        config = train.parse_config(train.TrainConfig, flags.format(SEED=0).split() + ["--init-from", "run"])
        assert config.stages == flags.split()[1] and (begins_from in tables.SETTINGS or name == "stage-1")
        assert "{" not in flags.replace("{SEED}", "")


def test_every_measure_is_one_that_evaluate_takes():
    for task, score, flags, *_ in [measure for measure in tables.MEASURES.values() if measure[0] != "text"]:
        argv = [*flags.split(), "--words", "name", "--seed", "3", "--blind", "--into", "x"]
        if task in evaluate.TASKS:
            args = evaluate.parse(["run", "--task", task, *argv])
        else:
            args = tables.benchmarks.parse([task, "run", *argv])
        assert (args.task, args.seed, args.limit, args.words, args.max_new_tokens) == (task, 3, None, "name", 64)
        assert score in tables.SCORES or (task, score) == ("refcoco", "METEOR 1.5")


def test_every_measure_finds_its_questions(tmp_path, monkeypatch):
    """Read from small worlds as an evaluation reads them: patterns keep some of a task's questions; sides are left or right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks.refcoco, "require_meteor", lambda: None)
    for folder in (tables.STILL, tables.FEW, tables.OTHER):
        write_world(folder, {"val": 16})
    write_clips(tables.MOVING, {"val": 4})
    wording, kept = Wording(VARIANTS["tiny"].coord_format()), {}
    for heading, (task, _, flags, *only) in tables.MEASURES.items():
        if task == "text":
            continue
        args = tables.benchmarks.parse([task, "run", *flags.split()])
        items, _ = {**tasks.TASKS, **evaluate.TASKS}[task].read(args, wording)
        kept[heading] = tables.matching([{"truth": item.truth} for item in items], *only)
        assert len(items) > len(kept[heading]) > 3 if only else len(kept[heading]) == len(items) > 3, heading
    assert len(kept["left"]) + len(kept["right"]) == len(kept["left/right"]) and len(kept["left"]) == len(kept["right"])
    assert {row["truth"]["setting"] for row in kept["left/right"]} == {"left/right", "left/right mirrored"}
    assert {row["truth"]["answer"] for row in kept["QA"]} == {*"left right above below yes no two three four".split()}


def test_every_row_and_column_of_the_tables_exists():
    for table in tables.TABLES.values():
        assert list(table) == ["title", "measures", "paper_measures", "references", "rows"]
        assert set(table["measures"]) <= set(tables.MEASURES)
        names = [name for _, name, _ in table["rows"]]
        assert set(table["references"]) <= set(names) and len(set(names)) == len(names)
        assert [name for name in names if name in table["references"]] == table["references"], "in the order of the rows"
        for _, name, paper in table["rows"]:
            setting, _, steps = name.removesuffix(", blind").partition("@")
            assert setting in tables.SETTINGS and steps.isdecimal() == bool(steps)
            assert len(paper) in (0, len(table["paper_measures"]))


def test_all_objectives_have_the_same_conversations_and_bring_their_own_questions(tmp_path, monkeypatch):
    """Tab. 11a and 12 are cumulative: drawn as training draws them. No row is cut, in any wording."""
    monkeypatch.chdir(tmp_path)
    write_world(tables.STILL, {"train": 40})
    write_clips(tables.MOVING, {"train": 20})
    for world in (tables.STILL, tables.MOVING):
        tables.limit_conversations(world, "some")
    for kind in ("nfp", "diga", "point", "quiz"):
        write_side_texts(tables.STILL / f"text_{kind}_train.json", 15)
    tokenizer = Tokenizer(Path(tables.__file__).parent.parent / "tiny/llama")
    drawn = {}
    for name, (_, options) in tables.SETTINGS.items():
        if re.match("stage|seen|silent|captions|own|clips-adapter|clips-frame", name):
            continue
        config = train.parse_config(train.TrainConfig, [*options.split(), "--init-from", "run"])
        model = SimpleNamespace(config=replace(VARIANTS["tiny"], **config.settings()), tokenizer=tokenizer)
        examples = train.build_examples(config, config.stage_list[0], read_records(config.sources)[0], model)
        talks, kinds = [], Counter()
        assert sum(record.image is None for record in examples.records) == (0 if "clips" in name or "no-text" in name else 15)
        for record in (record for record in examples.records if record.image):
            segments = examples.draw_turns(record, random.Random(record.id))
            row = examples.text_row(record, 0)
            assert len(segments) == max(row["segment_of"]), "none is cut"
            talks.append({segment for segment in segments if segment in record.conversations})
            answers = [segment[0][1] for segment in segments if segment not in record.conversations]
            kinds.update("neg" if a == NEG_ANSWER else "loc" if a.startswith("It is located") else "rev" for a in answers)
        drawn[name] = talks, kinds
    for prefix in ("", "clips-"):
        none, loc, both, every = (drawn[prefix + name] for name in ("none", "loc", "loc-neg", "all"))
        assert none[0] == loc[0] == both[0] == every[0] and sum(map(len, none[0])) > 5 * len(none[0])
        assert not none[1] and set(loc[1]) == {"loc"} and loc[1]["loc"] == both[1]["loc"] == every[1]["loc"] == every[1]["rev"]
        assert both[1]["neg"] == every[1]["neg"] >= loc[1]["loc"], "an image without a unique shape has one as well"
    assert drawn["all"][0] == drawn["nfp"][0] == drawn["oracle"][0] == drawn["point"][0]


def test_silent_conversations_deny_nothing(tmp_path):
    write_world(tmp_path, {"train": 20})
    tables.limit_conversations(tmp_path, "silent", r"(?!Yes\b|No\b)")
    rows = read_json(tmp_path / "silent_train.json")
    assert max(Counter(row["image"] for row in rows).values()) <= tables.TALKS
    assert not any(row["conversations"][1]["value"].startswith(("Yes", "No")) for row in rows) and len(rows) > 60


def test_a_table_compares_the_rows_and_trains_each_once(fake, capsys):
    trained, asked, _ = fake
    tables.main(["4", "--seeds", "1,2"])
    outs = [config.out for config in trained]
    assert len(outs) == len(set(outs)) == 6, "stage 1, and two settings that begin from it, of two seeds"
    assert [config.seed for config in trained] == [1, 1, 2, 2, 1, 2] and trained[1].init_from == outs[0]
    assert len(asked) == 6 and sum("--blind" in argv for *_, argv in asked) == 2, "the last row, of two seeds"
    assert {argv[argv.index("--seed") + 1] for *_, argv in asked} == {"1", "2"}, "each seed has questions of its own"
    text = capsys.readouterr().out
    assert "| | left/right (n 4) | left (n 2) | right (n 2) | above/below (n 4) | ICL left/right (n 4) |" in text
    assert "| instructions alone (LLaVA) * | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| LocVLM-B |" + 6 * " 50.0 ± 0.0 (+0.0 ± 0.0) |" + " 69.5 | 65.4 | 76.5 | 74.1 |" in text
    assert (tables.OUT / "table-4.md").read_text().strip() in text
    assert read_json(tables.OUT / "table-4.json")["figures"]["all, blind"]["left"] == [50.0, 50.0]
    count = len(trained), len(asked)
    tables.main(["4", "--seeds", "1,2"])
    assert (len(trained), len(asked)) == count, "asked again, it is only read"


def test_mirrored_questions_count_with_the_direct_ones_and_each_row_has_its_reference(fake, monkeypatch):
    """Tab. 8's last two rows are compared with each other: the last reference above a row is its own."""
    right = {"seen-none": 0.1, "seen-all": 0.5, "silent-none": 0.2, "silent-all": 0.9}
    scores = {"left/right": [0, 1, 1], "left/right mirrored": [0, 0, 0, 1], "icl left/right": [1] * 5}

    def figure(heading, run, seed, is_blind):
        return 100 * right[run.name.rpartition("-")[0]] + seed, 8 - seed

    monkeypatch.setattr(tables, "figure", figure)
    tables.main(["8", "--seeds", "0,1"])
    text = (tables.OUT / "table-8.md").read_text()
    assert "| LocVLM-B | **50.5 ± 0.7 (+40.0 ± 0.0)**" in text and "(n 7-8)" in text
    assert "| instructions alone, no yes or no in them * | **20.5 ± 0.7 (+10.0 ± 0.0)**" in text
    assert "| LocVLM-B, no yes or no in its instructions | **90.5 ± 0.7 (+70.0 ± 0.0)**" in text
    monkeypatch.undo()
    run = tables.OUT / "pooled"
    rows = [{"correct": bool(v), "truth": {"setting": s, "word": "left"}} for s, values in scores.items() for v in values]
    monkeypatch.setattr(tables, "is_made", lambda *of_folder: True)
    monkeypatch.setattr(tables, "hashes", lambda paths: {})
    write_rows(run / "eval-spatial-shapes/spatial-instances_val.jsonl", rows)
    assert tables.figure("left/right", run, 0) == (100 * 3 / 7, 7) and tables.figure("ICL left/right", run, 0) == (100.0, 5)


def test_a_point_and_the_centre_of_a_box_are_judged_alike():
    truth = {"box_px": [10, 10, 20, 20]}
    for boxes, right in (([[13, 13, 17, 17]], True), ([[0, 0, 90, 90]], False), ([[0, 0, 30, 30]], True), ([], False)):
        assert tables.has_centre({"truth": truth, "boxes_px": boxes}) is right


def test_sides_in_text_are_asked_as_they_were_taught(tmp_path, monkeypatch):
    """The prompt is a training row's up to its answer, which counts if it is right as a whole."""
    monkeypatch.setattr(tables, "STILL", tmp_path)
    write_side_texts(tmp_path / "text_val.json", 6)
    model = LocVLM.from_parts(*(Path(tables.__file__).parent.parent / "tiny" / part for part in ("clip", "llama")))
    model.save_pretrained(tmp_path / "run")
    config = train.TrainConfig(data=str(tmp_path / "text_val.json"), images=str(tmp_path), stages="2")
    examples = train.build_examples(config, 2, read_records(config.sources)[0], model)
    taught = {}
    for record in examples.records:
        row = examples.text_row(record, 0)
        start = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        taught[tuple(row["input_ids"][:start])] = [*row["input_ids"][start:-1]]

    def generate(self, prompts, **decoding):
        answers = [taught[tuple(prompt)] for prompt in prompts]
        return [ids[:-2] if i == 0 else ids for i, ids in enumerate(answers)]

    monkeypatch.setattr(Llama, "generate", generate)
    assert tables.sides_in_text(tmp_path / "run") == [False] + [True] * 5


def test_a_killed_run_resumes(fake):
    trained, *_ = fake
    tables.tuned("stage-1", 0)
    (tables.OUT / "stage-1-0/config.json").rename(tables.OUT / "stage-1-0/train.json")
    tables.tuned("none", 0)
    assert [config.resume for config in trained] == [False, True, False]


def test_a_run_of_another_recipe_is_removed_and_trained_again(fake, settings, capsys, monkeypatch):
    """Another recipe: options, numbers of the preset, data, what it starts from. Its evaluations go with it."""
    trained, asked, content = fake

    def again(name="none"):
        trained.clear(), asked.clear(), capsys.readouterr()
        run = tables.tuned(name, 0)
        tables.figure("boxes", run, 0)
        return [Path(config.out).name for config in trained], len(asked)

    assert again() == (["stage-1-0", "none-0"], 1) and again() == ([], 0)
    recipe = read_json(tables.OUT / "none-0.recipe.json")
    assert recipe["argv"][:2] == ["--stages", "2"] and "--init-from" in recipe["argv"] and "--resume" not in recipe["argv"]
    settings["none"] = [settings["none"][0], settings["none"][1].replace("--steps 220", "--steps 221")]
    assert again() == (["none-0"], 1)
    assert "runs/tables/none-0 was made by another recipe; it is removed and made again" in capsys.readouterr().out
    content["data/shapes/some_train.json"] += 1
    assert again() == (["none-0"], 1), "other data; stage 1 has read others"
    settings["stage-1"] = ["", settings["stage-1"][1] + " --lr 1e-3"]
    assert again() == (["stage-1-0", "none-0"], 1), "what started from it is trained again, too"
    (tables.OUT / "none-0.recipe.json").unlink()
    assert again() == (["none-0"], 1), "a run of an older version has no recipe"
    assert again("none@440") == (["none@440-0"], 1) and trained[-1].steps == 440
    assert again("captions")[0] == ["captions-0"], "captioned by the run that is there"
    assert again("captions") == ([], 0)
    settings["none"] = [settings["none"][0], settings["none"][1] + " --lr 1e-4"]
    assert again("captions")[0] == ["none-0", "captions-0"], "another captioner"
    monkeypatch.setattr(tables, "weights_sha256", lambda path: {"model.safetensors": "pretrained again"})
    assert again() == (["stage-1-0", "none-0"], 1), "another tower or LLaMA"


def test_an_evaluation_with_other_options_or_questions_is_made_again(fake, monkeypatch):
    _, asked, content = fake
    run = tables.tuned("none", 0)
    for questions, count in ((0, 1), (0, 1), (1, 2)):
        content["data/shapes/instances_val.json"] = questions
        tables.figure("boxes", run, 0)
        assert len(asked) == count
    for heading in ("boxes", "point in box"):
        tables.figure(heading, run, 0)
    assert len(asked) == 2, "one evaluation serves both"
    task, score, options = tables.MEASURES["boxes"]
    monkeypatch.setattr(tables, "MEASURES", {"boxes": [task, score, f"{options} --limit 9"]})
    tables.figure("boxes", run, 0)
    assert len(asked) == 3


def test_clips_of_one_frame_have_features_of_their_own(fake):
    tables.tuned("clips-none", 0)
    tables.tuned("clips-frame", 0)
    assert read_json(f"{tables.WORDS['FEATURES']}/features.json") == [8]
    assert read_json(f"{tables.WORDS['FRAME']}/features.json") == [1]
    budgets = {name: options for name, (_, options) in tables.SETTINGS.items() if name.startswith("clips")}
    configs = [train.parse_config(train.TrainConfig, [*o.split(), "--init-from", "x"]) for o in budgets.values()]
    assert len({(c.batch, c.steps, c.questions, c.lr, c.data) for c in configs}) == 1, "equal budgets"


def test_points_are_asked_for_points(fake):
    """Evaluation takes the location from the run's config."""
    trained, asked, _ = fake
    tables.figure("point in box", tables.tuned("point", 0), 0)
    assert trained[-1].location == "point" and trained[-1].settings()["location"] == "point"
    assert "--location" not in asked[-1][2]


def test_objects_are_asked_for_by_name_whatever_the_model_was_trained_with(fake):
    trained, asked, _ = fake
    for heading in ("boxes", "QA"):
        tables.figure(heading, tables.tuned("oracle", 0), 0)
        assert asked[-1][2][asked[-1][2].index("--words") + 1] == "name"
    assert trained[-1].words == "description"


def test_cells_are_bold_beyond_two_standard_errors_of_the_paired_difference():
    """The standard error of 1, 2, 3 is 0.577; a shift shared by both rows does not count."""
    assert tables.cell([50.0]) == "50.0" and tables.cell([50.0], [40.0]) == "50.0 (+10.0)"
    assert tables.cell([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == "**22.0 ± 11.0 (+2.0 ± 0.6)**"
    assert tables.cell([10.0, 21.0, 32.0], [10.0, 20.0, 30.0]) == "21.0 ± 11.0 (+1.0 ± 0.6)"
    assert tables.cell([1.0, 2.0], [1.01, 2.0]) == "1.5 ± 0.7 (+0.0 ± 0.0)"
    assert tables.cell([1.0, 2.0], [3.0, 4.0]) == "**1.5 ± 0.7 (-2.0 ± 0.0)**"


def test_what_meteor_needs_is_asked_for_before_anything_is_trained(fake, monkeypatch):
    def lacking():
        raise ValueError("no java")

    trained, *_ = fake
    monkeypatch.setattr(tables, "require_meteor", lacking)
    for number in ("10", "all"):
        with pytest.raises(ValueError, match="no java"):
            tables.main([number, "--seeds", "0"])
    assert not trained
    tables.main(["8", "--seeds", "0"])
    assert {config.out for config in trained} == {
        f"{tables.OUT}/{name}-0" for name in ("stage-1", "seen-none", "seen-all", "silent-none", "silent-all")
    }


def test_what_the_plot_needs_is_asked_for_before_anything_is_trained(fake, monkeypatch):
    trained, *_ = fake
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        tables.main(["curves", "--seeds", "0"])
    assert not trained


def test_curves_have_a_line_for_each_setting_and_a_panel_for_each_measure(tmp_path, monkeypatch):
    """The loss is the first seed's of the longest run; a run without "@" has STEPS."""
    figure, drawn = pytest.importorskip("matplotlib.figure").Figure, {}
    save = figure.savefig
    monkeypatch.setattr(tables, "OUT", tmp_path)
    monkeypatch.setattr(figure, "savefig", lambda self, *given, **how: drawn.update(figure=self) or save(self, *given, **how))
    write_rows(tmp_path / "all@880-3/log.jsonl", [{"loss": float(step >= 20)} for step in range(40)])
    figures = {name: {"boxes": [x, x + 20], "left/right": [50.0, 50.0]} for name, x in {"all@880": 70, "none": 0, "all": 30}.items()}
    tables.draw_curves(figures, [3, 4], tmp_path / "curves.svg")
    loss, boxes, _ = drawn["figure"].axes
    assert [(line.get_label(), line.get_xydata().tolist()) for line in loss.lines] == [("all", [[10, 0], [30, 1]]), ("none", [])]
    assert [line.get_xydata().tolist() for line in boxes.lines] == [[[220, 40], [880, 80]], [[220, 10]]]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert [axes.get_title() for axes in drawn["figure"].axes] == ["loss", "boxes", "left/right"]


def test_all_tables_are_made_and_curves_on_request(fake, capsys, monkeypatch):
    trained, *_ = fake
    plots = []
    monkeypatch.setattr(tables, "find_spec", lambda name: True)
    monkeypatch.setattr(tables, "draw_curves", lambda figures, seeds, path: plots.append((len(figures), seeds, path.name)))
    tables.main(["all", "--seeds", "0"])
    made = {path.stem for path in tables.OUT.glob("table-*.md")}
    assert made == {f"table-{number}" for number in ("2", "4", "8", "10", "11a", "11b", "11c", "12")}
    assert {Path(config.out).name for config in trained} == {f"{name}-0" for name in tables.SETTINGS if "no-text" not in name}
    trained.clear()
    tables.main(["curves", "--seeds", "0"])
    assert Counter(config.steps for config in trained) == {220: 2, 440: 4, 880: 4, 1760: 4}, "of 220 steps, without text alone"
    assert plots == [(16, [0], "curves.svg")]


def test_invalid_seeds_and_tables_are_refused():
    for seeds in ("a", "1,1", ""):
        with pytest.raises(ValueError, match="--seeds .*: write different whole numbers"):
            tables.main(["8", "--seeds", seeds])
    with pytest.raises(SystemExit):
        tables.main(["9"])
