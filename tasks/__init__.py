"""Public benchmarks, a file each: one that defines TASKS = {name: evaluate.Task}. `python -m tasks NAME RUN` finds it."""

from importlib import import_module
from pkgutil import iter_modules

TASKS = {}


def add(module, tasks):
    """Add a module's tasks to TASKS. Raise ValueError for what would otherwise give wrong results."""
    for name, task in tasks.items():
        if name in TASKS:
            raise ValueError(f"tasks/{module}.py: there is a benchmark {name} already; choose another name")
        if isinstance(task.prompts, str):
            raise ValueError(f"tasks/{module}.py: prompts of {name} are a text, {task.prompts!r}; write a tuple (TEXT,)")
        if not task.files:
            raise ValueError(f"tasks/{module}.py: {name} has no files=, which says what --questions is")
        TASKS[name] = task


for entry in iter_modules(__path__):
    if entry.name != "__main__":
        add(entry.name, getattr(import_module(f"tasks.{entry.name}"), "TASKS", {}))
