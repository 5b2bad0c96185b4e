"""The pace of a run: durations of its items, and stragglers among those in work."""

from __future__ import annotations

from bisect import insort

_TIMES = 3
"""Times the median that a straggler is projected to take, at least."""

_LEAST_SECONDS = 5.0
"""An item that has run for less is none: starting a worker takes as long."""

_FIRST_SECONDS = 20.0
"""The same until its first progress: it may be loading libraries."""


class Pace:
    """Seconds and bytes of the items that are finished, for what they cost."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._nbytes: list[float] = []

    def note(self, cost: int, seconds: float, nbytes: int) -> None:
        """Take note of an item that is finished, and of the bytes that it has told of."""
        insort(self._seconds, seconds / max(1, cost))
        insort(self._nbytes, nbytes / max(1, cost))

    def is_straggler(self, cost: int, seconds: float, nbytes: int, silent_seconds: float) -> bool:
        """Tell whether an item in work takes so long that another worker would be done earlier.

        Args:
            cost: of the item.
            seconds: since it began.
            nbytes: it has told of so many.
            silent_seconds: since it told of any.
        """
        if not self._seconds or seconds < (_LEAST_SECONDS if nbytes > 0 else _FIRST_SECONDS):
            return False
        usual = max(1, cost) * self._seconds[len(self._seconds) // 2]
        whole = max(1, cost) * self._nbytes[len(self._nbytes) // 2]
        part = min(1.0, max(1.0, nbytes) / whole) if whole > 0 else 1.0
        projected = seconds / part
        is_worth_it = projected - seconds >= usual or silent_seconds >= usual
        return seconds >= usual and projected >= _TIMES * usual and is_worth_it
