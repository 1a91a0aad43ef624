"""Public benchmarks, one file each: what its files are, how its questions read, its official score, a worked example.

A file of this folder that defines TASKS = {name: evaluate.Task} is a benchmark: `python -m tasks NAME RUN` finds it.
"""

from importlib import import_module
from pkgutil import iter_modules

TASKS = {}
for module in iter_modules(__path__):
    if module.name != "__main__":
        TASKS |= getattr(import_module(f"tasks.{module.name}"), "TASKS", {})
