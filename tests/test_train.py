"""Training is a function of its options: same losses again, after a kill, and on two processes."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEXT, VISION
from PIL import Image
from safetensors.torch import load_file

import data
import evaluate
import formats.features
import llama
import train
from clip_vit import CLIPVisionTower
from formats import run_folder
from formats.fast_cpu import keep_freed_memory
from formats.files import read_json, write_json
from formats.processes import Processes, pick_device
from formats.weights import write_tensors
from llama import Llama
from model import LocVLM
from tiny.moving import write_clips
from tiny.shapes import write_world
from tools.features import features
from train import TrainConfig, lr_at, parse_config


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer):
    """Flags for a run on 24 shapes images with a random model of width 32."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for name, module, config in (("clip", CLIPVisionTower(VISION), VISION), ("llama", Llama(TEXT), TEXT)):
        write_tensors(
            folder / name / "model.safetensors",
            {
                k if k.startswith("lm_head") else f"{'vision_' * (name == 'clip')}model.{k}": v
                for k, v in module.state_dict().items()
            },
        )
        write_json(folder / name / "config.json", vars(config))
    (folder / "llama/tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    write_world(folder / "world", {"train": 24})
    world = folder / "world"
    return {
        "vision": str(folder / "clip"),
        "llm": str(folder / "llama"),
        "data": ",".join(str(world / f"{what}_train.json") for what in ("instances", "captions", "conversations")),
        "images": str(world / "images"),
        "steps": 5,
        "batch": 4,
        "questions": 3,
        "lr": 1e-2,
    }


def world_of(parts):
    return Path(parts["images"]).parent


def losses(run):
    return [json.loads(line)["loss"] for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def flags(options):
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return [part for pair in pairs for part in pair if part]


def test_warm_up_is_linear_and_the_rest_half_a_cosine():
    rates = [lr_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1.0
    assert (
        rates[55] == pytest.approx(0.5)
        and rates[99] < 1e-3
        and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    )


def test_flags_come_from_the_dataclass():
    config = parse_config(TrainConfig, ["--steps", "3", "--lr", "1e-3", "--objectives", "loc,neg"])
    assert [(r.steps, r.lr) for r in map(config.recipe, (1, 2))] == [(3, 1e-3), (3, 1e-3)]
    paper = TrainConfig(preset="paper").recipe(2)
    assert (paper.batch, paper.lr, paper.warmup_ratio, paper.epochs) == (64 // 2, 2e-5, 0.3, 10), "Sec. 4.1: 64 conversations, two an image"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "--steps -1 must be a number from 0"),
        ({"batch": -4}, "--batch -4 must be"),
        ({"lr": math.nan}, "--lr nan must be"),
        ({"data": "x.json"}, "x.json without --images"),
        ({"save_every": 0}, "--save-every 0 must be a number from 1"),
        ({"micro_batch": -1}, "--micro-batch -1"),
        ({"frames": -1}, "--frames -1"),
        ({"questions": -1}, "--questions -1"),
        ({"objectives": "loc,side"}, "--objectives side unknown"),
        ({"adapter": "no/such.bin"}, "--adapter no/such.bin"),
        ({"init_from": "x", "llm": "y"}, "--init-from loads"),
        ({"init_from": "x", "adapter": "linear"}, "--init-from loads"),
        ({"data": "a.json@b*1.2.3"}, "write FILE or FILE@IMAGES"),
        ({"images": "train2017"}, "--images train2017 without --data"),
        ({"frames": 8}, "--frames is for clips, in stages 3 and 4; stage 1,2"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_first(options, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


def test_the_adapter_may_learn_faster(parts, tmp_path, monkeypatch):
    """AdamW's first step moves each weight by its learning rate; log.jsonl has LLaMA's."""
    recipe = train.Recipe(batch=4, lr=1e-3, warmup_ratio=0.0, steps=1, questions=3, adapter_lr_ratio=5.0)
    monkeypatch.setitem(train.PRESETS, "tiny", {1: recipe, 2: recipe})
    options = {**parts, "steps": 0, "batch": 0, "lr": 0.0, "evaluate": False, "out": str(tmp_path / "run")}
    before = train.build_model(TrainConfig(**options)).state_dict()
    train.main(TrainConfig(**options, stages="2"))
    after = LocVLM.from_pretrained(tmp_path / "run").state_dict()
    for name in (next(name for name in before if name.startswith("adapter.")), "language_model.lm_head.weight"):
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(5e-3 if "adapter" in name else 1e-3, rel=0.01), name
    assert json.loads((tmp_path / "run/log.jsonl").read_text())["lr"] == 1e-3


def test_whatever_is_trainable_is_optimized():
    """The tower too, if `unfreeze` lets it learn; only the adapter has a rate of its own."""
    names = ("vision_tower.a", "adapter.b", "language_model.c", "mine.d")
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    optimizer, ratios = train.make_optimizer(parameters, 5.0)
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW([torch.zeros(1)]).param_groups[0].keys(), "as checkpoints hold them"
    ratios = {id(p): ratio for group, ratio in zip(optimizer.param_groups, ratios, strict=True) for p in group["params"]}
    assert [ratios[id(parameters[name])] for name in names] == [1.0, 5.0, 1.0, 1.0]


def test_stage_one_moves_only_the_adapter_and_stage_two_llama_too(parts, tmp_path):
    train.main(TrainConfig(**{**parts, "stages": "1", "steps": 3}, out=str(tmp_path / "one")))
    train.main(
        TrainConfig(
            **{**parts, "stages": "2", "steps": 3, "vision": "", "llm": ""},
            init_from=str(tmp_path / "one"),
            out=str(tmp_path / "two"),
        )
    )
    one, two = (LocVLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    tower = CLIPVisionTower.from_pretrained(parts["vision"]).state_dict()
    llama = Llama.from_pretrained(parts["llm"]).state_dict()
    for name in one:
        part, _, rest = name.partition(".")
        moved = not torch.equal(one[name], two[name])
        if part == "vision_tower":
            assert torch.equal(one[name], tower[rest]) and not moved
        elif part == "language_model":
            assert torch.equal(one[name], llama[rest]) and moved, name
        else:
            assert moved


def test_same_seed_same_losses_and_another_seed_others(parts, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main(TrainConfig(**parts, out=str(tmp_path / name), seed=seed))
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert a == b and a != c and len(a) == 10


def test_accumulation_changes_nothing(parts, tmp_path):
    """The mean is over the answer tokens of the whole batch, however it is cut."""
    for name, micro in (("whole", 0), ("cut", 1)):
        train.main(TrainConfig(**parts, out=str(tmp_path / name), micro_batch=micro))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cut"), rel=1e-5)


def torchrun(options, processes=2):
    """Train in so many processes, which talk over gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(ROOT / "train.py"), *flags(options)]
    subprocess.run(command, check=True, capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_equal_one(parts, tmp_path):
    """The losses of one process with the same global batch, to 1e-5: in micro-batches, with ddp and fsdp."""
    own = {**parts, "steps": 20, "lr": 1e-3}
    train.main(TrainConfig(**own, out=str(tmp_path / "one")))
    torchrun({**own, "out": tmp_path / "two", "micro_batch": 1})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    torchrun({**own, "out": tmp_path / "split", "parallel": "fsdp", "micro_batch": 1})
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, split = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "split"))
    assert all(torch.allclose(one[name], split[name], atol=1e-4) for name in one) and one.keys() == split.keys()


def test_stage_two_follows_stage_one_in_bf16_under_fsdp(parts, tmp_path):
    """LLaMA is frozen in stage 1 and learns in stage 2, in bfloat16 with float32 gradients: near the losses of fp32."""
    own = {**parts, "steps": 6}
    train.main(TrainConfig(**own, out=str(tmp_path / "one")))
    torchrun({**own, "out": tmp_path / "two", "parallel": "fsdp", "precision": "bf16"})
    train.main(TrainConfig(**own, out=str(tmp_path / "autocast"), precision="bf16"))
    for name in ("two", "autocast"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=5e-3)
        assert losses(tmp_path / name) != pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_two_processes_train_and_one_evaluates(parts, tmp_path):
    write_world(tmp_path / "w", {"train": 8, "val": 2})
    own = {**parts, "data": f"{tmp_path}/w/instances_train.json", "images": f"{tmp_path}/w/images"}
    torchrun({**own, "stages": "2", "steps": 1, "out": tmp_path / "run"})
    assert read_json(tmp_path / "run/eval/hal-instances_val.json")["world_size"] == 1


@pytest.mark.parametrize("clip", [1.0, 1e-14])
def test_epochs_become_steps_and_gradients_are_clipped(parts, tmp_path, monkeypatch, clip):
    """AdamW divides by the gradient's size + 1e-8: where gradients are clipped to far less, nothing moves."""
    recipe = train.Recipe(batch=16, lr=1e-2, warmup_ratio=0.0, epochs=1.5, grad_clip=clip)
    monkeypatch.setitem(train.PRESETS, "tiny", {1: recipe})
    own = {**parts, **dict.fromkeys(("steps", "batch", "questions", "lr"), 0), "stages": "1", "evaluate": False}
    config = TrainConfig(**own, out=str(tmp_path / "run"))
    before = train.build_model(config).adapter.linear_1.weight
    train.main(config)
    after = LocVLM.from_pretrained(tmp_path / "run").adapter.linear_1.weight
    assert len(losses(config.out)) == 3  # 1.5 x 24 images / 16
    assert ((after - before).abs().max() < 1e-6) == (clip < 1)


def test_one_process_looks_at_the_images_and_tells_the_others(monkeypatch):
    told = []
    monkeypatch.setattr("formats.processes.dist.is_initialized", lambda: True)
    monkeypatch.setattr("formats.processes.dist.broadcast_object_list", lambda made, device: told.append(made) or made.__setitem__(0, 7))
    device = torch.device("cpu")
    first, second = (Processes(rank, 2, device, torch.float32, False) for rank in (0, 1))
    assert first.from_first(lambda: 7) == second.from_first(lambda: 1 / 0) == 7 and len(told) == 2


def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_train_7b_on_a_cpu(monkeypatch, tmp_path):
    """A PyTorch for a newer CUDA than the driver's warns, and sees no GPU. Without a driver, or if GPUs are hidden, it is the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("formats.processes.DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pick_device(3) == torch.device("cpu")
    (tmp_path / "version").write_text("NVRM version: 535")
    with pytest.raises(ValueError, match="PyTorch for CUDA 13.0 cannot use this machine's NVIDIA driver; install a PyTorch for"):
        pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device() == torch.device("cpu")


def test_freed_memory_is_not_kept_beside_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ctypes.CDLL", lambda name: 1 / 0)
    keep_freed_memory()


def test_a_run_resumes_on_another_number_of_processes(parts, tmp_path):
    """Begun on two processes under fsdp and ended on one, and the other way: the losses of a run left alone."""
    own = {**parts, "stages": "2", "steps": 6, "save_every": 3}
    train.main(TrainConfig(**own, out=str(tmp_path / "whole")))
    half = lambda name: shutil.rmtree(tmp_path / name / "state/2-6")  # noqa: E731 what a run killed after step 5 leaves
    torchrun({**own, "out": tmp_path / "two", "parallel": "fsdp"})
    half("two")
    train.main(TrainConfig(**own, out=str(tmp_path / "two"), resume=True))
    train.main(TrainConfig(**own, out=str(tmp_path / "one")))
    half("one")
    torchrun({**own, "out": tmp_path / "one", "parallel": "fsdp"} | {"resume": ""})
    for name in ("two", "one"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5), name


def test_recomputing_layers_changes_nothing(parts, tmp_path, monkeypatch):
    ran, recomputed = set(), llama.recomputed
    monkeypatch.setattr(llama, "recomputed", lambda f, *x: ran.add(f.__name__) or recomputed(f, *x))
    for recompute in (False, True):
        ran.clear()
        train.main(TrainConfig(**parts, recompute=recompute, out=str(tmp_path / str(recompute))))
        assert ("body" in ran) == recompute
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_complete_checkpoint_has_its_name_before_the_next_one(parts, tmp_path, monkeypatch):
    """A kill loses at most the steps since the last checkpoint that was written whole."""
    log, names = run_folder.RunFolder.log, []

    def slow_log(run, row):
        if run.pending:
            run.pending[1].result()  # this step took long enough for the writer
        log(run, row)
        names.append([path.name for path in run.state.iterdir()] if run.state.is_dir() else [])

    monkeypatch.setattr(run_folder.RunFolder, "log", slow_log)
    train.main(TrainConfig(**{**parts, "stages": "2", "steps": 4, "save_every": 2}, out=str(tmp_path / "run")))
    assert names == [[], [], ["2-2"], ["2-2"]]


def test_a_checkpoint_cut_short_is_not_one(parts, tmp_path, monkeypatch):
    """Killed in the middle of writing, or with no room to write: the one before is resumed, to the same bits."""
    monkeypatch.setattr(run_folder, "KEEP", 9)
    own = {**parts, "stages": "2", "steps": 6, "save_every": 2}
    train.main(TrainConfig(**own, out=str(tmp_path / "whole")))
    assert sorted(path.name for path in (tmp_path / "whole/state").iterdir()) == ["2-2", "2-4", "2-6"]
    killer = (  # dies when it has written a part of its second checkpoint
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import train\n"
        "from formats import run_folder\n"
        "save, count = run_folder.dcp.async_save, [0]\n"
        "def dying(state, checkpoint_id, **how):\n"
        "    count[0] += 1\n"
        "    if count[0] == 2:\n"
        "        (checkpoint_id / '__0_0.distcp').parent.mkdir(); (checkpoint_id / '__0_0.distcp').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return save(state, checkpoint_id=checkpoint_id, **how)\n"
        "run_folder.dcp.async_save = dying\n"
        "train.main(train.parse_config(train.TrainConfig, sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = flags({**own, "out": tmp_path / "killed"})
    done = subprocess.run([sys.executable, "-c", killer, str(ROOT), *options], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed/state").iterdir()) == ["2-2", "2-4.tmp"]
    full = (  # files may not grow beyond what the first checkpoint needs
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import train\n"
        "from formats import run_folder\n"
        "save, count = run_folder.dcp.async_save, [0]\n"
        "def limited(*state, **how):\n"
        "    count[0] += 1\n"
        "    if count[0] == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return save(*state, **how)\n"
        "run_folder.dcp.async_save = limited\n"
        "train.main(train.parse_config(train.TrainConfig, sys.argv[1:]))\n"
    )
    options = flags({**own, "out": tmp_path / "full"})
    done = subprocess.run(
        [sys.executable, "-c", full, str(ROOT), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode and "cannot be written" in done.stderr and "--resume" in done.stderr
    assert [path.name for path in (tmp_path / "full/state").iterdir()] == ["2-2"]
    for name in ("killed", "full"):
        train.main(TrainConfig(**own, out=str(tmp_path / name), resume=True))
        assert losses(tmp_path / name) == losses(tmp_path / "whole"), name
        whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", name))
        assert all(torch.equal(whole[key], again[key]) for key in whole), name


@pytest.mark.parametrize("kill_after, how", [(3, signal.SIGKILL), (6, signal.SIGKILL), (1, signal.SIGINT)])
def test_a_killed_run_resumes_to_the_same_bits(parts, tmp_path, kill_after, how):
    """kill -9 in stage 1 and in stage 2, or Ctrl-C; then --resume: weights, losses and steps equal those of a whole run."""
    train.main(TrainConfig(**parts, out=str(tmp_path / "whole"), save_every=2))
    options = {**parts, "out": tmp_path / "killed", "save_every": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(options)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.time() + 120
    while (
        time.time() < deadline
        and process.poll() is None
        and not (log.exists() and log.read_text().count("\n") >= kill_after)
    ):
        time.sleep(0.002)
    process.send_signal(how)
    *_, last = process.communicate()[1].splitlines()
    if how == signal.SIGINT:
        assert process.returncode == 130 and last == "train.py: interrupted; add --resume to continue from the last checkpoint"
    train.main(TrainConfig(**parts, out=str(tmp_path / "killed"), save_every=2, resume=True))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_run_killed_twice_in_stage_two_keeps_what_stage_one_made(parts, tmp_path, monkeypatch):
    """The model in the run's folder stays the last one that was finished, whatever is resumed and killed again."""
    rates, calls = train.lr_at, []

    def killing(after):
        def lr_at(*args):
            calls.append(args)
            if len(calls) > after:
                raise KeyboardInterrupt
            return rates(*args)

        monkeypatch.setattr(train, "lr_at", lr_at)
        calls.clear()

    own = {**parts, "out": str(tmp_path / "run"), "save_every": 2}
    killing(after=5 + 3)
    with pytest.raises(KeyboardInterrupt, match="add --resume"):
        train.main(TrainConfig(**own))
    stage_one = (tmp_path / "run/model.safetensors").read_bytes()
    assert read_json(tmp_path / "run/config.json")["locvlm"]["stage"] == 1
    killing(after=1)
    with pytest.raises(KeyboardInterrupt, match="add --resume"):
        train.main(TrainConfig(**own, resume=True))
    assert (tmp_path / "run/model.safetensors").read_bytes() == stage_one
    assert [path.name for path in (tmp_path / "run/state").iterdir()].count("2-2") == 1


def test_as_many_images_for_each_process_or_none(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch 4 does not divide by 3 processes.*--batch 3"):
        train.main(TrainConfig(**parts, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_what_a_model_was_trained_with_stays_unless_a_flag_says_otherwise(parts, tmp_path):
    one = {**parts, "stages": "1", "steps": 1}
    train.main(TrainConfig(**one, geometry="pad", kind="nfp", out=str(tmp_path / "one")))
    kept = train.build_model(TrainConfig(stages="2", init_from=str(tmp_path / "one"))).config
    assert (kept.geometry, kept.kind) == ("pad", "nfp")
    changed = train.build_model(TrainConfig(stages="2", init_from=str(tmp_path / "one"), kind="ivb")).config
    assert (changed.geometry, changed.kind) == ("pad", "ivb")


def test_the_val_split_is_found_as_coco_names_it(tmp_path):
    for name in (
        "instances_train2017.json",
        "instances_val2017.json",
        "captions_train2017.json",
        "captions_val2017.json",
    ):
        (tmp_path / name).write_text("{}")
    instances, images = tmp_path / "instances_train2017.json", tmp_path / "train2017"
    found = str(tmp_path / "instances_val2017.json")
    assert train.held_out_of(instances, images) == (found, str(images)), "nothing else is there"
    (tmp_path / "val2017").mkdir()
    assert train.held_out_of(instances, images) == (found, str(tmp_path / "val2017"))
    assert train.held_out_of(tmp_path / "captions_train2017.json", images) is None
    assert train.held_out_of(instances, ".") == (found, ".")
    (tmp_path / "instances_val2017.json").unlink()
    assert train.held_out_of(instances, images) is None


def test_a_run_whose_held_out_images_are_missing_ends_well(parts, tmp_path, capsys):
    world = tmp_path / "world"
    shutil.copytree(world_of(parts), world)
    held_out = read_json(world / "instances_train.json")
    held_out["images"] = [image | {"file_name": "gone.png"} for image in held_out["images"]]
    write_json(world / "instances_val.json", held_out)
    own = {**parts, "data": parts["data"].replace(str(world_of(parts)), str(world)), "stages": "1", "steps": 1}
    train.main(TrainConfig(**own, out=str(tmp_path / "run")))
    assert "not evaluated: 1 of the 1 images" in capsys.readouterr().out
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_trained_run_survives_an_evaluation_without_memory(parts, tmp_path, monkeypatch, capsys):
    def fail(argv):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "held_out_of", lambda path, images: (path, images))
    monkeypatch.setattr(train.evaluate, "main", fail)
    train.main(TrainConfig(**{**parts, "steps": 1}, out=str(tmp_path / "run")))
    assert "not evaluated: CUDA out of memory" in capsys.readouterr().out


def test_a_run_is_never_written_over(parts, tmp_path):
    config = TrainConfig(**{**parts, "steps": 1}, out=str(tmp_path / "run"))
    train.main(config)
    with pytest.raises(ValueError, match="holds a run already"):
        train.main(config)
    with pytest.raises(ValueError, match="lr was 0.01, is 0.005"):
        train.main(TrainConfig(**{**parts, "steps": 1, "lr": 5e-3}, out=str(tmp_path / "run"), resume=True))


def test_a_loss_that_is_not_finite_stops_the_run(parts, tmp_path):
    """It says where and on what, and leaves the last good checkpoint."""
    own = {**parts, "stages": "2", "lr": 1e38, "steps": 9}
    with pytest.raises(FloatingPointError, match=r"stage 2, step \d+, lr .*images \['"):
        train.main(TrainConfig(**own, out=str(tmp_path / "run"), save_every=1))
    assert all(math.isfinite(row) for row in losses(tmp_path / "run"))
    (*_, last), steps = sorted((tmp_path / "run/state").iterdir()), len(losses(tmp_path / "run"))
    assert last.name == f"2-{steps}" and (last / ".metadata").is_file()


def damage(monkeypatch, module, parts, index):
    """Make one image of the world undecodable where `module` opens it, and return its name."""
    damaged = read_json(world_of(parts) / "instances_train.json")["images"][index]["file_name"]
    opened = module.open_image

    def decode(path):
        if Path(path).name == damaged:
            raise ValueError(f"{path} cannot be read as an image")
        return opened(path)

    monkeypatch.setattr(module, "open_image", decode)
    return damaged


def one_image(parts, file_name, folder):
    """Write instances of a single image of the world."""
    content = read_json(world_of(parts) / "instances_train.json")
    content["images"] = [image for image in content["images"] if image["file_name"] == file_name]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    write_json(folder / "one.json", content)
    return str(folder / "one.json")


def test_damage_that_shows_only_when_decoded_is_told_or_stepped_over(parts, tmp_path, monkeypatch):
    """An image with a whole head and end: the run stops by name, its checkpoint whole; with --skip-bad another takes its place."""
    damaged = damage(monkeypatch, data, parts, 0)
    own = {**parts, "stages": "2", "steps": 14, "save_every": 1}  # more than two epochs: the image comes up again
    with pytest.raises(ValueError, match=f"{damaged} cannot be read.*--skip-bad"):
        train.main(TrainConfig(**own, out=str(tmp_path / "stopped")))
    with pytest.raises(ValueError, match="cannot be read"):  # nothing is there to take its place
        train.main(TrainConfig(**{**own, "data": one_image(parts, damaged, tmp_path)}, skip_bad=True, out=str(tmp_path / "one")))
    train.main(TrainConfig(**own, skip_bad=True, out=str(tmp_path / "over")))
    rows = [json.loads(line) for line in (tmp_path / "over/log.jsonl").read_text().splitlines()]
    assert rows[-1]["unreadable"] == 1 and rows[-1]["faces_blurred"] is False and len(rows) == 14


def test_features_on_disk_stand_in_for_images(parts, tmp_path):
    """Nearly the losses of reading images (half precision); of another tower or geometry, or short of an image: refused."""
    source = f"{world_of(parts)}/instances_train.json@{parts['images']}"
    features(source, tmp_path / "features", parts["vision"])
    train.main(TrainConfig(**parts, out=str(tmp_path / "images")))
    train.main(TrainConfig(**parts, features=str(tmp_path / "features"), out=str(tmp_path / "read")))
    assert losses(tmp_path / "read") == pytest.approx(losses(tmp_path / "images"), rel=5e-3)
    with pytest.raises(ValueError, match="geometry squash, this run has pad"):
        train.main(TrainConfig(**parts, geometry="pad", features=str(tmp_path / "features"), out=str(tmp_path / "x")))
    about = read_json(tmp_path / "features/features.json")
    write_json(tmp_path / "features/features.json", {**about, "tower": "0"})
    with pytest.raises(ValueError, match="has tower 0"):
        train.main(TrainConfig(**parts, features=str(tmp_path / "features"), out=str(tmp_path / "x")))
    write_json(tmp_path / "features/features.json", {**about, "images": about["images"][:-1]})
    with pytest.raises(ValueError, match="lacks .*tools.features"):
        train.main(TrainConfig(**parts, features=str(tmp_path / "features"), out=str(tmp_path / "x")))


def test_features_begun_are_gone_on_with(parts, tmp_path, monkeypatch):
    """Stopped in the middle: what is done is not made again, and the files end the same."""
    source = f"{world_of(parts)}/instances_train.json@{parts['images']}"
    features(source, tmp_path / "whole", parts["vision"], batch=4)
    opened, open_image = [], formats.features.open_image
    ninth = sorted(image["file_name"] for image in read_json(source.partition("@")[0])["images"])[8]  # of the third batch

    def stopping(image):
        opened.append(name := Path(image).name)
        if name == ninth and opened.count(ninth) == 1:
            raise KeyboardInterrupt
        return open_image(image)

    monkeypatch.setattr(formats.features, "open_image", stopping)
    with pytest.raises(KeyboardInterrupt):
        features(source, tmp_path / "stopped", parts["vision"], batch=4)
    with pytest.raises(FileNotFoundError, match="features.json"):
        train.main(TrainConfig(**parts, features=str(tmp_path / "stopped"), out=str(tmp_path / "x")))
    done, before = (tmp_path / "stopped/features.parts/part-0.jsonl").read_text().count("\n"), len(opened)
    features(source, tmp_path / "stopped", parts["vision"], batch=4)
    assert len(opened) - before == 24 - 4 * done and done == 2
    for name in ("features.npy", "features.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_features_of_what_cannot_be_read_are_left_out_by_name(parts, tmp_path, monkeypatch, capsys):
    source = f"{world_of(parts)}/instances_train.json@{parts['images']}"
    damaged = damage(monkeypatch, formats.features, parts, 3)
    with pytest.raises(ValueError, match=f"{damaged} cannot be read.*--skip-bad"):
        features(source, tmp_path / "features", parts["vision"], batch=2)
    whole = read_json(source.partition("@")[0])
    whole["images"][0]["width"] += 1
    (tmp_path / "other.json").write_text(json.dumps(whole))
    other = f"{tmp_path}/other.json@{parts['images']}"
    with pytest.raises(ValueError, match="1 of .* images cannot be used: .* but the annotations say.*--skip-bad"):
        features(other, tmp_path / "sizes", parts["vision"], batch=2)
    with monkeypatch.context() as full, pytest.raises(ValueError, match="features.npy needs 0.0 GiB, and 0.0 are free"):
        full.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=999))
        features(other, tmp_path / "sizes", parts["vision"], batch=2, skip_bad=True)
    assert not (tmp_path / "sizes").exists()
    features(other, tmp_path / "sizes", parts["vision"], batch=2, skip_bad=True)
    named = {damaged, whole["images"][0]["file_name"]}
    assert {Path(name).name for name in read_json(tmp_path / "sizes/features.json")["skipped"]} == named
    features(source, tmp_path / "features", parts["vision"], batch=2, skip_bad=True)
    assert [Path(name).name for name in read_json(tmp_path / "features/features.json")["skipped"]] == [damaged]
    own = {**parts, "stages": "2", "steps": 7, "features": str(tmp_path / "features")}
    with pytest.raises(ValueError, match="1 images or clips could not be read .*--skip-bad"):
        train.main(TrainConfig(**own, out=str(tmp_path / "run")))
    train.main(TrainConfig(**own, skip_bad=True, out=str(tmp_path / "run")))
    assert "skipped: 1 images or clips" in capsys.readouterr().out and len(losses(tmp_path / "run")) == 7


@pytest.fixture(scope="session")
def clips(parts, tmp_path_factory):
    """Flags for a run on 12 clips of the moving world, from a model of images."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, {"train": 12, "val": 4}, frames=4)
    train.main(TrainConfig(**{**parts, "stages": "2", "steps": 2}, out=str(folder / "images")))
    data = ",".join(f"{folder}/{what}_train.json@{folder}/clips" for what in ("clips", "conversations"))
    own = {"data": data, "init_from": str(folder / "images"), "frames": 4, "steps": 4, "batch": 4, "questions": 3}
    return {**own, "lr": 1e-2}


def test_clips_train_the_adapter_alone_in_stage_three_and_llama_too_in_stage_four(clips, tmp_path):
    """Vid-B and Vid-B+, from a model of images; what comes out reads clips, and stays a model that can be saved and asked."""
    before = load_file(Path(clips["init_from"]) / "model.safetensors")
    for stage, moves in (("3", {"multi_modal_projector"}), ("4", {"multi_modal_projector", "language_model"})):
        run = tmp_path / stage
        train.main(TrainConfig(**clips, stages=stage, evaluate=False, out=str(run)))
        after = load_file(run / "model.safetensors")
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == moves
        assert stage == "3" or losses(run)[-1] < losses(run)[0]  # an adapter before a random LLaMA has little to win
    model = LocVLM.from_pretrained(run)
    (clip,) = sorted((Path(clips["data"].split("@")[1].split(",")[0])).glob("*0001"))[:1]
    [[answer]] = model.generate([clip], [["Is there a circle in the image?"]], max_new_tokens=4)
    assert model.config.frames == 4 and model.config.visual_tokens == 4 + 4 and isinstance(answer, str)
    frames = [Image.open(path) for path in sorted(clip.iterdir())]
    assert model.generate([frames], [["Is there a circle in the image?"]], max_new_tokens=4) == [[answer]]
    evaluate.ask(model, clip, "What is at location (1, 1, 20, 20) in image?", tmp_path / "sheet.png", max_new_tokens=4)
    assert Image.open(tmp_path / "sheet.png").width > 2 * frames[0].width
    world = clip.parent.parent
    asked = ["--coco", str(world / "clips_val.json"), "--images", str(clip.parent), "--max-new-tokens", "4"]
    for a_model in (run, clips["init_from"]):  # the model of images sees the frame in the middle
        evaluate.main([str(a_model), "--task", "hal", *asked])
        assert read_json(Path(a_model) / "eval/hal-clips_val.json")["questions"] > 4


def test_a_run_on_clips_resumes_to_the_same_bits(clips, tmp_path):
    own = {**clips, "stages": "4", "save_every": 2, "evaluate": False}
    train.main(TrainConfig(**own, out=str(tmp_path / "whole")))
    train.main(TrainConfig(**own, out=str(tmp_path / "again")))
    shutil.rmtree(tmp_path / "again/state/4-4")
    train.main(TrainConfig(**own, resume=True, out=str(tmp_path / "again")))
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "again") and all(
        torch.equal(whole[k], again[k]) for k in whole
    )


def test_a_dry_run_on_clips_looks_at_no_clip(clips, tmp_path, capsys):
    train.main(TrainConfig(**clips, stages="4", dry_run=True, out=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "«" in out and "clips are opened when" in out and not list(tmp_path.iterdir())


def test_stage_three_without_a_model_to_go_on_from_is_refused(clips):
    with pytest.raises(ValueError, match="--init-from"):
        TrainConfig(stages="3")


def test_text_alone_trains_beside_images(parts, tmp_path):
    """Rows without an image, in batches with and without images; the adapter gets no gradient from those and keeps its weights."""
    rows = [
        {"id": "t", "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "There is."}]}
    ]
    write_json(tmp_path / "text.json", rows)
    one = {**parts, "stages": "2", "steps": 3}
    train.main(TrainConfig(**{**one, "data": f"{tmp_path}/text.json@none*8,{one['data']}"}, out=str(tmp_path / "both")))
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "both"))
    train.main(TrainConfig(**{**one, "data": f"{tmp_path}/text.json@none"}, out=str(tmp_path / "alone")))
    adapter = load_file(tmp_path / "alone/model.safetensors")["multi_modal_projector.linear_1.weight"]
    torch.manual_seed(0)
    assert losses(tmp_path / "alone")[-1] < losses(tmp_path / "alone")[0] and adapter.isfinite().all()


def test_bad_files_are_refused_or_left_out_and_counted(parts, tmp_path, capsys):
    """A truncated and a missing image, a box outside: refused by name before training, skipped only when asked to."""
    world = world_of(parts)
    shutil.copytree(world, tmp_path / "world")
    instances = read_json(tmp_path / "world/instances_train.json")
    first, second = (tmp_path / "world/images" / image["file_name"] for image in instances["images"][:2])
    first.write_bytes(first.read_bytes()[:200])
    second.unlink()
    instances["annotations"][-1]["bbox"] = [500, 0, 10, 10]
    instances["images"][2]["file_name"] = "../images/" + instances["images"][2]["file_name"]
    write_json(tmp_path / "world/instances_train.json", instances)
    talks = read_json(tmp_path / "world/conversations_train.json")
    talks[-1]["conversations"][0]["value"] += " so" * 3000
    write_json(tmp_path / "world/conversations_train.json", talks)
    own = {**parts, "stages": "2", "steps": 2}
    own |= {key: parts[key].replace(str(world), str(tmp_path / "world")) for key in ("data", "images")}
    with pytest.raises(ValueError, match="2 images and 2 annotations cannot be used.*--skip-bad"):
        train.main(TrainConfig(**own, out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()
    train.main(TrainConfig(**own, skip_bad=True, evaluate=False, out=str(tmp_path / "run")))
    out = capsys.readouterr().out
    assert "22 images" in out and "skipped: 1 boxes" in out and "skipped: 2 images that cannot be read" in out
    assert "skipped: 1 conversations of stage 2: too long for a row" in out


def test_its_last_lines_say_what_to_try_next(parts, tmp_path, capsys, monkeypatch):
    """The command that is printed is accepted, and asks about an object of the image it names. Stage 1 teaches no questions."""
    asked = []
    monkeypatch.setattr(evaluate, "main", lambda argv: asked.append(argv) or write_json(tmp_path / "a run/eval/report.html", {}))
    write_json(world_of(parts) / "instances_val.json", {})
    config = {**parts, "stages": "2", "steps": 1, "out": str(tmp_path / "a run")}
    train.main(TrainConfig(**config))
    (world_of(parts) / "instances_val.json").unlink()
    assert asked[0][1] == "--coco" and asked[0][-2:] == ["--limit", "200"], "all tasks, as no --task is chosen"
    *before, look, ask, last = capsys.readouterr().out.splitlines()
    before = [line.split()[0] for line in before]
    assert before[0] == "reading" and "loading" in before, "what happens before the bar moves"
    assert look.endswith("a run/eval/report.html") and "docs/data.md" in last
    args = evaluate.parse(shlex.split(ask.partition(" evaluate.py ")[2]))
    name = Path(args.image).name
    instances = read_json(world_of(parts) / "instances_train.json")
    number = next(image["id"] for image in instances["images"] if image["file_name"] == name)
    present = {a["category_id"] for a in instances["annotations"] if a["image_id"] == number}
    assert args.run == config["out"] and any(c["name"] in args.ask for c in instances["categories"] if c["id"] in present)
    train.main(TrainConfig(**{**config, "stages": "1", "out": str(tmp_path / "one")}, evaluate=False))
    assert "evaluate.py" not in (out := capsys.readouterr().out) and "report.html" not in out and out.endswith("of your own\n")


def test_a_dry_run_writes_nothing(parts, tmp_path, capsys):
    train.main(TrainConfig(**parts, out=str(tmp_path / "run"), dry_run=True))
    out = capsys.readouterr().out
    assert "frozen" in out and re.search(r"adapter +([\d,]+) parameters, \1 trained\n", out) and "«" in out and "patches (4, 4, 32)" in out and not (tmp_path / "run").exists()


def test_a_dry_run_shows_an_image_although_most_rows_are_text(parts, tmp_path, capsys):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write_json(tmp_path / "text.json", [{"id": i, "conversations": turns} for i in range(400)])
    files = f"{tmp_path}/text.json,{world_of(parts)}/instances_train.json"
    train.main(TrainConfig(**parts | {"data": files}, stages="2", out=str(tmp_path / "run"), dry_run=True))
    assert re.search(r"/images/\d+\.png \(\d+, \d+\) px", capsys.readouterr().out)


@pytest.mark.parametrize("options, file", [({}, "text"), ({"kind": "nfp"}, "text_nfp"), ({"location": "point"}, "text_point")])
def test_texts_of_the_shapes_world_write_places_as_the_run_does(tmp_path, monkeypatch, options, file):
    monkeypatch.chdir(tmp_path)
    write_world("data/shapes", {"train": 8, "val": 1})
    config = TrainConfig(**options)
    sources = train.world_sources(config, Processes.start(config))
    assert [Path(path).name for path, *_ in sources][2] == f"{file}_train.json"
    place = {"text": r"\(\d+, \d+, \d+, \d+\)", "text_nfp": r"\(0\.\d+, ", "text_point": r"\(\d+, \d+\)"}[file]
    assert re.search(place, read_json(sources[2][0])[0]["conversations"][0]["value"])


def test_layers_of_ones_own_are_merged_before_a_run_is_saved(parts, tmp_path, monkeypatch):
    """Or the run is refused, with its checkpoint kept: nobody could read it back."""
    build = train.build_model

    def with_lora(*args):
        model = build(*args)
        model.language_model.layers[0].self_attn.q_proj.lora_a = torch.nn.Parameter(torch.zeros(2, 2))
        return model

    monkeypatch.setattr(train, "build_model", with_lora)
    with pytest.raises(ValueError, match="1 tensors that are in no LocVLM .*q_proj.lora_a.* merge them"):
        train.main(TrainConfig(**parts, stages="2", out=str(tmp_path), evaluate=False))
    assert (tmp_path / "state/2-5").is_dir() and not (tmp_path / "config.json").exists()


def test_objectives_may_be_written_with_blanks():
    assert TrainConfig(objectives="loc, rev").objective_list == ("loc", "rev")


def test_a_dry_run_without_data_paints_a_few_shapes_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(TrainConfig(dry_run=True))
    out = capsys.readouterr().out
    assert "16 images" in out and "not blurred" not in out and not list(tmp_path.iterdir())


def test_a_dry_run_does_not_complete_a_world_of_an_older_version(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(Path("data/shapes/instances_val.json"), {})
    train.main(TrainConfig(dry_run=True))
    assert "16 images" in capsys.readouterr().out and [p.name for p in tmp_path.rglob("*.*")] == ["instances_val.json"]


def test_tensorboard_reads_what_the_log_holds(parts, tmp_path, monkeypatch):
    """In both stages; a resumed run's steps are there once."""
    path = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(path, reason="pip install tensorboard")
    options = {**parts, "out": str(tmp_path / "run"), "steps": 3, "save_every": 2, "tensorboard": True}
    train.main(TrainConfig(**options))
    shutil.rmtree(tmp_path / "run/state/2-3")
    train.main(TrainConfig(**options, resume=True))
    for stage in (1, 2):
        events = accumulator.EventAccumulator(str(tmp_path / f"run/tensorboard/stage-{stage}")).Reload()
        rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == stage]
        for name in ("loss", "lr", "grad_norm", "tflops"):
            assert [(e.step, e.value) for e in events.Scalars(name)] == [(row["step"], pytest.approx(row[name])) for row in rows]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train.main(TrainConfig(**options | {"out": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()


def test_a_small_model_overfits_a_few_examples(parts, tmp_path):
    """Loss starts near log V and goes to almost nothing on four images asked the same way."""
    write_world(tmp_path / "world", {"train": 4})
    own = {**parts, "data": f"{tmp_path}/world/instances_train.json", "images": f"{tmp_path}/world/images"}
    own |= {"stages": "2", "steps": 150, "lr": 5e-3, "objectives": "rev"}
    train.main(TrainConfig(**own, out=str(tmp_path / "run")))
    found = losses(tmp_path / "run")
    assert abs(found[0] - math.log(TEXT.vocab_size)) < 1 and found[-1] < 0.1
