"""The books of a run on Ray: items that wait, attempts in work, and what they have told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from raymerge.cluster.pace import Pace
from raymerge.cluster.ray.attempt import Attempt
from raymerge.cluster.runner import Progress, Report, Resources
from raymerge.cluster.waiting import Waiting


class Ledger:
    """Items that wait, and attempts in work by the streams of what they tell.

    Two attempts at one item may be in work, twins: the progress of the later one counts.
    """

    def __init__(
        self,
        attempts: Sequence[Attempt],
        resources: Sequence[Resources],
        num_slots: int,
        on_progress: Report,
        *,
        has_twins: bool = True,
    ) -> None:
        """Have all items wait.

        Args:
            attempts: the first at each item.
            resources: of each item.
            num_slots: of the runner.
            on_progress: told of the progress that counts.
            has_twins: whether an item that takes far longer than its like is begun once more.
        """
        self._has_twins = has_twins
        self.running: dict[Any, Attempt] = {}
        self.is_ending = False
        """Whether nothing is to begin any more."""
        self._waiting = Waiting(resources, num_slots)
        self._attempts = list(attempts)
        self._costs = [each.cost for each in resources]
        self._on_progress = on_progress
        self._pace = Pace()
        self._doubled: set[int] = set()

    def __bool__(self) -> bool:
        """Return whether something is in work, or waits."""
        return bool(self.running or self._waiting)

    @property
    def has_waiting(self) -> bool:
        """Whether an item waits."""
        return bool(self._waiting)

    @property
    def has_spare(self) -> bool:
        """Whether there is a slot for a twin."""
        return self._has_twins and self._waiting.has_spare and not self.is_ending

    def take(self) -> Attempt | None:
        """Return the attempt that starts next; None where there is no slot for one."""
        item = self._waiting.take()
        return None if item is None else self._attempts[item]

    def count(self, attempt: Attempt, progress: Progress) -> None:
        """Add to what an attempt has told."""
        attempt.told += progress.without_notes()
        if _sum(progress) > 0:
            attempt.advanced_at = attempt.heard_at
        self._on_progress(progress if attempt.is_counted else Progress())

    def finish(self, stream: Any) -> Attempt | None:
        """Take out the first attempt that has done an item, and return its twin, which is beaten now."""
        attempt, twin = self.running[stream], self.find_twin(stream)
        self._pace.note(self._costs[attempt.item], time.monotonic() - attempt.began_at, _sum(attempt.told))
        if twin is not None:
            twin.is_beaten = True
            self._move_count(twin, attempt)
        self._remove(stream)
        return twin

    def drop(self, stream: Any) -> Attempt | None:
        """Take out an attempt that has ended without a result; return its twin, which goes on."""
        attempt, twin = self.running[stream], self.find_twin(stream)
        self._move_count(attempt, twin)
        self._remove(stream)
        return twin

    def find_twin(self, stream: Any) -> Attempt | None:
        """Return the other attempt at the same item that is in work."""
        attempt = self.running[stream]
        return next((each for each in self.running.values() if each.item == attempt.item and each is not attempt), None)

    def repeat(self, attempt: Attempt) -> None:
        """Have an attempt wait before all others, in place of one that was dropped."""
        self._attempts[attempt.item] = attempt
        self._waiting.repeat(attempt.item)

    def end(self) -> None:
        """Have nothing begin any more."""
        self.is_ending = True
        self._waiting.clear()

    def find_stragglers(self) -> list[Any]:
        """Return the streams of attempts that should have a twin, if there is a slot for one, by what was read."""
        if not self.has_spare:
            return []
        now = time.monotonic()
        return [
            stream
            for stream, attempt in self.running.items()
            if attempt.begun and attempt.item not in self._doubled
            if self._pace.is_straggler(
                self._costs[attempt.item], now - attempt.began_at, _sum(attempt.told), now - attempt.advanced_at
            )
        ]

    def take_twin(self, stream: Any) -> bool:
        """Take the slots for an attempt's twin, whose progress counts from now on; return False where they are none."""
        attempt = self.running[stream]
        if not self._waiting.take_twice(attempt.item):
            return False
        self._doubled.add(attempt.item)
        self._move_count(attempt, None)
        return True

    def _remove(self, stream: Any) -> None:
        self._waiting.release(self.running.pop(stream).item)

    def _move_count(self, attempt: Attempt, other: Attempt | None) -> None:
        """Take an attempt's progress back, if it counts, and count that of the other instead."""
        if attempt.is_counted:
            attempt.is_counted = False
            self._on_progress(-attempt.told)
            if other is not None:
                other.is_counted = True
                self._on_progress(other.told)


def _sum(progress: Progress) -> int:
    return progress.read_nbytes + progress.written_nbytes
