"""Plan a training step before it runs, without weights: memory of each process, operations, hours.

    python -m tools.plan                                      LocVLM-B and -L on eight A100s, App. B's questions
    python -m tools.plan --variant b --stages 2 --preset paper --world-size 8 --device-memory 80GB      one run: does it fit?

The other options are train.py's; the model has the shape of --variant, or of --vision, --llm or --init-from. A run is planned
for the longest rows that can occur; in stage 1, for the longest of 64 rows of --data, or for captions as long as CC3M's. The
model's own code runs on fake tensors (shapes without contents) while a mode counts the bytes alive.
"""

import argparse
import math
import os
import re
import weakref
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import IGNORE, IMAGE_ID, collate, pack
from formats.files import run_command
from formats.meter import PEAK_FLOPS, step_flops
from formats.processes import Processes, has_bf16, require_even, require_untied
from formats.weights import without_contents
from model import ADAPTERS, VARIANTS, LocVLM
from tools import positive
from train import PRESETS, TrainConfig, build_examples, build_model, build_records, parse_config, print_parts, unfreeze

RESERVE, SPARE = 2.75 * 2**30, 0.05  # of a GPU: bytes that CUDA and communication take, share that the allocator loses to gaps
CAPTION, QUESTION, ANSWER = 24, 55, 20  # tokens: CC3M's captions; a question of App. B with its answer, and the answer
SYSTEM_TOKENS, SHARE_OF_PEAK = 36, 0.4  # of A100s, that such training reaches
IMAGES, QUESTIONS, EPOCHS = 95_899, 2 * 402_686, 10  # PRefCOCO, with LocPred and RevLoc of each object


class Plan(NamedTuple):
    """Bytes that each process holds at the peak of a step."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # kept by the forward pass, logits included, and temporary ones of the backward pass
    gathered: int  # what fsdp holds whole at a time

    @property
    def total(self):
        return sum(self)

    def fits(self, device_memory):
        return self.total * (1 + SPARE) + RESERVE <= device_memory

    def __str__(self):
        parts = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in self._asdict().items())
        return f"{self.total / 2**30:.2f} GiB: {parts}"


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive, now and at the peak. Views of parameters are not new."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters = parameters
        self.now = self.peak = self.sharded = self.gradients_at_peak = 0
        self.storages = weakref.WeakSet(p.untyped_storage() for p in parameters)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if torch.is_tensor(tensor)):
            if storage not in self.storages:
                self.storages.add(storage)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return out

    def change(self, size):
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.gradients_at_peak = self.sharded + sum(p.grad.nbytes for p in self.parameters if p.grad is not None)

    def shard(self, p, world):
        """Do what fsdp does with a gradient as soon as it exists: sum it over processes and keep a share, in float32."""
        p.grad = None
        self.sharded += 4 * p.numel() // world
        self.change(4 * p.numel() // world)


def plan_step(config, stage, batch, parallel="ddp", world=1, bf16=False, recompute=False):
    """Plan a step of a LocVLMConfig in one of `world` processes, from the shapes of its batch (see data.collate).
    bf16: layers compute in bfloat16; weights and optimizer are always float32."""
    if is_fsdp := parallel == "fsdp":
        require_untied(config.text_config)
    dtype = torch.bfloat16 if bf16 and is_fsdp else torch.float32  # ddp computes under autocast
    with FakeTensorMode():
        torch.set_default_dtype(dtype)  # a fake model cannot be converted
        model = LocVLM(config)
        torch.set_default_dtype(torch.float32)
        everything, learned = list(model.parameters()), list(unfreeze(model, stage).values())
        for layer in model.language_model.layers:
            layer.recompute = recompute
        alive = BytesAlive(everything)
        for p in learned if is_fsdp else ():
            p.register_post_accumulate_grad_hook(partial(alive.shard, world=world))
        with alive:
            tensors = {name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype)
                       for name, t in batch.items() if t is not None}  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not is_fsdp):
                loss = model(**tensors)
            loss.backward()
    weights, learning = 4 * sum(p.numel() for p in everything), sum(p.numel() for p in learned)
    gradients, activations = alive.gradients_at_peak, alive.peak - alive.gradients_at_peak
    if not is_fsdp:  # gradients lie in ddp's buckets (gradient_as_bucket_view)
        return Plan(weights, 8 * learning, gradients, activations, 0)
    layer = sum(p.nbytes for p in model.language_model.layers[0].parameters())
    wrapped = [*model.vision_tower.encoder["layers"][:-1], *model.language_model.layers]  # see formats.processes.shard
    root = sum(p.nbytes for p in everything) - sum(p.nbytes for part in wrapped for p in part.parameters())
    # whole at a time: the root, a layer and the one fetched ahead; while summing, a layer's gradients, here and in float32
    sums = (root + layer + 4 * layer // dtype.itemsize) if stage in (2, 4) else 0
    return Plan(weights // world, 8 * learning // world, gradients, activations, root + 2 * layer + sums)


def made_row(config, stage, questions, length=None):
    """Make a packed row of captions (stage 1) or of App. B's questions; or one of `length` tokens, which may all be answers."""
    prefix = [1] * (1 if stage == 1 else SYSTEM_TOKENS) + [IMAGE_ID] * config.visual_tokens
    size, answer = (CAPTION, CAPTION) if stage == 1 else (QUESTION, ANSWER)
    segments = [([1] * size, [IGNORE] * (size - answer) + [1] * answer)] * questions
    if length:
        rest = [1] * max(1, length - len(prefix))
        segments = [(rest[i::questions],) * 2 for i in range(min(questions, len(rest)))]
    return pack(prefix, segments, length or config.text_config.max_position_embeddings)


def batch_of(config, row, count, features=False):
    """Repeat a row: the batch of one process. Its images, or features, hold no numbers."""
    vision = config.vision_config
    shape = (config.frames + vision.num_patches, vision.hidden_size) if features else (3, *2 * [vision.image_size])
    return collate([row] * count) | {"pixel_values": torch.empty(count, *shape, device="meta")}


def remedies(fits, micro_batch, parallel, recompute, world, can_shard=True):
    """Return options that make a step fit, the mildest first, or None. fits: (micro_batch, parallel, recompute) -> bool"""
    engines = [parallel] + ["fsdp"] * (parallel == "ddp" and world > 1 and can_shard)
    sizes = [micro_batch >> n for n in range(micro_batch.bit_length())]  # halved, down to 1
    for engine, again, m in product(engines, sorted({recompute, True}), sizes):
        if fits(m, engine, again):
            flags = [f"--micro-batch {m}"] * (m != micro_batch) + ["--parallel fsdp"] * (engine != parallel)
            return " ".join(flags + ["--recompute"] * (again != recompute))


def row_of(config, stage, records, model):
    """Return the row to plan for, and why it is so long. In stage 1, a full row would be far too much."""
    recipe = config.recipe(stage)
    if stage > 1:
        length = min(recipe.max_length, model.config.text_config.max_position_embeddings)
        return made_row(model.config, stage, recipe.questions, length), "full, every token after the image an answer"
    if records and model.tokenizer:
        examples = build_examples(config, stage, records, model)
        rows = [examples.text_row(examples.records[index], seed) for index, seed in map(examples.order, range(64))]
        return max(rows, key=lambda row: len(row["input_ids"])), "the longest of 64 rows"
    reason = "no tokenizer without --llm" if records else "no --data"
    return made_row(model.config, stage, recipe.questions), f"{reason}: captions as long as CC3M's"


def plan_stage(config, stage, model, records, world, room):
    """Print a stage's parts and what each process holds in a step. Raise ValueError if that exceeds `room` bytes, if given."""
    recipe = config.recipe(stage)
    learned = sum(p.numel() for p in unfreeze(model, stage).values())
    print_parts(config, stage, model)
    row, basis = row_of(config, stage, records, model)
    features, bf16 = bool(config.features or model.config.frames), config.precision == "bf16"
    bf16 |= config.precision == "auto" and bool(room or has_bf16())

    def plan_of(micro, parallel, recompute):
        return plan_step(model.config, stage, batch_of(model.config, row, micro, features), parallel, world, bf16, recompute)

    require_even(recipe.batch, world)
    share = recipe.batch // world  # images of a step for each process
    how = (min(config.micro_batch or share, share), config.parallel, config.recompute)
    planned, micro, length, answers = plan_of(*how), how[0], len(row["input_ids"]), sum(i != IGNORE for i in row["labels"])
    flops = step_flops(model.config, stage, micro, micro, length, micro * answers, runs_tower=not features)
    print(f"  {micro} rows of at most {length} tokens ({basis}), {world} processes, {'bf16' if bf16 else 'fp32'}")
    print(f"  each process holds {planned}\n  {flops / 1e12:.2f} TFLOP forward and backward")
    print_beside(model, learned, how[1] == "fsdp", world)
    if room and not planned.fits(room):
        can_shard = not model.config.text_config.tie_word_embeddings
        remedy = remedies(lambda *how: plan_of(*how).fits(room), *how, world, can_shard)
        fix = f"add {remedy}" if remedy else "use " + "more processes with --parallel fsdp, or " * can_shard + "larger GPUs"
        need = f"{planned.total / 2**30:.0f} GiB per process, too much for {room / 2**30:g}GB"
        raise ValueError(f"stage {stage} needs {need}; {fix}")


def print_beside(model, learning, is_fsdp, world):
    """Print what a run takes beside a step: a checkpoint, the host's memory, and the keys and values of evaluation."""
    weights, state, text = 4 * sum(p.numel() for p in model.parameters()), 12 * learning, model.config.text_config
    copied, first = (state / world, weights) if is_fsdp else (state, 0)  # while one is written; loaded, and saved whole
    tokens = SYSTEM_TOKENS + model.config.visual_tokens + QUESTION + 64  # evaluate.py's --max-new-tokens
    cache = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * 128  # its --batch, in bf16
    print(f"  a checkpoint: {state / 2**30:.1f} GiB on disk. The host: {copied / 2**30:.1f} GiB for each process"
          f" and {first / 2**30:.1f} for the first. Evaluation: {cache / 2**30:.1f} GiB of keys and values")  # fmt: skip


def bytes_of(text):
    """Read the memory of a GPU: 80GB, 80g or 80."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)(GI?B?)?", text.upper()):
        return float(match[1]) * 2**30
    raise ValueError(f"--device-memory {text} is not a number of gigabytes; write 80GB")


def print_table(world):
    """Print the memory of the paper's models, and hours of their stage 2."""
    print("| | stage | run as | GiB a GPU | " + " | ".join(Plan._fields) + " |\n" + "|---" * 9 + "|")
    runs = [(1, "ddp", False), (1, "fsdp", True), (2, "ddp", True), (2, "fsdp", False), (2, "fsdp", True)]
    for name, (stage, engine, recompute) in product("bl", runs):
        config, recipe = VARIANTS[name], PRESETS["paper"][stage]
        micro = math.ceil(recipe.batch / world)  # images of a step for each process
        batch = batch_of(config, made_row(config, stage, recipe.questions), micro)
        plan = plan_step(config, stage, batch, engine, world, bf16=True, recompute=recompute)
        how = f"`--parallel {engine}{' --recompute' * recompute} --micro-batch {micro}`"
        print("|", name.upper(), "|", stage, "|", how, "|", *(f"{size / 2**30:.1f} |" for size in (plan.total, *plan)))
    print()
    for name, (what, rows) in product("bl", (("question", QUESTIONS), ("image", IMAGES))):
        config, questions = VARIANTS[name], QUESTIONS / rows  # in a row
        length = SYSTEM_TOKENS + config.visual_tokens + round(questions * QUESTION)
        flops = step_flops(config, 2, 1, 1, length, round(questions * ANSWER))
        hours = flops * rows * EPOCHS / (PEAK_FLOPS["A100"] * SHARE_OF_PEAK) / 3600
        print(f"LocVLM-{name.upper()}, stage 2, a row for each {what}: {flops / 1e12:.1f} TFLOP a row, "
              f"{hours:,.0f} A100-hours (estimate)")  # fmt: skip


def main(argv=None):
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **how)
    parser.add_argument("--variant", choices=VARIANTS, help="the model's shape (default: tiny, if any other option is given)")
    parser.add_argument("--world-size", type=positive, help="processes (default: 8 for the table, else as started)")
    parser.add_argument("--device-memory", help="memory of a GPU, such as 80GB; a step that does not fit is refused")
    args, of_train = parser.parse_known_args(argv)
    if not (args.variant or args.device_memory or of_train):
        return print_table(args.world_size or 8)
    room, config = args.device_memory and bytes_of(args.device_memory), parse_config(TrainConfig, [*of_train, "--dry-run"])
    checkpoint = config.vision or config.llm or config.init_from
    if checkpoint and args.variant:
        raise ValueError(f"--variant {args.variant} and {checkpoint} are two shapes of a model; leave out one")
    if checkpoint or args.variant in (None, "tiny"):
        model = build_model(config, "meta")
    else:  # a variant's shape, without a tokenizer
        adapter = {"adapter": config.adapter} if config.adapter in ADAPTERS else {}
        with without_contents():
            model = LocVLM(replace(VARIANTS[args.variant], **config.settings(), **adapter))
    records = build_records(config, Processes.start(config))[0] if config.sources else None
    for stage in config.stage_list:
        plan_stage(config, stage, model, records, args.world_size or int(os.environ.get("WORLD_SIZE", 1)), room)


if __name__ == "__main__":
    run_command("tools.plan", main)
