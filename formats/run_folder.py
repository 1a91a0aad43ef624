"""Train a LocVLM: stage 1 the adapter, stage 2 the adapter and LLaMA, on clips again as stages 3 and 4 (Sec. 3.1, 3.5, 4.1).

    torchrun train.py                                         the shapes world and the tiny model, both stages, then evaluation
    torchrun train.py --variant b --stages 1 --preset llava --vision clip-vit-large-patch14 --llm vicuna-7b-v1.3 \\
        --llava chat.json --images CC3M/images --out runs/b1
    torchrun --nproc-per-node 8 train.py --variant b --stages 2 --preset paper --init-from runs/b1 --parallel fsdp \\
        --coco instances_train2017.json --images train2017 --llava llava_instruct_80k.json --out runs/b2
    torchrun train.py --stages 4 --init-from runs/default --out runs/video    clips: the moving shapes

A run is a folder: train.json (these options), log.jsonl (an object per step), state/ (to --resume from, on any number of
processes that divides the batch), and the model itself (`LocVLM.from_pretrained(run)`). What is drawn at a step depends on the seed and the step
alone, so a resumed run equals an uninterrupted one, and N processes see the batches of one.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
import typing
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import plan
import prepare
import shapes
import video
from checkpoint import read_json, write_json
from clip_vit import Features, image_size
from coords import GEOMETRIES, KINDS
from data import IGNORE, Examples, Wording, image_ids_of, join_sources, marked, read_records
from model import VARIANTS, LocVLM, describe_parts


@dataclass(frozen=True)
class Recipe:
    """Numbers of one stage. `batch` counts images over all processes; each brings up to `questions` questions."""

    batch: int
    lr: float
    warmup_ratio: float
    epochs: float = 0.0
    steps: int = 0  # instead of epochs
    questions: int = 1


PRESETS = {
    # found on the shapes world, see LOG.md
    "tiny": {
        1: Recipe(batch=32, lr=3e-3, warmup_ratio=0.1, steps=150),
        2: Recipe(batch=16, lr=1e-3, warmup_ratio=0.1, steps=300, questions=6),
        3: Recipe(batch=16, lr=1e-3, warmup_ratio=0.1, steps=100, questions=6),
        4: Recipe(batch=16, lr=1e-3, warmup_ratio=0.1, steps=260, questions=6),
    },
    # stage 1 as LLaVA v1; stage 2 of Sec. 4.1, warm-up ratio 0.3 as printed there; video as Video-ChatGPT. An epoch draws each
    # image once: `questions` is as many as make it about a pass over what is asked (four descriptions an image in PRefCOCO,
    # each for LocPred and RevLoc, as many absent things; some eight questions a video)
    "paper": {
        1: Recipe(batch=128, lr=2e-3, warmup_ratio=0.03, epochs=1),
        2: Recipe(batch=64, lr=2e-5, warmup_ratio=0.3, epochs=10, questions=16),
        3: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
        4: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
    },
    "llava": {
        1: Recipe(batch=128, lr=2e-3, warmup_ratio=0.03, epochs=1),
        2: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
        3: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
        4: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
    },
}


def opt(default, help):
    """One option: its default and the line that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run. Where a value may differ by stage, give one, or one for each stage: --steps 300,600"""

    out: str = opt("runs/default", "folder of the run")
    stages: typing.Literal["1", "2", "1,2", "3", "4"] = opt(
        "1,2",
        "1: adapter only, on captions; 2: adapter and LLaMA, on questions; from a model of these, on clips: 3: adapter only, on "
        "conversations (Vid-B); 4: adapter and LLaMA, on the objectives too (Vid-B+)",
    )
    resume: bool = opt(False, "continue the run where its last checkpoint left it")
    dry_run: bool = opt(False, "print parts, shapes, an example and memory; train and write nothing")
    evaluate: bool = opt(
        True, "evaluate after the last stage, if the data has a val split beside it (instances_val.json)"
    )
    # model
    variant: typing.Literal["tiny", "b", "l"] = opt(
        "tiny", "tiny: the weights in tiny/; b, l: the paper's, weights from --vision and --llm"
    )
    vision: str = opt("", "CLIP: HF folder, or OpenAI's .pt state dict [tiny/clip]")
    llm: str = opt("", "LLaMA or Vicuna: HF folder, or Meta's with params.json [tiny/llama]")
    init_from: str = opt(
        "", "run, llava-hf or LLaVA folder to start from (an original LLaVA may need --vision beside it)"
    )
    adapter: str = opt(
        "", "linear or mlp2x_gelu, or a file of trained weights: LLaVA's mm_projector.bin [the variant's kind]"
    )
    # data
    coco: str = opt("", "instances_*.json [the shapes world, written to data/shapes where it is not there]")
    captions: str = opt("", "captions_*.json: what stage 1 learns from a COCO folder")
    llava: str = opt("", "LLaVA-format JSON: conversations, captions, or what prepare.py wrote")
    images: str = opt("", "folder of the images of these three, or a zip of them")
    data: str = opt("", "more of such files, each with its images and how often to draw it: FILE@IMAGES*WEIGHT,...")
    exclude: str = opt("", "files that name COCO images not to train on: benchmarks, or lists of ids; parted by commas")
    features: str = opt("", "folder that prepare.py features made: the tower is not run [images are read]")
    skip_bad: bool = opt(
        False, "leave out and count what is missing, unreadable or wrong, instead of refusing to start"
    )
    limit: int = opt(0, "use the first so many images only [all]")
    frames: int = opt(0, "in stages 3 and 4: frames of a clip [tiny: 8; else the paper's 100 and 8]")
    # what is asked
    objectives: typing.Literal["none", "loc", "loc,neg", "loc,neg,rev", "neg", "rev", "loc,rev", "neg,rev"] = opt(
        "loc,neg,rev", "the paper's: LocPred, NegPred, RevLoc"
    )
    kind: typing.Literal["", *KINDS] = opt("", "how coordinates are written [as --init-from has it, else ivb]")
    geometry: typing.Literal["", *GEOMETRIES] = opt(
        "", "how an image becomes the model's square [as --init-from has it, else squash]"
    )
    location: typing.Literal["box", "point"] = opt("box", "what a location is")
    words: typing.Literal["name", "description", "mixed"] = opt(
        "name", "what names an object: its category, or its pseudo-caption"
    )
    neg_ratio: float = opt(1.0, "absent objects asked for, per object that is there")
    instruct_share: float = opt(0.34, "share of a row's questions that come from the conversations")
    # optimisation
    preset: typing.Literal["tiny", "paper", "llava"] = opt("tiny", "recipe that the next flags change")
    batch: str = opt("", "images a step, over all processes [preset]")
    micro_batch: int = opt(0, "images a forward pass in each process; the rest is accumulated [all at once]")
    questions: str = opt("", "questions behind each image [preset]")
    lr: str = opt("", "peak learning rate [preset]")
    warmup_ratio: str = opt("", "share of the steps until the peak [preset]")
    epochs: str = opt("", "passes over the images [preset]")
    steps: str = opt("", "optimizer steps, instead of epochs [preset]")
    weight_decay: float = opt(0.0, "of matrices; biases and norms never decay")
    grad_clip: float = opt(1.0, "largest gradient norm")
    max_length: int = opt(
        2048,
        "tokens up to which a question and its answer are read, the image included; at most what LLaMA was made for",
    )
    precision: typing.Literal["auto", "fp32", "bf16"] = opt(
        "auto", "of the forward pass; weights stay fp32. auto: bf16 on GPUs that have it"
    )
    seed: int = opt(0, "of data order, wording and the adapter's first weights")
    # how it is run: none of these changes what is learned
    parallel: typing.Literal["ddp", "fsdp"] = opt(
        "ddp", "ddp: a whole model in each process; fsdp: weights, gradients and optimizer are split among them"
    )
    recompute: bool = opt(
        False, "keep only each decoder layer's input for the backward pass, and compute the layer again"
    )
    world_size: int = opt(0, "with --dry-run: how many processes to plan for [as started]")
    device_memory: str = opt("", "with --dry-run: memory of a GPU, as 80GB; a step that does not fit is refused")
    workers: int = opt(2, "threads that read and prepare images, in each process")
    save_every: int = opt(200, "steps between checkpoints")
    keep: int = opt(2, "checkpoints to keep")

    def __post_init__(self):
        for stage in self.stage_list:
            self.recipe(stage)
        if self.variant != "tiny" and not (self.init_from or self.dry_run or (self.vision and self.llm)):
            raise ValueError(
                f"variant {self.variant} without weights; expected --vision and --llm, or --init-from; tiny needs none"
            )
        if self.adapter not in ("", "linear", "mlp2x_gelu") and not Path(self.adapter).exists():
            raise ValueError(
                f"--adapter {self.adapter}; expected linear, mlp2x_gelu, or a file that is there; check the path"
            )
        if self.init_from and (self.adapter or self.llm):
            raise ValueError(
                "--init-from with --adapter or --llm; expected a whole model, or its parts by --vision, --llm and --adapter; leave "
                "out the one or the other"
            )
        at_least_1 = ("workers", "save_every", "keep", "max_length")
        for name in (*at_least_1, "limit", "frames", "micro_batch", "world_size", "neg_ratio", "weight_decay"):
            least = int(name in at_least_1)
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}; expected {least} or more; leave it out for the default"
                )
        if self.device_memory and not re.fullmatch(r"\d+(\.\d+)?(GI?B?)?", self.device_memory.upper()):
            raise ValueError(f"--device-memory {self.device_memory}; expected a number of gigabytes; write 80GB")
        _ = self.sources  # refuses what is written otherwise
        if self.frames_of_clip and not (self.init_from or self.dry_run):
            raise ValueError(
                f"stage {self.stages} without --init-from; expected the run of stage 2 to go on from; give it"
            )

    @property
    def sources(self):
        """The annotation files: (file, images, weight) each; none: the shapes world."""
        return join_sources(self.data, self.images, self.coco, self.captions, self.llava)

    @property
    def frames_of_clip(self):
        """How many frames of a clip the model reads; 0 in the stages on images."""
        default = 8 if self.variant == "tiny" or self.stages == "4" else 100
        return (self.frames or default) if self.stages in ("3", "4") else 0

    @property
    def stage_list(self):
        return [int(stage) for stage in self.stages.split(",")]

    def recipe(self, stage):
        """The preset's recipe for a stage, with this run's flags."""
        changes = {}
        for name, kind in (
            ("batch", int),
            ("questions", int),
            ("lr", float),
            ("warmup_ratio", float),
            ("epochs", float),
            ("steps", int),
        ):
            given = getattr(self, name)
            if given == "":
                continue
            values = given.split(",")
            if len(values) not in (1, len(self.stage_list)):
                raise ValueError(
                    f"--{name.replace('_', '-')} {given}; expected one value, or one for each of the stages {self.stages}"
                )
            try:
                changes[name] = kind(values[self.stage_list.index(stage)] if len(values) > 1 else values[0])
            except ValueError:
                raise ValueError(
                    f"--{name.replace('_', '-')} {given}; expected {kind.__name__} values; separate stages by a comma"
                ) from None
            if not changes[name] >= 0 or (name != "warmup_ratio" and changes[name] == 0):
                raise ValueError(f"--{name.replace('_', '-')} {given}; expected a positive number")
        if "epochs" in changes:
            changes.setdefault("steps", 0)
        return dataclasses.replace(PRESETS[self.preset][stage], **changes)


def parse_config(cls, argv=None):
    """Build the dataclass `cls` from command-line flags, one flag per field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        flag = "--" + f.name.replace("_", "-")
        how = {
            "default": f.default,
            "dest": f.name,
            "help": f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})"),
        }
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
        elif typing.get_origin(f.type) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(f.type), **how)
        else:
            parser.add_argument(flag, type=f.type, **how)
    try:
        return cls(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


# ----- steps of a run


def lr_at(step, steps, lr, warmup_ratio):
    """Linear warm-up to `lr` over the first share of the steps, then half a cosine down to 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(model, stage):
    """Freeze and thaw: the adapter learns in all stages, LLaMA in 2 and 4, the vision tower never. Gives what learns."""
    model.vision_tower.requires_grad_(False)
    model.adapter.requires_grad_(True)
    model.language_model.requires_grad_(stage in (2, 4))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(learned, config):
    matrices = [p for p in learned.values() if p.ndim >= 2]
    others = [p for p in learned.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def keep_freed_memory():
    """Tell glibc to keep what is freed: handing pages back and faulting them in again takes most of a CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow it by much
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks


def build_model(config, device="cpu"):
    """The model that a run starts from; on the meta device its shapes alone."""
    torch.manual_seed(config.seed)
    given = {"kind": config.kind, "geometry": config.geometry, "frames": config.frames_of_clip}
    given = {name: value for name, value in given.items() if value != ""}
    if config.init_from:
        model = LocVLM.from_pretrained(config.init_from, config.vision or None, device=device)
        model.config = dataclasses.replace(model.config, **given)
        return model
    adapter = config.adapter or VARIANTS[config.variant].adapter
    if config.variant == "tiny" or config.vision:
        here = Path(__file__).parent / "tiny"
        vision, llm = config.vision or here / "clip", config.llm or here / "llama"
        return LocVLM.from_parts(vision, llm, adapter, **given, device=device)
    with torch.device("meta"):  # a dry run without weights: shapes only
        return LocVLM(dataclasses.replace(VARIANTS[config.variant], adapter=adapter, **given))


def build_records(config, rank):
    """Read the records to train on; the shapes world, or the moving one, is written first where it is wanted and not there.

    What is wrong with the files is told before anything is trained: refused, or left out with --skip-bad.
    """
    sources = config.sources
    if not sources:
        moving = config.frames_of_clip > 0
        ensure, kinds = (shapes.ensure_clips, "clips") if moving else (shapes.ensure_world, "instances,captions")
        if rank == 0:
            ensure()
        if dist.is_initialized():
            dist.barrier()
        folder = ensure()
        files = (folder / f"{what}_train.json" for what in (kinds + ",conversations").split(","))
        sources = join_sources("", folder / ("clips" if moving else "images"), *files)
    records, left_out = read_records(sources, image_ids_of(config.exclude))
    records = records[: config.limit or None]
    bad = unreadable(records)
    records = [record for record in records if record.id not in bad]
    meant = ("images that --exclude", "boxes where the box has no area")  # the second occur in COCO itself
    wrong = {what: count for what, count in left_out.items() if not what.startswith(meant)}
    if (bad or wrong) and not config.skip_bad:
        told = [*bad.values()][:3] + [f"{count} {what}" for what, count in wrong.items()]
        raise ValueError(
            f"{len(bad)} images and {sum(wrong.values())} annotations cannot be used: {'; '.join(told)}; run `python data.py "
            "check` and mend the files, or leave them out with --skip-bad"
        )
    left_out["images that cannot be read"] = len(bad)
    if rank == 0:
        if faces_blurred(config) is False:
            print("faces are not blurred in all of these images; the paper blurs them first (App. C): prepare.py blur")
        print(
            f"{len(records)} images, {sum(len(r.objects) for r in records)} objects that are alone of their category"
            + "".join(f"; left out: {count} {what}" for what, count in left_out.items() if count)
        )
    return records, sources


def faces_blurred(config):
    """Say whether every folder of images was made by `prepare.py blur`; None for the shapes world, which has no faces."""
    folders = {images for _, images, _ in config.sources}
    return all(map(prepare.blurred, folders)) if folders else None


def unreadable(records):
    """Look at every image file without decoding it: {record id: what is wrong}."""

    def look(record):
        if record.image and video.is_clip(record.image):
            return None  # read when its features are made
        try:
            size = image_size(record.image) if record.image else record.size
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return (
            f"{record.image} is {size}, the annotations say {record.size}"
            if any(record.size) and size != record.size
            else None
        )

    with ThreadPoolExecutor(8) as pool:
        return {record.id: problem for record, problem in zip(records, pool.map(look, records), strict=True) if problem}


class States:
    """What a run resumes from: folders run/state/STAGE-STEP with weights that learn, optimizer, and position.

    Each is written by all processes, each its own part, while training goes on, and renamed when it is whole: a process
    or a disk that dies while writing leaves the one before. Read back on any number of processes, under ddp or fsdp.
    """

    learned = StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(self, run, keep, world, rank):
        self.folder, self.keep, self.world, self.rank = run / "state", keep, world, rank
        self.group = dist.new_group(backend="gloo") if world > 1 else None  # of its own: it talks while training talks
        self.pending = None
        if rank == 0:
            for cut_short in self.folder.glob("*.tmp"):
                shutil.rmtree(cut_short)

    def whole(self):
        """(stage, step) of the finished ones, the newest last."""
        names = [path.name.split("-") for path in self.folder.glob("*-*") if path.suffix != ".tmp"]
        return sorted((int(stage), int(step)) for stage, step in names)

    def newest(self):
        """(stage, step) of the newest finished one, (0, 0) where there is none."""
        return max(self.whole(), default=(0, 0))

    def save(self, stage, step, model, optimizer):
        """Start writing; weights are copied before this returns."""
        self.finish()
        weights, moments = get_state_dict(model, optimizer, options=self.learned)
        path = self.folder / f"{stage}-{step}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"weights": weights, "optimizer": moments}
        self.pending = path, dcp.async_save(state, checkpoint_id=path, process_group=self.group)

    def finish(self):
        """Wait for what is being written, give it its name, and delete the oldest beyond `keep`."""
        if self.pending is None:
            return
        (path, writing), self.pending = self.pending, None
        try:
            writing.result()
        except (dcp.CheckpointException, OSError) as error:  # a full disk comes wrapped in what the writer makes of it
            shutil.rmtree(path, ignore_errors=True)
            raise OSError(
                f"{path} cannot be written ({str(error).strip().splitlines()[-1]}); the checkpoints before it are good; make room "
                "and go on with --resume"
            ) from error
        if self.rank == 0:
            path.rename(path.with_suffix(""))
            for stage, step in self.whole()[: -self.keep]:
                shutil.rmtree(self.folder / f"{stage}-{step}")

    def load(self, stage, step, model, optimizer):
        """Read a finished one into model and optimizer."""
        weights, moments = get_state_dict(model, optimizer, options=self.learned)
        state = {"weights": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=self.folder / f"{stage}-{step}", process_group=self.group)
        moved = {"model_state_dict": state["weights"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **moved, options=self.learned)


def claim_run(config):
    """Make the run's folder, or refuse: another run's is never written over; a resumed one must have the same options."""
    run = Path(config.out)
    free = (
        "resume",
        "dry_run",
        "evaluate",
        "out",
        "parallel",
        "recompute",
        "workers",
        "save_every",
        "keep",
        "micro_batch",
    )
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    if config.resume:
        if not (run / "train.json").is_file():
            raise FileNotFoundError(
                f"no run to resume in {run}; expected its train.json; leave out --resume to start one"
            )
        before = read_json(run / "train.json")
        changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in options.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{run} was started with other options: {'; '.join(changed)}; resume it with the same, or start another --out"
            )
    elif (run / "train.json").exists():
        raise ValueError(
            f"{run} holds a run already; expected a new folder; choose another --out, or continue this one with --resume"
        )
    else:
        write_json(run / "train.json", options)
    return run


def rows_for(rank, world, step, recipe):
    """Which draws of the run this process takes at a step: every world-th of the global batch."""
    return range(step * recipe.batch + rank, (step + 1) * recipe.batch, world)


def prefetched(make, count_from, count_to, workers):
    """Yield make(i) for each i in order, the next ones made in threads meanwhile."""
    with ThreadPoolExecutor(workers) as pool:
        coming = deque()
        for i in range(count_from, count_to + workers):
            if i < count_to:
                coming.append(pool.submit(make, i))
            if i >= count_from + workers:
                yield coming.popleft().result()


def shard(model, device, dtype):
    """Split a model's parameters over all processes, a decoder or tower layer at a time (FSDP2), and copy rank 0's weights there.

    Weights, gradients and their sums stay float32; layers compute in `dtype`. Other ranks' models may be on the meta device.
    """
    if model.config.text_config.tie_word_embeddings:
        raise ValueError(
            "a LLaMA whose head is its embedding, under fsdp; expected a head of its own; use --parallel ddp"
        )
    whole = model.state_dict() if dist.get_rank() == 0 else {}
    model.to("meta")
    how = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32),
    }
    for layer in [
        *model.vision_tower.encoder.layers[:-1],
        *model.language_model.layers,
    ]:  # the tower's last is never run
        fully_shard(layer, **how)
    fully_shard(model, **how)
    model.to_empty(device=device)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def train_stage(config, stage, model, examples, run, states, rank, world, device, dtype):
    """Run one stage, from its beginning or from its last checkpoint."""
    recipe = config.recipe(stage)
    steps = recipe.steps or math.ceil(recipe.epochs * examples.epoch_length / recipe.batch)
    learned = trainable(model, stage)
    optimizer = make_optimizer(learned, config)
    at_stage, at_step = states.newest() if config.resume else (0, 0)
    first_step = at_step if at_stage == stage else 0
    if first_step:
        states.load(stage, first_step, model, optimizer)
    fsdp = config.parallel == "fsdp"
    parallel = model
    if world > 1 and not fsdp:
        parallel = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    for layer in model.language_model.layers:
        layer.recompute = config.recompute
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 and not fsdp else nullcontext()
    micro = config.micro_batch or math.ceil(recipe.batch / world)

    def make(step):
        samples = list(rows_for(rank, world, step, recipe))
        return [examples.batch(samples[i : i + micro]) for i in range(0, len(samples), micro)]

    log = open_log(run, stage, first_step) if rank == 0 else None
    bar = tqdm(total=steps, initial=first_step, desc=f"stage {stage}", disable=rank != 0, mininterval=1.0)
    blurred = faces_blurred(config)
    peak_flops, flops_done = plan.peak_flops(device), 0
    began = waited_since = time.time()
    waited = 0.0  # seconds that the device had to wait for data
    for step, micro_batches in enumerate(prefetched(make, first_step, steps, config.workers), start=first_step):
        waited += time.time() - waited_since
        lr = lr_at(step, steps, recipe.lr, recipe.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # answer tokens over micro-batches and processes: the loss is their mean, however they fell
        totals = (
            torch.tensor([float((batch["labels"] != IGNORE).sum()) for batch, _ in micro_batches], dtype=torch.float64)
            .sum()
            .to(device)
        )
        if world > 1:
            dist.all_reduce(totals)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for i, (batch, _) in enumerate(micro_batches):
            answers = int((batch["labels"] != IGNORE).sum())
            size = (*batch["input_ids"].shape, answers)
            flops_done += plan.step_flops(model.config, stage, *size, tower=not examples.features)
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            last = i == len(micro_batches) - 1
            # ddp's gradients travel once per step; fsdp's after each micro-batch, or it would hold them whole
            with nullcontext() if last or world == 1 or fsdp else parallel.no_sync():
                with autocast:
                    loss = parallel(**batch, reduction="sum")
                (loss * world / totals).backward()  # DDP averages over processes; we want the sum
            loss_sum += loss.detach()
        if world > 1:
            dist.all_reduce(loss_sum)
        mean_loss = (loss_sum / totals).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(learned.values(), config.grad_clip)
        grad_norm = float(grad_norm.full_tensor() if fsdp else grad_norm)
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            ids = [i for _, ids in micro_batches for i in ids]
            raise FloatingPointError(
                f"loss {mean_loss}, gradient norm {grad_norm} at stage {stage}, step {step}, lr {lr:.3g}, process {rank}, images "
                f"{ids}; the last checkpoint in {run} is good; lower --lr, or look at these images with data.py show"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if rank == 0:
            flops_a_second = flops_done / (time.time() - began)  # of this process, since the start
            log.write(
                json.dumps(
                    {
                        "stage": stage,
                        "step": step,
                        "loss": mean_loss,
                        "lr": lr,
                        "grad_norm": grad_norm,
                        "answer_tokens": int(totals),
                        "seconds": round(time.time() - began, 2),
                        "waited": round(waited, 2),
                        "tflops": round(flops_a_second / 1e12, 3),
                        "mfu": peak_flops and round(flops_a_second / peak_flops, 4),
                        "faces_blurred": blurred,
                        "unreadable": len(examples.unreadable),
                    }
                )
                + "\n"
            )
            log.flush()
            bar.set_postfix_str(f"loss {mean_loss:.3f}", refresh=False)
            bar.update()
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            states.save(stage, step + 1, model, optimizer)
        waited_since = time.time()
    bar.close()
    if rank == 0 and steps > first_step:
        used = f", {flops_a_second / peak_flops:.1%} of the GPU's peak" if peak_flops else ""
        print(
            f"stage {stage}: {flops_a_second / 1e12:.3f} TFLOP/s in each process{used}; waited for data "
            f"{waited / (time.time() - began):.1%} of the time"
        )
    if world > 1:
        dist.barrier()


def open_log(run, stage, first_step):
    """Open log.jsonl to continue at a step: lines of steps that will be taken again are dropped."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short when the process was killed
            continue
        if (row["stage"], row["step"]) < (stage, first_step):
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


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
        asked = (plan.CAPTION, plan.CAPTION) if stage == 1 else (plan.QUESTION, plan.ANSWER)
        longest = min(config.max_length, model.config.text_config.max_position_embeddings)
        length = min(plan.SYSTEM_TOKENS + patches + recipe.questions * asked[0], longest)
        answers, basis = recipe.questions * asked[1], "no data given: questions as App. B has them"

    def plan_of(micro, parallel, recompute):
        how = (parallel, world, bf16, recompute)
        return plan.plan_step(model.config, stage, micro, length, micro * answers, *how)

    planned = plan_of(micro, config.parallel, config.recompute)
    print(f"  {micro} rows of {length} tokens ({basis}), {world} processes, {'bf16' if bf16 else 'fp32'}")
    print(f"  each holds {planned}")
    flops = plan.step_flops(model.config, stage, micro, length, micro * answers)
    print(f"  {flops / 1e12:.2f} TFLOP forward and backward")
    if not config.device_memory:
        return
    room = float(config.device_memory.upper().rstrip("GIB")) * 2**30
    if not planned.fits(room):
        remedy = plan.remedies(lambda *how: plan_of(*how).fits(room), micro, config.parallel, config.recompute, world)
        raise ValueError(
            f"stage {stage} needs {planned.total / 2**30:.0f} GiB a process; expected to fit into {config.device_memory}; "
            + (f"add {remedy}" if remedy else "use more processes with --parallel fsdp, or larger GPUs")
        )


def dry_run(config, model, examples, stage):
    """Print what a stage would do."""
    recipe = config.recipe(stage)
    trainable(model, stage)
    print(f"\nstage {stage}: {recipe}")
    for name, count, learning in describe_parts(model):
        print(f"  {name:15} {count:>14,} parameters  {'trained' if learning else 'frozen'}")
    print_plan(config, stage, model, examples)
    if examples is None:
        return
    index, epoch = examples.order(0)
    record = examples.records[index]
    print(f"  {record.image} {record.size} px\n  {marked(examples.tokenizer, examples.text_row(record, epoch))}")
    if config.frames_of_clip and not examples.features:
        return print("  clips are looked at when their features are made")
    batch, _ = examples.batch(range(min(recipe.batch, 4)))
    print("  a batch: " + ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items()))
    if next(model.parameters()).device.type != "meta":
        patches = batch["pixel_values"] if examples.features else model.vision_tower(batch["pixel_values"])
        print(
            f"  patches {tuple(patches.shape)} -> adapter -> {tuple(model.adapter(patches).shape)} -> LLaMA -> loss {model(**batch).item():.3f}"
        )


def held_out_of(path, images):
    """The val split beside a train split, as COCO and the shapes worlds name them: (annotations, images), or None."""
    there = Path(path).with_name(Path(path).name.replace("_train", "_val"))
    if not there.name.startswith(("instances", "clips")) or there == Path(path) or not there.is_file():
        return None
    folder = Path(images).parent / Path(images).name.replace("train", "val")  # train2017 -> val2017; images stays
    return str(there), str(folder if folder.exists() else images)


def evaluate_held_out(config, run, sources):
    """Evaluate a run on the val splits beside what it was trained on; the training is done, whatever is wrong with these."""
    for path, images, _ in sources:
        if held_out := held_out_of(path, images):
            data = ["--coco", held_out[0], "--images", held_out[1]] if config.sources else []  # none: the shapes world
            try:
                evaluate.main([str(run), "--task", "all", *data, "--limit", "200"])
            except (ValueError, FileNotFoundError) as error:
                print(f"not evaluated: {error}")


def require_even_batches(config, world):
    """Refuse a batch that gives some processes more images than others: they wait for each other."""
    for stage in config.stage_list:
        if (batch := config.recipe(stage).batch) % world:
            raise ValueError(
                f"stage {stage} has batches of {batch} for {world} processes; expected as many for each, for they wait for each "
                f"other; start a number of processes that divides it, or a run with --batch {max(1, round(batch / world)) * world} here"
            )


def with_features(config, records, model, rank, world):
    """Open the features of a run, made first where they are of clips and not given: (the records that they hold, Features)."""
    fmt, frames, folder = model.config.coord_format(), config.frames_of_clip, config.features
    tower = model.vision_tower if rank == 0 else None
    if not folder:  # clips are always read as features, made once
        folder = f"{config.out}-features"
        if world == 1:
            prepare.write_features(records, folder, tower, fmt.geometry, frames, skip_bad=config.skip_bad)
        elif not Path(folder, "features.json").is_file():
            raise ValueError(
                "clips without --features in several processes; expected what the tower makes of them, made by all of them before; "
                "run prepare.py features with the same data"
            )
    features = Features(folder, fmt.side, fmt.geometry, frames, tower)
    kept = [record for record in records if features.holds(record.image)]  # refuses an image that is not there
    if lost := len(records) - len(kept):
        told = f"{lost} images or clips could not be read when {folder} was made"
        if not config.skip_bad:
            raise ValueError(
                f"{told}; expected all of the run's; mend them and make it anew, or leave them out with --skip-bad"
            )
        if rank == 0:
            print(f"left out: {told}")
    return kept, features


def main(config):
    # 1 devices and seed
    keep_freed_memory()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything asks CUDA: fsdp gathers on the current device
    if not config.dry_run:
        require_even_batches(config, world)
    if (world > 1 or config.parallel == "fsdp") and not dist.is_initialized() and not config.dry_run:
        dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    dtype = torch.bfloat16 if bf16 else torch.float32

    # 2 data and model
    without_data = config.dry_run and config.variant != "tiny" and not config.sources
    records, sources = (None, ()) if without_data else build_records(config, rank)
    fsdp = config.parallel == "fsdp" and not config.dry_run
    model = build_model(config, "meta" if fsdp and rank > 0 else "cpu")  # whole in one process only
    fmt = model.config.coord_format()
    wording = Wording(
        fmt,
        () if config.objectives == "none" else tuple(config.objectives.split(",")),
        config.location,
        config.words,
        config.neg_ratio,
    )

    frames, features = config.frames_of_clip, None
    if records and (config.features or frames and not config.dry_run):
        records, features = with_features(config, records, model, rank, world)

    def examples_of(stage):
        return Examples(
            records,
            model.tokenizer,
            model.config.vision_config,
            dataclasses.replace(wording, objectives=()) if stage == 3 else wording,  # Vid-B: conversations alone
            "plain" if stage == 1 else "v1",
            config.recipe(stage).questions,
            config.instruct_share,
            min(config.max_length, model.config.text_config.max_position_embeddings),
            config.seed,
            config.skip_bad,
            features,
            frames,
        )

    if config.dry_run:
        for stage in config.stage_list:
            dry_run(config, model, examples_of(stage) if records and model.tokenizer else None, stage)
        return
    examples = {
        stage: examples_of(stage) for stage in config.stage_list
    }  # both, so that a stage without data is told now
    run = claim_run(config) if rank == 0 else Path(config.out)
    if fsdp:
        shard(model, device, dtype)
    model.to(device)

    # 3 stages
    states = States(run, config.keep, world, rank)
    done, _ = states.newest() if config.resume else (0, 0)
    for stage in [stage for stage in config.stage_list if stage >= done]:  # what those before learned is in the last
        try:
            train_stage(config, stage, model, examples[stage], run, states, rank, world, device, dtype)
        finally:
            states.finish()
        weights = (
            get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if fsdp
            else None
        )
        if rank == 0:
            model.save_pretrained(run, weights, stage=stage, trained_with=dataclasses.asdict(config))

    # 4 evaluation, by rank 0 alone: the others would wait longer than their group allows
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        os.environ["WORLD_SIZE"] = "1"
    if rank == 0 and config.evaluate:
        evaluate_held_out(config, run, sources)


if __name__ == "__main__":
    try:
        main(parse_config(TrainConfig))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
