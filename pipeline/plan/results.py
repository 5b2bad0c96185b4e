"""Results of a merge: finished shards and the report. Frozen, picklable, without handles or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_nbytes, format_seconds


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One finished file of one output; also its record in the journal."""

    file: str
    nbytes: int
    sha256: str
    etag: str
    """Etag of the file in the output's store when it was finished."""
    nonfinite: tuple[str, ...]
    """Tensors with NaN or infinity in the output."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict, compare=False)
    """Figures of each tensor, by its name: its `norm`, and those that the kernel measured anyway; in no log."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of one task."""

    file: str
    """The shard's name, the same in every output."""
    nbytes: int
    """Size of all files together, in bytes."""
    files: tuple[ShardFile, ...]
    """One for each output of the plan."""
    read_nbytes: int
    """Bytes read in fact, rereads included."""
    seconds: float
    peak_rss: int
    """Peak of the whole process when the shard was done, in bytes."""
    peak_measured_mem: int
    """Part of it that compares with `projected_mem`: without code and without what was there before, in bytes."""
    host: str
    """The machine that made it: its address on a cluster, else its name."""
    faults: tuple[tuple[str, int], ...]
    """Faults that were recovered from, with their counts."""
    remark: str = ""
    """Why it took longer than it need have, if so."""

    def __repr__(self) -> str:
        return f"ShardResult({self.file}: {format_nbytes(self.nbytes)} in {format_seconds(self.seconds)})"


@dataclass(frozen=True, slots=True)
class HostReport:
    """One machine's share of a merge."""

    host: str
    num_shards: int
    read_nbytes: int
    written_nbytes: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The report of a merge."""

    out: str
    manifest: str
    """Manifest of what the output was made of, and the checksum of every file."""
    num_tensors: int
    num_shards: int
    num_resumed: int
    """Shards that an earlier run had finished."""
    was_complete: bool
    """Whether an earlier run had finished everything, so that there was nothing to do."""
    read_nbytes: int
    written_nbytes: int
    seconds: float
    work_seconds: float
    """Seconds of these in which shards were made."""
    slowest: ShardResult | None
    """The shard that took longest; None where none was made."""
    hosts: tuple[HostReport, ...]
    """By name."""
    peak_rss: int
    """Peak of the largest worker process, in bytes."""
    peak_measured_mem: int
    """Memory for tensors, scratch and transfers of the largest worker, in bytes; to compare with `projected_mem`."""
    projected_mem: int
    """Memory that the plan projects for that, in bytes."""
    over_nbytes: int
    """Excess of that process over the plan, in bytes; 0 where it kept to it."""
    faults: tuple[tuple[str, int], ...]
    """Faults of stores and workers that were recovered from, with their counts."""
    warnings: tuple[str, ...]
    nonfinite: tuple[str, ...]
    """Tensors with NaN or infinity in the output."""
    limits: tuple[str, ...] = ()
    """Limits of the stores, such as no conditional writes, and what follows from each."""

    def __repr__(self) -> str:
        contents = f"{counted(self.num_tensors, 'tensor')} in {counted(self.num_shards, 'shard')}"
        return f"MergeReport({redact(self.out)}: {contents}, {format_seconds(self.seconds)})"
