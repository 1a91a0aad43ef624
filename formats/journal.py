"""Work that takes hours and may be killed at any moment: journals of JSON lines, options that must match, processes.

A journal gets a line per piece of work, flushed to disk. After a kill, the same command reads the journal and continues.
"""

import atexit
import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def read_journal(path):
    """Read the rows of a journal. A last line that a kill cut short does not count; no file, no rows."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else ()
    return [json.loads(line) for line in lines]


def open_journal(path):
    """Open a journal to append to, for this process alone, without a half-written last line."""
    import fcntl  # not on Windows
    file = open(path, "ab")
    for _ in range(50):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            return file
        except BlockingIOError:
            time.sleep(0.1)  # helpers of a run just killed may still hold it, see `end_with_parent`
    raise ValueError(f"{path} is being written by another run; wait for that one, or end it")


def write_line(file, row):
    """Append a row and flush it to disk."""
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def require_same_options(before, now, where):
    """Raise ValueError if work was begun with other options than it is to be continued with."""
    changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{where} was made with other options: {'; '.join(changed)}; repeat those, or change --out")


def require_new(path):
    if Path(path).exists():
        raise ValueError(f"{path} exists already; choose another --out")


def end_with_parent():
    """Let this process end when its parent ends, even if the parent is killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_processes():
    """Join torchrun's other processes for work in parts: (rank, world, a function that waits for all of them)."""
    world = 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))  # initialized: another program calls
    if world == 1:
        return 0, 1, lambda: None
    end_with_parent()  # a torchrun that is killed leaves its processes running
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # for barriers, which wait for the slowest process
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return dist.get_rank(), world, dist.barrier
