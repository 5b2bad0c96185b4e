"""Trying again: how long, how often, and a record of what went wrong."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact

T = TypeVar("T")

PATIENCE_SECONDS = 40.0
"""Time after which a store that fails without an interruption counts as down."""

FIRST_SECONDS = 15.0
"""The same for a store that has not answered once: it is rather misspelt, or not running, than failing."""

MAX_RATE_LIMIT_SECONDS = 330.0
"""Longest total of the waits that a store asks for by name: the Hub's limits are for five minutes."""

_FIRST_DELAY_SECONDS = 0.1
_MAX_DELAY_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that may pass."""

    what: str
    """Such as `503 SlowDown` or `connection reset`: few different ones, as they are counted."""
    retry_after: float | None = None
    """Seconds that the store asks to be left alone."""


class FaultLog:
    """Counts the faults that were got over, and knows which stores work, and what they lack.

    Safe to use from several threads.
    """

    def __init__(self, reached: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._reached = set(reached)
        self._limits: dict[str, None] = {}

    def note(self, store: str, operation: str, what: str) -> str:
        """Count one fault of a store, such as `s3://bucket`, in an operation, such as `GET`; return its name."""
        name = redact(f"{store}: {operation}: {what}")
        with self._lock:
            self._counts[name] += 1
        return name

    def drain(self) -> tuple[tuple[str, int], ...]:
        """Return the counts since the last call, by name."""
        with self._lock:
            counts = tuple(sorted(self._counts.items()))
            self._counts.clear()
        return counts

    def note_limit(self, store: str, what: str) -> None:
        """Note what a store lacks, and what the merge does without."""
        with self._lock:
            self._limits[redact(f"{store}: {what}")] = None

    @property
    def limits(self) -> tuple[str, ...]:
        """Capabilities that stores lack, each once."""
        with self._lock:
            return tuple(self._limits)

    def note_answer(self, store: str) -> None:
        """Note that a store has answered."""
        self._reached.add(store)

    @property
    def reached(self) -> tuple[str, ...]:
        """The stores that have answered."""
        return tuple(sorted(self._reached))

    def has_answered(self, store: str) -> bool:
        """Tell whether a store has answered once."""
        return store in self._reached


class Patience:
    """Decides whether one operation is tried again, and waits in between.

    Delays grow from 0.1 to 8 seconds, half of each at random so that workers do not return together. What a store asks
    for (Retry-After) is waited for instead. An operation whose single try may outlast the patience is allowed
    `least_tries` in a row however long they take.
    """

    def __init__(
        self, faults: FaultLog, store: str, operation: str, seconds: float | None = None, *, least_tries: int = 1
    ) -> None:
        self.num_attempts = 0
        """Failures so far."""
        self._faults = faults
        self._store = store
        self._operation = operation
        self._seconds = PATIENCE_SECONDS if seconds is None else seconds
        self._least_tries = least_tries
        self._num_in_a_row = 0
        self._failing_since: float | None = None
        self._asked_seconds = 0.0
        self._start = self._last_progress = time.monotonic()

    def succeeded(self) -> None:
        """Note that some progress was made, or all is done."""
        self._faults.note_answer(self._store)
        self._num_in_a_row = 0
        self._failing_since = None
        self._last_progress = time.monotonic()

    def failed(self, fault: Fault) -> bool:
        """Note a fault; return True after a wait, or False at once where it has gone on for too long."""
        self._faults.note(self._store, self._operation, fault.what)
        if fault.what[:1].isdigit():  # the status of an answer
            self._faults.note_answer(self._store)
        seconds = self._seconds if self._faults.has_answered(self._store) else min(self._seconds, FIRST_SECONDS)
        now = time.monotonic()
        self.num_attempts += 1
        self._num_in_a_row += 1
        if self._failing_since is None:
            self._failing_since = self._last_progress
        delay = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** (self._num_in_a_row - 1))
        delay *= random.uniform(0.5, 1.0)
        if fault.retry_after is not None:
            delay = max(fault.retry_after, delay)
            if self._asked_seconds + delay > MAX_RATE_LIMIT_SECONDS:
                return False
            self._asked_seconds += delay
            if fault.what.startswith("429"):  # the store works, and says when it will again for us
                self._failing_since += delay
        if now + delay - self._failing_since > seconds and self._num_in_a_row >= self._least_tries:
            return False
        time.sleep(delay)
        return True

    @property
    def summary(self) -> str:
        """Such as `gave up after 9 attempts in 38 s`."""
        return f"gave up after {counted(self.num_attempts, 'attempt')} in {time.monotonic() - self._start:.0f} s"


def retry(
    call: Callable[[], T],
    *,
    faults: FaultLog,
    store: str,
    operation: str,
    classify: Callable[[Exception], Fault | None],
    give_up: Callable[[Exception, str], Exception],
    least_tries: int = 1,
) -> T:
    """Call until it works.

    Args:
        call: what is to be done; doing it twice must do no harm.
        faults: where what goes wrong is noted.
        store: for the record and messages, such as `s3://bucket`.
        operation: such as `GET`.
        classify: returns the fault that an error is, or None where trying again is useless: it is raised as it is.
        give_up: returns what to raise when it has gone on for too long, from the last error and how it was tried.
        least_tries: how often it is tried at least, however long that takes.
    """
    patience = Patience(faults, store, operation, least_tries=least_tries)
    while True:
        try:
            result = call()
        except Exception as error:
            fault = classify(error)
            if fault is None:
                raise
            if not patience.failed(fault):
                raise give_up(error, patience.summary) from None
        else:
            patience.succeeded()
            return result


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, with its kind where the text alone would not do."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
