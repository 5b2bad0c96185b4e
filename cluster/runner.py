"""The seam between what is done and where it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


NUM_ATTEMPTS = 4
"""Attempts at an item whose worker dies or hangs, or whose store fails."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one item while it runs."""

    mem_nbytes: int
    """Memory for tensors and scratch, in bytes."""
    cost: int
    """Any measure of how long it takes; of items with as many slots, the largest start first."""
    num_slots: int = 1
    """Slots of the runner that it takes up: several where its memory is that of several items."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of an item since its last report."""

    read_nbytes: int = 0
    """Bytes read from the inputs."""
    written_nbytes: int = 0
    """Bytes handed to the output."""
    notes: tuple[object, ...] = ()
    """Other messages of the work, in order: picklable and small. They are not taken back."""

    def __add__(self, other: Progress) -> Progress:
        """Return the progress of both."""
        read, written = self.read_nbytes + other.read_nbytes, self.written_nbytes + other.written_nbytes
        return Progress(read, written, self.notes + other.notes)

    def __neg__(self) -> Progress:
        """Return the progress that takes this one back."""
        return Progress(-self.read_nbytes, -self.written_nbytes)

    def without_notes(self) -> Progress:
        """Return the bytes alone."""
        return Progress(self.read_nbytes, self.written_nbytes)


Report = Callable[[Progress], None]
"""Called by the work, often; raises `StoppedError` once the run is to end."""

Work = Callable[[Item, Report], Result]
"""A picklable function of one picklable item; its result is picklable and small.

A worker process gets one copy for all the items of a run, so that it may keep what it has opened. An item may be in
work twice at a time, in two processes: the first result counts, and the other one's report raises.
"""


class Runner(ABC):
    """Runs one function over many items.

    The driver calls `run` once per phase and consumes the iterator to its end; the runner calls `work`
    once per item, wherever it likes, and `on_progress` in the driver's process. Leaving the iterator
    early stops the run: items in work end at their next report, and no further item starts.
    """

    num_per_process = 1
    """Items in work at once in one process, at most."""

    @abstractmethod
    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes, in no fixed order.

        Raises:
            Exception: what the first failing item raised; the other items have ended by then.
        """
