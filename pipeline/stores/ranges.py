"""Which byte ranges are read together: pure planning, no I/O."""

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
    """Positions in the ranges given, by start; neighbours may overlap, or leave a gap of at most `max_gap`."""

    @property
    def nbytes(self) -> int:
        """How many bytes it spans, gaps included."""
        return self.stop - self.start


def coalesce(ranges: Sequence[ByteRange], *, max_gap: int, max_nbytes: int) -> list[ReadGroup]:
    """Group ranges that lie close to each other in the same file.

    Files come in the order of their first range, groups of a file by start. Every range is in exactly one group, and no
    byte is in two: ranges that overlap stay together, and so does a long range, even if they exceed `max_nbytes`.

    Args:
        ranges: in any order.
        max_gap: bytes that may be read in vain between two ranges; 0 joins only what touches.
        max_nbytes: ranges that do not overlap are joined only up to this size.

    >>> file = StoredFile("a.safetensors", 100, "")
    >>> ranges = [ByteRange(file, 40, 60), ByteRange(file, 0, 10), ByteRange(file, 10, 20)]
    >>> [(group.start, group.stop, group.members) for group in coalesce(ranges, max_gap=0, max_nbytes=100)]
    [(0, 20, (1, 2)), (40, 60, (0,))]
    >>> [(group.start, group.stop, group.members) for group in coalesce(ranges, max_gap=20, max_nbytes=100)]
    [(0, 60, (1, 2, 0))]
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
            is_near = item.start - stop <= max_gap and item.stop - start <= max_nbytes
            if item.start < stop or is_near:
                members.append(position)
                stop = max(stop, item.stop)
            else:
                groups.append(ReadGroup(file, start, stop, tuple(members)))
                members, start, stop = [position], item.start, item.stop
        groups.append(ReadGroup(file, start, stop, tuple(members)))
    return groups
