"""Shows how a merge goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from raymerge.cluster.runner import Progress as Step
from raymerge.pipeline.driver import Listener
from raymerge.pipeline.errors import HeldError
from raymerge.pipeline.plan_report import format_plan
from raymerge.pipeline.sizes import format_nbytes
from raymerge.pipeline.types import MergePlan, ShardResult

_LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""


class Display(Listener):
    """Prints to stderr what it is told; use it in a `with` block."""

    def __init__(self, *, verbose: bool, quiet: bool) -> None:
        self._verbose = verbose
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.fields[shards]}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
        )
        self._lines = not sys.stderr.isatty()
        self._num_shards = 0
        self._num_done = 0
        self._total = 0
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, plan: MergePlan) -> None:
        """Print the plan."""
        self._print(format_plan(plan, verbose=self._verbose))
        for warning in plan.warnings:
            self._print(f"warning: {warning}")
        self._num_shards = len(plan.tasks)
        self._total = sum(task.nbytes for task in plan.tasks)
        self._task = self._bar.add_task("", total=self._total, shards=self._shards())

    def held(self, error: HeldError) -> None:
        """Say whom it waits for."""
        self._print(f"waiting: {error}")

    def resumed(self, results: list[ShardResult]) -> None:
        """Say what an earlier run has left to do."""
        self._num_done = len(results)
        if results:
            self._print(f"{len(results)} of {self._num_shards} shards are finished and sound; going on with the rest")
        self._advance(sum(result.nbytes for result in results))

    def progressed(self, progress: Step) -> None:
        """Move the bar, or print a line now and then."""
        self._advance(progress.written_nbytes)
        if self._lines and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            speed = self._done / (self._last_line - self._start)
            done = f"{format_nbytes(self._done)} of {format_nbytes(self._total)}"
            self._print(f"{self._shards()}, {done}, {format_nbytes(speed)}/s")

    def finished(self, result: ShardResult) -> None:
        """Count a shard."""
        self._num_done += 1
        self._advance(0)
        if self._verbose:
            self._print(f"{result.file}: {format_nbytes(result.nbytes)} in {result.seconds:.1f} s")

    def _shards(self) -> str:
        return f"{self._num_done}/{self._num_shards} shards"

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._bar.update(self._task, advance=nbytes, shards=self._shards())

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
