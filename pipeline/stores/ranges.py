"""Coalescing of byte ranges that are read together: pure planning, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymerge.pipeline.stores.files import ByteRange, StoredFile


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Ranges of one file that are read together, as bytes [start, stop)."""

    file: StoredFile
    start: int
    stop: int
    members: tuple[int, ...]
    """Positions in the ranges given, by start; neighbours touch or overlap, or a gap lies between them."""

    @property
    def nbytes(self) -> int:
        """Bytes that it spans."""
        return self.stop - self.start


GAP_NBYTES = 64 * 2**10
"""Between ranges that may be read together: it takes a connection a millisecond, and a request by itself takes more."""


def coalesce(ranges: Sequence[ByteRange], *, max_nbytes: int, max_gap: int = 0) -> list[ReadGroup]:
    """Group ranges that follow each other in the same file; what lies between others is in no group.

    Files come in the order of their first range, groups of a file by start. Every range is in exactly one group, and no
    byte is in two: ranges that overlap stay together, and so does a long range, even if they exceed `max_nbytes`.

    Args:
        ranges: in any order.
        max_nbytes: ranges that do not overlap are joined only up to this size.
        max_gap: so many bytes may lie between ranges that are joined.

    >>> file = StoredFile("a.safetensors", 100, "")
    >>> ranges = [ByteRange(file, 40, 60), ByteRange(file, 0, 10), ByteRange(file, 10, 20)]
    >>> [(group.start, group.stop, group.members) for group in coalesce(ranges, max_nbytes=100)]
    [(0, 20, (1, 2)), (40, 60, (0,))]
    """
    by_file: dict[StoredFile, list[int]] = {}
    for position, item in enumerate(ranges):
        by_file.setdefault(item.file, []).append(position)
    groups = []
    for file, positions in by_file.items():
        positions.sort(key=lambda position: (ranges[position].start, ranges[position].stop))
        members = [positions[0]]
        start, stop = ranges[positions[0]].start, ranges[positions[0]].stop
        for position in positions[1:]:
            item = ranges[position]
            if item.start < stop or (item.start <= stop + max_gap and item.stop - start <= max_nbytes):
                members.append(position)
                stop = max(stop, item.stop)
            else:
                groups.append(ReadGroup(file, start, stop, tuple(members)))
                members, start, stop = [position], item.start, item.stop
        groups.append(ReadGroup(file, start, stop, tuple(members)))
    return groups
