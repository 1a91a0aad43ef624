"""Public benchmarks, a file each: one that defines TASKS = {name: evaluate.Task}. `python -m tasks NAME RUN` finds it."""

from importlib import import_module
from pkgutil import iter_modules

TASKS = {}
for module in iter_modules(__path__):
    if module.name != "__main__":
        TASKS |= getattr(import_module(f"tasks.{module.name}"), "TASKS", {})
