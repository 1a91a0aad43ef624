"""The first hour on a GPU: what no CPU can show, see docs/gpu.md. Skipped without CUDA.

LOCVLM_GPU_TESTS_ON_CPU=1 runs every case on a CPU, with small shapes and without the bounds that only a GPU can meet, so that
nothing but the figures is left to find out. Models are LocVLM-B and -L of a few layers with random weights.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

import evaluate
import train
from formats import meter
from formats.files import read_json, write_json
from formats.processes import Processes
from formats.run_folder import RunFolder
from llama import Tokenizer
from model import VARIANTS, LocVLM, packed_mask
from tiny.shapes import write_world
from tools.plan import batch_of, made_row, plan_step

ON_CPU = os.environ.get("LOCVLM_GPU_TESTS_ON_CPU") == "1"
DEVICE = "cpu" if ON_CPU else "cuda"
LEAST_MFU = {"A100": (0.45, 0.55), "H100": (0.38, 0.5)}  # SXM cards: eager, compiled


def gpu(shows, count=1):
    """Skip a case where there are fewer GPUs, and say what is left unknown."""
    missing = not ON_CPU and torch.cuda.device_count() < count
    return pytest.mark.skipif(missing, reason=f"needs {count} of CUDA's GPUs: {shows}")


def config_of(name, layers=2):
    """Return a variant with few layers; on the CPU, narrow as well."""
    vision, text = {"num_hidden_layers": layers + 1}, {"num_hidden_layers": layers}  # the tower's last layer never runs
    if ON_CPU:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        vision, text = vision | narrow, text | narrow | {"vocab_size": 800, "num_key_value_heads": None, "head_dim": None}
    whole = VARIANTS[name]
    return replace(whole, vision_config=replace(whole.vision_config, **vision), text_config=replace(whole.text_config, **text))


def model_of(name, layers=2, device=DEVICE):
    """Make a variant with random weights, the same on every device."""
    torch.manual_seed(0)
    with torch.device("meta" if device == "meta" else "cpu"):
        model = LocVLM(config_of(name, layers))
    model.tokenizer = Tokenizer(ROOT / "tiny/llama")
    return model.to(device)


# ----- training in processes of its own


def work(name, layers, options):
    """Do what train.py does, with random weights and without files of weights; measure memory. Runs under torchrun."""
    peaks, batches, count = [], [], meter.Meter.count

    def counted(self, batch):
        batches.append(batch)
        count(self, batch)

    def measured(run, stage, step, model, optimizer):
        peaks.append(0 if ON_CPU else torch.cuda.max_memory_allocated())
        None if ON_CPU else torch.cuda.reset_peak_memory_stats()

    meter.Meter.count, RunFolder.save, LocVLM.save_pretrained = counted, measured, lambda *_, **__: None
    meter.PEAK_FLOPS |= {"": 1e12} if ON_CPU else {}
    train.build_model = lambda config, device="cpu": model_of(name, layers, device)
    is_compiled, find = options.pop("compile", False), train.unfreeze
    for stage, recipe in train.PRESETS["paper"].items():
        train.PRESETS["paper"][stage] = replace(recipe, compile=is_compiled)
    if is_compiled and ON_CPU:  # where train.py never compiles
        train.unfreeze = lambda model, stage: model.language_model.compile_layers("aot_eager") or find(model, stage)
    config = train.TrainConfig(**options, evaluate=False, save_every=1)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    is_bf16 = Processes.start(config).dtype == torch.bfloat16
    train.main(config)
    if rank == 0:
        largest = max(batches, key=lambda batch: (batch["input_ids"].numel(), batch["targets"].shape[1]))
        stage = config.stage_list[-1]
        planned = plan_step(config_of(name, layers), stage, largest, config.parallel, world, is_bf16, config.recompute)
        write_json(f"{config.out}/memory.json", {"peak": max(peaks[1:]), "plan": planned.total, "parts": str(planned)})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Options for a run on 24 pictures of shapes."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, {"train": 24})
    files = (f"{folder}/{what}_train.json" for what in ("instances", "captions", "conversations"))
    return {"data": ",".join(files), "images": f"{folder}/images", "preset": "paper"}


def torchrun(program, *arguments, processes=1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1" if ON_CPU else "4"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*launcher, str(ROOT / program), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def trained(name, options, out, layers=2, processes=1):
    """Train a variant, and return its log: a dict for each step."""
    torchrun("tests/test_gpu.py", json.dumps([name, layers, {**options, "out": str(out)}]), processes=processes)
    return rows_of(out)


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(rows):
    return [row["loss"] for row in rows]


# ----- what is learned


@gpu("whether the default run in bf16 learns what it learns on a CPU")
def test_the_default_run_reaches_the_figures_of_the_readme(tmp_path, monkeypatch):
    """Within two points of each. On the CPU: two steps, sixteen pictures, no bound."""
    monkeypatch.chdir(tmp_path)
    if ON_CPU:
        write_world("data/shapes", {"train": 32, "val": 16})
        whole = evaluate.main
        monkeypatch.setattr(evaluate, "main", lambda argv: whole([*argv, "--max-new-tokens", "4"]))
    train.main(train.TrainConfig(steps=2 * ON_CPU))
    printed = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[3]
    for part in re.split(r"^(?=\w+: )", printed, flags=re.MULTILINE)[1:]:
        found = read_json(f"runs/default/eval/{part.split(':')[0]}.json")["metrics"]
        for metric, percent in re.findall(r"^  (\S.*?)  +([\d.]+) %", part, re.MULTILINE):
            print(f"{part.split(':')[0]} {metric}: {100 * found[metric]:.1f} %, on a CPU {percent}")
            assert ON_CPU or 100 * found[metric] >= float(percent) - 2, metric


@pytest.fixture(scope="module")
def exact(world, tmp_path_factory):
    """Return the losses of each variant in fp32, in one process."""
    steps = {**world, "batch": 4, "questions": 4, "steps": 6, "precision": "fp32"}
    return {name: losses(trained(name, steps, tmp_path_factory.mktemp("exact") / name)) for name in "bl"}


@pytest.mark.parametrize("name", "bl")
@pytest.mark.parametrize(
    ("parallel", "processes"),
    [
        pytest.param("ddp", 1, marks=gpu("losses of ddp in bf16")),
        pytest.param("fsdp", 1, marks=gpu("losses of fsdp in bf16 on one GPU")),
        pytest.param("ddp", 2, marks=gpu("losses of ddp in bf16 on two GPUs", 2)),
        pytest.param("fsdp", 2, marks=gpu("losses of fsdp in bf16 on two GPUs", 2)),
    ],
)
def test_bf16_and_both_engines_have_the_losses_of_fp32(name, parallel, processes, world, exact, tmp_path):
    """In both stages of one run."""
    steps = {**world, "batch": 4, "questions": 4, "steps": 6, "precision": "bf16", "parallel": parallel}
    assert losses(trained(name, steps, tmp_path / "run", processes=processes)) == pytest.approx(exact[name], rel=5e-3)


@pytest.mark.parametrize("processes", [pytest.param(n, marks=gpu("losses of compiled layers under fsdp", n)) for n in (1, 2)])
def test_compiled_layers_under_fsdp_have_the_losses_of_fp32(processes, world, exact, tmp_path):
    """As README's commands for a 7B run: FlexAttention on packed rows of many lengths."""
    steps = {**world, "batch": 4, "questions": 4, "steps": 6, "precision": "bf16", "parallel": "fsdp", "compile": True}
    assert losses(trained("b", steps, tmp_path / "run", processes=processes)) == pytest.approx(exact["b"], rel=1e-2)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@gpu("whether the tower and attention take no image at all")
def test_a_batch_of_text_rows_alone_trains(parallel, world, tmp_path):
    turns = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "There is."}]
    write_json(tmp_path / "text.json", [{"id": str(i), "conversations": turns} for i in range(4)])
    text = {**world, "data": f"{tmp_path}/text.json@none", "stages": "2", "batch": 4, "steps": 8, "lr": 1e-3}
    found = losses(trained("b", {**text, "parallel": parallel}, tmp_path / "run"))
    assert found[-1] < found[0]


@gpu("whether a killed run resumes on a GPU")
def test_a_killed_run_resumes(world, tmp_path):
    """The tiny model: kill -9 in stage 2, then --resume; losses within 1e-3 of a run left alone."""
    options = {**world, "preset": "tiny", "batch": 4, "questions": 3, "steps": 12, "save_every": 2}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    flags.append("--no-evaluate")
    torchrun("train.py", *flags, "--out", str(tmp_path / "whole"))
    program = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed/state/2-[0-9]")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
    torchrun("train.py", *flags, "--out", str(tmp_path / "killed"), "--resume")
    whole, killed = (losses(rows_of(tmp_path / run)) for run in ("whole", "killed"))
    assert killed == pytest.approx(whole, rel=1e-3) and len(whole) == 24


@pytest.mark.parametrize("name", "bl")
@gpu("whether greedy answers equal a CPU's")
def test_greedy_ids_in_fp32_equal_those_of_the_cpu(name):
    spelled = SimpleNamespace(encode=lambda text: [3 + ord(c) % 97 for c in text], decode=str, bos_token_id=1, eos_token_id=2)
    side = config_of(name).vision_config.image_size
    images, answers = list(torch.randn(2, 3, side, side)), []
    for device in ("cpu", DEVICE):
        model = model_of(name, device=device)
        model.tokenizer = spelled
        answers.append(model.generate(images, [["Where?", "What is at (1, 2, 3, 4)?"], ["Which side?"]], max_new_tokens=16))
    assert answers[0] == answers[1] and all(answer.count(",") == 15 for of_image in answers[0] for answer in of_image)


# ----- what it takes


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("questions", [1, 4], ids=["causal", "packed"])
@pytest.mark.parametrize("name", "bl")
@gpu("which attention kernels run")
def test_attention_is_fused(name, questions, precision):
    """In the tower, with causal and with packed rows: never the math kernel, even where it is allowed."""
    model, config = model_of(name), config_of(name)
    batch = batch_of(config, made_row(config, 2, questions), 2)
    batch["pixel_values"] = torch.randn(batch["pixel_values"].shape)
    batch = {key: tensor.to(DEVICE) for key, tensor in batch.items() if tensor is not None}
    every = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with profile() as seen, sdpa_kernel(every):
        with torch.autocast(DEVICE, precision) if precision == torch.bfloat16 else nullcontext():
            loss = model(**batch)
        loss.backward()
    counts = {event.key.removeprefix("aten::_scaled_dot_product_"): event.count for event in seen.key_averages()}
    assert not any("attention_math" in kernel for kernel in counts), counts
    fused = {kernel: n for kernel, n in counts.items() if re.match(r"(flash|efficient|cudnn)_attention(?!.*backward)", kernel)}
    print(name, questions, precision, fused)
    assert sum(fused.values()) == 2 * config.text_config.num_hidden_layers, fused  # tower and LLaMA


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", "12")
@pytest.mark.parametrize("name", "bl")
@gpu("how much memory a step takes")
def test_memory_is_what_the_plan_says(name, stage, parallel, world, tmp_path):
    # so many that activations outweigh gradients: they are the hardest part of the plan
    rows = {"batch": 2 if ON_CPU else 48, "steps": 3, "stages": stage, "parallel": parallel}
    trained(name, {**world, **rows}, tmp_path / "run")
    found = read_json(tmp_path / "run/memory.json")
    share = found["peak"] / found["plan"]
    print(f"{name} stage {stage} {parallel}: {share:.3f} of {found['parts']}")
    assert ON_CPU or 0.8 <= share <= 1.02


@gpu("how fast a step is, and whether compiled layers learn the same")
def test_a_step_reaches_its_share_of_the_peak(world, tmp_path):
    """Stage 2 of LocVLM-B in bf16, eager and compiled (with FlexAttention), after twenty steps of warming up."""
    card, found, seconds, mfu = "" if ON_CPU else torch.cuda.get_device_name(), {}, {}, {}
    least = next((shares for name, shares in LEAST_MFU.items() if name in card and not re.search("PCIe|NVL", card)), (0, 0))
    size = {"stages": "2", "batch": 2, "steps": 24} if ON_CPU else {"stages": "2", "batch": 8, "steps": 60}
    for how in (False, True):
        rows = found[how] = trained("b", {**world, **size, "compile": how}, tmp_path / str(how), layers=2 if ON_CPU else 4)
        first, last = rows[19], rows[-1]
        seconds[how] = last["seconds"] - first["seconds"]
        mfu[how] = (last["mfu"] * last["seconds"] - first["mfu"] * first["seconds"]) / seconds[how]
        waited = last["waited"] - first["waited"]
        print(f"{card}, {'compiled' if how else 'eager'}: mfu {mfu[how]:.3f}; waited {waited:.2f} of {seconds[how]:.2f} s for data")
    assert losses(found[True]) == pytest.approx(losses(found[False]), rel=1e-2)
    assert ON_CPU or seconds[True] <= 0.87 * seconds[False]
    assert mfu[False] >= least[0] and mfu[True] >= least[1]


@gpu("whether FlexAttention's kernel does what SDPA's do")
def test_flex_attention_equals_sdpa():
    """Four questions behind an image, heads of 128, bf16: hidden states and the gradient that reaches the embeddings."""
    config, found = config_of("b"), []
    segments = batch_of(config, made_row(config, 2, 4), 2)["segment_of"].to(DEVICE)
    segments = torch.nn.functional.pad(segments, (0, -segments.shape[1] % 128), value=-1)
    llama = model_of("b").language_model
    x = torch.randn(*segments.shape, config.text_config.hidden_size, device=DEVICE)
    for is_compiled in (False, True):
        if is_compiled:
            llama.compile_layers("aot_eager" if ON_CPU else "inductor")
        embedded = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            hidden = llama.hidden(embedded, mask=packed_mask(segments, as_blocks=is_compiled and not ON_CPU))[segments >= 0]
        hidden.float().square().mean().backward()
        found.append((hidden.detach().float(), embedded.grad))
    for sdpa, flex in zip(*found, strict=True):
        assert (flex - sdpa).norm() <= 2e-2 * sdpa.norm()


@gpu("whether a step waits for the GPU")
def test_a_forward_and_backward_pass_asks_the_gpu_for_nothing():
    model, config = model_of("b"), config_of("b")
    batch = batch_of(config, made_row(config, 2, 4), 2)
    batch["pixel_values"] = torch.randn(batch["pixel_values"].shape)
    batch = {key: tensor.to(DEVICE) for key, tensor in batch.items() if tensor is not None}
    for mode in ("default", "error"):  # what is made at the first call may wait
        None if ON_CPU else torch.cuda.set_sync_debug_mode(mode)
        try:
            model(**batch).backward()
        finally:
            None if ON_CPU else torch.cuda.set_sync_debug_mode("default")


@gpu("how fast tools.features is in bf16, and how exact")
def test_features_in_bf16_are_those_of_fp32(tmp_path):
    """CLIP ViT-L/14 with random weights: cosine above 0.999, at least four times as fast."""
    tower = model_of("b", 23).vision_tower
    pixels = torch.randn(*((2,) if ON_CPU else (64,)), 3, *[tower.config.image_size] * 2, device=DEVICE)
    found, seconds = [], []
    with torch.inference_mode():
        for is_bf16 in (False, True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=is_bf16):
                for _ in range(3):
                    began = time.time()
                    found[is_bf16:] = [tower(pixels).half().float().cpu()]
            seconds.append(time.time() - began)
    cosine = torch.nn.functional.cosine_similarity(*found, dim=-1).min()
    print(f"cosine {cosine:.5f}; {seconds[0]:.3f} and {seconds[1]:.3f} s")
    assert cosine > 0.999 and (ON_CPU or seconds[0] >= 4 * seconds[1])


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
