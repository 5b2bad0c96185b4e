"""The public API of evaluations: many models, each with every task; what is finished is never done again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from raymerge import __version__
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Progress, Report, Resources
from raymerge.pipeline.errors import HeldError, MergeError
from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.evaluation.engines import Engines
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Model, Place, Task
from raymerge.pipeline.evaluation.events import Begun, Evaluated, OnEvaluationEvent, Sampled
from raymerge.pipeline.evaluation.figures import Figures
from raymerge.pipeline.evaluation.hub_results import check_benchmarks, write_hub_result
from raymerge.pipeline.evaluation.options import EvaluateKeywords, EvaluateOptions
from raymerge.pipeline.evaluation.records import Records
from raymerge.pipeline.evaluation.registry import prepare_tasks
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.samples import Sample, open_log
from raymerge.pipeline.evaluation.scratch import bring_here
from raymerge.pipeline.evaluation.subjects import Subject, find_subjects
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import StoreSettings

_WAIT_SECONDS = 1.0
"""Between looks at whether another run has finished an evaluation."""


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
            check_benchmarks(prepared, subjects.models)
        run = _Run(stores, out, prepared, on_event or (lambda event: None))
        units = run.plan(subjects.models)
        num_cached = sum(each.state == "complete" for each in run.found.values())
        run.tell(Begun(len(subjects.models), len(prepared), num_cached, subjects.skipped))
        for evaluation in run.found.values():
            run.tell(Evaluated(evaluation, is_cached=evaluation.state == "complete"))
        with Engines(options.backend, options.workers) as engines:
            runner = LocalRunner(min(options.workers, max(len(units), 1)))
            merging = MergeOptions(storage=options.storage, ops=options.ops)
            work = partial(evaluate_unit, stores, out, merging=merging, engines=engines, tell=run.tell)
            resources = [Resources(mem_nbytes=0, cost=0)] * len(units)
            for name, evaluations in runner.run(work, units, resources, lambda progress: None):
                run.finish(name, evaluations)
        pairs = [(subject, task) for subject in subjects.models for task in prepared]
        for subject, task in pairs if options.eval_results else ():
            write_hub_result(stores, subject, task, run.found[subject.name, task.name])
        return [run.found[subject.name, task.name] for subject, task in pairs]


@dataclass(frozen=True, slots=True)
class Unit:
    """A model with the tasks that it has not done: it is brought to a disk, and loaded, once for all of them."""

    subject: Subject
    digest: str
    """Empty as long as it is not known."""
    tasks: tuple[Task, ...]


class _Run:
    """What is found, and what is to be done."""

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

    def tell(self, event: Begun | Sampled | Evaluated) -> None:
        """Tell of an event; of several threads, one after the other."""
        with self._lock:
            self._on_event(event)

    def plan(self, subjects: Sequence[Subject]) -> list[Unit]:
        """Return what is to be done, and enter what is found."""
        units: dict[str, Unit] = {}
        for subject in subjects:
            if subject.error:
                for task in self._tasks:
                    self.found[subject.name, task.name] = _make(subject, "", task, error=subject.error)
                continue
            digest = find_digest(self._digests, subject) or ""
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


def find_digest(digests: Digests, subject: Subject) -> str | None:
    """Return a model's digest; None for one that is not merged yet, and never was."""
    key = _plan_key(digests, subject)
    if not subject.url:
        return digests.find(key) if key else None
    digest = digests.measure(subject.url)
    if key and digests.find(key) is None:
        digests.keep(key, digest)  # a search may delete the model
    return digest


def _plan_key(digests: Digests, subject: Subject) -> str:
    """Return what the digest of a merged model is kept under; empty where it is not known how it is merged."""
    if subject.parts:
        return " ".join(["sum", __version__, *map(digests.measure, subject.parts)])
    base = f" {subject.planned.base}" if subject.planned and subject.planned.base else ""
    return f"plan {subject.fingerprint}{base}" if subject.fingerprint else ""


def evaluate_unit(
    stores: Stores,
    out: str,
    unit: Unit,
    report: Report,
    *,
    merging: MergeOptions,
    engines: Engines,
    tell: Callable[[Sampled | Evaluated], None],
) -> tuple[str, list[Evaluation]]:
    """Evaluate one model with its tasks; return its name, and what came of each."""
    records = Records(stores, out)
    subject = unit.subject
    done: list[Evaluation] = []

    def check() -> None:
        report(Progress())

    def finish(evaluation: Evaluation, task: Task) -> None:
        records.write(evaluation, task)
        done.append(evaluation)
        tell(Evaluated(evaluation, is_cached=False))

    try:
        with bring_here(stores, subject, merging) as directory, engines.lend() as engine:
            digests = Digests(stores, out)
            digest = unit.digest if unit.digest and subject.url else digests.measure(directory)
            if unit.digest not in ("", digest):
                raise EvaluationError(
                    f"{subject.name} comes out otherwise than when it was first evaluated: its inputs have changed"
                    " since it was planned; sweep it again with --overwrite"
                )
            if not unit.digest and (key := _plan_key(digests, subject)):
                digests.keep(key, digest)
            model = Model(subject.name, directory, digest)
            place = Place(engine, check)
            for task in unit.tasks:
                with _alone(stores, f"{out}/{model.name}/{records.samples_name(digest, task)}.lock", check):
                    if (found := records.find(subject.name, digest, task)) is not None:
                        done.append(records.copy(found, task, subject.name, subject.url or subject.shown))
                        tell(Evaluated(done[-1], is_cached=True))
                    else:
                        finish(_evaluate(stores, records, subject, model, task, place, tell), task)
    except MergeError as error:  # it cannot be fetched or merged
        for task in unit.tasks[len(done) :]:
            finish(_make(subject, unit.digest, task, error=f"{type(error).__name__}: {error}"), task)
    return subject.name, done


@contextmanager
def _alone(stores: Stores, url: str, check: Callable[[], None]) -> Iterator[None]:
    """Hold a lock; as long as another run has it, which may find what is wanted here, wait."""
    with ExitStack() as stack:
        while True:
            check()
            try:
                stack.enter_context(stores.at(url).lock(url))
                break
            except HeldError:
                time.sleep(_WAIT_SECONDS)
        yield


def _evaluate(
    stores: Stores,
    records: Records,
    subject: Subject,
    model: Model,
    task: Task,
    place: Place,
    tell: Callable[[Sampled | Evaluated], None],
) -> Evaluation:
    start = time.perf_counter()
    name = records.samples_name(model.digest, task)
    url = f"{records.directory}/{model.name}/{name}"
    with open_log(stores, url) as log:
        wanted = {key for key, sample in log.samples.items() if task.is_wanted(sample)}

        def keep(sample: Sample) -> None:
            log.add(sample)
            wanted.add(sample.key)
            tell(Sampled(model.name, task.name, len(wanted), task.num_samples))

        figures, error = None, ""
        try:
            task.run(model, place, frozenset(wanted), keep)
            figures = task.summarise([log.samples[key] for key in sorted(wanted)])
        except EvaluationError as failed:
            error = str(failed)
    return _make(subject, model.digest, task, figures, error, name, time.perf_counter() - start)


def _make(
    subject: Subject,
    digest: str,
    task: Task,
    figures: Figures | None = None,
    error: str = "",
    samples: str = "",
    seconds: float = 0.0,
) -> Evaluation:
    found = figures or Figures(0, 0)
    return Evaluation(
        model=subject.name,
        url=subject.url or subject.shown,
        digest=digest,
        task=task.name,
        task_digest=task.digest,
        sampling=dict(task.sampling),
        state="failed" if figures is None else "complete",
        error=error,
        num_items=found.num_items,
        num_samples=found.num_samples,
        accuracy=found.accuracy,
        tokens=found.tokens,
        loss=found.loss,
        thinking=found.thinking,
        cut_off=found.cut_off,
        other=found.other,
        samples=samples,
        seconds=round(seconds, 3),
    )


def _list(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(given)] if isinstance(given, str | Path) else [str(each) for each in given]
