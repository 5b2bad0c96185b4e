"""Finds the evaluator of a task."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation import evaluators
from raymerge.pipeline.evaluation.evaluator import Evaluator, Task
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.messages import find_near

_PREFIX = re.compile(r"([a-z][a-z-]+:)(.*)", re.DOTALL)


def load_evaluators() -> Mapping[str, Evaluator]:
    """Return the evaluators by the prefixes of their tasks."""
    found = {}
    for module in pkgutil.iter_modules(evaluators.__path__, f"{evaluators.__name__}."):
        for kind in vars(import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Evaluator) and kind.__module__ == module.name:
                found[kind.prefix] = kind()
    return dict(sorted(found.items()))


def prepare_tasks(names: Sequence[str], options: EvaluateOptions) -> list[Task]:
    """Read tasks, each by its evaluator.

    Raises:
        ConfigError: one is wrong, or two have one name.
    """
    if not names:
        raise ConfigError("no task is given; --task FILE.yml, --task loss:FILE or --command 'python eval.py {model}'")
    known = load_evaluators()
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        match = _PREFIX.fullmatch(name)
        if match is None:
            evaluator, rest = known[""], name
        elif match[1] in known:
            evaluator, rest = known[match[1]], match[2]
        else:
            near = find_near(match[1], list(filter(None, known)))
            hint = f"did you mean {near}{match[2]}? " if near else ""
            raise ConfigError(f"--task {name}: {hint}A task is a .yml or .jsonl file, or begins with {_list(known)}")
        task = evaluator.prepare(rest, options)
        missing = [library for library in task.libraries if find_spec(library) is None]
        if missing and options.address is None:
            extra = "vllm" if missing[0] == "vllm" else "eval"
            raise ConfigError(f"--task {name}: {missing[0]} is not installed; pip install 'raymerge[{extra}]'")
        if other := next((other for other in tasks if other.name == task.name), None):
            same = "twice the same" if other.digest == task.digest else "two tasks of one name"
            raise ConfigError(f"--task {name}: {task.name} is {same}; give one another `name:`, or leave it out")
        tasks.append(task)
    return tasks


def _list(known: Mapping[str, Evaluator]) -> str:
    return ", ".join(filter(None, known))
