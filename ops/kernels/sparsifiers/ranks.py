"""Random masks whose chances follow from the ranks of an element within its row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.kernels.sparsifiers.random import RandomBits, biased_words, numpy_table
from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, np, rank_loops, torch
from raymerge.ops.stored import PIECE_ELEMENTS, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE_SHIFT = 17
"""Sizes are compared by the bits of their floats without so many low ones: by exponent and 6 binary places."""
NUM_SIZES = 2 ** (31 - SIZE_SHIFT)
CHANCE_SHIFT = 30
"""Binary places of the step of chances from one rank to the next."""

_NUM_CHANCES = 2**32
"""Random words."""
_TEMPORARY_NBYTES = 32
"""For each element of a block, on a GPU."""
_KEPT_NBYTES = 2**23
"""For each model: masks that were drawn to measure them are kept, a bit for each element, up to so many."""


class RankSparsifier(Sparsifier):
    """Keeps each element with a probability that grows with its rank by size within its row.

    Sizes with the same `SIZE_SHIFT` high bits count as equal; equal ones share their mean rank.

    Source: Deep et al. 2024, "DELLA-Merging", section 3.1 (MagPrune): from density - epsilon for the smallest element
    of a row to density + epsilon for the largest, in equal steps.
    """

    def __init__(self, density: float, epsilon: float, *, is_rescaling: bool, site: Site, position: int) -> None:
        """Draw the mask of one model on one tensor.

        Args:
            density: probability that an element is kept, on average.
            epsilon: by how much the probability of the smallest and the largest element differ from it.
            is_rescaling: whether what is kept is divided by the probability.
            site: the tensor.
            position: index of the model among those that are not the base.
        """
        self._row, self._block = count_row(site), count_row_block(site)
        low, high = (int(p * _NUM_CHANCES) for p in (density - epsilon, density + epsilon))
        self._low = low if self._row > 1 else int(density * _NUM_CHANCES)
        self._step = ((high - low) << CHANCE_SHIFT) // (2 * (self._row - 1)) if self._row > 1 else 0
        self._is_rescaling = is_rescaling
        self._source = position + 1
        self._stream = RandomBits(site.seed, site.name, position)
        self._masks: dict[int, NDArray[np.uint8]] = {}
        """Masks of blocks, by their number, packed; see `keep_mask`."""

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what the mask drops to zero; the block holds whole rows."""
        for first in range(0, delta.numel(), self._block):
            part = slice(first, first + self._block)
            self._trim_rows(start + first, delta[part], (spares[0][part], spares[1][part]))

    def make_trim(self, stored: Stored) -> Trim:
        """Return the mask; whatever rows it begins and ends in lie in the buffer as a whole."""
        kept = np.empty(stored.num_elements, np.uint8)
        place = stored.start
        while place < stored.stop:
            number = place // self._block
            stop = min(stored.stop, (number + 1) * self._block)
            mask = self._masks.get(number)
            here = slice(place - stored.start, stop - stored.start)
            if mask is None:
                kept[here] = self._draw(stored, place, stop)
            else:
                offset = place - number * self._block
                kept[here] = np.unpackbits(mask, count=offset + stop - place)[offset:]
            place = stop
        return Trim(delta_loops.MASKED, kept=kept)

    def keep_mask(self, start: int, trim: Trim) -> None:
        """Remember the mask of a block for when it is combined, if there is room."""
        assert trim.kept is not None
        if (len(self._masks) + 1) * self._block <= 8 * _KEPT_NBYTES:
            self._masks[start // self._block] = np.packbits(trim.kept)

    def split(self, stored: Stored) -> list[Stored]:
        """Return the blocks in which deltas are measured."""
        return stored.split(self._block)

    def _draw(self, stored: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """Return 1 for each of the elements [start, stop) that is kept and 0 for the others."""
        row = self._row
        first, last = start // row * row, -(-stop // row) * row
        kept = np.empty(last - first, np.uint8)
        tables = np.zeros((3, NUM_SIZES), np.uint32)
        numbers = self._source, first, row, self._low, self._step
        keys = self._stream.list_keys(first, last)
        scratch = np.empty((2, row), np.uint32)
        sources = stored.cut(first, last).sources()
        rank_loops.draw_by_rank(*sources, *numbers, numpy_table(), keys, tables, kept, scratch)
        return kept[start - first : stop - first]

    def _trim_rows(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        limits = self._find_limits(torch.abs(delta, out=spares[0]).view(torch.int32).view(-1, self._row)).view(-1)
        self._stream.write(start, spares)
        biased = (limits - _NUM_CHANCES // 2).int()
        delta.mul_(torch.lt(biased_words(spares[0]), biased, out=spares[0]))
        if self._is_rescaling:
            delta.mul_((_NUM_CHANCES / limits.clamp_(min=1).double()).float())

    def _find_limits(self, bits: torch.Tensor) -> torch.Tensor:
        """Return for each element the number of random words that keep it; overwrites the bits of the sizes."""
        sizes = bits.bitwise_right_shift_(SIZE_SHIFT)
        if sizes.device.type == "cpu":
            in_order = sizes.clone()
            in_order.numpy().sort(axis=1)  # with vector instructions, which torch does not have for it
        else:
            in_order = sizes.sort(dim=1).values
        ranks = torch.searchsorted(in_order, sizes, out_int32=True)
        ranks.add_(torch.searchsorted(in_order, sizes, right=True, out_int32=True)).sub_(1)
        return ranks.long().mul_(self._step).bitwise_right_shift_(CHANCE_SHIFT).add_(self._low)


def count_row(site: Site) -> int:
    """Return the elements of a row, which lies along the last dimension; a vector is one row."""
    return max(1, site.shape[-1]) if site.shape else 1


def count_row_block(site: Site) -> int:
    """Return the elements of a block of whole rows, near the usual number; one row, where that is longer.

    >>> count_row_block(Site("w", (4096, 1000), 2, 0)), count_row_block(Site("w", (3, 200_000), 2, 0))
    (131000, 200000)
    """
    row = count_row(site)
    return max(1, BLOCK_ELEMENTS // row) * row


def measure_ranking(site: Site) -> int:
    """Return the memory that ranking takes, in bytes: while a block or a piece is drawn, and masks that are kept."""
    drawn = 2 * min(PIECE_ELEMENTS, site.num_elements) + min(_KEPT_NBYTES, -(-site.num_elements // 8))
    temporary: int = count_row_block(site) * _TEMPORARY_NBYTES + 3 * 4 * NUM_SIZES + 2 * 4 * count_row(site)
    return temporary + (site.num_sources - 1) * drawn
