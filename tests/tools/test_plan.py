"""What a step will need, against what it took."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_vit import CLIPVisionConfig
from data import IGNORE, IMAGE_ID, collate, pack
from formats import meter, processes
from formats.meter import step_flops
from llama import LlamaConfig
from model import VARIANTS, LocVLM, LocVLMConfig
from tiny.shapes import write_world
from tools import plan
from tools.plan import plan_step, remedies
from train import PRESETS, unfreeze

SHAPES = {  # hidden_size, layers, vocabulary, adapter, stage, rows, questions, recompute
    "wide": (512, 3, 4000, "linear", 2, 2, 3, False),
    "many words": (256, 2, 32000, "mlp2x_gelu", 2, 3, 3, False),
    "recomputed": (256, 8, 4000, "linear", 2, 4, 3, True),
    "adapter": (384, 4, 4000, "mlp2x_gelu", 1, 3, 3, False),
}

STEP = """
import sys
sys.path[:0] = sys.argv[1:4]
import torch
from test_plan import SHAPES, batch_of, config_of
from tools.bench import memory
from model import LocVLM
from train import make_optimizer, unfreeze

def steps(name, count):
    stage, recompute = SHAPES[name][4], SHAPES[name][7]
    model, batch = LocVLM(config_of(name)), batch_of(name)
    for layer in model.language_model.layers:
        layer.recompute = recompute
    optimizer, _ = make_optimizer(unfreeze(model, stage))
    for _ in range(count):
        model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()

torch.set_num_threads(1)
steps(sys.argv[4], 1)  # libraries, threads and their buffers
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # begin the peak anew
steps(sys.argv[4], 2)  # the moments are there from the second on
print((memory("VmHWM") - before) * 2**30)
"""


def config_of(name):
    width, layers, words, adapter = SHAPES[name][:4]
    text = LlamaConfig(words, width, width * 8 // 3, layers, width // 64, max_position_embeddings=1024)
    return LocVLMConfig(CLIPVisionConfig(128, 512, 3, 2, image_size=224), text, adapter)


def made_batch(rows, questions, length=30, answer=12, before=0):
    """Rows of some tokens, an image of 256, and some questions of `length` tokens each, with `answer` of them to answer."""
    segment = [5] * length, [IGNORE] * (length - answer) + [5] * answer
    row = pack([5] * before + [IMAGE_ID] * 256, [segment] * questions, 1024)
    return collate([row] * rows) | {"pixel_values": torch.randn(rows, 3, 224, 224)}


def batch_of(name):
    """Rows of one image and some questions, each of 30 tokens with 12 to answer."""
    return made_batch(*SHAPES[name][5:7])


def size_of(name):
    rows, questions = SHAPES[name][5:7]
    return rows, rows, 256 + 30 * questions, rows * 12 * questions  # an image each


@pytest.fixture(scope="module")
def steps():
    """Processes that take the steps of SHAPES, side by side."""
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", STEP, str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/tools")]
    running = {name: subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True) for name in SHAPES}
    yield running
    for process in running.values():
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_what_a_step_takes(name, steps):
    """Within 15 % of the peak of a process in which each tensor is a mapping of its own, so that freed memory is returned."""
    measured = float(steps[name].communicate()[0])
    planned = plan_step(config_of(name), SHAPES[name][4], batch_of(name), recompute=SHAPES[name][7])
    assert planned.total == pytest.approx(measured, rel=0.15), f"{planned}; measured {measured / 2**30:.3f}"


class ShardsAlive(plan.BytesAlive):
    """Leaves an operation on a DTensor to the DTensor, whose operations on its shard are counted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return NotImplemented if DTensor in types else super().__torch_dispatch__(function, types, args, kwargs)


def sharded_peak(config, stage, batch, world, recompute, monkeypatch):
    """Count the bytes alive at the peak of a first step under the real FSDP2 (bf16), without the optimizer's moments.

    It runs in the first of `world` processes, on fake tensors and torch's fake process group.
    """
    private = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="torch moved its private fake group")
    resize, alive = torch.UntypedStorage.resize_, ShardsAlive([])

    def resized(storage, size):  # so FSDP frees what it gathered
        before, _ = storage.nbytes(), resize(storage, size)
        alive.change((storage.nbytes() - before) * (storage in alive.storages))

    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    dist.init_process_group("fake", rank=0, world_size=world, store=private.FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (world,))  # looks at contents, which fake tensors lack
        monkeypatch.setattr(dist, "init_device_mesh", lambda *_: mesh)
        monkeypatch.setattr("torch.distributed.checkpoint.state_dict.set_model_state_dict", lambda *_, **__: None)
        env = processes.Processes(0, world, torch.device("cpu"), torch.bfloat16, True)
        with FakeTensorMode(allow_non_fake_inputs=True), alive:
            model = LocVLM(config)
            model.to = model.to_empty = lambda *_, **__: model  # fake tensors are on no other device
            processes.shard(model, env)
            unfreeze(model, stage)
            env.begin_stage(model)
            for layer in model.language_model.layers:
                layer.recompute = recompute
            inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items() if tensor is not None}
            alive.peak = alive.now
            model(**inputs).backward()
            return alive.peak
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("stage", "recompute", "gib", "most"), [(1, False, 17.49, 1.005), (2, False, 42.69, 1.05), (2, True, 16.65, 1.05)]
)
def test_the_plan_of_fsdp_covers_what_it_takes(stage, recompute, gib, most, monkeypatch):
    """LocVLM-B on eight GPUs, and at most a twentieth more."""
    config, rows = VARIANTS["b"], 16 if stage == 1 else 8
    batch = plan.batch_of(config, plan.made_row(config, stage, PRESETS["paper"][stage].questions), rows)
    planned = plan_step(config, stage, batch, "fsdp", 8, True, recompute)
    taken = sharded_peak(config, stage, batch, 8, recompute, monkeypatch) + planned.optimizer
    assert taken / 2**30 == pytest.approx(gib, rel=5e-3) and 1 <= planned.total / taken < most


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_that_torch_counts(name):
    model, stage = LocVLM(config_of(name)), SHAPES[name][4]
    model.language_model.requires_grad_(stage == 2)
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch_of(name)).backward()
    assert step_flops(config_of(name), stage, *size_of(name)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_row_of_text_alone_counts_no_image():
    """Of two rows, both, one or none has an image."""
    config, row = VARIANTS["tiny"], ([1] * 60, [1] * 60)
    rows = [pack([1] + [IMAGE_ID] * config.visual_tokens, [row], 256), pack([1], [row], 256)]
    counted = []
    for images in (2, 1, 0):
        batch = collate(rows) | {"pixel_values": torch.empty(images, 3, 112, 112)}
        counter = meter.Meter(config, 2, "cpu", True)
        counter.count(batch)
        counted.append(counter.flops)
    assert counted[0] - counted[1] == counted[1] - counted[2] > 0


def test_a_7b_model_needs_fsdp_on_80_gb():
    """Sixteen bytes a parameter do not fit into one GPU; split over eight they do, and recomputing takes less again."""
    config, batch = VARIANTS["b"], made_batch(8, 4, length=77, answer=30, before=36)
    assert batch["input_ids"].shape == (8, 600) and batch["targets"].shape == (3, 8 * 120)
    whole = plan_step(config, 2, batch, "ddp", 8, bf16=True, recompute=True)
    split = plan_step(config, 2, batch, "fsdp", 8, bf16=True)
    assert not whole.fits(80 * 2**30) and split.fits(80 * 2**30)
    assert whole.weights // 8 == split.weights and whole.optimizer > 50 * 2**30
    config = replace(config, text_config=replace(config.text_config, num_hidden_layers=8))
    split, again = (plan_step(config, 2, batch, "fsdp", 8, True, recompute) for recompute in (False, True))
    assert again.activations < split.activations / 3


def test_the_mildest_remedy_is_named_first():
    assert remedies(lambda m, engine, again: again, 8, "ddp", False, 8) == "--recompute"
    assert remedies(lambda m, engine, again: m <= 2, 8, "ddp", False, 1) == "--micro-batch 2"
    assert (
        remedies(lambda m, engine, again: engine == "fsdp" and again, 8, "ddp", False, 8)
        == "--parallel fsdp --recompute"
    )
    assert remedies(lambda m, engine, again: False, 8, "ddp", False, 8) is None
    assert remedies(lambda m, engine, again: engine == "fsdp", 8, "ddp", False, 8, can_shard=False) is None


def test_a_plan_refuses_what_training_refuses():
    tied = replace(config_of("wide"), text_config=replace(config_of("wide").text_config, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="whose head is its embedding; use --parallel ddp"):
        plan_step(tied, 2, batch_of("wide"), "fsdp", 8)
    with pytest.raises(ValueError, match="batch 32 does not divide by 6 processes; use --batch 30"):
        plan.main(["--variant", "tiny", "--stages", "2", "--batch", "32", "--world-size", "6"])
    with pytest.raises(ValueError, match="--variant l and tiny/clip are two shapes of a model; leave out one"):
        plan.main(["--variant", "l", "--vision", "tiny/clip"])


def test_a_plan_refuses_what_does_not_fit_and_names_the_flag(tmp_path, monkeypatch, capsys):
    def planned(*how):
        recompute = how[-1]
        return plan.Plan(60 * 2**30, 0, 0, 4 * 2**30 if recompute else 40 * 2**30, 0)

    monkeypatch.setattr(plan, "plan_step", planned)
    how = ["--variant", "b", "--stages", "2", "--preset", "paper", "--world-size", "8", "--device-memory", "80GB"]
    with pytest.raises(ValueError, match="stage 2 needs 100 GiB per process.*80GB; add --recompute"):
        plan.main([*how, "--out", str(tmp_path / "run")])
    assert "8 processes, bf16" in capsys.readouterr().out and not (tmp_path / "run").exists()
    plan.main([*how, "--recompute", "--out", str(tmp_path / "run")])


def test_the_parts_of_a_variant_are_counted(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "plan_step", lambda *how: plan.Plan(0, 0, 0, 0, 0))
    plan.main(["--variant", "l", "--out", str(tmp_path / "run")])
    assert "20,979,712" in capsys.readouterr().out, "the parameters of LocVLM-L's adapter"
    assert not (tmp_path / "run").exists()


def test_what_a_run_takes_beside_a_step_is_printed(monkeypatch, capsys):
    """LocVLM-B, stage 2: 12 bytes for each of 6.74 billion parameters that learn; 4 for each of 7.05 billion in one process."""
    monkeypatch.setattr(plan, "plan_step", lambda *how: plan.Plan(0, 0, 0, 0, 0))
    plan.main(["--variant", "b", "--stages", "2", "--parallel", "fsdp", "--world-size", "8", "--batch", "8"])
    assert "a checkpoint: 75.4 GiB on disk. The host: 9.4 GiB for each process and 26.2 for the first" in capsys.readouterr().out


@pytest.mark.parametrize("card, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12)])
def test_cards_of_one_name_have_their_own_peaks(card, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert meter.Meter(VARIANTS["tiny"], 2, "cuda", True).peak == peak


def test_a_plan_of_clips_reads_features_and_one_of_images_runs_the_tower(monkeypatch):
    shapes = []

    def planned(config, stage, batch, *how):
        shapes.append((stage, *batch["pixel_values"].shape, batch["input_ids"].shape[1]))
        return plan.Plan(0, 0, 0, 0, 0)

    monkeypatch.setattr(plan, "plan_step", planned)
    plan.main(["--variant", "tiny", "--stages", "4", "--micro-batch", "2"])
    plan.main(["--variant", "tiny", "--stages", "2", "--micro-batch", "2"])
    length = VARIANTS["tiny"].text_config.max_position_embeddings  # less than the recipe's max_length
    assert shapes == [(4, 2, 8 + 64, 128, length), (2, 2, 3, 112, 112, length)]


def test_a_plan_with_data_takes_the_longest_of_its_rows(tmp_path, capsys):
    write_world(tmp_path, {"train": 12})
    data = ["--data", f"{tmp_path}/captions_train.json", "--images", f"{tmp_path}/images", "--stages", "1"]
    plan.main([*data, "--micro-batch", "2", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "(the longest of 64 rows), 1 processes, fp32" in out and not (tmp_path / "run").exists()
    plan.main([*data, "--micro-batch", "2", "--variant", "b", "--preset", "paper", "--recompute"])
    assert "no tokenizer without --llm" in capsys.readouterr().out


def test_a_plan_of_stage_2_is_for_full_rows_of_answers(capsys):
    """No batch of the run, however late, can need more: not even one of long conversations."""
    plan.main(["--variant", "tiny", "--stages", "2", "--micro-batch", "2"])
    assert "2 rows of at most 1024 tokens" in capsys.readouterr().out
    plan.main(["--variant", "tiny", "--stages", "2", "--batch", "32", "--micro-batch", "8", "--world-size", "8"])
    assert "  4 rows of at most 1024 tokens" in capsys.readouterr().out, "a step has no more for each process"
    row = plan.made_row(VARIANTS["tiny"], 2, questions=6, length=1024)
    assert len(row["input_ids"]) == 1024 and max(row["segment_of"]) == 6
    assert sum(label != IGNORE for label in row["labels"]) == 1024 - plan.SYSTEM_TOKENS - 64
    with pytest.raises(ValueError, match="no room for a question's answer in 80 tokens"):
        plan.made_row(VARIANTS["tiny"], 2, questions=6, length=80)


def test_options_that_cannot_be_meant_are_refused_first(capsys):
    assert plan.bytes_of("80g") == 80 * 2**30
    with pytest.raises(ValueError, match="--device-memory much"):
        plan.main(["--device-memory", "much"])
    with pytest.raises(SystemExit):
        plan.main(["--world-size", "0"])
    assert "--world-size: 0 must be at least 1" in capsys.readouterr().err


def test_the_table_of_the_readme_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(plan, "VARIANTS", {"b": config_of("wide"), "l": config_of("adapter")})
    plan.main([])
    out = capsys.readouterr().out
    assert out.count("| B | ") == out.count("| L | ") == 5 and "A100-hours" in out
