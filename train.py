"""Train a LocVLM: stage 1 the adapter, stage 2 the adapter and LLaMA; on clips again, stages 3 and 4 (Sec. 3.1, 3.5, 4.1).

    torchrun train.py                                         the shapes world and the tiny model, both stages, then evaluation
    torchrun --nproc-per-node 8 train.py --stages 1 --preset paper --vision clip-vit-large-patch14 --llm vicuna-7b-v1.3 \\
        --parallel fsdp --data chat.json --images images.zip --out runs/b1
    torchrun --nproc-per-node 8 train.py --stages 2 --preset paper --init-from runs/b1 --parallel fsdp \\
        --data annotations/instances_train2017.json,llava_instruct_80k.json --images train2017 --out runs/b2
    torchrun train.py --stages 4 --init-from runs/default --out runs/video    clips: the moving shapes

A run is a folder: train.json (these options), log.jsonl (one object per step), state/ (checkpoints to --resume from, on any
number of processes that divides the batch), and the model (`LocVLM.from_pretrained(run)`). What a step draws depends on the
seed and the step alone, so a resumed run equals an uninterrupted one, and N processes see the batches of one.

    B rows of a batch   T tokens of a row   A answer tokens of a batch
"""

import argparse
import dataclasses
import math
import os
import typing
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

import evaluate
from coords import GEOMETRIES, KINDS
from data import LOCATIONS, OBJECTIVES, WORDS, Examples, Wording, marked
from formats.annotations import image_ids_of, note_fractions, parse_sources, read_records, unreadable
from formats.fast_cpu import keep_freed_memory
from formats.features import open_features
from formats.files import run_command, some
from formats.hub import is_name
from formats.images import are_faces_blurred
from formats.meter import Meter
from formats.processes import Processes, prefetched, shard, whole_state_dict
from formats.run_folder import RunFolder, print_next
from formats.schema import HARMLESS, counted
from model import ADAPTERS, LocVLM
from tiny.moving import ensure_clips
from tiny.shapes import FOLDER, LAST, ensure_side_texts, ensure_world, write_world

# ----- recipes and options


@dataclass(frozen=True)
class Recipe:
    """The numbers of one stage. `batch` counts images over all processes; each image brings up to `questions` questions."""

    batch: int
    lr: float
    warmup_ratio: float
    epochs: float = 0.0
    steps: int = 0  # instead of epochs; one of the two must be given
    questions: int = 1
    frames: int = 8  # per clip, in stages 3 and 4
    max_length: int = 2048  # tokens of a row, image included; at most LLaMA's max_position_embeddings
    instruct_share: float = 0.34  # of a row's questions, the share that come from conversations
    grad_clip: float = 1.0  # largest gradient norm
    adapter_lr_ratio: float = 1.0  # the adapter's learning rate, over LLaMA's
    compile: bool = True  # on a GPU: compiled layers and FlexAttention, which skips what packed rows mask


PRESETS = {  # to change what has no option, add a recipe here and name it with --preset
    "tiny": {  # found on the shapes world, see LOG.md
        1: Recipe(batch=16, lr=3e-3, warmup_ratio=0.1, steps=100),
        2: Recipe(batch=2, lr=3.5e-4, warmup_ratio=0.1, steps=1200, questions=4, instruct_share=0.17, adapter_lr_ratio=5.0),
        3: Recipe(batch=16, lr=1e-3, warmup_ratio=0.1, steps=100, questions=6),
        4: Recipe(batch=16, lr=1e-3, warmup_ratio=0.1, steps=260, questions=6),
    },
    # Stage 1 as LLaVA v1, stage 2 of Sec. 4.1, with its warm-up ratio of 0.3. Its batch is 64 conversations, two for an image:
    # 32 images, 29,969 steps. An epoch draws each image once, and `questions` makes it about one pass over them: PRefCOCO has
    # four descriptions per image, each for LocPred and RevLoc, and as many absent objects; a video has about eight questions
    "paper": {
        1: Recipe(batch=128, lr=2e-3, warmup_ratio=0.03, epochs=1),
        2: Recipe(batch=32, lr=2e-5, warmup_ratio=0.3, epochs=10, questions=16),
        # as Video-ChatGPT: Vid-B reads 100 frames, Vid-B+ 8
        3: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8, frames=100),
        4: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8),
    },
}
PRESETS["llava"] = PRESETS["paper"] | {2: Recipe(batch=32, lr=2e-5, warmup_ratio=0.03, epochs=3, questions=8)}


def opt(default, help):
    """Declare one option: its default and the line that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run. 0 or an empty value means the default in [brackets]."""

    out: str = opt("runs/default", "folder of the run")
    stages: typing.Literal["1", "2", "1,2", "3", "4"] = opt(
        "1,2", "1: adapter, on captions; 2: adapter and LLaMA, on questions; 3, 4: continue a stage-2 model on clips, "
        "3: adapter, on conversations (Vid-B); 4: adapter and LLaMA, on the objectives too (Vid-B+)",
    )  # fmt: skip
    resume: bool = opt(False, "continue the run from its last checkpoint")
    dry_run: bool = opt(False, "print parts, shapes and an example; train nothing, write no run")
    evaluate: bool = opt(True, "evaluate after the last stage, if a val split lies beside the data, as instances_val.json")
    # model
    vision: str = opt("", "CLIP: folder, ORG/NAME[@REVISION] on the Hugging Face hub, or OpenAI's .pt state dict [tiny/clip]")
    llm: str = opt("", "LLaMA, Vicuna or Qwen2: folder (HF's, or Meta's with params.json) or ORG/NAME[@REVISION] [tiny/llama]")
    init_from: str = opt("", "run, llava-hf or LLaVA to start from, folder or ORG/NAME (an original LLaVA may need --vision)")
    adapter: str = opt("", f"{', '.join(ADAPTERS)}, or a file of trained weights: LLaVA's mm_projector.bin [linear]")
    # data
    data: str = opt("", "annotation files, separated by commas: FILE, or FILE@IMAGES*WEIGHT [the shapes world]")
    images: str = opt("", "folder or zip of the images of every FILE without @IMAGES")
    exclude: str = opt("", "files that name COCO images to leave out (benchmarks, lists of ids), separated by commas")
    features: str = opt("", "folder made by tools.features, so that the tower need not run [images are read]")
    skip_bad: bool = opt(False, "skip and count missing, damaged or invalid data, instead of refusing to start")
    frames: int = opt(0, "frames per clip, in stages 3 and 4 [preset]")
    # questions
    objectives: str = opt("loc,neg,rev", f"any of {', '.join(OBJECTIVES)}, separated by commas; or none")
    kind: typing.Literal["", *KINDS] = opt("", "how coordinates are written [as in --init-from, else ivb]")
    geometry: typing.Literal["", *GEOMETRIES] = opt("", "how an image becomes a square [as in --init-from, else squash]")
    location: typing.Literal["", *LOCATIONS] = opt("", "what a location is [as in --init-from, else box]")
    words: typing.Literal["", *WORDS] = opt("", "objects by category (name), description, mixed [as in --init-from, else name]")
    questions: int = opt(0, "questions after each image, at most [preset]")
    # optimisation
    preset: typing.Literal[tuple(PRESETS)] = opt("tiny", "recipe; --batch, --lr, ... replace its numbers in every stage")
    batch: int = opt(0, "images per step, over all processes [preset]")
    lr: float = opt(0.0, "peak learning rate [preset]")
    steps: int = opt(0, "optimizer steps [preset]")
    seed: int = opt(0, "of data order, wording and the adapter's initial weights")
    # how it runs: changes no result but by rounding (in bf16, ddp and fsdp round differently)
    micro_batch: int = opt(0, "images per forward pass in each process; gradients accumulate [all at once]")
    precision: typing.Literal["auto", "fp32", "bf16"] = opt("auto", "of the forward pass; auto: bf16 on GPUs that have it")
    parallel: typing.Literal["ddp", "fsdp"] = opt("ddp", "ddp: a whole model per process; fsdp: weights and optimizer sharded")
    recompute: bool = opt(False, "keep only each decoder layer's input for the backward pass, and compute the layer again")
    save_every: int = opt(1000, "steps between checkpoints")
    tensorboard: bool = opt(False, "also write loss, rate, gradient norm and TFLOPs for TensorBoard: tensorboard --logdir RUN")

    def __post_init__(self):
        if self.adapter and self.adapter not in ADAPTERS and not (Path(self.adapter).exists() or is_name(self.adapter)):
            raise ValueError(f"--adapter {self.adapter} is neither one of {', '.join(ADAPTERS)} nor a file")
        if self.init_from and (self.adapter or self.llm):
            raise ValueError("--init-from loads a whole model; leave out --adapter and --llm")
        for name in ("batch", "micro_batch", "questions", "frames", "lr", "steps", "save_every", "seed"):
            least = int(name == "save_every")
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a number from {least}")
        if unknown := [name for name in self.objective_list if name not in OBJECTIVES]:
            raise ValueError(f"--objectives {', '.join(unknown)} unknown; choose of {', '.join(OBJECTIVES)}, or none")
        _ = self.sources  # checks --data and --images
        if self.frames and not self.is_about_clips:
            raise ValueError(f"--frames is for clips, in stages 3 and 4; stage {self.stages} reads images")
        if self.is_about_clips and not (self.init_from or self.dry_run):
            raise ValueError(f"stage {self.stages} starts from a trained model; pass the run of stage 2 as --init-from")

    @property
    def sources(self):
        """The annotation files: (file, images, weight) each; none for the shapes world."""
        return parse_sources(self.data, self.images)

    @property
    def stage_list(self):
        return [int(stage) for stage in self.stages.split(",")]

    @property
    def objective_list(self):
        return () if self.objectives == "none" else tuple(name.strip() for name in self.objectives.split(","))

    @property
    def is_about_clips(self):
        return self.stages in ("3", "4")

    def recipe(self, stage):
        """Return the preset's recipe for a stage, with this run's options."""
        changes = {name: getattr(self, name) for name in ("batch", "lr", "steps", "questions", "frames")}
        return dataclasses.replace(PRESETS[self.preset][stage], **{k: v for k, v in changes.items() if v})

    def settings(self):
        """Return the settings of LocVLMConfig that this run fixes."""
        names = ("kind", "geometry", "location", "words")
        frames = self.recipe(self.stage_list[0]).frames if self.is_about_clips else 0
        return {name: getattr(self, name) for name in names if getattr(self, name)} | {"frames": frames}


def parse_config(cls, argv=None):
    """Build the dataclass `cls` from command-line options, one per field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        flag = "--" + f.name.replace("_", "-")
        how = {"default": f.default, "help": f.metadata["help"] + (f" (default: {f.default})" if f.default else "")}
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
        elif typing.get_origin(f.type) is typing.Literal:
            choices = [v for v in typing.get_args(f.type) if v]
            parser.add_argument(flag, choices=choices, metavar=" | ".join(choices), **how)
        else:
            parser.add_argument(flag, type=f.type, **how)
    return cls(**vars(parser.parse_args(argv)))


# ----- one stage


def lr_at(step, steps, lr, warmup_ratio):
    """Return the learning rate of a step: linear warm-up over a share of the steps, then half a cosine down to 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def unfreeze(model, stage):
    """Let the adapter learn, in stages 2 and 4 LLaMA too, and freeze the rest. Return {name: parameter}."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("adapter.") or (name.startswith("language_model.") and stage in (2, 4)))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(parameters, adapter_lr_ratio=1.0):
    """Return AdamW without weight decay, as LLaVA's, and for each of its groups what multiplies the learning rate."""
    groups = {}  # ratio: parameters
    for name, p in parameters.items():
        groups.setdefault(adapter_lr_ratio if name.startswith("adapter.") else 1.0, []).append(p)
    return torch.optim.AdamW([{"params": ps} for ps in groups.values()], lr=0.0, weight_decay=0.0, fused=True), list(groups)


def micro_batches_of(step, examples, recipe, micro_batch, processes):
    """Draw this process's share of a step's batch: every world-th image, in pieces of micro_batch images."""
    samples = list(range(step * recipe.batch + processes.rank, (step + 1) * recipe.batch, processes.world))
    size = micro_batch or len(samples)
    drawn = [examples.batch(samples[i : i + size]) for i in range(0, len(samples), size)]
    return [(processes.pinned(batch), ids) for batch, ids in drawn]


def train_stage(config, stage, model, examples, run, processes):
    """Train one stage, from its beginning or from its last checkpoint."""
    # 1 what learns, and from where
    recipe = config.recipe(stage)
    steps = recipe.steps or math.ceil(recipe.epochs * examples.epoch_length / recipe.batch)
    parameters = unfreeze(model, stage)
    processes.begin_stage(model)  # fsdp must know which parameters learn now
    optimizer, ratios = make_optimizer(parameters, recipe.adapter_lr_ratio)
    first_step = run.begin_stage(stage, steps, model, optimizer)  # with --resume, loads the newest checkpoint into both
    for layer in model.language_model.layers:
        layer.recompute = config.recompute
    if recipe.compile and processes.device.type == "cuda":
        model.language_model.compile_layers()
    parallel = processes.wrap(model)
    meter = Meter(model.config, stage, processes.device, runs_tower=not examples.features)
    faces_blurred = are_faces_blurred(config.sources)
    draw = partial(micro_batches_of, examples=examples, recipe=recipe, micro_batch=config.micro_batch, processes=processes)

    # 2 the loop
    for step, micro_batches in enumerate(meter.waiting(prefetched(draw, first_step, steps)), start=first_step):
        lr = lr_at(step, steps, recipe.lr, recipe.warmup_ratio)
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = lr * ratio

        # the loss is the mean over all A answer tokens of the step, in whichever micro-batch and process they are
        answer_tokens = processes.sum(sum(batch["targets"].shape[1] for batch, _ in micro_batches))
        loss_sum = 0.0
        for i, (batch, _) in enumerate(micro_batches):
            meter.count(batch)
            batch = {k: v.to(processes.device, non_blocking=True) for k, v in batch.items() if v is not None}
            with processes.accumulate(parallel, is_last=i == len(micro_batches) - 1):
                with processes.autocast():
                    loss = parallel(**batch, reduction="sum")  # (B, T) ids -> a sum over its answer tokens
                (loss * processes.world / answer_tokens).backward()  # DDP averages over processes; we want the sum
            loss_sum += loss.detach().double()

        mean_loss = (processes.sum(loss_sum) / answer_tokens).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.grad_clip)
        grad_norm = float(grad_norm.full_tensor() if processes.is_fsdp else grad_norm)
        row = {"stage": stage, "step": step, "loss": mean_loss, "lr": lr, "grad_norm": grad_norm}
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            stop_run(row, micro_batches, run, processes)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3 what to keep
        row |= {"answer_tokens": int(answer_tokens), **meter.row()}
        row |= {"faces_blurred": faces_blurred, "unreadable": int(processes.sum(len(examples.unreadable)))}
        run.log(row)  # rank 0 writes it
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            run.save(stage, step + 1, model, optimizer)
    run.end_stage(meter.summary())


def stop_run(row, micro_batches, run, processes):
    """Stop at a loss or gradient that is not finite, and say where."""
    ids = [i for _, ids in micro_batches for i in ids]
    raise FloatingPointError(
        f"loss {row['loss']}, gradient norm {row['grad_norm']} at stage {row['stage']}, step {row['step']}, lr {row['lr']:.3g}"
        f", process {processes.rank}, images {ids}; start again with a lower --lr and another --out, or look at these images "
        "with python -m tools.show"
    )


# ----- data and model


def build_records(config, processes):
    """Read the records to train on; without --data those of the shapes or, for clips, the moving world, written if missing.
    Invalid files are refused before training, or skipped and counted with --skip-bad."""
    sources = config.sources or world_sources(config, processes)
    if processes.rank == 0:
        print("reading " + ", ".join(path for path, *_ in sources))
    records, skipped = read_records(sources, image_ids_of(config.exclude))
    bad = processes.from_first(partial(unreadable, records))
    records = [record for record in records if record.image not in bad]
    wrong = {reason: count for reason, count in skipped.items() if not reason.startswith(HARMLESS)}
    clips = [record.id for record in records if record.is_clip]
    if clips and not config.is_about_clips:
        raise ValueError(f"{len(clips)} records are about clips ({some(clips)}), stages 1 and 2 read images; use --stages 3")
    if (bad or wrong) and not config.skip_bad:
        examples = [*bad.values()][:3] + [f"{count} {reason}" for reason, count in wrong.items()]
        problem = f"{len(bad)} images and {sum(wrong.values())} annotations cannot be used: {'; '.join(examples)}"
        raise ValueError(f"{problem}; list all with `python -m tools.check`, or skip them with --skip-bad")
    skipped["images that cannot be read"] = len(bad)
    if processes.rank == 0:
        if are_faces_blurred(config.sources) is False and not config.dry_run:
            print("faces are not blurred in all of these images; the paper blurs them first (App. C): python -m tools.blur")
        count = Counter("clips" if r.is_clip else "images" if r.image else "texts" for r in records)
        count["unique objects"] = sum(len(r.objects) for r in records)
        found = ", ".join(f"{number} {kind}" for kind, number in count.items())
        print(found, *counted(skipped).splitlines(), sep="; ")
    return records, sources


def world_sources(config, processes):
    """Return the sources of the default data, which rank 0 writes if it is missing."""
    if config.is_about_clips:
        folder, images, files = processes.from_first(ensure_clips), "clips", ["clips_train.json"]
    else:
        c, folder, images = build_model(config, "meta").config, processes.from_first(ensure_world), "images"
        wording = Wording(c.coord_format(), location=c.location)  # how texts write places
        texts = processes.from_first(partial(ensure_side_texts, folder, wording))
        files = ["instances_train.json", "captions_train.json", texts]
    return [(str(folder / file), str(folder / images), 1.0) for file in (*files, "conversations_train.json")]


def build_model(config, device="cpu"):
    """Load the model that a run starts from; on the meta device, its shapes alone. Layers of your own are put in here."""
    torch.manual_seed(config.seed)
    if config.init_from:
        model = LocVLM.from_pretrained(config.init_from, config.vision or None, device=device)
        model.config = dataclasses.replace(model.config, **config.settings())
    else:
        tiny = Path(__file__).parent / "tiny"
        parts = config.vision or tiny / "clip", config.llm or tiny / "llama"
        model = LocVLM.from_parts(*parts, config.adapter or "linear", device=device, **config.settings())
    return model


def build_examples(config, stage, records, model, features=None):
    """Make the training rows of a stage."""
    c, recipe = model.config, config.recipe(stage)
    objectives = config.objective_list if stage != 3 else ()  # Vid-B: conversations alone
    return Examples(
        records, model.tokenizer, c, Wording(c.coord_format(), objectives, c.location, c.words),
        template="plain" if stage == 1 else "v1",
        questions=recipe.questions,
        instruct_share=recipe.instruct_share,
        max_length=min(recipe.max_length, c.text_config.max_position_embeddings),
        seed=config.seed,
        skip_bad=config.skip_bad,
        features=features,
    )  # fmt: skip


def print_parts(config, stage, model):
    """Print a stage's recipe, and which parts of the model it trains, see `unfreeze`."""
    print(f"\nstage {stage}: {config.recipe(stage)}")
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        learned = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"  {name:15} {count:>14,} parameters, " + (f"{learned:,} trained" if learned else "frozen"))


def dry_run(config, processes):
    """Print what each stage would do, and write no run. Without data, a few shapes are painted in a temporary folder."""
    with TemporaryDirectory() as folder:
        if not config.sources and not config.is_about_clips and not Path(FOLDER, LAST).is_file():
            write_world(folder, {"train": 16})
            files = ",".join(f"{folder}/{kind}_train.json" for kind in ("instances", "captions", "conversations"))
            config = dataclasses.replace(config, data=files, images=f"{folder}/images")
        records, _ = build_records(config, processes)
        model = build_model(config)
        for stage in config.stage_list:
            examples, recipe = build_examples(config, stage, records, model), config.recipe(stage)
            unfreeze(model, stage)
            print_parts(config, stage, model)
            drawn = map(examples.order, range(4 * examples.epoch_length))  # the first with an image, if there is one
            index, text_seed = next((pair for pair in drawn if examples.records[pair[0]].image), (0, 0))
            record = examples.records[index]
            print(f"  {record.image} {record.size} px\n  {marked(model.tokenizer, examples.text_row(record, text_seed))}")
            if config.is_about_clips:
                print("  clips are opened when their features are made")
                continue
            batch, _ = examples.batch(range(min(recipe.batch, 4)))
            print("  a batch: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if v is not None))
            patches = model.vision_tower(batch["pixel_values"])
            visual = model.adapter(patches)
            print(f"  patches {tuple(patches.shape)} -> adapter -> {tuple(visual.shape)} -> LLaMA -> loss {model(**batch):.3f}")


# ----- the run


def held_out_of(path, images):
    """Find the val split beside a train split, as COCO and the shapes worlds name it: (annotations, images), or None."""
    val = Path(path).with_name(Path(path).name.replace("_train", "_val"))
    if not val.name.startswith(("instances", "clips")) or val == Path(path) or not val.is_file():
        return None
    folder = Path(images).parent / Path(images).name.replace("train", "val")  # train2017 -> val2017; images stays
    return str(val), str(folder if folder.exists() else images)


def evaluate_held_out(config, sources):
    """Evaluate a run on the val splits beside its data. Training is done by then, so problems are only reported."""
    for path, images, _ in sources:
        if held_out := held_out_of(path, images):
            data = ["--coco", held_out[0], "--images", held_out[1]] if config.sources else []  # none: the shapes world
            try:
                evaluate.main([config.out, *data, "--limit", "200"])
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                print(f"not evaluated: {error}; evaluate.py can try again, perhaps with --batch 32")


def main(config):
    # 1 devices and seed
    keep_freed_memory()
    processes = Processes.start(config)
    if config.dry_run:
        return dry_run(config, processes)

    # 2 data and model
    records, sources = build_records(config, processes)
    if processes.rank == 0:
        print(f"loading {config.init_from or 'the tower and LLaMA'}; {processes}")
    device = ("cpu" if processes.rank == 0 else "meta") if processes.is_fsdp else processes.device  # fsdp: rank 0 reads
    model = build_model(config, device)
    if processes.rank == 0:
        note_fractions(records, model.config.geometry)
    features = None
    if config.features or config.is_about_clips:
        records, features = open_features(config, records, model, processes)
    # the rows of all stages first, so that a stage without data fails now
    examples = {stage: build_examples(config, stage, records, model, features) for stage in config.stage_list}
    for stage, of_stage in examples.items():
        if of_stage.left_out and processes.rank == 0:
            print(f"skipped: {of_stage.left_out} conversations of stage {stage}: too long for a row")
    run = RunFolder(config, processes.rank, processes.world, records)
    if processes.is_fsdp:
        shard(model, processes)
    model.to(processes.device)

    # 3 stages
    for stage in [stage for stage in config.stage_list if stage >= run.newest()[0]]:  # those before it are done
        try:
            train_stage(config, stage, model, examples[stage], run, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("add --resume to continue from the last checkpoint") from None
        finally:
            run.close()
        weights = whole_state_dict(model) if processes.is_fsdp else model.state_dict()
        if processes.rank == 0:
            model.save_pretrained(run.folder, weights, stage=stage, trained_with=dataclasses.asdict(config))

    # 4 evaluation, by rank 0 alone: the others would wait longer than their group allows
    if processes.world > 1:
        dist.barrier()
        dist.destroy_process_group()
        os.environ["WORLD_SIZE"] = "1"  # so that evaluate.main waits for no other process
    torch.backends.cuda.enable_math_sdp(True)  # off since Processes.start: some GPUs have no other kernel for generation
    if processes.rank == 0:
        if config.evaluate:
            evaluate_held_out(config, sources)
        print_next(config, records, model.config.location)


if __name__ == "__main__":
    run_command("train.py", lambda: main(parse_config(TrainConfig)), "--out; --resume continues a run")
