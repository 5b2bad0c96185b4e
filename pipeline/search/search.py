"""The public API of a search: batches of trials, each merged from one reading of the inputs, and evaluated."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from raymerge import __version__
from raymerge.pipeline.errors import CheckpointError, ConfigError, MemoryLimitError, OutputError, TensorMismatchError
from raymerge.pipeline.evaluation.evaluate import evaluate
from raymerge.pipeline.evaluation.events import OnEvaluationEvent
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.registry import prepare_tasks
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.output.state import locate_output
from raymerge.pipeline.progress.events import OnEvent
from raymerge.pipeline.search.deletion import delete_model
from raymerge.pipeline.search.front import find_front
from raymerge.pipeline.search.grid import Grid
from raymerge.pipeline.search.options import SearchOptions
from raymerge.pipeline.search.recipe import Config, read_recipe
from raymerge.pipeline.search.record import SearchRecord, Trial, read_record, write_record
from raymerge.pipeline.search.replay import check_replayed, check_same, list_batches
from raymerge.pipeline.search.results import SearchReport
from raymerge.pipeline.search.soup import Soup
from raymerge.pipeline.search.study import Settings, Study, load_optuna
from raymerge.pipeline.search.values import explain_failure, read_values
from raymerge.pipeline.spectrum.record import (
    EVALUATIONS,
    Point,
    Spectrum,
    has_spectrum,
    locate_point,
    read_spectrum,
    update_spectrum,
)
from raymerge.pipeline.spectrum.sweep import plan_sweep, sweep
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.seam import Lock
from raymerge.pipeline.stores.settings import StoreSettings
from raymerge.pipeline.urls import scheme_of

LOCK = "search.lock"
_BY_SETTINGS = (ConfigError, CheckpointError, TensorMismatchError, MemoryLimitError)
"""Errors of plans that are a trial's own: what else goes wrong ends the search, and is not held against a trial."""
OnTrial = Callable[[Trial, int], None]
"""Told of each trial, with the number of trials so far."""


def search(
    recipe: Config,
    out: str | Path,
    tasks: Sequence[str | Path],
    options: SearchOptions | None = None,
    *,
    merging: MergeOptions | None = None,
    evaluating: EvaluateOptions | None = None,
    on_trial: OnTrial | None = None,
    on_event: OnEvent | None = None,
    on_evaluation: OnEvaluationEvent | None = None,
) -> SearchReport:
    """Search a recipe's parameters for the best models, or finish an earlier run of the search.

    Args:
        recipe: a mergekit YAML file or its name, YAML text, or what it holds, with a `search:` section.
        out: a directory or URL; it becomes a spectrum of the best models, with the evaluations of all.
        tasks: as `evaluate` takes them.
        options: how to search.
        merging: how to merge.
        evaluating: how to evaluate.
        on_trial: told of each trial when its values are known.
        on_event: told what happens in merges.
        on_evaluation: told what happens in evaluations.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with what is finished.
    """
    start = time.perf_counter()
    options, merging, evaluating = (
        options or SearchOptions(),
        merging or MergeOptions(),
        evaluating or EvaluateOptions(),
    )
    if evaluating.eval_results:
        raise ConfigError("models of a search come and go; `raymerge eval OUT --eval-results` writes those of the best")
    with open_stores(StoreSettings(merging.storage, merging.private)) as stores:
        run = _Search(stores, recipe, locate_output(stores, out), [str(task) for task in tasks], options, merging)
        run.evaluating = replace(evaluating, out=f"{run.out}/{EVALUATIONS}", storage=merging.storage, ops=merging.ops)
        run.judging = run.evaluating if options.subset is None else replace(run.evaluating, limit=options.subset)
        run.on_trial = on_trial or (lambda trial, number: None)
        run.on_event, run.on_evaluation = on_event, on_evaluation
        with ExitStack() as stack:
            run.hold = lambda: stack.enter_context(stores.at(run.out).lock(f"{run.out}/{LOCK}"))
            stopped = run.run()
            best, values = run.finish()
    names = tuple(direction.name for direction in options.directions)
    seconds = time.perf_counter() - start
    return SearchReport(run.out, names, tuple(run.trials), best, values, stopped, seconds)


@dataclass(frozen=True, slots=True)
class _Planned:
    """What planning a trial has come to."""

    fingerprint: str
    error: str
    """Why it cannot be merged; empty otherwise."""


class _Search:
    """One run of a search."""

    evaluating: EvaluateOptions
    """Of the best, at the end."""
    judging: EvaluateOptions
    """Of trials."""
    on_trial: OnTrial
    on_event: OnEvent | None
    on_evaluation: OnEvaluationEvent | None
    hold: Callable[[], Lock]
    """Takes the directory for this run: not before it is known that something can be merged."""

    def __init__(
        self,
        stores: Stores,
        recipe: Config,
        out: str,
        tasks: Sequence[str],
        options: SearchOptions,
        merging: MergeOptions,
    ) -> None:
        if scheme_of(out) in ("hf", "http", "https"):
            raise ConfigError(
                f"{out}: a search deletes models that are not among the best; search in a directory or bucket"
            )
        if merging.overwrite:
            raise ConfigError("a search goes on with what is in its directory; to begin anew, choose another directory")
        self._stores, self.out, self._tasks, self._options, self._merging = stores, out, tasks, options, merging
        self._recipe = read_recipe(recipe, needs_space=options.sampler != "soup")
        self._directions = options.directions
        self.trials: list[Trial] = []
        self._fingerprints: dict[str, str] = {}
        """Of the plans of trials, with the name of the first."""
        self._lock = Lock()
        self._num_idle = 0
        """Batches since the last that brought a better model."""

    def run(self) -> str:
        """Try settings until the budget is used up; return why it ended before, if so."""
        described = self._describe()
        recipe = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        record = read_record(self._stores, self.out)
        check_same(record, recipe, described, self.out)
        if record is not None:
            self._lock = self.hold()
            record = read_record(self._stores, self.out)  # another run may have gone on until now
        proposer = self._make_proposer()
        version = load_optuna().__version__ if isinstance(proposer, Study) else ""
        for batch in list_batches(record):
            check_replayed(batch, proposer.ask(len(batch)), record, version, self.out)
            self._learn(batch, proposer)
        self._remember()
        if self.trials:
            self._clean()  # an earlier run may have been killed before it did
            self._check_inputs()
        while (left := self._options.budget - len(self.trials)) > 0:
            if self._options.patience is not None and self._num_idle >= self._options.patience:
                return f"the last {self._num_idle} batches brought no better model"
            proposals = proposer.ask(min(self._options.batch, left))
            if not proposals:
                return "everything was tried"
            self._learn(self._try(proposals), proposer)
            self._lock.check()
            write_record(
                self._stores, self.out, SearchRecord(__version__, version, recipe, described, tuple(self.trials))
            )
            self._clean()
        return ""

    def finish(self) -> tuple[tuple[Point, ...], tuple[tuple[float, ...], ...]]:
        """Judge the best by all items, and the parents; return the best, and their values."""
        spectrum = read_spectrum(self._stores, self.out)
        points = {point.name: point for point in spectrum.points}
        names = [self.trials[k].name for k in self._list_best()]
        if not names:
            errors = next((trial.error for trial in self.trials if trial.error), "")
            raise OutputError(f"none of {len(self.trials)} trials came to anything; the first error: {errors}")
        parents = [parent.name for parent in spectrum.parents]
        found = self._evaluate([*names, *parents], self.evaluating)
        values = {name: read_values(found[name], self._directions) for name in names}
        front = find_front([values[name] for name in names], self._directions)
        kept = {names[k]: own for k in front if (own := values[names[k]]) is not None}
        if not kept:
            raise OutputError(
                f"the best trials could not be evaluated by all items: {explain_failure(found[names[0]])}"
            )
        order = sorted(kept, key=lambda name: -kept[name][0] if self._directions[0].is_maximised else kept[name][0])
        return tuple(points[name] for name in order), tuple(kept[name] for name in order)

    def _learn(self, batch: Sequence[Trial], proposer: Study | Grid | Soup) -> None:
        """Take note of what a batch has come to."""
        before = self._list_best()
        self.trials += batch
        proposer.tell([trial.values for trial in batch])
        self._num_idle = 0 if self._list_best() != before else self._num_idle + 1

    def _remember(self) -> None:
        """Take note of the plans of trials of an earlier run."""
        if self.trials and has_spectrum(self._stores, self.out):
            tried = {trial.name for trial in self.trials}
            for point in read_spectrum(self._stores, self.out).points:
                if point.name in tried and point.fingerprint:
                    self._fingerprints.setdefault(point.fingerprint, point.name)

    def _check_inputs(self) -> None:
        """Make sure that further trials come out as earlier ones did: of the same inputs, ops and version.

        Raises:
            OutputError: they would not.
        """
        best = [self.trials[k] for k in self._list_best()[:1]]
        if len(self.trials) < self._options.budget:
            for trial in best:
                self._plan_together({trial.name: trial.settings})

    def _list_best(self) -> list[int]:
        return find_front([trial.values for trial in self.trials], self._directions)

    def _make_proposer(self) -> Study | Grid | Soup:
        options = self._options
        if options.sampler == "soup":
            return Soup(self._recipe.num_models, is_maximised=self._directions[0].is_maximised)
        if options.sampler == "grid":
            return Grid(self._recipe.space, options.sampler_seed)
        return Study(self._recipe.space, options.sampler, self._directions, options.batch, options.sampler_seed)

    def _try(self, proposals: Sequence[Settings]) -> list[Trial]:
        """Merge and evaluate a batch of settings."""
        first = len(self.trials)
        number = self.trials[-1].batch + 1 if self.trials else 0
        names = [f"trial-{first + k:04}" for k in range(len(proposals))]
        settings = dict(zip(names, proposals, strict=True))
        trials: dict[str, Trial] = {}
        fresh: dict[str, Settings] = {}
        for name, planned in self._plan(settings).items():
            own = settings[name]
            same = self._fingerprints.setdefault(planned.fingerprint, name) if planned.fingerprint else name
            if planned.error:
                trials[name] = Trial(name, number, own, None, "", planned.error)
            elif same == name:
                fresh[name] = own
            else:
                trials[name] = Trial(name, number, own, None, same, "")
        if not self.trials:
            self._lock = self.hold()
            if read_record(self._stores, self.out) is not None:
                raise OutputError(f"{self.out}: another search has begun there meanwhile; run again to go on with it")
        if fresh:
            sweep(self._recipe.compose(fresh), self.out, options=self._merging, on_event=self.on_event)
            found = self._evaluate(list(fresh), self.judging)
            for name, own in fresh.items():
                values = read_values(found[name], self._directions)
                error = "" if values else explain_failure(found[name])
                trials[name] = Trial(name, number, own, values, "", error)
            if not self.trials and len(fresh) > 1 and all(trials[name].values is None for name in fresh):
                error = next(trials[name].error for name in fresh)
                raise OutputError(
                    f"no trial of the first batch could be evaluated; put it right and run again, which finds the"
                    f" models: {error}"
                )
        done = {trial.name: trial for trial in self.trials}
        batch = []
        for name in names:
            trial = trials[name]
            if trial.same_as:
                original = trials.get(trial.same_as) or done[trial.same_as]
                trial = replace(trial, values=original.values, error=original.error)
            batch.append(trial)
            self.on_trial(trial, first + len(batch))
        return batch

    def _plan(self, settings: Mapping[str, Settings]) -> dict[str, _Planned]:
        """Return the fingerprint of each setting's plan, or why there is none: planned together if they all can be."""
        try:
            return self._plan_together(settings)
        except _BY_SETTINGS as error:
            if len(settings) == 1:
                [name] = settings
                return {name: _Planned("", str(error))}
        planned: dict[str, _Planned] = {}
        for name, own in settings.items():
            planned |= self._plan({name: own})
        if not self.trials and all(each.error for each in planned.values()):
            raise ConfigError(f"no trial of the first batch can be merged: {next(iter(planned.values())).error}")
        return planned

    def _plan_together(self, settings: Mapping[str, Settings]) -> dict[str, _Planned]:
        points = plan_sweep(self._recipe.compose(settings), self.out, options=self._merging).spectrum.points
        return {point.name: _Planned(point.fingerprint, "") for point in points if point.name in settings}

    def _evaluate(self, names: Sequence[str], options: EvaluateOptions) -> dict[str, list[Evaluation]]:
        found = evaluate(self.out, self._tasks, options, only=names, on_event=self.on_evaluation)
        by_name: dict[str, list[Evaluation]] = {name: [] for name in names}
        for evaluation in found:
            by_name[evaluation.model].append(evaluation)
        if gone := [name for name in names if not by_name[name]]:
            raise OutputError(f"{self.out}/{gone[0]}: the model is gone; merge it again, by its YAML in spectrum.json")
        return by_name

    def _clean(self) -> None:
        """Delete the models that are not among the best; their evaluations stay."""
        if self._options.keep_all:
            return
        best = {self.trials[k].name for k in self._list_best()}
        tried = {trial.name for trial in self.trials}
        dropped: list[Point] = []

        def change(spectrum: Spectrum | None) -> Spectrum:
            if spectrum is None:
                raise OutputError(f"{self.out} has lost its record while the search ran; search in another directory")
            kept = {point.url for point in spectrum.points if point.name in best or point.name not in tried}
            points = []
            for point in spectrum.points:
                is_dropped = point.url not in kept and point.url in tried and point.state != "failed"
                if is_dropped:
                    dropped.append(point)
                points.append(replace(point, state="planned") if is_dropped else point)
            return replace(spectrum, points=tuple(points))

        update_spectrum(self._stores, self.out, change)
        for point in dropped:
            delete_model(self._stores, locate_point(self.out, point))

    def _describe(self) -> dict[str, object]:
        """Return everything that decides what is proposed and how it is judged."""
        options = self._options
        tasks = {task.name: [task.digest, task.sampling] for task in prepare_tasks(self._tasks, self.judging)}
        return {
            "recipe": self._recipe.text,
            "sampler": options.sampler,
            "sampler_seed": options.sampler_seed,
            "batch": options.batch,
            "subset": options.subset,
            "objectives": [direction.name for direction in self._directions],
            "tasks": json.loads(json.dumps(tasks)),
            "seed": self._merging.seed,
        }
