"""Evaluations by task, so that models are compared by the same items and sampling."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.messages import counted, listing, suggest


@dataclass(frozen=True, slots=True)
class Task:
    """One task with one content, sampled in one way."""

    label: str
    """Its name, and what tells it from others of the name."""
    name: str
    results: Mapping[str, Evaluation]
    """By model."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of a curve."""

    chosen: tuple[Task, ...]
    notes: tuple[str, ...]
    """Evaluations that were left out, and why."""


def sort_evaluations(evaluations: Iterable[Evaluation]) -> tuple[tuple[Task, ...], tuple[str, ...]]:
    """Return the tasks by name, and notes on models of which there is more than one version.

    Of several evaluations of one model in one task, which differ in the model's digest, a complete one counts rather
    than a failed one, and then the last.
    """
    groups: dict[tuple[str, str, str], dict[str, Evaluation]] = defaultdict(dict)
    several: dict[str, set[str]] = defaultdict(set)
    for evaluation in evaluations:
        results = groups[evaluation.task, evaluation.task_digest, _dump(evaluation.sampling)]
        earlier = results.get(evaluation.model)
        if earlier is not None and earlier.digest != evaluation.digest:
            several[evaluation.model] |= {earlier.digest, evaluation.digest}
        if earlier is None or evaluation.state == "complete" or earlier.state == "failed":
            results[evaluation.model] = evaluation
    by_name: dict[str, list[dict[str, Evaluation]]] = defaultdict(list)
    for key in sorted(groups):
        by_name[key[0]].append(groups[key])
    tasks = tuple(
        Task(f"{name}{mark}", name, results)
        for name, variants in by_name.items()
        for mark, results in zip(_tell_apart(variants), variants, strict=True)
    )
    notes = tuple(
        f"{model} was evaluated as {counted(len(digests), 'different model')}"
        f" ({listing(sorted(each[:12] for each in digests))}); the curve has one of them: delete its other evaluations"
        for model, digests in sorted(several.items())
    )
    return tasks, notes


def choose_tasks(tasks: Sequence[Task], wanted: Sequence[str]) -> Tasks:
    """Return the tasks that are wanted; by default of each name the one with the most models.

    Of those with equally many, the one with the most samples counts.

    Args:
        tasks: all there are.
        wanted: labels; a name stands for the task that counts by default.

    Raises:
        ConfigError: there is no such task.
    """
    defaults: dict[str, Task] = {}
    for task in tasks:
        if task.name not in defaults or _weight(task) > _weight(defaults[task.name]):
            defaults[task.name] = task
    by_label = {**{task.label: task for task in tasks}, **defaults}
    for label in wanted:
        if label not in by_label:
            raise ConfigError(f"no model was evaluated in the task {label!r}; {suggest(label, list(by_label))}")
    chosen = tuple(dict.fromkeys(by_label[label].label for label in wanted or defaults))
    notes = tuple(
        f"{task.label} is left out ({counted(len(task.results), 'model')}): the curve compares models that were sampled"
        f" alike; --task '{task.label}' takes it"
        for task in tasks
        if not wanted and task.label not in chosen and not task.results.keys() <= defaults[task.name].results.keys()
    )
    return Tasks(tuple(task for label in chosen for task in tasks if task.label == label), notes)


def _weight(task: Task) -> tuple[int, int]:
    complete = [each for each in task.results.values() if each.state == "complete"]
    return len(complete), max((each.num_items * each.num_samples for each in complete), default=0)


def _tell_apart(variants: Sequence[Mapping[str, Evaluation]]) -> list[str]:
    """Return for each variant of a task what the others do not share, in brackets; nothing where there is one."""
    if len(variants) == 1:
        return [""]
    firsts = [next(iter(results.values())) for results in variants]
    names = sorted({name for first in firsts for name in first.sampling})
    differing = [name for name in names if len({_dump(first.sampling.get(name)) for first in firsts}) > 1]
    by_digest = len({first.task_digest for first in firsts}) > 1
    marks = [
        [
            *([first.task_digest[:8]] if by_digest else []),
            *(f"{name} {_show(first.sampling.get(name))}" for name in differing),
        ]
        for first in firsts
    ]
    return [f" ({', '.join(each)})" for each in marks]


def _show(value: object) -> str:
    return "unset" if value is None else value if isinstance(value, str) else _dump(value)


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
