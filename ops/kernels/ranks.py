"""Random masks whose chances follow from the ranks of an element within its row."""

from __future__ import annotations

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.kernels.random import RandomBits, biased_words
from raymerge.ops.kernels.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import np, torch
from raymerge.ops.stored import Stored

_NUM_CHANCES = 2**32
"""Random words."""
_TEMPORARY_NBYTES, _TABLE_NBYTES = 48, 32
"""For each element of a block while it is sorted, on a GPU; for each place in a row, in tables."""


class RankSparsifier(Sparsifier):
    """Keeps each element with a probability that grows with its rank by size within its row.

    Source: Deep et al. 2024, "DELLA-Merging", section 3.1 (MagPrune): from density - epsilon for the smallest element
    of a row to density + epsilon for the largest, in equal steps; of equal ones the first is the smaller.
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
        self._low, self._high = (int(p * _NUM_CHANCES) for p in (density - epsilon, density + epsilon))
        self._mean = int(density * _NUM_CHANCES)
        self._is_rescaling = is_rescaling
        self._row, self._block = count_row(site), count_row_block(site)
        self._stream = RandomBits(site.seed, site.name, position)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what the mask drops to zero; the block holds whole rows."""
        for first in range(0, delta.numel(), self._block):
            part = slice(first, first + self._block)
            self._trim_rows(start + first, delta[part], (spares[0][part], spares[1][part]))

    def make_trim(self, stored: Stored) -> Trim:
        """Refuse: ranking has no compiled loop."""
        raise AssertionError("this sparsifier has no loops")

    def _trim_rows(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        order = _sort_rows(torch.abs(delta, out=spares[0]).view(torch.int32).view(-1, self._row))
        limits, factors = self._find_tables(delta.device)
        self._stream.write(start, spares)
        placed = spares[1].view(torch.int32).view(order.shape).scatter_(1, order, limits.expand(order.shape))
        delta.mul_(torch.lt(biased_words(spares[0]), placed.view(-1), out=spares[0]))
        if self._is_rescaling:
            delta.mul_(spares[0].view(order.shape).scatter_(1, order, factors.expand(order.shape)).view(-1))

    def _find_tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each rank the number of random words that keep an element, biased, and its reciprocal."""
        if self._tables is None:
            ranks = np.arange(self._row, dtype=np.int64)
            limits = (
                ranks * (self._high - self._low) // (self._row - 1) + self._low if self._row > 1 else self._mean + ranks
            )
            factors = torch.from_numpy((_NUM_CHANCES / np.maximum(limits, 1)).astype(np.float32))
            limits -= _NUM_CHANCES // 2
            self._tables = torch.from_numpy(limits.astype(np.int32)).to(device), factors.to(device)
        return self._tables


def _sort_rows(bits: torch.Tensor) -> torch.Tensor:
    """Return the places of each row's elements, the smallest first; of equal ones the first comes first."""
    if bits.device.type != "cpu":
        return torch.sort(bits, dim=1, stable=True).indices
    keys = bits.numpy().astype(np.int64)  # numpy sorts integers with vector instructions, and torch does not
    keys <<= 32
    keys |= np.arange(bits.shape[1], dtype=np.int64)
    keys.sort(axis=1)
    keys &= 2**32 - 1
    return torch.from_numpy(keys)


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
    """Return the memory that ranking takes, in bytes: temporary, and tables for each model."""
    return count_row_block(site) * _TEMPORARY_NBYTES + (site.num_sources - 1) * count_row(site) * _TABLE_NBYTES
