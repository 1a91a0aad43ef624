"""formats/processes.py: threads that draw ahead."""

import os
import subprocess
import sys

PROGRAM = """
from formats.processes import prefetched
import torch
drawn = list(prefetched(lambda i: (i, torch.get_num_threads()), 3, 40))
print([i for i, _ in drawn] == list(range(3, 40)), {count for _, count in drawn}, torch.get_num_threads())
"""


def test_threads_that_draw_ahead_leave_the_caller_its_own():
    """In a new process, whose main thread has computed nothing yet. A step of one thread takes twice its time."""
    out = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert out.stdout == "True {1} 2\n", out.stdout + out.stderr
