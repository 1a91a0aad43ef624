"""Plan a training step before it runs, without weights: memory of each process, operations, hours.

    python -m tools.plan                                      LocVLM-B and -L on eight A100s
    python -m tools.plan --variant b --stages 2 --preset paper --world-size 8 --device-memory 80GB      one run: does it fit?

The other options are train.py's (--parallel, --recompute, --micro-batch, --data, ...). The model has the shape of --variant,
or of the weights in --vision, --llm or --init-from. Rows are as long as the run's own (with --data and a tokenizer), or as
App. B's questions.

LocVLM's own forward and backward pass runs on fake tensors (FakeTensorMode: shapes without contents) under a mode that counts
the bytes alive, so activations and logits follow the code as it changes. Weights, optimizer states and fsdp's gathered layers
are counted from the parameters.
"""

import argparse
import math
import os
import re
import sys
import weakref
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import IGNORE, IMAGE_ID, collate, pack
from formats.meter import PEAK_FLOPS, step_flops
from formats.processes import Processes
from model import ADAPTERS, VARIANTS, LocVLM
from train import PRESETS, TrainConfig, build_examples, build_model, build_records, parse_config, trainable

RESERVE = 1.5 * 2**30  # bytes of a GPU that its context, libraries and communication take
SPARE = 0.05  # share that the allocator loses to gaps
CAPTION, QUESTION, ANSWER = 24, 55, 20  # tokens: CC3M's captions; a question of App. B with its answer, and the answer
SYSTEM_TOKENS = 36
SHARE_OF_PEAK = 0.4  # that such training reaches
PAPER = {"images": 95_899, "questions": 402_686, "epochs": 10}

# ----- one step


@dataclass(frozen=True)
class Plan:
    """Bytes that each process holds at the peak of a step."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # kept by the forward pass, logits included, and temporary ones of the backward pass
    gathered: int  # what fsdp holds whole at a time
    logits: int  # of the activations

    @property
    def total(self):
        return self.weights + self.optimizer + self.gradients + self.activations + self.gathered

    def fits(self, device_memory):
        """Return True if a GPU of so many bytes can hold it."""
        return self.total * (1 + SPARE) + RESERVE <= device_memory

    def __str__(self):
        names = ("weights", "optimizer", "gradients", "activations", "gathered")
        parts = ", ".join(f"{getattr(self, name) / 2**30:.2f} {name}" for name in names)
        return f"{self.total / 2**30:.2f} GiB: {parts} (of the activations, {self.logits / 2**30:.2f} logits)"


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive, now and at the peak. Views of parameters are not new."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters = list(parameters)
        self.now = self.peak = self.gradients_at_peak = 0
        self.sizes = weakref.WeakKeyDictionary({p.untyped_storage(): 0 for p in self.parameters})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return False  # an `if` on contents, which fake tensors lack: the check of counts in model.place_image passes
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.sizes:
                self.begin(tensor.untyped_storage())
        return out

    def begin(self, storage):
        size = self.sizes[storage] = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self.end, size)
        if self.now > self.peak:
            self.peak = self.now
            self.gradients_at_peak = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)

    def end(self, size):
        self.now -= size


def fake_model(config, stage, dtype, recompute):
    """Make a model of fake weights in a dtype. Call it under FakeTensorMode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LocVLM(config)
    finally:
        torch.set_default_dtype(before)
    for layer in model.language_model.layers:
        layer.recompute = recompute
    return model, list(trainable(model, stage).values())


def plan_step(config, stage, batch, parallel="ddp", world=1, bf16=False, recompute=False):
    """Plan a step of a LocVLMConfig.

    batch            what LocVLM.forward takes in one process, see data.collate; only shapes and dtypes matter
    parallel, world  "ddp" or "fsdp", and over how many processes
    bf16             layers compute in bfloat16 (weights and optimizer are always float32)
    """
    is_fsdp = parallel == "fsdp" and world > 1
    dtype = torch.bfloat16 if bf16 and is_fsdp else torch.float32  # ddp computes under autocast
    with FakeTensorMode():
        model, learned = fake_model(config, stage, dtype, recompute)
        for p in learned if is_fsdp else ():  # a gradient is summed over processes and sharded as soon as it exists
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with BytesAlive(model.parameters()) as alive:
            fake = {
                name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype)
                for name, t in batch.items() if t is not None
            }  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not is_fsdp):
                loss = model(**fake)
            loss.backward()
    everything, learning = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in learned)
    logits = batch["answers"].shape[1] * config.text_config.vocab_size * 4
    if not is_fsdp:  # gradients lie in ddp's buckets (gradient_as_bucket_view)
        activations = alive.peak - alive.gradients_at_peak
        return Plan(4 * everything, 8 * learning, alive.gradients_at_peak, activations, 0, logits)
    layer = sum(p.nbytes for p in model.language_model.layers[0].parameters())
    wrapped = [*model.vision_tower.encoder["layers"][:-1], *model.language_model.layers]  # see formats.processes.shard
    root = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for part in wrapped for p in part.parameters())
    # whole at a time: the root, a layer and the one fetched ahead; while summing, a layer's gradients, here and in float32
    sums = (root + layer + 4 * layer // dtype.itemsize) if stage in (2, 4) else 0
    shards = (4 * everything // world, 8 * learning // world, 4 * learning // world)
    return Plan(*shards, alive.peak, root + 2 * layer + sums, logits)


def made_row(config, stage, questions, max_length=2048):
    """Make a packed row as long as App. B's questions, or in stage 1 as CC3M's captions, for a plan without data."""
    prefix = [1] * (1 if stage == 1 else SYSTEM_TOKENS) + [IMAGE_ID] * config.visual_tokens
    length, answer = (CAPTION, CAPTION) if stage == 1 else (QUESTION, ANSWER)
    segment = [1] * length, [IGNORE] * (length - answer) + [1] * answer
    return pack(prefix, [segment] * questions, min(max_length, config.text_config.max_position_embeddings))


def batch_of(config, row, count, features=False):
    """Repeat a row: the batch of one process. Its images, or features, hold no numbers."""
    vision = config.vision_config
    shape = (3, vision.image_size, vision.image_size)
    if features:
        shape = (config.frames + vision.num_patches, vision.hidden_size)
    images = count if IMAGE_ID in row["input_ids"] else 0
    return collate([row] * count) | {"pixel_values": torch.empty(images, *shape, device="meta")}


# ----- one run


def remedies(fits, micro_batch, parallel, recompute, world):
    """Return options that make a step fit, the mildest first, or None. fits: (micro_batch, parallel, recompute) -> bool"""
    smaller = [micro_batch // 2**n for n in range(1, micro_batch.bit_length())]
    tries = [(micro_batch, parallel, True)] * (not recompute) + [(m, parallel, recompute) for m in smaller]
    tries += [(m, parallel, True) for m in smaller]
    if parallel == "ddp" and world > 1:
        tries += [(micro_batch, "fsdp", recompute)]
        tries += [(m, "fsdp", True) for m in (micro_batch, *smaller)]
    for m, engine, again in tries:
        if fits(m, engine, again):
            flags = [f"--micro-batch {m}"] * (m != micro_batch) + ["--parallel fsdp"] * (engine != parallel)
            return " ".join(flags + ["--recompute"] * (again != recompute))
    return None


def model_of(variant, config):
    """Make the model of a run on the meta device: of its own weights, or of a variant's shape (then without a tokenizer)."""
    if config.vision or config.llm or config.init_from or variant == "tiny":
        return build_model(config, "meta")
    shape = replace(VARIANTS[variant], **config.settings())
    if config.adapter in ADAPTERS and config.adapter != "linear":
        shape = replace(shape, adapter=config.adapter)
    with torch.device("meta"):
        return LocVLM(shape)


def row_of(config, stage, records, model):
    """Return the row to plan for, and where its length comes from."""
    if records and model.tokenizer:
        examples = build_examples(config, stage, records, model)
        rows = [examples.text_row(examples.records[index], epoch) for index, epoch in map(examples.order, range(64))]
        return max(rows, key=lambda row: len(row["input_ids"])), "the longest of 64 rows"
    recipe = config.recipe(stage)
    reason = "no tokenizer without --llm" if records else "no --data"
    return made_row(model.config, stage, recipe.questions, recipe.max_length), f"{reason}: questions as long as App. B's"


def plan_stage(config, stage, model, records, world, room):
    """Print a stage's parts and what each process holds in a step. Raise ValueError if that exceeds `room` bytes, if given."""
    recipe, learned = config.recipe(stage), trainable(model, stage)
    print(f"\nstage {stage}: {recipe}")
    for name, part in model.named_children():
        count, learns = sum(p.numel() for p in part.parameters()), any(n.startswith(name) for n in learned)
        print(f"  {name:15} {count:>14,} parameters  {'trained' if learns else 'frozen'}")

    row, basis = row_of(config, stage, records, model)
    micro, features = config.micro_batch or math.ceil(recipe.batch / world), bool(config.features or model.config.frames)
    on_gpu = bool(room) or torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)

    def plan_of(micro, parallel, recompute):
        return plan_step(model.config, stage, batch_of(model.config, row, micro, features), parallel, world, bf16, recompute)

    planned = plan_of(micro, config.parallel, config.recompute)
    length, answers = len(row["input_ids"]), sum(label != IGNORE for label in row["labels"])
    print(f"  {micro} rows of {length} tokens ({basis}), {world} processes, {'bf16' if bf16 else 'fp32'}")
    print(f"  each process holds {planned}")
    flops = step_flops(model.config, stage, micro, length, micro * answers, runs_tower=not features)
    print(f"  {flops / 1e12:.2f} TFLOP forward and backward")
    if room and not planned.fits(room):
        remedy = remedies(lambda *how: plan_of(*how).fits(room), micro, config.parallel, config.recompute, world)
        raise ValueError(
            f"stage {stage} needs {planned.total / 2**30:.0f} GiB per process, too much for {room / 2**30:g}GB; "
            + (f"add {remedy}" if remedy else "use more processes with --parallel fsdp, or larger GPUs")
        )


def bytes_of(text):
    """Read the memory of a GPU.

    >>> bytes_of("80GB") == bytes_of("80g") == bytes_of("80") == 80 * 2**30
    True
    """
    if not re.fullmatch(r"\d+(\.\d+)?(GI?B?)?", text.upper()):
        raise ValueError(f"--device-memory {text} is not a number of gigabytes; write 80GB")
    return float(text.upper().rstrip("GIB")) * 2**30


# ----- LocVLM-B and -L


def print_table(world):
    """Print the memory of the paper's models, and hours of their stage 2."""
    print("| | stage | run as | GiB a GPU | weights | optimizer | gradients | activations | gathered |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in ("b", "l"):
        config = VARIANTS[variant]
        for stage, micro, engines in (
            (1, 16, (("ddp", False), ("fsdp", True))),
            (2, 8, (("ddp", True), ("fsdp", False), ("fsdp", True))),
        ):
            batch = batch_of(config, made_row(config, stage, PRESETS["paper"][stage].questions), micro)
            for engine, recompute in engines:
                plan = plan_step(config, stage, batch, engine, world, True, recompute)
                how = f"`--parallel {engine}{' --recompute' if recompute else ''} --micro-batch {micro}`"
                parts = (plan.total, plan.weights, plan.optimizer, plan.gradients, plan.activations, plan.gathered)
                sizes = " | ".join(f"{part / 2**30:.1f}" for part in parts)
                print(f"| {variant.upper()} | {stage} | {how} | {sizes} |")
    print()
    per_image = 2 * PAPER["questions"] / PAPER["images"]  # LocPred and RevLoc of each object
    for variant in ("b", "l"):
        prefix = SYSTEM_TOKENS + VARIANTS[variant].visual_tokens
        for how, rows, questions in (
            ("a row for each question", PAPER["images"] * per_image, 1),
            ("a row for each image", PAPER["images"], per_image),
        ):
            flops = step_flops(VARIANTS[variant], 2, 1, prefix + round(questions * QUESTION), round(questions * ANSWER))
            hours = flops * rows * PAPER["epochs"] / (PEAK_FLOPS["A100"] * SHARE_OF_PEAK) / 3600
            cost = f"{flops / 1e12:.1f} TFLOP a row, {hours:,.0f} A100-hours (estimate)"
            print(f"LocVLM-{variant.upper()}, stage 2, {how}: {cost}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", choices=VARIANTS, help="the model's shape (default: tiny, if any other option is given)")
    parser.add_argument("--world-size", type=int, help="processes (default: 8 for the table, else as started)")
    parser.add_argument("--device-memory", help="memory of a GPU, such as 80GB; a step that does not fit is refused")
    args, of_train = parser.parse_known_args(argv)
    if args.world_size is not None and args.world_size < 1:
        raise ValueError(f"--world-size {args.world_size} must be at least 1")
    if not (args.variant or args.device_memory or of_train):
        return print_table(args.world_size or 8)
    room = bytes_of(args.device_memory) if args.device_memory else None
    config = parse_config(TrainConfig, [*of_train, "--dry-run"])
    model = model_of(args.variant or "tiny", config)
    records = build_records(config, Processes.start(config))[0] if config.sources else None
    for stage in config.stage_list:
        plan_stage(config, stage, model, records, args.world_size or int(os.environ.get("WORLD_SIZE", 1)), room)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.plan: {error}")
