"""The public API of evaluations: many models, each with every task; what is finished is never done again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.evaluation.evaluator import Task
from raymerge.pipeline.evaluation.events import Begun, Evaluated, EvaluationEvent, OnEvaluationEvent
from raymerge.pipeline.evaluation.hub_results import check_benchmarks, write_hub_result
from raymerge.pipeline.evaluation.options import EvaluateKeywords, EvaluateOptions
from raymerge.pipeline.evaluation.records import Records
from raymerge.pipeline.evaluation.registry import prepare_tasks
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.subjects import Subject, find_subjects
from raymerge.pipeline.evaluation.units import Unit, find_digest, make_result
from raymerge.pipeline.evaluation.workers import evaluate_here, evaluate_on_ray
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import StoreSettings


def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Path | Sequence[str | Path],
    options: EvaluateOptions | None = None,
    *,
    only: Sequence[str] | None = None,
    on_event: OnEvaluationEvent | None = None,
    **keywords: Unpack[EvaluateKeywords],
) -> list[Evaluation]:
    """Evaluate models with tasks, or return what an earlier run has found; samples are on disk as they come.

    Args:
        models: a spectrum's directory, or directories, URLs or Hub names of models.
        tasks: task files, or what `--task` of the command line takes.
        options: how to evaluate.
        only: names of points and parents of the spectrum; the others are left out.
        on_event: called with each event, in whatever thread, one after the other.
        **keywords: fields of `EvaluateOptions`; they go before those of `options`.

    Returns:
        For each model, in the order given, an evaluation for each task. One that failed has the state `failed`, and
        says why.

    Raises:
        RaymergeError: a task is wrong, or a model is not there; nothing is evaluated then.
    """
    options = replace(options or EvaluateOptions(), **keywords)
    prepared = prepare_tasks(_list(tasks), options)
    with open_stores(StoreSettings(options.storage)) as stores:
        subjects = find_subjects(stores, _list(models), only, options.base)
        out = subjects.out if options.out is None else stores.at(options.out).absolute(options.out)
        if options.eval_results:
            check_benchmarks(stores, prepared, subjects.models)
        run = _Run(stores, out, prepared, on_event or (lambda event: None))
        units = run.plan(subjects.models)
        num_cached = sum(each.state == "complete" for each in run.found.values())
        run.tell(Begun(len(subjects.models), len(prepared), num_cached, subjects.skipped, subjects.has_spectrum))
        for evaluation in run.found.values():
            run.tell(Evaluated(evaluation, is_cached=evaluation.state == "complete"))
        evaluate_units = evaluate_on_ray if options.ray or options.address is not None else evaluate_here
        for name, evaluations in evaluate_units(stores, out, units, options, run.tell) if units else ():
            run.finish(name, evaluations)
        pairs = [(subject, task) for subject in subjects.models for task in prepared]
        for subject, task in pairs if options.eval_results else ():
            write_hub_result(stores, subject, task, run.found[subject.name, task.name])
        return [run.found[subject.name, task.name] for subject, task in pairs]


class _Run:
    """Results that were found, and evaluations that are to be done."""

    def __init__(self, stores: Stores, out: str, tasks: Sequence[Task], on_event: OnEvaluationEvent) -> None:
        self._stores = stores
        self._records = Records(stores, out)
        self._digests = Digests(stores, out)
        self._tasks = tasks
        self._lock = threading.Lock()
        self._on_event = on_event
        self._equal: dict[str, list[Subject]] = {}
        """By the model that is evaluated, those that are equal to it."""
        self.found: dict[tuple[str, str], Evaluation] = {}
        """By model and task."""

    def tell(self, event: EvaluationEvent) -> None:
        """Tell of an event; of several threads, one after the other."""
        with self._lock:
            self._on_event(event)

    def plan(self, subjects: Sequence[Subject]) -> list[Unit]:
        """Return what is to be done, and enter what is found."""
        units: dict[str, Unit] = {}
        for subject in subjects:
            if subject.error:
                for task in self._tasks:
                    self.found[subject.name, task.name] = make_result(subject, "", task, error=subject.error)
                continue
            digest = find_digest(self._stores, self._digests, subject) or ""
            missing = []
            for task in self._tasks:
                found = self._records.find(subject.name, digest, task) if digest else None
                if found is None:
                    missing.append(task)
                else:
                    self.found[subject.name, task.name] = self._copy(found, task, subject)
            same = digest or subject.same
            if not missing:
                continue
            if same in units:
                self._equal.setdefault(units[same].subject.name, []).append(subject)
            else:
                units[same] = Unit(subject, digest, tuple(missing))
        return list(units.values())

    def finish(self, name: str, evaluations: Sequence[Evaluation]) -> None:
        """Enter what came of a unit, also for the models that are equal to it."""
        tasks = {task.name: task for task in self._tasks}
        for evaluation in evaluations:
            self.found[name, evaluation.task] = evaluation
            for subject in self._equal.get(name, ()):
                if (subject.name, evaluation.task) not in self.found:
                    copied = self._copy(evaluation, tasks[evaluation.task], subject)
                    self.found[subject.name, evaluation.task] = copied
                    self.tell(Evaluated(copied, is_cached=True))

    def _copy(self, found: Evaluation, task: Task, subject: Subject) -> Evaluation:
        return self._records.copy(found, task, subject.name, subject.url or subject.shown)


def _list(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(given)] if isinstance(given, str | Path) else [str(each) for each in given]
