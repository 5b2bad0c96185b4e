"""The events of a merge: what whoever watches it is told, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raymerge.pipeline.plan.results import MergeReport, ShardResult
from raymerge.pipeline.plan.types import MergePlan


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is made; nothing is written yet."""

    method: str
    models: tuple[str, ...]
    num_tensors: int
    num_shards: int
    read_nbytes: int
    """To be read, rereads included."""
    write_nbytes: int
    """To be written."""
    fingerprint: str
    """Hash of everything that decides the output's bytes."""
    text: str
    """The plan for people."""
    plan: MergePlan | None = field(default=None, compare=False, repr=False)
    """None where the merge runs elsewhere."""


@dataclass(frozen=True, slots=True)
class SweepPlanned:
    """The points of a sweep are planned; nothing is written yet."""

    num_points: int
    num_models: int
    """To be made, or complete; fewer than points where some are equal."""
    num_batches: int
    """Number of times that the inputs are read."""
    read_nbytes: int
    """To be read for all of them, rereads included."""
    write_nbytes: int
    """To be written."""
    text: str
    """The plan for people."""


@dataclass(frozen=True, slots=True)
class SweepDone:
    """A sweep has ended, with all of its models complete if they were to be made."""

    out: str
    record: str
    """File that lists the points."""
    num_points: int
    """In the record, those of earlier sweeps included."""
    num_complete: int
    """Points whose model is complete."""
    num_made: int
    """Models that this sweep made or finished."""
    seconds: float
    collection: str = ""
    """URL of the Hub's collection of the models; empty elsewhere."""


@dataclass(frozen=True, slots=True)
class Held:
    """Another run is writing to the output, and is waited for."""

    text: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The shards of an earlier run are known, and the work begins."""

    num_shards: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """The progress of a merge."""

    num_finished: int
    """Shards, those of an earlier run included."""
    num_shards: int
    read_nbytes: int
    """Read by this run so far."""
    to_read_nbytes: int
    """To be read by this run in all."""
    written_nbytes: int
    """Bytes of the output, those of an earlier run included."""
    to_write_nbytes: int
    """Bytes of the whole output."""
    read_per_second: float
    """Bytes, over the last half minute."""
    written_per_second: float
    """Bytes, over the last half minute."""
    seconds_left: float | None
    """At this speed; None where nothing moves, or hardly anything has yet."""
    num_retries: int
    """Faults recovered from so far."""


@dataclass(frozen=True, slots=True)
class Retried:
    """Something went wrong and was done again."""

    reason: str
    count: int
    """Number of repetitions since this was last told."""


@dataclass(frozen=True, slots=True)
class Warned:
    """Something is doubtful."""

    text: str


@dataclass(frozen=True, slots=True)
class MergeFailed:
    """The merge has ended without a model."""

    type: str
    """The error's."""
    message: str
    exit_code: int

    @property
    def text(self) -> str:
        """For people."""
        return f"Error: {self.message}" if self.exit_code == 2 else self.message


Event = (
    Planned
    | Held
    | Resumed
    | Progressed
    | ShardResult
    | Retried
    | Warned
    | MergeReport
    | MergeFailed
    | SweepPlanned
    | SweepDone
)
"""In this order, more or less; `MergeReport` or `MergeFailed` is the last. A call that fails raises instead.

A sweep begins with `SweepPlanned`, tells of each of its batches as of a merge, and ends with `SweepDone`.
"""

OnEvent = Callable[[Event], object]
"""Is told how a merge goes, in the thread that called it; what it raises ends the merge."""
