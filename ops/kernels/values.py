"""Values that loops compute for each element, such as its variance, from which the largest are selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernels.delta import Trims
from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier
from raymerge.ops.lazy import np, sum_loops, value_loops
from raymerge.ops.stored import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Values:
    """A float32 for each of some neighbouring elements."""

    def __init__(self, place: Stored) -> None:
        """Make room for values of the elements of `place`; loops write to `array`."""
        self.array: NDArray[np.float32] = np.empty(place.num_elements, np.float32)
        self.stored = Stored(place.start, place.stop, self.array.data.cast("B"), (0,), ("float32",))
        """The values as a source by themselves, number 0: what loops on deltas take as it is."""

    def find_kept(self, selection: Sparsifier) -> NDArray[np.uint8]:
        """Return a byte for each value: 1 where it is selected and not zero, else 0."""
        trims = Trims([selection], self.stored)
        kept = np.empty(len(self.array), np.uint8)
        where = self.stored.start, len(self.array)
        value_loops.find_kept(*self.stored.sources(), *where, *trims.arguments(), kept, sum_loops.make_scratch(2))
        trims.end()
        return kept
