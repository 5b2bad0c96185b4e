"""The seam between task arithmetic and the rules that thin out a delta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.ops.lazy import torch
from raymerge.ops.stored import RunAll, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Trim:
    """Rule by which a loop trims a delta; see `delta_loops.combine_deltas`."""

    kind: int = 0
    """`delta_loops.ALL`, `delta_loops.MAGNITUDE`, `delta_loops.RANDOM` or `delta_loops.MASKED`."""
    limits: tuple[int, int, int, int] = (0, 0, 0, 0)
    """The bits of sizes: the largest one that is too small while some at the lower threshold may be kept; the lower
    threshold; the upper one; the largest one that is not too large once no more at the upper threshold may be kept."""
    word_limit: int = 0
    """Elements are kept whose random word is smaller."""
    left: tuple[int, int] = (-1, -1)
    """Numbers of elements at the lower and the upper threshold to keep, counted from here; -1 where all may be kept."""
    keys: NDArray[Any] | None = None
    """The two keys of each page of random words that the stored values touch."""
    kept: NDArray[Any] | None = None
    """A byte for each element, 1 where it is kept and 0 elsewhere."""


class Sparsifier(ABC):
    """Decides which elements of one model's delta are kept; the state for one tensor.

    Order of calls: for each of `num_passes`, `measure` for all blocks in order and `end_pass`; then any number of times
    `trim` for all blocks in order, from the block that starts at 0. After the passes, a copy (`copy.copy`) trims on its
    own: `measure` and `end_pass` may change what an attribute refers to, `trim` only replaces attributes.
    """

    num_passes: int = 0
    """Measuring passes over the delta before it can be trimmed."""

    def figures(self) -> Mapping[str, float]:
        """Return the figures of the measuring passes, by name, for reports."""
        return {}

    def measure(self, index: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take the figures of pass `index` from one block; overwrites `delta` and `spares`."""
        raise AssertionError("this sparsifier measures nothing")

    def end_pass(self, index: int) -> None:
        """Evaluate pass `index`, after its last block."""
        raise AssertionError("this sparsifier measures nothing")

    def fork(self, pieces: Sequence[Stored], source: int, run_all: RunAll) -> Sequence[Sparsifier]:
        """Return one for each of some neighbouring pieces, to trim them all at once by loops; see `KernelRun.fork`."""
        return [self] * len(pieces)

    def measure_stored(self, index: int, stored: Stored, source: int) -> None:
        """Take the figures of pass `index` from the delta of a source, by loops."""
        raise AssertionError("this sparsifier measures nothing")

    def split(self, stored: Stored) -> list[Stored]:
        """Return the pieces in which the sums of trimmed deltas are measured by loops, one after the other."""
        return [stored]

    def keep_mask(self, start: int, trim: Trim) -> None:  # noqa: B027  # most have masks that cost little
        """Remember the rule of a piece that begins at `start`, to return it again from `make_trim`."""

    @abstractmethod
    def make_trim(self, stored: Stored) -> Trim:
        """Return the rule by which loops trim these elements, in place of `trim`; called in the same order."""

    def end_trim(self, left: tuple[int, int]) -> None:  # noqa: B027  # most have nothing left over
        """Take back what loops have left of `Trim.left`."""

    @abstractmethod
    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what is not kept to zero, in place; overwrites `spares`.

        What is kept depends on the size of the values only, not on their sign.

        Args:
            start: index of the block's first element in the tensor.
            delta: the block's values, or their absolute values.
            spares: two blocks of scratch.
        """
