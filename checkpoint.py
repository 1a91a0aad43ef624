"""Weight files and configs on disk: read strictly, written whole.

A checkpoint is a folder in the form of the Hugging Face hub: `config.json` beside `model.safetensors`, or beside
shards that `model.safetensors.index.json` lists. Tensors travel as a dict of name -> tensor; which module a name
belongs to is said by the module that loads it (`clip_vit.py`, `llama.py`, `model.py`).
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def read_config(folder):
    """Read a folder's config.json as a dict."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; expected a checkpoint folder with config.json and safetensors; check the path"
        )
    return read_json(path)


def read_json(path):
    """Read a JSON file, naming it where it is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); expected a complete file; was its download or copy cut short?"
        ) from None


def read_tensors(folder):
    """Read every tensor of a checkpoint folder: a dict of name -> tensor, on the CPU, in the dtype of the file."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {}
    for name in names:
        if not (folder / name).is_file():
            expected = f"every shard that {index.name} lists" if index.is_file() else "a safetensors file"
            raise FileNotFoundError(f"no {folder / name}; expected {expected}; download or copy it again")
        try:
            tensors.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name} is not a whole safetensors file ({error}); download or copy it again"
            ) from None
    return tensors


def load_strictly(module, tensors, source):
    """Fill a module with tensors of the same names and shapes; name what is missing, unexpected or of another shape."""
    wanted = module.state_dict()
    complaints = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & tensors.keys())
            if tensors[name].shape != wanted[name].shape
        ],
    }
    for what, names in complaints.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"{source}: {len(names)} tensors {what}: {', '.join(names[:5])}{more}; "
                "expected what config.json describes; is this another model's file or config?"
            )
    module.load_state_dict(tensors, strict=True)


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


def write_tensors(path, tensors):
    """Write name -> tensor as one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def write_state(path, state):
    """Write anything torch.save takes (read back with weights_only=True)."""
    write_whole(path, lambda temporary: torch.save(state, temporary))
