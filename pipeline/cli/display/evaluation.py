"""Shows how an evaluation goes, and its results as a table."""

from __future__ import annotations

import time
from collections.abc import Sequence

from raymerge.pipeline.cli.console import say
from raymerge.pipeline.curve.formats import format_count, format_tokens
from raymerge.pipeline.evaluation.evaluators.loss import BITS
from raymerge.pipeline.evaluation.events import Begun, Evaluated, EvaluationEvent, Repeated, Sampled
from raymerge.pipeline.evaluation.results import Estimate, Evaluation
from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_seconds

_LINE = "\n"
_LINE_SECONDS = 10.0
"""Between lines of progress."""


class EvaluationDisplay:
    """Prints events to stderr: a line for each evaluation, and now and then how far one is."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._told_at = time.monotonic()
        self._num_done = self._num = self._num_found = 0
        self.has_spectrum = False
        """Whether the models are those of a spectrum; never if nothing is shown."""

    def show(self, event: EvaluationEvent) -> None:
        """Show one event."""
        if self._quiet:
            return
        if isinstance(event, Begun):
            self._num = event.num_models * event.num_tasks
            self._num_found = event.num_cached
            self.has_spectrum = event.has_spectrum
            found = f"; {counted(event.num_cached, 'result')} already there" if event.num_cached else ""
            say(f"{counted(event.num_models, 'model')}, {counted(event.num_tasks, 'task')}{found}")
            for reason in event.skipped:
                say(redact(f"warning: not evaluated: {reason}"))
        elif isinstance(event, Evaluated):
            self._num_done += 1
            if event.is_cached and self._num_found:  # told of in one line at the start
                self._num_found -= 1
                return
            done = event.evaluation
            what = format_short(done) if done.state == "complete" else f"failed: {done.error.partition(_LINE)[0]}"
            how = "the same model was evaluated before" if event.is_cached else format_seconds(done.seconds)
            say(f"[{self._num_done}/{self._num}] {done.model}  {done.task}  {what}  {how}")
        elif isinstance(event, Repeated):
            say(redact(f"warning: an evaluation is begun again: {event.reason}"))
        elif isinstance(event, Sampled) and time.monotonic() - self._told_at > _LINE_SECONDS:
            self._told_at = time.monotonic()
            say(f"  {format_progress(event)}")


def format_progress(event: Sampled) -> str:
    """Return how far an evaluation is, on a line."""
    of = f" of {event.num_samples:,}" if event.num_samples else ""
    samples = f"{event.num_finished:,}{of} samples" if event.num_finished else "no samples yet"
    return f"{event.model}  {event.task}  {samples}"


def format_short(done: Evaluation) -> str:
    """Return the main figures on a line."""
    parts = []
    if done.accuracy is not None:
        parts.append(f"accuracy {_percent(done.accuracy)}")
    if done.tokens is not None:
        parts.append(format_tokens(done.tokens.mean))
    if done.loss is not None:
        parts.append(f"loss {done.loss.mean:.4f}")
    if BITS in done.other:
        parts.append(f"{done.other[BITS]:.4f} bits per byte")
    return ", ".join(parts)


def format_table(found: Sequence[Evaluation]) -> str:
    """Return results as a table: a line for each model and task."""
    has_loss = any(each.loss is not None for each in found)
    has_bits = any(BITS in each.other for each in found)
    head = ["model", "task", "accuracy %", "tokens", "p95", "thinking", "cut off"]
    head += [*(["loss"] if has_loss else []), *(["bits/byte"] if has_bits else [])]
    rows = [head]
    for each in found:
        if each.state == "failed":
            rows.append([each.model, each.task, "failed", *[""] * (len(head) - 3)])
            continue
        tokens = each.tokens
        row = [each.model, each.task, _percent(each.accuracy) if each.accuracy else ""]
        row += [format_count(tokens.mean), format_count(tokens.p95)] if tokens else ["", ""]
        row += [_share(each.thinking), _share(each.cut_off)]
        if has_loss:
            row.append(f"{each.loss.mean:.4f}" if each.loss else "")
        if has_bits:
            row.append(f"{each.other[BITS]:.4f}" if BITS in each.other else "")
        rows.append(row)
    return _align(rows)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    places = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return "\n".join(
        "  ".join(place(cell, width) for place, cell, width in zip(places, row, widths, strict=True)).rstrip()
        for row in rows
    )


def _percent(estimate: Estimate) -> str:
    """Return an accuracy with its interval.

    >>> _percent(Estimate(0.8, 0.5, 0.95)), _percent(Estimate(0.5, 0.5, 0.5))
    ('80.0 (50.0 to 95.0)', '50.0')
    """
    if not estimate.has_interval:
        return f"{100 * estimate.mean:.1f}"
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
