"""What a training step will need, before it is run and without the weights: memory of each process, operations, hours.

    python plan.py                                                              LocVLM-B and -L on eight A100s
    python train.py --variant b ... --dry-run --world-size 8 --device-memory 80     one run, and whether it fits

A step is run on fake tensors (torch's FakeTensorMode: shapes and no contents) under a mode that counts the bytes alive, so
activations, logits and what passes in the backward pass are those of the code as it is, and change with it. Weights,
optimizer and what fsdp gathers are counted from the parameters.
"""

import argparse
import math
import os
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import IGNORE
from model import VARIANTS, LocVLM


def print_plan(config, stage, model, examples):
    """Print what each process will hold in a step of a stage; refuse what --device-memory cannot."""
    recipe, world = config.recipe(stage), config.world_size or int(os.environ.get("WORLD_SIZE", 1))
    micro = config.micro_batch or math.ceil(recipe.batch / world)
    on_gpu = bool(config.device_memory) or torch.cuda.is_available()
    patches, bf16 = (
        model.config.visual_tokens,
        config.precision == "bf16" or (config.precision == "auto" and on_gpu),
    )
    if examples:
        rows = [examples.text_row(examples.records[index], epoch) for index, epoch in map(examples.order, range(64))]
        length = max(len(row["input_ids"]) for row in rows)
        answers = max(sum(label != IGNORE for label in row["labels"]) for row in rows)
        basis = "the longest of 64 rows"
    else:
        asked = (CAPTION, CAPTION) if stage == 1 else (QUESTION, ANSWER)
        longest = min(config.max_length, model.config.text_config.max_position_embeddings)
        length = min(SYSTEM_TOKENS + patches + recipe.questions * asked[0], longest)
        answers, basis = recipe.questions * asked[1], "no data given: questions as App. B has them"

    def plan_of(micro, parallel, recompute):
        how = (parallel, world, bf16, recompute)
        return plan_step(model.config, stage, micro, length, micro * answers, *how)

    planned = plan_of(micro, config.parallel, config.recompute)
    print(f"  {micro} rows of {length} tokens ({basis}), {world} processes, {'bf16' if bf16 else 'fp32'}")
    print(f"  each holds {planned}")
    flops = step_flops(model.config, stage, micro, length, micro * answers)
    print(f"  {flops / 1e12:.2f} TFLOP forward and backward")
    if not config.device_memory:
        return
    room = float(config.device_memory.upper().rstrip("GIB")) * 2**30
    if not planned.fits(room):
        remedy = remedies(lambda *how: plan_of(*how).fits(room), micro, config.parallel, config.recompute, world)
        raise ValueError(
            f"stage {stage} needs {planned.total / 2**30:.0f} GiB a process; expected to fit into {config.device_memory}; "
            + (f"add {remedy}" if remedy else "use more processes with --parallel fsdp, or larger GPUs")
        )

RESERVE = 1.5 * 2**30  # bytes of a GPU that its context, libraries and communication take
SPARE = 0.05  # share that the allocator cannot use for the gaps it leaves
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}  # bf16, dense, a second


@dataclass(frozen=True)
class Plan:
    """Bytes that each process holds at the peak of a step."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # kept by the forward pass, logits and all, and made in passing by the backward pass
    gathered: int  # what fsdp has whole at a time
    logits: int  # of the activations

    @property
    def total(self):
        return self.weights + self.optimizer + self.gradients + self.activations + self.gathered

    def fits(self, device_memory):
        """Say whether it fits into a GPU of so many bytes."""
        return self.total * (1 + SPARE) + RESERVE <= device_memory

    def __str__(self):
        names = ("weights", "optimizer", "gradients", "activations", "gathered")
        parts = ", ".join(f"{getattr(self, name) / 2**30:.2f} {name}" for name in names)
        return f"{self.total / 2**30:.2f} GiB: {parts} (of the activations, {self.logits / 2**30:.2f} logits)"


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive, now and at the peak; those of parameters are not new."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters = list(parameters)
        self.now = self.peak = self.gradients_at_peak = 0
        self.known = weakref.WeakKeyDictionary({p.untyped_storage(): 0 for p in self.parameters})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.known:
                self.begin(tensor.untyped_storage())
        return out

    def begin(self, storage):
        size = self.known[storage] = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self.end, size)
        if self.now > self.peak:
            self.peak = self.now
            self.gradients_at_peak = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)

    def end(self, size):
        self.now -= size


def fake_step(model, rows, length, answers, autocast):
    """LocVLM.forward and the backward pass for rows of one image each, as far as shapes go: nothing depends on contents."""
    side, patches = model.config.vision_config.image_size, model.config.vision_config.num_patches
    llama = model.language_model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            features = model.vision_tower(torch.zeros(rows, 3, side, side, dtype=llama.norm.weight.dtype))
        visual = model.adapter(features)
        x = llama.embed_tokens(torch.zeros(rows, length, dtype=torch.long))
        x = torch.cat([visual.to(x.dtype), x[:, patches:]], dim=1)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        hidden = llama.hidden(x, None, mask).flatten(0, 1)[:answers]
        loss = F.cross_entropy(llama.lm_head(hidden).float(), torch.zeros(answers, dtype=torch.long))
    loss.backward()


def plan_step(config, stage, rows, length, answers, parallel="ddp", world=1, bf16=False, recompute=False):
    """Plan a step of a LocVLMConfig.

    rows, length, answers  of a forward pass in one process: images, tokens of the longest row, supervised tokens in all
    parallel, world        "ddp" or "fsdp", and over how many processes
    bf16                   layers compute in bfloat16 (weights and optimizer are float32 always)
    """
    fsdp = parallel == "fsdp" and world > 1
    dtype = torch.bfloat16 if bf16 and fsdp else torch.float32  # ddp computes under autocast
    with FakeTensorMode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LocVLM(config)
        finally:
            torch.set_default_dtype(before)
        model.language_model.requires_grad_(stage in (2, 4))
        for layer in model.language_model.layers:
            layer.recompute = recompute
        learned = [p for p in model.parameters() if p.requires_grad]
        for p in learned if fsdp else ():  # summed over processes and split as soon as it is there
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with BytesAlive(model.parameters()) as alive:
            fake_step(model, rows, length, answers, bf16 and not fsdp)
    everything, learning = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in learned)
    logits = answers * config.text_config.vocab_size * 4
    if not fsdp:  # gradients lie in ddp's buckets (gradient_as_bucket_view)
        peak = alive.peak - alive.gradients_at_peak
        return Plan(4 * everything, 8 * learning, alive.gradients_at_peak, peak, 0, logits)
    layer = sum(p.nbytes for p in model.language_model.layers[0].parameters())
    wrapped = [*model.vision_tower.encoder.layers[:-1], *model.language_model.layers]
    root = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for part in wrapped for p in part.parameters())
    # whole at a time: the root, a layer and the one fetched ahead; while summing, a layer's gradients, here and in float32
    sums = (root + layer + 4 * layer // dtype.itemsize) if stage in (2, 4) else 0
    return Plan(
        4 * everything // world,
        8 * learning // world,
        4 * learning // world,
        alive.peak,
        root + 2 * layer + sums,
        logits,
    )


def step_flops(config, stage, rows, length, answers, tower=True):
    """Operations of a forward and backward pass: rows of one image and `length` tokens each, `answers` tokens in all.

    tower  whether it is run, or its features read

    Two for each weight and token, once forward, once for the gradient that passes through, once for the weight's own where it
    learns; attention as if nothing were masked. What --recompute does twice is not counted.
    """
    v, t = config.vision_config, config.text_config
    passes = 3 if stage in (2, 4) else 2
    patches = v.num_patches + 1
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    a_patch = (2 * block + 4 * patches * v.hidden_size) * (
        v.num_hidden_layers - 1
    ) + 6 * v.patch_size**2 * v.hidden_size
    adapter = 2 * 2 * v.hidden_size * t.hidden_size + (config.adapter != "linear") * 3 * 2 * t.hidden_size**2
    heads, kv_heads = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = 2 * t.hidden_size * (heads + kv_heads) + 3 * t.hidden_size * t.intermediate_size
    layers = (passes * 2 * layer + 3 * 4 * length * heads) * t.num_hidden_layers
    head = passes * 2 * t.hidden_size * t.vocab_size * answers
    seeing = tower * patches * a_patch + config.visual_tokens * adapter
    return rows * (seeing + length * layers) + head


def remedies(fits, micro_batch, parallel, recompute, world):
    """Flags under which a step would fit, the mildest first: fits(micro_batch, parallel, recompute) -> bool; or None."""
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


def peak_flops(device):
    """Operations a second that a GPU is sold with, in bf16; None if it is not known."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


# ----- LocVLM-B and -L on eight A100s


CAPTION, QUESTION, ANSWER = 24, 55, 20  # tokens: CC3M's captions; a question of App. B with its answer, and the answer
SYSTEM_TOKENS = 36
QUESTIONS = 16  # behind an image, as train.py's preset of the paper has them
SHARE_OF_PEAK = 0.4  # that such training reaches
PAPER = {"captions": 595_375, "images": 95_899, "conversations": 191_798, "questions": 402_686, "epochs": 10}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=8, help="GPUs")
    world = parser.parse_args(argv).world_size
    print("| | stage | run as | GiB a GPU | weights | optimizer | gradients | activations | gathered |")
    print("|---|---|---|---|---|---|---|---|---|")
    asked, answered = QUESTIONS * QUESTION, QUESTIONS * ANSWER
    for variant in ("b", "l"):
        config = VARIANTS[variant]
        image = config.vision_config.num_patches
        for stage, micro, tokens, answers, engines in (
            (1, 16, image + CAPTION, CAPTION, (("ddp", False), ("fsdp", True))),
            (2, 8, SYSTEM_TOKENS + image + asked, answered, (("ddp", True), ("fsdp", False), ("fsdp", True))),
        ):
            for engine, recompute in engines:
                plan = plan_step(config, stage, micro, tokens, micro * answers, engine, world, True, recompute)
                how = f"`--parallel {engine}{' --recompute' if recompute else ''} --micro-batch {micro}`"
                parts = (plan.weights, plan.optimizer, plan.gradients, plan.activations, plan.gathered)
                sizes = " | ".join(f"{part / 2**30:.1f}" for part in parts)
                print(f"| {variant.upper()} | {stage} | {how} | {plan.total / 2**30:.1f} | {sizes} |")
    print()
    for variant in ("b", "l"):
        image = VARIANTS[variant].vision_config.num_patches
        asked = 2 * PAPER["questions"] / PAPER["images"]  # LocPred and RevLoc of each object
        for how, rows, questions in (
            ("a row for each question", PAPER["images"] * asked, 1),
            ("a row for each image", PAPER["images"], asked),
        ):
            tokens = SYSTEM_TOKENS + image + round(questions * QUESTION)
            flops = step_flops(VARIANTS[variant], 2, 1, tokens, round(questions * ANSWER))
            hours = flops * rows * PAPER["epochs"] / (PEAK_FLOPS["A100"] * SHARE_OF_PEAK) / 3600
            print(
                f"LocVLM-{variant.upper()}, stage 2, {how}: {flops / 1e12:.1f} TFLOP a row, {hours:,.0f} A100-hours (estimate)"
            )


if __name__ == "__main__":
    main()
