"""Shows how a search goes, and what it has come to."""

from __future__ import annotations

import time
from collections.abc import Sequence

from raymerge.pipeline.cli.console import say
from raymerge.pipeline.cli.display.evaluation import format_progress
from raymerge.pipeline.evaluation.events import Begun, Evaluated, EvaluationEvent, Repeated, Sampled
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.redact import redact
from raymerge.pipeline.search.display import format_settings, format_values
from raymerge.pipeline.search.record import Trial
from raymerge.pipeline.search.results import SearchReport
from raymerge.pipeline.sizes import format_seconds

_LINE_SECONDS = 10.0
"""Between lines of progress."""


class SearchDisplay:
    """Prints to stderr: a line for each batch and trial, and now and then how far an evaluation is."""

    def __init__(self, budget: int, objectives: Sequence[str], *, quiet: bool) -> None:
        self._budget, self._objectives, self._quiet = budget, objectives, quiet
        self._told_at = time.monotonic()
        self._num_done = self._num = 0

    def show_batch(self, start: int, stop: int) -> None:
        """Show that a batch is begun."""
        trials = f"trials {start + 1} to {stop}" if stop - start > 1 else f"trial {stop}"
        self._say(f"{trials} of {self._budget}: merging")

    def show_retry(self, count: int) -> None:
        """Show that failed trials are tried again."""
        self._say(f"{counted(count, 'trial')} of an earlier run failed: trying again")

    def show_warning(self, warning: str) -> None:
        """Show what plans warn of."""
        self._say(f"warning: {warning}")

    def show_trial(self, trial: Trial, number: int) -> None:
        """Show what a trial has come to."""
        values = trial.values
        found = f"failed: {trial.error}" if values is None else format_values(self._objectives, values)
        same = f"  (the same model as {trial.same_as})" if trial.same_as else ""
        self._say(f"[{number}/{self._budget}] {trial.name}  {format_settings(trial.settings)}  {found}{same}")

    def show_evaluation(self, event: EvaluationEvent) -> None:
        """Show how far an evaluation is."""
        if isinstance(event, Begun):
            self._num, self._num_done = event.num_models * event.num_tasks, 0
            if self._num > event.num_cached:
                self._say(f"evaluating {counted(event.num_models, 'model')}")
        elif isinstance(event, Evaluated):
            self._num_done += 1
            if not event.is_cached:
                self._show_now_and_then(f"  {self._num_done} of {self._num} done")
        elif isinstance(event, Repeated):
            self._say(f"warning: an evaluation is begun again: {event.reason}")
        elif isinstance(event, Sampled):
            self._show_now_and_then(f"  {format_progress(event)}")

    def _show_now_and_then(self, text: str) -> None:
        if time.monotonic() - self._told_at > _LINE_SECONDS:
            self._say(text)

    def _say(self, text: str) -> None:
        self._told_at = time.monotonic()
        if not self._quiet:
            say(redact(text))


def format_report(report: SearchReport) -> str:
    """Return the best models and how the parents compare with them."""
    lines = [
        f"{report.out}: {counted(len(report.trials), 'trial')} in {format_seconds(report.seconds)}"
        + (f"; {report.stopped}" if report.stopped else ""),
        f"{counted(len(report.best), 'model')} that no other is better than:",
    ]
    for point, values in zip(report.best, report.values, strict=True):
        parents = report.beaten.get(point.name)
        worse = f"; {_join(parents)} better" if parents else ""
        found = format_values(report.objectives, values)
        lines.append(f"  {point.name}  {format_settings(point.settings)}  {found}{worse}")
    lines.append("Parents:")
    for name, own in report.parents.items():
        if own is None:
            lines.append(f"  {name}  could not be evaluated: {report.parent_errors[name].splitlines()[0]}")
            continue
        better = report.beating[name]
        found = f"{_join(better)} better" if better else "no model is better"
        lines.append(f"  {name}  {format_values(report.objectives, own)}; {found}")
    if report.failed:
        again = [trial for trial in report.failed if trial.is_tried_again]
        first, failed = (again or report.failed)[0], counted(len(report.failed), "trial")
        those = "" if len(again) == len(report.failed) else f" {len(again)} of them"
        hint = f"; run the search again to retry{those}" if again else ""
        lines.append(f"{failed} failed, {first.name} with: {first.error.splitlines()[0]}{hint}")
    if len(report.beating) > 1:
        lines.append(f"Better than every parent: {listing(report.beating_all) if report.beating_all else 'none'}.")
    return "\n".join(lines)


def _join(names: Sequence[str]) -> str:
    return f"{listing(names)} {'is' if len(names) == 1 else 'are'}"
