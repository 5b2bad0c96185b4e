"""One model with its tasks: brought to a disk, evaluated, and recorded task by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from raymerge import RaymergeError, __version__
from raymerge.cluster.runner import Progress, Report
from raymerge.pipeline.checkpoint.checkpoint import locate_model
from raymerge.pipeline.errors import HeldError, MergeError
from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Model, Place, Task
from raymerge.pipeline.evaluation.events import Evaluated, Sampled
from raymerge.pipeline.evaluation.figures import Figures
from raymerge.pipeline.evaluation.generation.engines import Engines
from raymerge.pipeline.evaluation.records import Records
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.samples import Sample, open_log
from raymerge.pipeline.evaluation.scratch import bring_here, locate_base
from raymerge.pipeline.evaluation.subjects import Subject
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.stores.open import Stores

_TELL_SECONDS = 15.0
"""Between words on how far a task is that has no new sample: a command tells nothing before its end."""
_WAIT_SECONDS = 1.0
"""Between looks at whether another run has finished an evaluation."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A model with the tasks that it has not done: it is brought to a disk, and loaded, once for all of them."""

    subject: Subject
    digest: str
    """Empty as long as it is not known."""
    tasks: tuple[Task, ...]


def find_digest(stores: Stores, digests: Digests, subject: Subject) -> str | None:
    """Return a model's digest; None for one that is not merged yet, and never was."""
    key = _plan_key(stores, digests, subject)
    if not subject.url:
        return digests.find(key) if key else None
    digest = digests.measure(subject.url)
    if key and digests.find(key) is None:
        digests.keep(key, digest)  # a search may delete the model
    return digest


def _plan_key(stores: Stores, digests: Digests, subject: Subject) -> str:
    """Return the key of a merged model's digest; empty if it is not known how it is merged.

    The plan of a point that comes out as an adapter does not say which base it is evaluated with: that is kept when it
    is first merged.
    """
    if subject.parts:
        return " ".join(["sum", __version__, *map(digests.measure, subject.parts)])
    if not subject.fingerprint:
        return ""
    named = digests.find(_base_key(subject))
    if subject.planned is None or named is None:
        return f"plan {subject.fingerprint}"
    try:
        url = locate_model(stores, locate_base(subject.planned, named))
        return f"plan {subject.fingerprint} {digests.measure(url)}"
    except RaymergeError:  # told of the model, once it is its turn
        return ""


def _base_key(subject: Subject) -> str:
    return f"base of plan {subject.fingerprint}"


def evaluate_unit(
    stores: Stores,
    out: str,
    unit: Unit,
    report: Report,
    *,
    merging: MergeOptions,
    engines: Engines,
    tell: Callable[[Sampled | Evaluated], None],
    raised: tuple[type[MergeError], ...] = (),
) -> tuple[str, list[Evaluation]]:
    """Evaluate one model with its tasks; return its name, and what came of each.

    Raises:
        MergeError: the model cannot be brought here, with an error of `raised`; with another its evaluations fail.
    """
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
        with bring_here(stores, subject, merging, check) as brought, engines.lend() as engine:
            digests = Digests(stores, out)
            digest = unit.digest if unit.digest and subject.url else digests.measure(brought.directory)
            if unit.digest not in ("", digest):
                raise EvaluationError(
                    f"{subject.name} comes out otherwise than when it was first evaluated: its inputs have changed"
                    " since it was planned; sweep it again with --overwrite"
                )
            if brought.base and subject.fingerprint:
                digests.keep(_base_key(subject), brought.base)
            if not unit.digest and (key := _plan_key(stores, digests, subject)):
                digests.keep(key, digest)
            model = Model(subject.name, brought.directory, digest)
            place = Place(engine, check)
            for task in unit.tasks:
                with _alone(stores, f"{out}/{model.name}/{records.samples_name(digest, task)}.lock", check):
                    if (found := records.find(subject.name, digest, task)) is not None:
                        done.append(records.copy(found, task, subject.name, subject.url or subject.shown))
                        tell(Evaluated(done[-1], is_cached=True))
                    else:
                        finish(_evaluate(stores, records, subject, model, task, place, tell), task)
    except MergeError as error:  # it cannot be fetched or merged
        if isinstance(error, raised):
            raise
        for task in unit.tasks[len(done) :]:
            finish(make_failed(unit, task, error), task)
    return subject.name, done


def make_failed(unit: Unit, task: Task, error: Exception) -> Evaluation:
    """Return the evaluation of a model that could not be brought to where it would have been evaluated."""
    return make_result(unit.subject, unit.digest, task, error=f"{type(error).__name__}: {error}")


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
    start, told_at = time.perf_counter(), time.monotonic()
    name = records.samples_name(model.digest, task)
    url = f"{records.directory}/{model.name}/{name}"
    with open_log(stores, url) as log:
        if task.last and (task.last, 0) not in log.samples:
            log.clear()
        wanted = {key for key, sample in log.samples.items() if task.is_wanted(sample)}

        def keep(sample: Sample) -> None:
            log.add(sample)
            wanted.add(sample.key)
            show()

        def show() -> None:
            nonlocal told_at
            told_at = time.monotonic()
            tell(Sampled(model.name, task.name, len(wanted), task.num_samples))

        def check() -> None:
            place.check()
            if time.monotonic() - told_at > _TELL_SECONDS:
                show()

        figures, error = None, ""
        try:
            task.run(model, replace(place, check=check), frozenset(wanted), keep)
            figures = task.summarise([log.samples[key] for key in sorted(wanted)])
        except EvaluationError as failed:
            error = str(failed)
    return make_result(subject, model.digest, task, figures, error, name, time.perf_counter() - start)


def make_result(
    subject: Subject,
    digest: str,
    task: Task,
    figures: Figures | None = None,
    error: str = "",
    samples: str = "",
    seconds: float = 0.0,
) -> Evaluation:
    """Return the result of a task on a model; without figures it is a failed one."""
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
