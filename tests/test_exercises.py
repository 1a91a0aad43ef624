"""The worked solutions of docs/exercises.md apply to the code as it is, and do what they say.

Each check applies docs/exercises/NAME.diff to a copy of the program and imports that copy. To check a solution of your own in
its place, in the working tree and under the names that the page asks for: LOCVLM_EXERCISES=mine pytest tests/test_exercises.py
-k NAME
"""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, TEXT, VISION

FOLDER = ROOT / "docs/exercises"
PARTS = ("coords", "clip_vit", "llama", "data", "video", "model", "evaluate", "train", "formats", "tiny", "tasks", "tools")
IS_MINE = bool(os.environ.get("LOCVLM_EXERCISES"))  # whatever its value


def solved(name, copy):
    """Copy the program, without its data and runs, and apply a solution."""
    if not shutil.which("git"):
        pytest.skip("no git, which applies the solutions")
    copy.mkdir()
    for part in PARTS:
        if (ROOT / f"{part}.py").is_file():  # beside data.py, data/ holds the shapes
            shutil.copy(ROOT / f"{part}.py", copy / f"{part}.py")
        else:
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent), "LC_ALL": "C"}  # not a part of a repository around it
    apply = ["git", "apply", "--verbose", str(FOLDER / f"{name}.diff")]
    done = subprocess.run(apply, cwd=copy, env=alone, capture_output=True, text=True)
    if done.returncode or "Skipped" in done.stderr:
        hint = "to check a solution in this tree, set LOCVLM_EXERCISES=mine"
        pytest.fail(f"docs/exercises/{name}.diff does not apply to this code; {hint}:\n{done.stderr}", pytrace=False)
    return copy


@pytest.fixture
def solve(tmp_path, monkeypatch):
    """Return solve(name): from then on, imports take the copy of the program with that solution."""
    def is_ours(module):
        return module.split(".")[0] in PARTS

    before = {module: sys.modules[module] for module in sys.modules if is_ours(module)}

    def use(name):
        monkeypatch.syspath_prepend(ROOT if IS_MINE else solved(name, tmp_path / "copy"))
        for module in before:
            del sys.modules[module]

    yield use
    for module in [module for module in sys.modules if is_ours(module)]:
        del sys.modules[module]
    sys.modules.update(before)


@pytest.fixture
def run(tmp_path):
    """Return run(...): train the tiny model for two steps a stage on eight shapes, and return the run's folder."""
    def train_it(**options):
        train, world = import_module("train"), tmp_path / "world"
        if not world.exists():
            import_module("tiny.shapes").write_world(world, {"train": 8, "val": 8})
        files = ",".join(f"{world}/{kind}_train.json" for kind in ("instances", "captions", "conversations"))
        options = {"data": files, "images": f"{world}/images", "steps": 2, "batch": 2, "evaluate": False} | options
        config = train.TrainConfig(out=str(tmp_path / "run"), **options)
        train.main(config)
        return tmp_path / "run"

    return train_it


def test_every_solution_has_its_page_its_check_and_its_size():
    """The page's rows "files / lines" are what the diffs add to the program."""
    page, checks = (ROOT / "docs/exercises.md").read_text(), open(__file__, encoding="utf-8").read()
    diffs = {path.stem: path.read_text() for path in FOLDER.glob("*.diff")}
    assert len(diffs) == 8
    for name, diff in diffs.items():
        size = f"{len(re.findall(r'^diff --git', diff, re.M))} / {len(re.findall(r'^[+](?![+][+] )', diff, re.M))}"
        assert re.search(rf"^\| \[.+\]\(exercises/{name}\.diff\) .*\| {size} \|", page, re.M), f"{name}: {size}"
        assert f'solve("{name}")' in checks, name


def test_a_diff_that_does_not_apply_is_named(tmp_path, monkeypatch):
    stale = (FOLDER / "shikra.diff").read_text().replace("REPRESENTATIONS", "REPRESENTATION")
    (tmp_path / "shikra.diff").write_text(stale)
    monkeypatch.setitem(globals(), "FOLDER", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="shikra.diff does not apply.*\n(.*\n)*.*coords.py"):
        solved("shikra", tmp_path / "copy")


def test_shikra_boxes_survive_their_text(solve):
    """To half of a thousandth of the side, for boxes and points, in every geometry; a model can be made of the kind."""
    solve("shikra")
    coords, rng = import_module("coords"), random.Random(0)
    for geometry in coords.GEOMETRIES:
        fmt = coords.CoordFormat("shikra", geometry=geometry)
        for _ in range(500):
            size = width, height = rng.randint(50, 900), rng.randint(50, 900)
            left, top, wide, high = coords.window(size, "crop", 224)  # what every geometry shows
            xs, ys = (sorted(start + rng.random() * length for _ in "12") for start, length in ((left, wide), (top, high)))
            box_px, slack = (xs[0], ys[0], xs[1], ys[1]), 0.000501 * max(coords.window(size, geometry, 224)[2:])
            text = fmt.encode_box(box_px, size)
            [read] = fmt.decode_boxes(f"It is located at {text}", size)
            assert re.fullmatch(r"\([01]\.\d{3}(, [01]\.\d{3}){3}\)", text)
            assert max(abs(a - b) for a, b in zip(read, box_px, strict=True)) <= slack
            [point_px] = fmt.decode_points(fmt.encode_point(box_px[:2], size), size)
            assert max(abs(a - b) for a, b in zip(point_px, box_px[:2], strict=True)) <= slack
    assert import_module("train").TrainConfig(kind="shikra").settings()["kind"] == "shikra"


def test_pixel_shuffle_trains_answers_and_reloads(solve, run, tmp_path):
    """A quarter of the visual tokens: the first is made of patches 0, 1, 8 and 9 of the 8 x 8."""
    solve("pixel_shuffle")
    model_file, folder = import_module("model"), run(adapter="pixel_shuffle", stages="1,2")
    model = model_file.LocVLM.from_pretrained(folder)
    assert model.config.visual_tokens == 16 and type(model.adapter).__name__ == "PixelShuffleAdapter"
    patches = torch.randn(1, 64, 128)
    first = model.adapter(patches)[0]
    for changed in range(64):
        other = patches.clone()
        other[0, changed] += 1
        moved = (model.adapter(other)[0] != first).any(-1).nonzero().flatten().tolist()
        assert moved == [changed // 16 * 4 + changed % 8 // 2]
    image = next((tmp_path / "world/images").iterdir())
    [[answer]] = model.generate([image], [["What is at location (1, 2, 30, 40) in image?"]], max_new_tokens=4)
    assert isinstance(answer, str)
    with pytest.raises(ValueError, match="pixel_shuffle"):
        dataclasses.replace(model.config, frames=8)
    with pytest.raises(ValueError, match="pixel_shuffle"):
        dataclasses.replace(model.config, vision_config=dataclasses.replace(model.config.vision_config, image_size=98))


def test_further_left_is_trained_and_judged(solve, run, tmp_path):
    """Its answers agree with the boxes; evaluate.py asks and judges it as a task."""
    solve("further_left")
    run(stages="2", objectives="left")
    data, evaluate = import_module("data"), import_module("evaluate")
    world, read_file = tmp_path / "world", import_module("formats.annotations").read_file
    records, _ = read_file(world / "instances_val.json", world / "images")
    wording = data.Wording(import_module("coords").CoordFormat(side=112), objectives=("left",))
    task = evaluate.TASKS["further-left"]
    items = evaluate.objective_items(data.OBJECTIVES["left"], records, wording, random.Random(0))
    centres = {r.id: {o.name: o.box_px[0] + o.box_px[2] for o in r.objects} for r in records}
    assert len(items) > 5
    for item in items:
        record = item.id.partition(":")[0]
        one, two = sorted(item.truth["names"], key=centres[record].get)
        for answer, is_right in ((item.truth["answer"], True), (f"The {one}.", True), (f"The {two}.", False), ("", False)):
            item.answer = answer
            task.judge(item, wording)
            assert item.correct == is_right, (item.question, answer)
    assert {name for r in records for name, *_ in data.draw_questions(r, wording, random.Random(0))} == {"left"}


def test_siglip_agrees_with_transformers(solve, tmp_path, tokenizer):
    """The tower of a small random SigLIP, alone and in a saved LocVLM: hidden_states[-2], pixels in [-1, 1]."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    solve("siglip")
    clip_vit, llama, model_file = map(import_module, ("clip_vit", "llama", "model"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text, vision = sizes | {"vocab_size": 99, "max_position_embeddings": 8}, sizes | {"image_size": 64}  # patches of 16 px, SigLIP's default
    torch.manual_seed(0)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "siglip")
    tower = clip_vit.CLIPVisionTower.from_pretrained(tmp_path / "siglip")
    image = import_module("PIL.Image").new("RGB", (70, 40), (255, 0, 128))
    pixels = clip_vit.preprocess(image, tower.config)[None]
    assert (tower.config.num_patches, float(pixels.max()), float(pixels.min())) == (16, 1.0, -1.0)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        assert (tower(pixels) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    shape = llama.LlamaConfig(**vars(TEXT))
    whole = model_file.LocVLM.join(tower, model_file.LinearAdapter(32, 32), llama.Llama(shape), tokenizer, geometry="squash")
    whole.save_pretrained(tmp_path / "run")
    again = model_file.LocVLM.from_pretrained(tmp_path / "run")
    assert torch.equal(again.vision_tower(pixels), tower(pixels)) and again.config == whole.config
    clip = clip_vit.CLIPVisionTower(clip_vit.CLIPVisionConfig(**vars(VISION)))
    assert clip(torch.zeros(1, 3, 28, 28)).shape == (1, 4, 32), "a CLIP still works"
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        clip_vit.CLIPVisionConfig.from_dict(theirs.config.vision_config.to_dict() | {"hidden_act": "relu"})


def test_lora_trains_only_its_matrices_and_merges_exactly(solve, run):
    """A run is saved as a plain model: only attention has changed, by matrices of low rank; the merged logits are the same."""
    solve("lora")
    train, model_file = import_module("train"), import_module("model")
    base = train.merged(train.build_model(train.TrainConfig()).state_dict())
    ids, learned = torch.tensor([[1, 5, 9, 300]]), run(stages="1,2", lr=1e-2)
    plain = model_file.LocVLM.from_pretrained(learned).language_model
    changed = 0
    for name, p in plain.state_dict().items():
        difference = p - base[f"language_model.{name}"]
        if re.search(r"self_attn\.\w_proj\.weight", name):
            changed += 0 < torch.linalg.matrix_rank(difference.double(), rtol=1e-4) <= 8
        else:
            assert not difference.any(), name
    assert changed == 4 * len(plain.layers)

    logits = plain(ids).detach()
    config = train.TrainConfig(init_from=str(learned))
    model = train.build_model(config)
    assert torch.equal(model.language_model(ids), logits), "at first, a product of zeros"
    names = train.unfreeze(model, 2)
    assert {name.rpartition(".")[2] for name in names if "language_model" in name} == {"lora_a", "lora_b"}
    assert list(train.unfreeze(model, 1)) == [name for name in names if name.startswith("adapter.")]
    for p in names.values():
        torch.nn.init.normal_(p, std=0.02)
    merged = train.merged(model.state_dict())
    other = model_file.LocVLM.from_pretrained(learned)
    other.load_state_dict(merged)
    unmerged = model.language_model(ids)
    assert (other.language_model(ids) - unmerged).abs().max() < 1e-4 < (unmerged - logits).abs().max()


def test_qwen3_agrees_with_transformers(solve, tmp_path):
    """Logits, and a greedy answer through the cache, of a small random Qwen3 with fewer key heads and its own head size."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    solve("qwen3")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "head_dim": 12}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": False}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "qwen3")
    ours = import_module("llama").Llama.from_pretrained(tmp_path / "qwen3")
    ids = torch.randint(0, 99, (2, 12))
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert (ours(ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    greedy = theirs.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 12:]
    assert ours.generate([ids[0].tolist()], 6) == [greedy.tolist()]
    again = import_module("llama").LlamaConfig.from_dict(dataclasses.asdict(ours.config))
    assert again == ours.config and again.model_type == "qwen3"


def test_gradient_norms_of_parts_add_up_and_reach_tensorboard(solve, run):
    """In stage 1 the adapter has all of it; in stage 2 the squares of the parts add up. TensorBoard reads what the log holds."""
    accumulator = "tensorboard.backend.event_processing.event_accumulator"
    event_accumulator = pytest.importorskip(accumulator, reason="pip install tensorboard")
    solve("gradient_norms")
    folder = run(stages="1,2", tensorboard=True)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in rows:
        parts = {name: norm for name, norm in row.items() if name.startswith("grad_norm/")}
        assert sum(norm**2 for norm in parts.values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
        layers = {f"grad_norm/language_model.layers.{i}" for i in range(5)}
        assert parts.keys() == {"grad_norm/adapter"} if row["stage"] == 1 else layers < parts.keys()
    for stage in (1, 2):
        events = event_accumulator.EventAccumulator(str(folder / f"tensorboard/stage-{stage}")).Reload()
        wanted = [(row["step"], pytest.approx(row["grad_norm/adapter"])) for row in rows if row["stage"] == stage]
        assert [(event.step, event.value) for event in events.Scalars("grad_norm/adapter")] == wanted and len(wanted) == 2


def test_cv_bench_scores(solve, tmp_path, capsys):
    """`python -m tasks cv-bench`: the mean of the two sources' accuracies, letters however they are written, wrong rows."""
    solve("cv_bench")
    tasks, main = import_module("tasks").TASKS, import_module("tasks.__main__").main
    prompt = "Where is the cup?\n(A) left\n(B) right"
    about = [("ADE20K", "Count"), ("ADE20K", "Relation"), ("ADE20K", "Relation"), ("COCO", "Relation")]
    rows = [
        {"idx": f"q{i}", "type": "2D", "prompt": prompt, "answer": "(B)", "filename": f"img/{i}.png", "source": source, "task": task}
        for i, (source, task) in enumerate(about)
    ]
    answers = [{"id": f"q{i}", "pred": text} for i, text in enumerate(("(B) right", "A", "Beside it", "B."))]
    for name, content in (("test_2d.jsonl", rows), ("answers.jsonl", answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    questions, scored = str(tmp_path / "test_2d.jsonl"), str(tmp_path / "answers.jsonl")
    words = ["cv-bench", str(tmp_path), "--questions", questions, "--score", scored, "--into", str(tmp_path / "eval")]
    main(words)
    [result] = (json.loads(path.read_text()) for path in tmp_path.rglob("cv-bench*.json"))
    expected = {"accuracy": 2 / 3, "ADE20K": 1 / 3, "COCO": 1, "Count": 1, "Relation": 1 / 3, "no letter": 1 / 4}
    assert {name: result["metrics"].get(name) for name in expected} == pytest.approx(expected)
    assert "cv-bench" in tasks and "66.7 %" in capsys.readouterr().out
    for key, wrong in (("answer", "right"), ("source", "Omni3D")):
        other = [rows[0] | {key: wrong}, *rows[1:]]
        (tmp_path / "test_2d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
        with pytest.raises(ValueError, match=rf"\bq0\b.*{wrong}"):
            main(words)
