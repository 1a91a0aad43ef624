"""Small files: read JSON, write a file whole or not at all, hash; optional packages; how a command ends."""

import hashlib
import json
import os
import sys
import traceback
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from formats.hub import local


def require_file(path, expected):
    """Return the path if the file exists. Raise FileNotFoundError, or ValueError if it is a Git LFS pointer."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {expected}")
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
    return path


class WriteError(OSError):
    """Raised if a file cannot be written. run_command adds which option chooses another place."""


def import_package(name, why, install=None):
    """Import an optional package. Raise ImportError: why it is needed, and how to install it."""
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"{why}: pip install {install or name}") from None


@contextmanager
def writing(path, *errors):
    """Turn OSError, and a writer's own exceptions, into a WriteError that names the file."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, *errors) as error:
        raise WriteError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None


@contextmanager
def naming(path, *errors):
    """Turn a reader's exceptions into a ValueError that names the file."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); replace it") from None


def read_config(folder, name="config.json"):
    path = local(folder, name) / name
    content = read_json(require_file(path, "a checkpoint folder: its config beside its weights"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not an object of keys and values; download it again")
    return content


def read_processor(folder):
    """Return the settings of a checkpoint's image processor, or {}. transformers 5 nests them in processor_config.json."""
    names = "preprocessor_config.json", "processor_config.json"
    for path in [local(folder, *names) / name for name in names]:
        content = read_json(path) if path.is_file() else {}
        processor = content.get("image_processor", content)
        if processor.keys() & {"size", "do_resize", "do_pad", "image_mean"}:
            return processor
    return {}


def normalization(processor, side):
    """Return the mean and std of an image processor. Raise ValueError if the tower, which reads `side` px, has another side."""
    is_cropped = processor.get("do_center_crop", "crop_size" in processor)  # CLIP's are, SigLIP's are not
    size = processor.get("crop_size" if is_cropped else "size")
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    if size not in (None, side):
        raise ValueError(f"preprocessor_config.json makes images of {size} px, the tower reads {side}; correct the wrong one")
    for key, value in (("do_normalize", True), ("do_rescale", True), ("resample", 3)):  # 3: bicubic
        if processor.get(key, value) not in (value, None):
            raise ValueError(f"unsupported {key} = {processor[key]} in preprocessor_config.json; CLIP's is {value}")
    found = {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
    for key, value in found.items():
        if not (isinstance(value, list) and [type(v) in (int, float) for v in value] == [True] * 3):
            raise ValueError(f"preprocessor_config.json has {key} {value!r}, which is not three numbers; correct it")
    return found


def known_fields(cls, config):
    """Return the values of a HF config that the dataclass `cls` has fields for. ValueError if one must be a number and is not."""
    known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
    for field in fields(cls):
        value = known.get(field.name, field.default)
        if field.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"config.json has {field.name} {value!r}, which is not a number; correct it")
    return known


def read_json(path):
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); was its download or copy cut short?") from None


def read_text(path):
    """Read a text file in UTF-8, with or without a byte-order mark."""
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is a gzip file; unpack it first")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8 ({error}); is it another file, or in another encoding?") from None


def read_rows(path, expected):
    """Read JSON, or JSON lines whose rows are all objects: then a list of them. expected: what the file should be"""
    text, rows = read_text(require_file(path, expected)), []
    with suppress(json.JSONDecodeError, RecursionError):
        return json.loads(text)
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        with suppress(json.JSONDecodeError, RecursionError):
            rows += [json.loads(line)] if line.strip() else []
            if not line.strip() or isinstance(rows[-1], dict):
                continue
        problem = "so the file is neither JSON nor JSON lines; was its download cut short?"
        raise ValueError(f"{path}: line {number} is {line[:80]}, {problem} It should be {expected}")
    return rows


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names):
    """Write the first five names, then a count of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_whole(path, write):
    """Call write(temporary path), then rename: the file at `path` is either the old one or the complete new one."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    with writing(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
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


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value, indent=2):
    """Write a value as JSON. indent None: in one line, which takes a quarter of the time."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def remove_temporary(paths):
    """Remove what a killed `write_whole` left behind."""
    for path in [path for path in paths if path.suffix.startswith(".tmp")]:
        path.unlink()


def run_command(name, main, place="--out"):
    """Run a program's main function. What a user or the system can cause ends it in one line, a closed pipe in silence. A
    ValueError not raised by this code, as of int("x"), is followed by file and line. place: the option for where to write"""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # not at exit, where nobody could catch the error
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted; {str(error) or 'the same command continues, or starts again'}", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does not import
            raise
        what = ". ".join(str(error).split(". ")[:2])
        sys.exit(f"{name}: {what}; lower --batch, or in training --micro-batch (see python -m tools.plan)")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # a closed pipe, or a full disk; Python would try again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        hint = f"; make room, or choose another place with {place}" if isinstance(error, WriteError) else ""
        hint += origin(error) if isinstance(error, ValueError) else ""
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"{name}: {error}{hint}")  # 141, 130: as a shell counts


def origin(error):
    """Return " (FILE, line N: SOURCE)", the last line of this code that an error passed, or "" if that line is a raise."""
    root = Path(__file__).resolve().parent.parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if root in Path(frame.filename).resolve().parents]
    own = [frame for frame in frames if "site-packages" not in frame.filename]  # a virtual environment inside the checkout
    if not own or own[-1].line.startswith("raise"):
        return ""
    return f" ({Path(own[-1].filename).resolve().relative_to(root)}, line {own[-1].lineno}: {own[-1].line})"
