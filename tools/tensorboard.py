"""Write the logs of runs for TensorBoard, of finished runs and of runs that still train.

    python -m tools.tensorboard runs/b1 runs/b2            then: tensorboard --logdir runs
    python -m tools.tensorboard runs/b2 --watch            also what the run logs from now on

RUN/log.jsonl becomes RUN/tensorboard, a curve for each stage and number, such as "stage 2/loss". TensorBoard's "relative" axis
shows the time that training took. Training does not wait for this program, and no problem here can stop it.

runs   run folders of train.py
watch  look for new rows every ten seconds, until Ctrl-C
"""

import time
from itertools import pairwise
from pathlib import Path

from formats.files import require_file
from tools import command
from tools.report import is_number, read_lines


def curves(run, waits=False):
    """Write the event file of a run, and whenever resumed, the rows that its log has gained; yield the number of all rows."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard's files need its package: pip install tensorboard") from None
    log, options, folder, written, writer = *(Path(run) / name for name in ("log.jsonl", "train.json", "tensorboard")), [], None
    if not (waits and Path(run).is_dir()):
        require_file(log, "the log of a run; pass what train.py had as --out")
    while True:
        rows = [row for row in read_lines(log)[0] if {"stage", "step"} <= row.keys()]
        if rows and (not writer or rows[: len(written)] != written):  # or a resumed run takes steps again
            if writer:
                writer.close()
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            writer = SummaryWriter(folder, purge_step=0)  # a TensorBoard that is open forgets the old file
            written, clock = [], (options if options.is_file() else log).stat().st_mtime  # options: when the run began
        for before, row in pairwise([*(written[-1:] or [{}]), *rows[len(written) :]]):
            seconds, since = (r.get("seconds", 0) if r.get("stage") == row["stage"] else 0 for r in (row, before))
            clock += seconds - since if since <= seconds else seconds  # counted from 0 in each stage, and on resuming
            for name in row.keys() - {"stage", "step"}:
                if is_number(row[name]) and not isinstance(row[name], bool):
                    writer.add_scalar(f"stage {row['stage']}/{name}", row[name], row["step"], clock)
        written = rows or written
        if writer:
            writer.flush()
        yield len(rows)


def tensorboard(*runs, watch=False):
    followed = {run: curves(run, watch) for run in runs}
    for run, rows in followed.items():
        print(f"{run}/tensorboard: {next(rows)} rows")
    while watch:
        time.sleep(10)
        for rows in followed.values():
            next(rows)


main = command(__name__, tensorboard)
