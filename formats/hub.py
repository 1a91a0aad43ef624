"""Checkpoints by the names that people use: ORG/NAME, or ORG/NAME@REVISION, is a folder of the Hugging Face cache.

A file is downloaded when a reader wants it: a tokenizer without the weights, and nothing after a config that is refused.
The library's own settings hold: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, `hf auth login`.
"""

import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")


def is_name(path):
    """Return True for ORG/NAME or ORG/NAME@REVISION that is no path on this disk, nor a file of weights that is missing."""
    is_file = Path(path).suffix in (".bin", ".pt", ".pth", ".safetensors")
    return bool(NAME.fullmatch(str(path))) and not is_file and not Path(path).exists()


def local(path, *patterns):
    """Return the path on disk of a checkpoint. Of a name, first download files that fit a pattern and are not in the cache."""
    if not is_name(path):
        return Path(path)
    name, revision = NAME.fullmatch(str(path)).groups()
    folder, files = snapshot(name, revision)
    for file in files:
        if any(fnmatchcase(file, pattern) for pattern in patterns):
            download(name, revision, file)
    return folder


@cache
def snapshot(name, revision):
    """Return a model's folder in the cache, and the names of its files on the hub: none if it cannot be reached."""
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        own = f"`hf download {name} --local-dir FOLDER`, and pass FOLDER"
        raise ImportError(f"no folder {name}; to take it from the hub, pip install huggingface_hub; or {own}") from None
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    try:
        info = HfApi().model_info(name, revision=revision, timeout=30)
        return cached / "snapshots" / info.sha, [file.rfilename for file in info.siblings]
    except Exception as error:  # the library's own, or those of the HTTP client that its version uses
        ref = cached / "refs" / (revision or "main")
        folder = cached / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision or "main")
        problem, why = "the hub cannot be reached or does not have it", " ".join(str(error).split())
        if not folder.is_dir():
            where = f"no folder here, none in {cached.parent}, and {problem} ({why})"
            raise FileNotFoundError(f"no model {name}{f'@{revision}' if revision else ''}: {where}") from None
        if not constants.HF_HUB_OFFLINE:
            print(f"{name} is read from the cache ({folder.name}), for {problem}: {why}")
        return folder, []


@cache
def download(name, revision, file):
    """Download one file of a model into the cache, with a progress bar, or continue an earlier download."""
    from huggingface_hub import hf_hub_download
    try:  # by the revision, not its commit, so that the library notes which commit it is
        hf_hub_download(name, file, revision=revision)
    except Exception as error:
        why = " ".join(str(error).split())
        raise OSError(f"{file} of {name} cannot be downloaded ({why}); the same command continues") from None
