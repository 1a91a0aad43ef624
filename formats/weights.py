"""Weight files and configs on disk: read lazily and strictly, under every name they go by; written whole.

A checkpoint is a folder of the Hugging Face hub: `config.json` beside `model.safetensors` or `pytorch_model.bin`, or beside
shards that an index file lists; or it is one file. `open_tensors` gives every tensor's name and shape at once and its
contents when asked, `sort_tensors` says which part of a LLaVA each name belongs to, `build` makes a module of them: a
piece of one tensor is in memory at a time beside what is kept (of Meta's queries and keys, the whole tensor).
"""

import hashlib
import json
import os
import pickle
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

PIECE_BYTES = 2**24  # read at once, in float32
SHARD_BYTES = 5 * 10**9  # larger checkpoints are written in shards, as the hub's are


# ----- reading


def require_file(path, expected):
    """Refuse a file that is not there, or stands there as a Git LFS pointer only."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected {expected}; check the path, or download it again")
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer; expected the file it points to; run `git lfs pull` there")
    return path


def read_config(folder, name="config.json"):
    """Read a folder's config.json as a dict."""
    return read_json(require_file(Path(folder) / name, "a checkpoint folder, with its config beside the weights"))


def read_json(path):
    """Read a JSON file, naming it where it is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); expected a complete file; was its download or copy cut short?"
        ) from None


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, known at once, and `read_rows(start, stop)`, which gives some of its contents."""

    shape: tuple
    read_rows: Callable[[int, int], torch.Tensor]
    path: Path

    def read(self):
        return self.read_rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start, stop):
        """Some of its rows, still in the file."""
        return Stored((stop - start, *self.shape[1:]), lambda a, b: self.read_rows(start + a, start + b), self.path)


def open_tensors(path):
    """Open a checkpoint folder, or one .safetensors, .bin, .pt or .pth file: name -> Stored. No contents are read yet."""
    stored = {}
    files, weight_map = find_weights(path)
    for file in files:
        stored.update(open_file(file))
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise ValueError(
            f"{path}: the index lists {some(absent)}; expected them in the shards it names; the files are of two versions: "
            "download them again"
        )
    return stored


def find_weights(path):
    """Find the files that hold a checkpoint's weights: (their paths, tensor name -> file where an index says it, else {})."""
    path = Path(path)
    if path.is_file():
        return [path], {}
    for name in ("model.safetensors", "pytorch_model.bin", "mm_projector.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(require_file(index, "the list of shards")).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map; expected tensor name -> file; download it again")
            expected = f"every shard that {index.name} lists"
            return [require_file(path / shard, expected) for shard in sorted(set(weight_map.values()))], weight_map
        if (path / name).is_file():
            return [path / name], {}
    shards = sorted(path.glob("*-of-*.safetensors")) + sorted(path.glob("*-of-*.bin"))
    hint = f"; {shards[0].name} is there, its *.index.json is not" if shards else ""
    raise FileNotFoundError(
        f"no weights in {path}{hint}; expected model.safetensors, pytorch_model.bin, or shards with their index; "
        "check the path, or complete the download"
    )


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path):
    """What pins a model: file name -> sha256 of its config and weights. A path may be a single file."""
    expected = "a model: config.json beside its weights"
    about = [] if Path(path).is_file() else [require_file(Path(path) / "config.json", expected)]
    return {file.name: sha256(require_file(file, expected)) for file in [*about, *find_weights(path)[0]]}


def open_file(path):
    """Open one weight file: name -> Stored."""
    path = require_file(path, "a weight file")
    if path.suffix != ".safetensors":
        return TorchFile(path).stored()
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); expected one; download or copy it again"
        ) from None

    def read_rows(name, start, stop):
        with safe_open(path, "pt") as file:  # opened anew each time: pages of an open file count as our memory
            return file.get_slice(name)[start:stop] if shapes[name] else file.get_tensor(name)

    return {name: Stored(shape, partial(read_rows, name), path) for name, shape in shapes.items()}


class TorchFile:
    """A file that torch.save wrote, mapped into memory and read without running what its pickle says."""

    RENEW = 2**26  # bytes read until the mapping is made anew, so that pages read do not add up

    def __init__(self, path):
        self.path, self.given = path, 0
        self.tensors = self.load()

    def load(self):
        expected = "tensors saved by torch.save, and nothing else"
        how = {"map_location": "cpu", "weights_only": True}
        try:
            try:
                content = torch.load(self.path, mmap=True, **how)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(self.path, **how)  # the format before torch 1.6 cannot be mapped
        except pickle.UnpicklingError as error:
            wants = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(
                f"{self.path} is a pickle that wants {wants[1] if wants else 'more than tensors'}; expected {expected}; it "
                "could run any code, so it is not read: get the weights as safetensors"
            ) from None
        except (RuntimeError, EOFError, ValueError) as error:
            what = "a TorchScript archive" if "TorchScript" in str(error) else "cut short, or no such file"
            raise ValueError(
                f"{self.path} is {what}; expected {expected}; download it again, or save a TorchScript archive's "
                "state_dict() with torch.save"
            ) from None
        if not isinstance(content, dict) or not any(torch.is_tensor(value) for value in content.values()):
            raise ValueError(
                f"{self.path} holds {type(content).__name__}; expected {expected}, by name; save a state_dict"
            )
        return {name: value for name, value in content.items() if torch.is_tensor(value)}

    def read_rows(self, name, start, stop):
        if self.given > self.RENEW:
            self.tensors, self.given = None, 0
            self.tensors = self.load()
        tensor = self.tensors[name]
        rows = tensor[start:stop] if tensor.ndim else tensor
        self.given += rows.nbytes
        return rows

    def stored(self):
        return {
            name: Stored(tuple(tensor.shape), partial(self.read_rows, name), self.path)
            for name, tensor in self.tensors.items()
        }


# ----- names

# Full names of the tensors of a LLaVA, its CLIP or its LLaMA alone, in every naming on disk: HF's CLIP and LLaMA, LLaVA's
# own (model.mm_projector.0), llava-hf's (language_model.model.), transformers 4.52's (model.language_model.) and 5's (no
# vision_model). What the last group matches is our name within the part.
NAMES = {
    "vision_tower": r"(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
    "adapter": r"(?:model\.)?(?:mm_projector|multi_modal_projector)\.(.+)",
    "language_model": r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:layers|embed_tokens|norm|lm_head)\..+)",
}
IGNORED = r"(.+\.)?(position_ids|rotary_emb\.inv_freq)|(text_model|text_projection|visual_projection)\..+|text_projection|logit_scale"
ADAPTER = {"0": "linear_1", "2": "linear_2", "weight": "linear_1.weight", "bias": "linear_1.bias"}  # LLaVA's -> ours


def sort_tensors(stored, source):
    """Sort name -> Stored into the three parts, under our names: {"vision_tower": {name: Stored}, ...}."""
    parts, foreign = {part: {} for part in NAMES}, []
    for name, tensor in stored.items():
        if re.fullmatch(IGNORED, name):
            continue
        for part, pattern in NAMES.items():
            if found := re.fullmatch(pattern, name):
                first, dot, rest = found[1].partition(".")
                parts[part][(ADAPTER.get(first, first) if part == "adapter" else first) + dot + rest] = tensor
                break
        else:
            foreign.append(name)
    if foreign:
        raise ValueError(
            f"{source}: {some(sorted(foreign))} belong to no part; expected the names of a CLIP, a LLaMA or a LLaVA; "
            "is this another model's file?"
        )
    return parts


def some(names):
    """Five of the names, then a count."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class SkipInit(TorchFunctionMode):
    """Draw no first weights: they are filled, and drawing on the meta device imports a second's worth of modules."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(make, stored, source, dtype=torch.float32, device="cpu"):
    """Make a module and fill it from name -> Stored, strictly, at the price of its own size and a piece of a tensor.

    make    a function that gives the module; it is called under the meta device, so nothing is allocated or drawn
    device  "meta" checks all but the contents, and reads none
    source  what to call the checkpoint in an error: every tensor that is missing, unexpected, of another shape or not
            finite is named
    """
    with torch.device("meta"), SkipInit():
        module = make()
    wanted = module.state_dict()
    complaints = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {stored[name].shape}, expected {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & stored.keys())
            if stored[name].shape != tuple(wanted[name].shape)
        ],
    }
    for what, names in complaints.items():
        if names:
            raise ValueError(
                f"{source}: {len(names)} tensors {what}: {some(names)}; "
                "expected what config.json describes; is this another model's file or config?"
            )
    if torch.device(device).type == "meta":
        return module
    filled, same = {}, {}
    for name in wanted:
        if stored[name] in same:  # a tied head: one tensor under two names
            filled[name] = filled[same[stored[name]]]
            continue
        same[stored[name]] = name
        filled[name] = torch.empty(stored[name].shape, dtype=dtype, device=device)
        rows = max(1, PIECE_BYTES // (4 * max(1, wanted[name][0].numel())))
        for start in range(0, len(filled[name]), rows):
            piece = stored[name].read_rows(start, min(start + rows, len(filled[name])))
            if not torch.isfinite(piece).all():
                raise ValueError(
                    f"{stored[name].path}: {name} holds NaN or infinity; expected finite weights; the file is damaged, "
                    "or its training went wrong"
                )
            filled[name][start : start + rows] = piece
    module.load_state_dict(filled, assign=True)
    return module


# ----- writing


def write_whole(path, write):
    """Call write(temporary path), then rename: the file at `path` is either the old one or a whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # as any new file; safetensors makes its own private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def write_tensors(path, tensors, shard_bytes=SHARD_BYTES):
    """Write name -> tensor as one safetensors file, or above `shard_bytes` as shards and their index beside them.

    A kill leaves the one file that was there, or shards without an index, which `find_weights` refuses: never a mixture.
    """
    path = Path(path)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach()
        size += tensor.nbytes

    def write(path, shard):
        shard = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        write_whole(path, lambda temporary: save_file(shard, temporary, metadata={"format": "pt"}))

    index = path.with_name(path.name + ".index.json")
    index.unlink(missing_ok=True)  # first: without it, shards old and new are never read as one model
    if len(shards) == 1:
        return write(path, shards[0])
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        write(path.with_name(name), shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    path.unlink(missing_ok=True)


# ----- what a kill may interrupt


def read_journal(path):
    """The objects of a file of JSON lines; a last line that a kill cut short is not there."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else ()
    return [json.loads(line) for line in lines]


def open_journal(path):
    """Open a file of JSON lines to go on with, for this run alone, without what a kill left of its last line."""
    import fcntl  # not on Windows

    file = open(path, "ab")
    for _ in range(50):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            return file
        except BlockingIOError:
            time.sleep(0.1)  # helpers of a run just killed may still hold it, see `end_with_parent`
    raise ValueError(f"{path} is being written by another run; expected one at a time; wait for that one, or end it")


def write_line(file, row):
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def end_with_parent():
    """Let this process end with the one that started it, even where that one is killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_processes():
    """Join the other processes of torchrun for work in parts: (rank, world, wait for all). One, where another program calls."""
    world = 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, lambda: None
    end_with_parent()  # a torchrun that is killed leaves its processes
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # for barriers, which wait for the slowest
    return dist.get_rank(), world, dist.barrier


def remove_temporary(paths):
    """Remove what `write_whole` leaves of a file when it is killed."""
    for path in paths:
        if path.suffix.startswith(".tmp"):
            path.unlink()
