"""A training run on disk: its options (train.json), its log (log.jsonl), its checkpoints (state/STAGE-STEP).

A checkpoint holds the weights that learn and the optimizer. Each process writes its part while training continues; when
complete, its folder is renamed: a kill or a full disk leaves the one before. Any number of processes can read it, ddp or fsdp.
"""

import hashlib
import json
import re
import shlex
import shutil
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from data import LOC_PROMPTS, LOCATIONS
from formats.files import import_package, read_json, require_file, sha256, write_json, write_rows, writing
from formats.journal import read_journal, require_same_options, try_lock

KEEP = 2  # checkpoints; older ones are deleted
# options that may change on --resume
FREE = ("resume", "skip_bad", "dry_run", "evaluate", "out", "parallel", "recompute", "save_every", "micro_batch", "tensorboard")
LEARNED = StateDictOptions(ignore_frozen_params=True, strict=False)


def state_of(model, optimizer):
    return dict(zip(("weights", "optimizer"), get_state_dict(model, optimizer, options=LEARNED), strict=True))


def lock(path):
    """Open a file of a run. Raise ValueError if another process has it open by this function."""
    file = open(path, "a")
    if not try_lock(file, "lockf"):  # not flock, as journals: a run that failed may be resumed in the same process
        raise ValueError(f"another process trains {path.parent}; wait for it, or end it")
    return file


class RunFolder:
    """The folder of a run. Raise ValueError if it holds another run, or was started with other options than --resume has."""

    def __init__(self, config, rank, world, records=()):
        self.folder, self.state, self.rank, self.resumes = Path(config.out), Path(config.out, "state"), rank, config.resume
        why = "--tensorboard needs its package"
        self.tensorboard = config.tensorboard and rank == 0 and import_package("torch.utils.tensorboard", why, "tensorboard")
        if rank == 0:
            path, options = self.folder / "train.json", {k: v for k, v in asdict(config).items() if k not in FREE}
            options["adapter"] = config.adapter or "linear"  # as older runs note it
            files = [file for file, _, _ in config.sources] + [file for file in config.exclude.split(",") if file]
            recipes = {str(stage): asdict(config.recipe(stage)) for stage in config.stage_list}
            options["recipes"] = {stage: {k: v for k, v in of.items() if k != "compile"} for stage, of in recipes.items()}
            options["data_sha256"] = {file: sha256(file) for file in files}
            ids = hashlib.sha256(repr([record.id for record in records]).encode()).hexdigest()
            options["records"] = f"{len(records)} images (ids {ids[:8]})"  # their order depends on them all
            if config.resume:
                before = read_json(require_file(path, "the options of a run to resume"))
                if before.get("records", options["records"]) != options["records"]:
                    was, now = before["records"], options["records"]
                    fix = "`python -m tools.check` lists damaged images"
                    raise ValueError(f"{self.folder} was trained on {was}, now there are {now}; {fix}")
                defaults = {f.name: f.default for f in fields(config)}  # the run may predate an option
                require_same_options(options | defaults | before, options, self.folder)
            elif path.exists():
                raise ValueError(f"{self.folder} holds a run already; choose another --out, or continue it with --resume")
            else:
                write_json(path, options)
            self.lock = lock(path)
            for unfinished in self.state.glob("*.tmp"):
                shutil.rmtree(unfinished)
        # a group of its own: checkpoints are written while training communicates
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if world > 1 else None
        self.pending, self.bar, self.events = None, tqdm(disable=True), None

    def begin_stage(self, stage, steps, model, optimizer):
        """Load the stage's newest checkpoint, if the run is resumed and has one, and open the log. Return the first step."""
        newest_stage, newest_step = self.newest()
        first_step = newest_step if newest_stage == stage else 0
        if first_step:
            state = state_of(model, optimizer)
            dcp.load(state, checkpoint_id=self.state / f"{stage}-{first_step}", process_group=self.group)
            weights, moments = state["weights"], state["optimizer"]
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=LEARNED)
        if self.rank == 0:
            path = self.folder / "log.jsonl"  # rows of steps that will be taken again are dropped
            write_rows(path, [row for row in read_journal(path) if (row["stage"], row["step"]) < (stage, first_step)])
            self.log_file = open(path, "a", encoding="utf-8")
            # a resumed run takes steps again: their rows are purged there as well
            folder = self.folder / f"tensorboard/stage-{stage}"
            self.events = self.tensorboard and self.tensorboard.SummaryWriter(folder, purge_step=first_step)
            self.bar = tqdm(total=steps, initial=first_step, desc=f"stage {stage}", mininterval=1.0)
        return first_step

    def log(self, row):
        """Append a step's row to log.jsonl. A checkpoint that is complete by now gets its name, so that a kill cannot lose it."""
        if self.pending and self.pending[1].done():
            self.finish()
        if self.rank == 0:
            with writing(self.log_file.name):
                self.log_file.write(json.dumps(row) + "\n")
                self.log_file.flush()
            for name in ("loss", "lr", "grad_norm", "tflops") if self.events else ():
                self.events.add_scalar(name, row[name], row["step"])
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            self.bar.update()

    def end_stage(self, summary):
        self.bar.close()
        if self.rank == 0:
            print(summary)
        if self.group:
            dist.barrier()

    def complete(self):
        """List (stage, step) of the complete checkpoints, the newest last."""
        names = [path.name.split("-") for path in self.state.glob("*-*") if re.fullmatch(r"\d+-\d+", path.name)]
        return sorted((int(stage), int(step)) for stage, step in names)

    def newest(self):
        """Return (stage, step) of the checkpoint to resume from, or (0, 0)."""
        return max(self.complete(), default=(0, 0)) if self.resumes else (0, 0)

    def save(self, stage, step, model, optimizer):
        """Start writing a checkpoint. The weights are copied before this returns."""
        self.finish()
        path = self.state / f"{stage}-{step}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        # a writer of our own: the default one waits for the GPU after each 10 MB, though all of it is on the CPU by then
        how = {"checkpoint_id": path, "storage_writer": dcp.FileSystemWriter(path), "process_group": self.group}
        self.pending = path, dcp.async_save(state_of(model, optimizer), **how)

    def close(self):
        """Finish, and leave the bar's line to what is printed next."""
        self.finish()
        self.bar.close()
        if self.events:
            self.events.close()

    def finish(self):
        """Wait for the checkpoint being written, rename it, and delete the oldest beyond KEEP."""
        if not self.pending:
            return
        (path, future), self.pending = self.pending, None
        try:
            future.result()
        except (dcp.CheckpointException, OSError) as error:  # a full disk arrives wrapped in the writer's own exception
            shutil.rmtree(path, ignore_errors=True)
            why = str(error).strip().splitlines()[-1]
            raise OSError(f"{path} cannot be written ({why}); make room, then --resume from the checkpoint before") from error
        if self.rank == 0:
            path.rename(path.with_suffix(""))
            for stage, step in self.complete()[:-KEEP]:
                shutil.rmtree(self.state / f"{stage}-{step}")


def print_next(config, records, location):
    """Print what to try with a finished run: look at its page, ask it a question, train on other data."""
    page, record = Path(config.out) / "eval/report.html", next((r for r in records if r.image and r.objects), None)
    if page.is_file():
        print(f"look:  {page}")
    if record and config.stages != "1":  # which teaches no questions
        question = LOC_PROMPTS[2].format(category=record.objects[0].name, repr=LOCATIONS[location])
        print("ask:   " + shlex.join(["python", "evaluate.py", config.out, "--image", str(record.image), "--ask", question]))
    print("train: docs/data.md, on images of your own")
