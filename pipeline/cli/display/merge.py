"""Shows how a merge goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Self

from raymerge.pipeline.cli.console import paint, say
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.results import MergeReport, ShardResult
from raymerge.pipeline.progress.codec import read_event
from raymerge.pipeline.progress.events import (
    Event,
    Held,
    MergeFailed,
    Planned,
    Progressed,
    Resumed,
    Retried,
    SweepDone,
    SweepPlanned,
    Warned,
)
from raymerge.pipeline.progress.report import format_briefly, format_planned, format_report, format_swept
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_nbytes, format_seconds, format_speed

if TYPE_CHECKING:
    from raymerge.pipeline.cli.display.bar import Bar

_LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""


class Display:
    """Prints events to stderr, and the report to stdout; use it in a `with` block."""

    def __init__(self, *, verbose: bool, quiet: bool) -> None:
        self._verbose = verbose
        self._quiet = quiet
        self._bar = _make_bar() if sys.stderr.isatty() and not quiet else None
        self._num_planned = 0
        self._is_sweep = False
        self._retries: Counter[str] = Counter()
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def show_line(self, line: str) -> None:
        """Show what a line of a log tells; as it is where it is no event."""
        event = read_event(line)
        if event is None:
            self._print(line)
        else:
            self.show(event)

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Planned():
                self._num_planned = event.num_shards
                if self._verbose or not self._is_sweep:
                    self._print(format_planned(event, verbose=self._verbose))
            case Warned():
                self._print(f"warning: {event.text}")
            case Held():
                self._print(f"waiting: {event.text}")
            case Resumed():
                if event.num_shards:
                    verb = "is" if event.num_shards == 1 else "are"
                    kept = f"{event.num_shards} of {counted(self._num_planned, 'shard')}"
                    self._print(f"{kept} {verb} finished and sound; going on with the rest")
            case Progressed():
                self._show_progress(event)
            case ShardResult():
                if self._verbose:
                    made = f"{event.file}: {format_nbytes(event.nbytes)} in {format_seconds(event.seconds)}"
                    speed = format_speed(event.read_nbytes + event.nbytes, event.seconds)
                    self._print(f"{made} on {event.host}, {speed}")
            case Retried():
                self._show_retry(event)
            case MergeReport():
                self._show_report(event)
            case SweepPlanned():
                self._is_sweep = True
                self._print(event.text)
            case SweepDone():
                self._stop()
                if not self._quiet:
                    say(format_swept(event), stream=sys.stdout)
            case MergeFailed():
                self._stop()
                say(event.text)

    def _show_progress(self, event: Progressed) -> None:
        if self._bar is not None:
            completed, total = event.read_nbytes + event.written_nbytes, event.to_read_nbytes + event.to_write_nbytes
            self._bar.show(format_progress(event, self._bar.text_width), completed, total)
        elif time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print(format_progress(event))

    def _show_retry(self, event: Retried) -> None:
        """Print why something is done again: the first, second, fourth, eighth time, and so on."""
        before = self._retries[event.reason]
        after = self._retries[event.reason] = before + event.count
        if self._verbose or after.bit_length() > before.bit_length():
            self._print(f"retried: {event.reason}" + (f" ({after} times by now)" if after > 1 else ""))

    def _show_report(self, report: MergeReport) -> None:
        if not self._is_sweep:
            self._stop()
        for name in report.nonfinite:
            say(f"warning: {name}: the output has NaN or infinite values")
        if self._is_sweep and not self._verbose:
            self._print(format_briefly(report))
        elif not self._quiet:
            say(format_report(report), stream=sys.stdout)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.print(paint(redact(text), sys.stderr))
        elif not self._quiet:
            say(redact(text))


def _make_bar() -> Bar:
    from raymerge.pipeline.cli.display.bar import Bar  # rich: slow to import

    return Bar()


def format_progress(event: Progressed, max_width: int | None = None) -> str:
    """Return how far it is, on one line; what does not fit in the width is left out, from the end."""
    parts = [f"{event.num_finished}/{counted(event.num_shards, 'shard')}"]
    if event.seconds_left is not None and event.num_finished < event.num_shards:
        parts.append(f"{format_seconds(event.seconds_left)} left")
    if event.num_retries:
        parts.append(f"{event.num_retries} retried")
    parts += [
        f"read {format_speed(event.read_per_second)}",
        f"write {format_speed(event.written_per_second)}",
        f"{format_nbytes(event.written_nbytes)} of {format_nbytes(event.to_write_nbytes)}",
    ]
    while max_width is not None and len(parts) > 1 and len(", ".join(parts)) > max_width:
        parts.pop()
    return ", ".join(parts)
