"""Work that takes hours and may be killed at any moment: journals of JSON lines, options that must match, processes.
A journal gets a line per piece of work, flushed to disk. After a kill, the same command reads the journal and continues."""

import atexit
import errno
import json
import os
import shutil
import signal
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

from formats.files import read_json, write_json, writing
from formats.processes import prefetched


def read_journal(path):
    """Read the rows of a journal. A last line that a kill cut short does not count; no file, no rows."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []


def open_journal(path):
    """Open a journal to append to, for this process alone, without a half-written last line."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)  # without a buffer that would be written when a full disk ends the run
    for _ in range(50):
        if try_lock(file, "flock"):
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            return file
        time.sleep(0.1)  # helpers of a run just killed may still hold it, see `end_with_parent`
    raise ValueError(f"{path} is being written by another run; wait for that one, or end it")


def try_lock(file, how):
    """Lock a file by fcntl's flock or lockf: False if another process has it. Lustre and NFS may be mounted without locks."""
    import fcntl  # not on Windows
    try:
        getattr(fcntl, how)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{file.name}: this file system has no locks; make sure that no other run writes there")
    return True


def write_line(file, row):
    """Append a row and flush it to disk."""
    line = json.dumps(row).encode() + b"\n"
    with writing(file.name):
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def changes(before, now, name=""):
    """List what differs between options, which may hold dicts of options. Options at the top that only `before` has are ignored."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before | now if name else now
        return [text for key in keys for text in changes(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before!r:.200}, is {now!r:.200}"]


def require_same_options(before, now, where):
    """Raise ValueError if work was begun with other options than it is to be continued with."""
    if changed := changes(before, now):
        raise ValueError(f"{where} was made with other options: {'; '.join(changed)}; repeat those, or change --out")


def require_new(path):
    if os.path.exists(path):
        raise ValueError(f"{path} exists already; choose another --out")


def work_in_parts(pieces, make_worker, parts, options, processes, *, restarts=False, fresh=False):
    """Do the pieces {key: piece} that earlier runs did not finish; each of `world` processes takes every world-th of them.

    make_worker()  returns two functions: prepare, piece -> input, which threads call ahead (images are read there), and work,
                   input -> result, in JSON; called by processes with something to do
    parts          folder with a journal per process, and `options`, all that results depend on (rank 0's count). If it was
                   begun with others, raise ValueError or, with `restarts`, start over; `fresh` starts over anyway
    processes      of join_processes
    Return ([(key, result), ...] of all runs and processes, on rank 0; keys of the pieces done now; seconds that this took).
    """
    rank, world, wait = processes
    if rank == 0:
        begin(parts, options, restarts, fresh)
    wait()
    done = {key for key, _ in read_parts(parts)}
    wait()  # all have read what is done before any adds to it
    pending = [key for key in pieces if key not in done]
    if rank == 0 and done:
        print(f"{len(pieces) - len(pending)} of {len(pieces)} pieces are done already in {parts}; resuming")
    mine = pending[rank::world]
    with open_journal(parts / f"part-{rank}.jsonl") as journal:
        (prepare, work), began = make_worker() if mine else (None, None), time.perf_counter()
        ahead = prefetched(lambda i: prepare(pieces[mine[i]]), 0, len(mine))
        for key, ready in zip(tqdm(mine, desc=parts.stem, disable=None if rank == 0 else True), ahead, strict=True):
            write_line(journal, (key, work(ready)))
    wait()
    return read_parts(parts) if rank == 0 else [], pending, time.perf_counter() - began


def read_parts(parts):
    return [row for path in sorted(parts.glob("part-*.jsonl")) for row in read_journal(path)]


def begin(parts, options, restarts, fresh):
    """Make the folder of journals, or keep the one of an earlier run."""
    path = parts / "options.json"
    before = read_json(path) if path.is_file() else {}
    if before and not (restarts or fresh):
        require_same_options(before, options, parts)
    elif before != options or fresh:
        for journal in parts.glob("part-*.jsonl"):
            open_journal(journal).close()  # raises if another run is writing it
        if before and not fresh:
            print(f"{parts} was begun with other {', '.join(k for k in options if before.get(k) != options[k])}: starting over")
        shutil.rmtree(parts, ignore_errors=True)
        write_json(path, options)


def end_with_parent(ignores_interrupt=False):
    """Let this process end when its parent ends, even if the parent is killed. ignores_interrupt: the parent handles Ctrl-C"""
    parent = os.getppid()
    if ignores_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def join_processes():
    """Join torchrun's other processes for work in parts: (rank, world, a function that waits for all of them)."""
    world = 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))  # initialized: another program calls
    if world == 1:
        return 0, 1, lambda: None
    end_with_parent()  # a torchrun that is killed leaves its processes running
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # for barriers, which wait for the slowest process
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return dist.get_rank(), world, dist.barrier
