"""Training in one or several processes (DDP, or sharded by FSDP2); precision; prefetching. Read train.train_stage first."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

DRIVER = Path("/proc/driver/nvidia/version")


def pick_device(number=0):
    """Return GPU `number`, or the CPU of a machine without GPUs. Raise ValueError if PyTorch cannot use the GPUs' driver."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(number))
    if torch.version.cuda and DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        fix = "install a PyTorch for the driver's CUDA (nvidia-smi shows it), or set CUDA_VISIBLE_DEVICES= to use the CPU"
        raise ValueError(f"PyTorch for CUDA {torch.version.cuda} cannot use this machine's NVIDIA driver; {fix}")
    return torch.device("cpu")


def has_bf16():
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Processes:
    """Where this process runs, and the dtype of the forward pass. With one process and fp32, no method changes a number."""
    rank: int
    world: int  # number of processes
    device: torch.device
    dtype: torch.dtype
    is_fsdp: bool

    @classmethod
    def start(cls, config):
        """Read torchrun's environment and join the other processes. Raise ValueError if they cannot share the batch evenly."""
        env = os.environ
        world, rank, device = int(env.get("WORLD_SIZE", 1)), int(env.get("RANK", 0)), pick_device(env.get("LOCAL_RANK", 0))
        cuda = device.type == "cuda"
        if cuda:
            env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows of many lengths leave no gaps
            torch.cuda.set_device(device)  # before anything asks CUDA: fsdp gathers on the current device
            torch.backends.cuda.enable_math_sdp(False)  # attention that no fused kernel takes raises an error, and takes no GiBs
        for stage in () if config.dry_run else config.stage_list:
            require_even(config.recipe(stage).batch, world)
        is_fsdp = config.parallel == "fsdp" and not config.dry_run
        if (world > 1 or is_fsdp) and not dist.is_initialized() and not config.dry_run:
            # an hour: reading a million annotations or writing 27 GB keeps the others waiting
            dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timedelta(hours=1))
        bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16())
        return cls(rank, world, device, torch.bfloat16 if bf16 else torch.float32, is_fsdp)

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.world} x {name}, {str(self.dtype).removeprefix('torch.')}, {'fsdp' if self.is_fsdp else 'ddp'}"

    def from_first(self, make):
        """Return make() of rank 0 to all processes."""
        made = [make() if self.rank == 0 or not dist.is_initialized() else None]
        if dist.is_initialized():
            dist.broadcast_object_list(made, device=torch.device("cpu"))
        return made[0]

    def sum(self, value):
        """Sum a number over all processes: a float64 tensor on the device."""
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def pinned(self, batch):
        """Move a batch where a GPU can fetch it while it computes."""
        return batch if self.device.type == "cpu" else {k: v.pin_memory() for k, v in batch.items() if v is not None}

    def begin_stage(self, model):
        """Let FSDP see which parameters learn now: else it keeps the dtypes of the first stage's gradients (pytorch 186998)."""
        for part in model.modules():
            if hasattr(part, "unshard"):  # FSDP wrapped it
                part.unshard()
                part.reshard()

    def wrap(self, model):
        """Average gradients over processes (DDP). FSDP does it by itself, see `shard`."""
        is_alone = self.world == 1 or self.is_fsdp
        return model if is_alone else DistributedDataParallel(model, gradient_as_bucket_view=True)

    def accumulate(self, parallel, is_last):
        """Let DDP average gradients once per step. FSDP does after each micro-batch: no process holds them whole."""
        return nullcontext() if is_last or self.world == 1 or self.is_fsdp else parallel.no_sync()

    def autocast(self):
        """Compute in bf16 if asked; weights stay float32. FSDP casts by itself."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32 and not self.is_fsdp)


def prefetched(make, first, last, workers=2):
    """Yield make(i) for first <= i < last; threads prepare the next ones meanwhile."""
    # One OpenMP thread each: more slow the step by a quarter (LOG.md). set_num_threads also changes the default of threads that
    # have not computed yet, so the caller's own count is fixed first, by asking for it
    torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = []
        for i in range(first, last + workers):
            if i < last:
                pending.append(pool.submit(make, i))
            if i >= first + workers:
                yield pending.pop(0).result()


def require_even(batch, world):
    if batch % world:
        raise ValueError(f"batch {batch} does not divide by {world} processes; use --batch {max(1, round(batch / world)) * world}")


def require_untied(config):
    if config.tie_word_embeddings:
        raise ValueError("fsdp cannot train a LLaMA whose head is its embedding; use --parallel ddp")


def shard(model, processes):
    """Split a model over all processes by layer (FSDP2), and copy rank 0's weights there; other ranks' may be on "meta".
    Weights, gradients and their sums stay float32; layers compute in processes.dtype."""
    # imported here, as evaluate.py starts a second sooner without
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    require_untied(model.config.text_config)
    weights = model.state_dict() if processes.rank == 0 else {}
    model.to("meta")
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy(None if processes.dtype == torch.float32 else processes.dtype, torch.float32)
    tower = model.vision_tower.encoder["layers"][:-1]  # the last one never runs
    for part in [*tower, *model.language_model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=processes.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def whole_state_dict(model):
    """Gather a sharded model's weights on rank 0's CPU. All processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
