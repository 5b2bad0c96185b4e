"""One run of a search: batches of trials, each merged from one reading of the inputs, and evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from raymerge import __version__
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.registry import prepare_tasks
from raymerge.pipeline.search.best import find_best, judge_best
from raymerge.pipeline.search.grid import Grid
from raymerge.pipeline.search.models import Models
from raymerge.pipeline.search.options import SearchOptions
from raymerge.pipeline.search.record import SearchRecord, Trial, read_record, write_record
from raymerge.pipeline.search.replay import check_replayed, check_same, list_batches
from raymerge.pipeline.search.soup import Soup
from raymerge.pipeline.search.study import Settings, Study, load_optuna
from raymerge.pipeline.search.values import Values, explain_failure, read_values
from raymerge.pipeline.spectrum.record import has_spectrum
from raymerge.pipeline.stores.seam import Lock

OnBatch = Callable[[int, int], None]
"""Told of each batch before it is merged: the half-open range of its trials, counted from 0."""
OnTrial = Callable[[Trial, int], None]
"""Told of each trial, with the number of trials so far."""

OnRetry = Callable[[int], None]
"""Told how many failed trials of earlier runs are tried again, before they are."""


@dataclass(frozen=True, slots=True)
class Telling:
    """The callbacks of those who watch a search."""

    batch: OnBatch
    trial: OnTrial
    retry: OnRetry


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trials that a search ends with, judged by all items of the tasks."""

    best: Mapping[str, Values]
    """The models that no other is better than, best first by the first objective."""
    parents: Mapping[str, Values | None]
    """None where one could not be evaluated."""
    errors: Mapping[str, str]
    """Why, for those."""


class Run:
    """One run of a search."""

    def __init__(
        self,
        models: Models,
        options: SearchOptions,
        evaluating: EvaluateOptions,
        telling: Telling,
        hold: Callable[[], Lock],
    ) -> None:
        """Begin.

        Args:
            models: of the search.
            options: how to search.
            evaluating: how the best are evaluated; trials may be by fewer items.
            telling: told of batches and trials.
            hold: takes the directory for this run: not before it is known that something can be merged.
        """
        self._models, self._options, self._telling, self._hold = models, options, telling, hold
        self._evaluating = evaluating
        self._judging = evaluating if options.subset is None else replace(evaluating, limit=options.subset)
        self._directions = options.directions
        self.trials: list[Trial] = []
        self._fingerprints: dict[str, str] = {}
        """Name of the first trial by the fingerprint of its plan."""
        self._lock = Lock()
        self._num_idle = 0
        """Batches since the last that brought a better model."""
        self._has_unrecorded = False
        """Whether a killed run has merged models of a batch that it has not recorded."""

    def run(self) -> str:
        """Try settings until the budget is used up; return why it ended before, if so."""
        stores, out = self._models.stores, self._models.out
        described = self._describe()
        recipe = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        record = read_record(stores, out)
        check_same(record, recipe, described, out)
        if record is not None:
            self._lock = self._hold()
            record = read_record(stores, out)  # another run may have gone on until now
        proposer = self._replay(record.trials if record else (), record)
        version = load_optuna().__version__ if isinstance(proposer, Study) else ""

        def write() -> None:
            self._lock.check()
            write_record(stores, out, SearchRecord(__version__, version, recipe, described, tuple(self.trials)))

        if not self.trials:
            self._models.check_space()
        self._remember()
        if self.trials and (len(self.trials) < self._options.budget or self._list_failed()):
            self._clean(self._list_best())  # an earlier run may have been killed before it did
            self._check_inputs()
        if self._retry():
            write()
            proposer = self._replay(tuple(self.trials), record)
        while (left := self._options.budget - len(self.trials)) > 0:
            if self._options.patience is not None and self._num_idle >= self._options.patience:
                batches = "batch" if self._num_idle == 1 else f"{self._num_idle} batches"
                return f"the last {batches} brought no better model"
            proposals = proposer.ask(min(self._options.batch, left))
            if not proposals:
                return "everything was tried"
            batch = self._try(proposals)
            self._learn(batch, proposer)
            write()
            self._clean(self._list_best())
            if len(self.trials) < self._options.budget:
                self._check_judge(batch)
        return ""

    def finish(self) -> Outcome:
        """Judge the best by all items, and the parents; see `judge_best`."""
        values = {trial.name: trial.values for trial in self.trials}
        if not any(values.values()):
            errors = next((trial.error for trial in self.trials if trial.error), "")
            raise OutputError(f"none of {len(self.trials)} trials came to anything; the first error: {errors}")
        names = self._models.list_parents()
        found = self._models.evaluate([*self._list_best(), *names], self._evaluating)
        parents = {name: read_values(found[name], self._directions) for name in names}
        reasons = {name: explain_failure(found[name]) for name in names if parents[name] is None}
        failures: list[str] = []

        def judge(names: Sequence[str]) -> dict[str, Values | None]:
            lacking = [name for name in names if name not in found]
            found.update(self._models.evaluate(lacking, self._evaluating) if lacking else {})
            judged = {name: read_values(found[name], self._directions) for name in names}
            failures.extend(explain_failure(found[name]) for name in names if judged[name] is None)
            return judged

        best = judge_best(values, self._directions, judge)
        if not best:
            raise OutputError(f"the best trials could not be evaluated by all items: {failures[0]}")
        self._restore(list(best))
        self._clean(list(best))
        sign = -1 if self._directions[0].is_maximised else 1
        return Outcome(
            {name: best[name] for name in sorted(best, key=lambda name: sign * best[name][0])}, parents, reasons
        )

    def _replay(self, trials: Sequence[Trial], record: SearchRecord | None) -> Study | Grid | Soup:
        """Take note of the trials of earlier runs; return what proposes the next ones."""
        proposer = self._make_proposer()
        version = load_optuna().__version__ if isinstance(proposer, Study) else ""
        self.trials = []
        for batch in list_batches(trials):
            check_replayed(batch, proposer.ask(len(batch)), record, version, self._models.out)
            self._learn(batch, proposer)
        return proposer

    def _learn(self, batch: Sequence[Trial], proposer: Study | Grid | Soup) -> None:
        """Take note of what a batch has come to."""
        before = self._list_best()
        self.trials += batch
        proposer.tell([None if trial.told_failed else trial.values for trial in batch])
        self._num_idle = 0 if self._list_best() != before else self._num_idle + 1

    def _remember(self) -> None:
        """Take note of the plans of trials of an earlier run."""
        if self.trials and has_spectrum(self._models.stores, self._models.out):
            tried = {trial.name for trial in self.trials}
            for point in self._models.read().points:
                if point.name not in tried:
                    self._has_unrecorded = True
                elif point.fingerprint:
                    self._fingerprints.setdefault(point.fingerprint, point.name)

    def _check_inputs(self) -> None:
        """Make sure that further trials come out as earlier ones did: of the same inputs, ops and version.

        Raises:
            OutputError: they would not.
        """
        for name in self._list_best()[:1]:
            self._models.plan_together({name: self._settings[name]})

    def _list_failed(self) -> dict[str, Settings]:
        """Return the settings of trials that may come to values if they are tried again."""
        return {trial.name: trial.settings for trial in self.trials if trial.is_tried_again and not trial.same_as}

    def _retry(self) -> bool:
        """Try failed trials of earlier runs again; return whether there were any.

        The sampler is told of those of the last batch, unless a killed run has merged what it proposed after that. What
        it proposed after earlier ones stays as it is, so that the search can be replayed.
        """
        if not (failed := self._list_failed()):
            return False
        self._telling.retry(len(failed))
        numbers = {trial.name: number for number, trial in enumerate(self.trials, start=1)}
        last = self.trials[-1].batch
        planned = self._plan(failed, last)
        fresh = {name: own for name, own in failed.items() if name not in planned}
        for name, (values, error) in self._judge(fresh).items():
            planned[name] = Trial(name, last, failed[name], values, "", error)
        found: dict[str, Trial] = {trial.name: trial for trial in self.trials}
        for trial in self.trials:
            again = planned.get(trial.name, trial)
            if again.same_as:
                original = planned.get(again.same_as, found[again.same_as])
                again = replace(again, values=original.values, error=original.error)
            is_late = (trial.batch < last or self._has_unrecorded) and again.values is not None and trial.values is None
            found[trial.name] = replace(again, batch=trial.batch, told_failed=trial.told_failed or is_late)
            if found[trial.name] != trial or trial.name in failed:
                self._telling.trial(found[trial.name], numbers[trial.name])
        self.trials = list(found.values())
        return True

    def _check_judge(self, batch: Sequence[Trial]) -> None:
        """End the search where none of a batch could be evaluated: that is rather the judge's fault than the models'.

        Raises:
            OutputError: none could be; the batch is recorded, and tried again by the next run.
        """
        own = set(self._fingerprints.values())
        errors = [trial.error for trial in batch if trial.name in own and trial.is_tried_again]
        if len(errors) > 1 and len(errors) == sum(trial.name in own for trial in batch):
            raise OutputError(
                f"none of the last {len(errors)} models could be evaluated; put it right and run again, which tries"
                f" them again and goes on: {errors[0]}"
            )

    def _list_best(self) -> list[str]:
        return find_best({trial.name: trial.values for trial in self.trials}, self._directions)

    @property
    def _settings(self) -> dict[str, Settings]:
        return {trial.name: trial.settings for trial in self.trials}

    def _clean(self, best: Sequence[str]) -> None:
        """Delete the models that are not among the best."""
        if not self._options.keep_all:
            self._models.keep_only(best, [trial.name for trial in self.trials])

    def _restore(self, best: Sequence[str]) -> None:
        """Merge those of the best again that were deleted when they seemed not to be."""
        gone = {point.name for point in self._models.read().points if point.state == "planned"}
        if lacking := {name: self._settings[name] for name in best if name in gone}:
            self._models.merge(lacking)

    def _make_proposer(self) -> Study | Grid | Soup:
        options, recipe = self._options, self._models.recipe
        if options.sampler == "soup":
            return Soup(recipe.num_models, is_maximised=self._directions[0].is_maximised)
        if options.sampler == "grid":
            return Grid(recipe.space, options.sampler_seed)
        return Study(recipe.space, options.sampler, self._directions, options.batch, options.sampler_seed)

    def _try(self, proposals: Sequence[Settings]) -> list[Trial]:
        """Merge and evaluate a batch of settings."""
        first = len(self.trials)
        number = self.trials[-1].batch + 1 if self.trials else 0
        names = [f"trial-{first + k:04}" for k in range(len(proposals))]
        settings = dict(zip(names, proposals, strict=True))
        self._telling.batch(first, first + len(names))
        trials = self._plan(settings, number)
        if not self.trials and len(names) > 1 and all(name in trials and trials[name].error for name in names):
            raise ConfigError(f"no trial of the first batch can be merged: {trials[names[0]].error}")
        fresh = {name: own for name, own in settings.items() if name not in trials}
        if not self.trials:
            self._lock = self._hold()
            if read_record(self._models.stores, self._models.out) is not None:
                raise OutputError(
                    f"{self._models.out}: another search has begun there meanwhile; run again to go on with it"
                )
        for name, (values, error) in self._judge(fresh).items():
            trials[name] = Trial(name, number, fresh[name], values, "", error)
        done = {trial.name: trial for trial in self.trials}
        batch = []
        for name in names:
            trial = trials[name]
            if trial.same_as:
                original = trials.get(trial.same_as) or done[trial.same_as]
                trial = replace(trial, values=original.values, error=original.error)
            batch.append(trial)
            self._telling.trial(trial, first + len(batch))
        return batch

    def _plan(self, settings: Mapping[str, Settings], number: int) -> dict[str, Trial]:
        """Return the trials of a batch that need no merge: they have no plan, or that of an earlier one."""
        trials: dict[str, Trial] = {}
        for name, planned in self._models.plan(settings).items():
            same = self._fingerprints.setdefault(planned.fingerprint, name) if planned.fingerprint else name
            if planned.error or same != name:
                trials[name] = Trial(name, number, settings[name], None, "" if planned.error else same, planned.error)
        return trials

    def _judge(self, settings: Mapping[str, Settings]) -> dict[str, tuple[Values | None, str]]:
        """Merge and evaluate, with the first batch the parents as well; return values, or why there are none."""
        if not settings:
            return {}
        self._models.merge(settings)
        parents = [] if self.trials else self._models.list_parents()
        found = self._models.evaluate([*settings, *parents], self._judging)
        judged: dict[str, tuple[Values | None, str]] = {}
        for name in settings:
            values = read_values(found[name], self._directions)
            judged[name] = (values, "" if values else explain_failure(found[name]))
        errors = [error for values, error in judged.values() if values is None]
        if not self.trials and len(errors) == len(judged) > 1:
            raise OutputError(
                f"no trial of the first batch could be evaluated; put it right and run again, which finds the models:"
                f" {errors[0]}"
            )
        return judged

    def _describe(self) -> dict[str, object]:
        """Return everything that decides what is proposed and how it is judged."""
        options = self._options
        tasks = {task.name: [task.digest, task.sampling] for task in prepare_tasks(self._models.tasks, self._judging)}
        return {
            "recipe": self._models.recipe.text,
            "sampler": options.sampler,
            "sampler_seed": options.sampler_seed,
            "batch": options.batch,
            "subset": options.subset,
            "objectives": [direction.name for direction in self._directions],
            "tasks": json.loads(json.dumps(tasks)),
            "seed": self._models.merging.seed,
        }
