"""Turns what happens in a merge into events: adds up what is done, measures speeds and estimates the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from raymerge.cluster.runner import Progress
from raymerge.pipeline.errors import HeldError
from raymerge.pipeline.plan.report import format_plan
from raymerge.pipeline.plan.results import MergeReport, ShardResult
from raymerge.pipeline.plan.types import MergePlan, ShardTask
from raymerge.pipeline.progress.events import Event, Held, OnEvent, Planned, Progressed, Resumed, Retried, Warned

INTERVAL_SECONDS = 0.2
"""Between two reports of progress, at least."""

_WINDOW_SECONDS = 30.0
"""Over which speeds are measured."""

_FIRST_PART = 0.001
"""Share of the work before which no time left can be given."""


class Narrator:
    """Makes events of what happens in a merge, and tells them."""

    def __init__(self, on_event: OnEvent) -> None:
        self._tell = on_event
        self._speed = _Speed()
        self._read: dict[str, int] = {}
        self._num_finished = self._num_shards = self._num_retries = 0
        self._done = Progress()
        self._remarks: set[str] = set()
        self._to_read = self._to_write = self._to_move = 0
        self._last = time.monotonic()

    def planned(self, plan: MergePlan) -> None:
        """Tell of the plan and its warnings."""
        self._num_shards = len(plan.tasks)
        self._read = {task.file: task.read_nbytes + task.reread_nbytes for task in plan.tasks}
        self._to_write = sum(task.nbytes for task in plan.tasks)
        self._tell(
            Planned(
                method=plan.method,
                models=tuple(map(str, plan.models)),
                num_tensors=len(plan.weight_map),
                num_shards=self._num_shards,
                read_nbytes=sum(self._read.values()),
                write_nbytes=self._to_write,
                fingerprint=plan.fingerprint,
                text=format_plan(plan),
                plan=plan,
            )
        )
        for warning in plan.warnings:
            self._tell(Warned(warning))

    def held(self, error: HeldError) -> None:
        """Tell whom it waits for."""
        self._tell(Held(str(error)))

    def resumed(self, tasks: Sequence[ShardTask], partly: Sequence[ShardTask] = ()) -> None:
        """Tell of the work that an earlier run has left: tasks that are done, and those done for some outputs only."""
        kept = sum(task.nbytes for task in (*tasks, *partly))
        self._num_finished = len(tasks)
        self._to_read = sum(self._read.values()) - sum(self._read[task.file] for task in tasks)
        self._to_move = self._to_read + self._to_write - kept
        self._done = Progress(0, kept)
        self._last = time.monotonic()
        self._speed.measure(self._done, self._last)
        self._tell(Resumed(len(tasks), kept))

    def progressed(self, progress: Progress) -> None:
        """Tell now and then how far it is."""
        self._done = Progress(
            self._done.read_nbytes + progress.read_nbytes, self._done.written_nbytes + progress.written_nbytes
        )
        now = time.monotonic()
        if now - self._last >= INTERVAL_SECONDS:
            self._tell_progress(self._done, now)

    def _tell_progress(self, done: Progress, now: float) -> None:
        self._last = now
        read_speed, write_speed = self._speed.measure(done, now)
        left = max(0, self._to_read - done.read_nbytes + self._to_write - done.written_nbytes)
        speed = read_speed + write_speed
        is_known = speed > 0 and left < (1 - _FIRST_PART) * self._to_move
        self._tell(
            Progressed(
                num_finished=self._num_finished,
                num_shards=self._num_shards,
                read_nbytes=done.read_nbytes,
                to_read_nbytes=self._to_read,
                written_nbytes=done.written_nbytes,
                to_write_nbytes=self._to_write,
                read_per_second=read_speed,
                written_per_second=write_speed,
                seconds_left=left / speed if is_known else None,
                num_retries=self._num_retries,
            )
        )

    def finished(self, result: ShardResult) -> None:
        """Tell of a shard; after the last one also that everything is read and written."""
        self._num_finished += 1
        self._tell(result)
        if result.remark and result.remark not in self._remarks:
            self._remarks.add(result.remark)
            self._tell(Warned(f"{result.host}: {result.remark}"))
        if self._num_finished == self._num_shards:
            self._tell_progress(Progress(self._to_read, self._to_write), time.monotonic())

    def retried(self, reason: str, count: int) -> None:
        """Tell of a fault that was recovered from."""
        self._num_retries += count
        self._tell(Retried(reason, count))

    def told(self, event: Event) -> None:
        """Tell of what is no part of a single merge."""
        self._tell(event)

    def reported(self, report: MergeReport) -> None:
        """Tell of the report."""
        self._tell(report)


class _Speed:
    """Meter of the rate at which bytes have moved of late."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Progress]] = deque()

    def measure(self, done: Progress, now: float) -> tuple[float, float]:
        """Return the bytes read and written in a second; never less than nothing, though work may be lost.

        Args:
            done: all so far.
            now: in seconds; later than at the last call.
        """
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_SECONDS:
            self._seen.popleft()
        start, before = self._seen[0]
        seconds = max(now - start, 1e-6)
        return (
            max(0, done.read_nbytes - before.read_nbytes) / seconds,
            max(0, done.written_nbytes - before.written_nbytes) / seconds,
        )
