"""Weight files: read lazily and strictly, under every naming in use; written whole or not at all."""

import math
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from formats.files import naming, read_config, require_file, sha256, some, write_json, write_whole, writing
from formats.hub import local

PIECE_BYTES = 2**24  # read at once, in float32
SHARD_BYTES = 5 * 10**9  # larger checkpoints are written in shards, as the hub's are
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NO_WEIGHTS = {  # files of a folder without weights of its own, and what it is
    "adapter_config.json": "a LoRA; merge it into its base model first, and save that",
    "*.gguf": "GGUF, quantised for llama.cpp; get the original safetensors",
    "*.pth": "Meta's shards without their params.json; download that too",
    "*-of-*.*": "but no *.index.json; download that too",
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and `read_rows(start, stop)` to read some of its rows."""
    shape: tuple
    read_rows: Callable[[int, int], torch.Tensor]
    path: Path

    def read(self):
        return self.read_rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start, stop):
        """Return some of its rows as a Stored, still unread."""
        return Stored((stop - start, *self.shape[1:]), lambda a, b: self.read_rows(start + a, start + b), self.path)


def open_tensors(path):
    """Open a checkpoint folder, or one .safetensors, .bin, .pt or .pth file: {name: Stored}. Contents are read later."""
    tensors = {}
    for file in find_weights(path):
        of_file = open_file(file)
        if twice := tensors.keys() & of_file.keys():
            raise ValueError(f"{file} holds {some(sorted(twice))}, and so does another file of {path}; download them again")
        tensors |= of_file
    return tensors


def openclip_path(path):
    """Return open_clip's weights in a folder or a model on the hub; None if it has HF's config, or no config of open_clip's."""
    folder = local(path, "config.json", "open_clip_config.json")
    if not (folder / "open_clip_config.json").is_file():
        return None
    if (folder / "config.json").is_file() and "model_type" in read_config(folder):
        return None  # HF's, which has its own weights beside it
    files = (local(path, name) / name for name in OPEN_CLIP)  # the second is not downloaded if there is the first
    return require_file(next(filter(Path.is_file, files), folder / OPEN_CLIP[0]), "open_clip's weights")


def find_weights(path):
    """Find the files that hold a checkpoint's weights: their paths. A tensor that they lack is found missing by `build`."""
    source, path = path, Path(path)
    if re.search(r"delta-v\d", path.name):
        raise ValueError(f"{path} holds the difference to LLaMA's weights; add it to them first (FastChat's apply_delta)")
    if file := path if path.is_file() else openclip_path(source):
        return [file]
    for name in ("model.safetensors", "pytorch_model.bin", "mm_projector.bin", *OPEN_CLIP):
        path = local(source, name, f"{name}.index.json", name.replace(".", "-*-of-*."))
        index = path / f"{name}.index.json"
        if (path / name).is_file():  # before an index, which may be left over: so does transformers
            return [path / name]
        if index.is_file():
            weight_map = read_config(path, index.name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map; download it again")
            return [require_file(path / shard, f"all shards of {index.name}") for shard in sorted(set(weight_map.values()))]
    for pattern, what in NO_WEIGHTS.items():
        for found in sorted(path.glob(pattern))[:1]:
            raise FileNotFoundError(f"no weights in {path}; it has {found.name}, {what}")
    raise FileNotFoundError(f"no weights in {path}; it needs model.safetensors, pytorch_model.bin, or an index")


def weights_sha256(path):
    """Hash what identifies a model: {file name: sha256} of its config and weights. A path may be a single file."""
    if Path(path).is_file():
        return {Path(path).name: sha256(path)}
    name = "open_clip_config.json" if openclip_path(path) else "config.json"
    config = require_file(local(path, name) / name, "a model: its config and weights")
    return {file.name: sha256(file) for file in (config, *find_weights(path))}


def open_file(path):
    """Open one weight file: {name: Stored}."""
    path = require_file(path, "a weight file")
    if path.suffix != ".safetensors":
        return open_torch(path)
    with naming(path, SafetensorError), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read_rows(name, start, stop):
        with safe_open(path, "pt") as file:  # opened again each time: pages of an open file count as our memory
            return file.get_slice(name)[start:stop] if shapes[name] else file.get_tensor(name)
    return {name: Stored(shape, partial(read_rows, name), path) for name, shape in shapes.items()}


def rows_of(tensor, start, stop):
    return tensor[start:stop] if tensor.ndim else tensor  # a scalar has no rows


def open_torch(path):
    """Map a file that torch.save wrote into memory, without running any code in its pickle: {name: Stored}."""
    try:  # files from before torch 1.6 are no zips, and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is a pickle that wants more than tensors: it could run any code; get safetensors") from None
    except (RuntimeError, EOFError, ValueError) as error:
        script = "a TorchScript archive; save its state_dict() with torch.save"
        raise ValueError(f"{path} is {script if 'TorchScript' in str(error) else 'damaged; download it again'}") from None
    tensors = {k: v for k, v in content.items() if torch.is_tensor(v)} if isinstance(content, dict) else None
    if not tensors:
        keys = f" of {some([*map(str, content)])}" if isinstance(content, dict) and content else ""
        raise ValueError(f"{path} holds a {type(content).__name__}{keys}, no tensors by name; save the state_dict alone")
    return {name: Stored(tuple(tensor.shape), partial(rows_of, tensor), path) for name, tensor in tensors.items()}


# Tensor names of a LLaVA, or of its CLIP or LLaMA alone, in every naming: HF's, LLaVA's own (model.mm_projector.0), llava-hf's
# (language_model.model.), transformers 4.52's (model.language_model.) and 5's (no vision_model). The group of a part: our name.
NAMES = re.compile(r"""(?:model\.)?(?:
    (?:vision_tower\.)*(?:vision_model\.)?(?P<vision_tower>(?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)
    |(?:mm_projector|multi_modal_projector)\.(?P<adapter>.+)
    |(?:language_model\.)?(?:model\.)?(?P<language_model>(?:layers|embed_tokens|norm|lm_head)\..+))""", re.VERBOSE)
IGNORED = r"(.+\.)?(position_ids|rotary_emb\.inv_freq)|(text_model|visual_projection)\..+|text_projection(\..+)?|logit_scale"
ADAPTER = {"0": "linear_1", "2": "linear_2", "weight": "linear_1.weight", "bias": "linear_1.bias"}  # LLaVA's -> ours


def sort_tensors(stored, source):
    """Sort {name: Stored} into the three parts, under our names: {"vision_tower": {name: Stored}, ...}."""
    parts, names = {part: {} for part in NAMES.groupindex}, [name for name in stored if not re.fullmatch(IGNORED, name)]
    if foreign := sorted(name for name in names if not NAMES.fullmatch(name)):
        raise ValueError(f"{source}: {some(foreign)} are no tensors of a CLIP, LLaMA or LLaVA; is it another model?")
    for name in names:
        found = NAMES.fullmatch(name)
        part, (first, dot, rest) = found.lastgroup, found[found.lastgroup].partition(".")
        ours = (ADAPTER.get(first, first) if part == "adapter" else first) + dot + rest
        if parts[part].setdefault(ours, stored[name]) is not stored[name]:
            raise ValueError(f"{source} holds {ours} twice, once as {name}; keep the one that belongs to the other weights")
    return parts


@contextmanager
def without_contents():
    """Make modules on the meta device, for their shapes. Drawing first weights there would import modules for a second."""
    with torch.device("meta"), SkipInit():
        yield


class SkipInit(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def build(make, stored, source, dtype=torch.float32, device="cpu"):
    """Make a module on the meta device with make(), and fill it from {name: Stored}, strictly: `source` names it in errors.
    Memory: the module and a piece of a tensor. The device "meta" checks names and shapes, and reads no contents."""
    with without_contents():
        module = make()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = {
        "missing": sorted(shapes.keys() - stored.keys()), "unexpected": sorted(stored.keys() - shapes.keys()),
        "of another shape": [f"{name} {stored[name].shape}, expected {shapes[name]}"
                             for name in sorted(shapes.keys() & stored.keys()) if stored[name].shape != shapes[name]],
    }
    for what, names in problems.items():
        if names:
            raise ValueError(f"{source}: {len(names)} tensors {what}: {some(names)}; does config.json belong to these weights?")
    if torch.device(device).type == "meta":
        return module
    filled = {}  # by Stored, for a tied head is one tensor under two names
    for tensor, name in {stored[name]: name for name in shapes}.items():
        whole = filled[tensor] = torch.empty(tensor.shape, dtype=dtype, device=device)
        count, rows = tensor.shape[0] if tensor.shape else 1, max(1, PIECE_BYTES // (4 * math.prod(tensor.shape[1:])))
        for start in range(0, count, rows):
            piece, part = tensor.read_rows(start, min(start + rows, count)), rows_of(whole, start, start + rows)
            if piece.dtype not in DTYPES:
                raise ValueError(f"{tensor.path}: {name} is {piece.dtype}, a quantised or packed tensor; get bf16 or fp16")
            part.copy_(piece)
            if not torch.stack(part.aminmax()).isfinite().all():  # NaN passes through aminmax; float16 ends at 65504
                what = f"NaN, infinity or more than {dtype} holds"
                raise ValueError(f"{tensor.path}: {name} holds {what}; the file is damaged, or its training diverged")
    module.load_state_dict({name: filled[stored[name]] for name in shapes}, assign=True)
    return module


def write_tensors(path, tensors, shard_bytes=SHARD_BYTES):
    """Write {name: tensor} as one safetensors file; above `shard_bytes`, as shards with an index. A kill leaves no mixture."""
    path, shards = Path(path), [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.detach()
    index, weight_map, count = path.with_name(path.name + ".index.json"), {}, len(shards)
    with writing(index):
        index.unlink(missing_ok=True)  # first: find_weights refuses shards without an index, so old and new ones do not mix
    for number, shard in enumerate(shards, start=1):
        file = path if count == 1 else path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")
        contents = {k: v.cpu().contiguous() for k, v in shard.items()}
        with writing(file, SafetensorError):
            write_whole(file, partial(save_file, contents, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, file.name)
    if count > 1:
        path.unlink(missing_ok=True)  # before the index, for a single file goes first
        write_json(index, {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map})
