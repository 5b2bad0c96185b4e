"""Deltas where the models vary most, weighted by their size."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.sparsifiers.select import (
    CUT_NBYTES,
    SELECTION_TEMPORARY_NBYTES,
    MagnitudeSparsifier,
    count_equal,
)
from raymerge.ops.kernels.values import Values
from raymerge.ops.lazy import np, sum_loops, torch, value_loops
from raymerge.ops.stored import LOOP_DTYPES, RunAll, Slot, Stored
from raymerge.ops.sums import add_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST_SQUARES = 1e-6
"""Mean squares that sum to less give all models the same weight, as in mergekit."""
SMALLEST_DIVISOR = 1e-6

MOST_REMEMBERED = 2**28
"""Elements of a tensor for which the loops remember which of them are selected, a bit for each; of a larger one, they
find them again."""


@dataclass(frozen=True)
class VaryingDeltas(Kernel):
    """y = base + sum(w_i * d_i) / sum(w_i) over the models that agree with the sign of sum(d_i).

    Deltas count where the models vary most, and a model's weight is its share of the mean squares of what counts.
    """

    family = "deltas"
    loop_dtypes = LOOP_DTYPES
    share: float
    """Share of the elements with any variance that is kept, the most varying first; 1 and more keep all elements."""

    def num_passes(self, site: Site) -> int:
        """Return two to select, and one for the weights."""
        return (1 + 2 * (self.share < 1)) * (site.num_sources > 1)

    def num_scratch(self, site: Site) -> int:
        """The base, the variance, two spares, and all deltas."""
        return 3 + site.num_sources

    def state_nbytes(self, site: Site) -> int:
        """Histograms and collected bits of the selection, and what is selected."""
        if self.num_passes(site) < 2:
            return 0
        remembered = -(-site.num_elements // 8) if site.num_elements <= MOST_REMEMBERED else 0
        return CUT_NBYTES + SELECTION_TEMPORARY_NBYTES + remembered

    def start(self, site: Site) -> KernelRun:
        """Begin; squares are summed over the blocks."""
        return _VaryingDeltasRun(self, site)


class _VaryingDeltasRun(KernelRun):
    def __init__(self, kernel: VaryingDeltas, site: Site) -> None:
        self._kernel = kernel
        self._site = site
        self._selection = MagnitudeSparsifier(1) if kernel.share < 1 else None
        self._num_varying = self._num_selected = 0
        self._masks: dict[int, NDArray[np.uint8]] = {}
        """Elements that are selected of each block, by its number, packed; empty where loops find them again."""
        self._squares = self._weights = [0.0] * (site.num_sources - 1)

    def share(self, kernel: Kernel) -> KernelRun:
        run = copy.copy(self)
        run._selection = copy.copy(self._selection)
        return run

    def measure(self, index: int, block: Block) -> None:
        variance, first, second = block.scratch[1:4]
        deltas = self._load_deltas(block)
        if self._selection is not None and index < self._selection.num_passes:
            _write_variance(deltas, variance, (first, second))
            if index == 0:
                self._num_varying += int(variance.count_nonzero().item())
            self._selection.measure(index, variance, (first, second))
            return
        self._select(block, deltas)
        self._squares = [
            add_blocks(total, delta.mul_(delta)) for total, delta in zip(self._squares, deltas, strict=True)
        ]

    def end_pass(self, index: int) -> None:
        if self._selection is not None and index < self._selection.num_passes:
            if index == 0:
                self._num_selected = int(self._num_varying * max(0.0, self._kernel.share))
                self._selection.choose(max(1, self._num_selected))
            self._selection.end_pass(index)
            return
        means = [total / max(1, self._site.num_elements) for total in self._squares]
        total = sum(means)
        is_even = total < SMALLEST_SQUARES
        self._weights = [1 / len(means) if is_even else mean / total for mean in means]

    def combine(self, block: Block, out: torch.Tensor) -> None:
        """Source: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", section 3.3, with signs by the sum."""
        if not self._weights:
            block.load(0, out)
            return
        base, divisor, signs, spare = block.scratch[:4]
        deltas = self._load_deltas(block)
        self._select(block, deltas)
        torch.add(deltas[0], deltas[1], out=signs) if len(deltas) > 1 else signs.copy_(deltas[0])
        for delta in deltas[2:]:
            signs.add_(delta)
        torch.ge(signs, 0, out=signs).mul_(2).sub_(1)
        out.zero_()
        divisor.zero_()
        for delta, weight in zip(deltas, self._weights, strict=True):
            agreeing = torch.threshold_(delta.mul_(signs), 0, 0)
            divisor.add_(torch.sign(agreeing, out=spare).mul_(weight))
            out.add_(agreeing.mul_(weight))
        out.div_(divisor.clamp_(min=SMALLEST_DIVISOR)).mul_(signs).add_(base)

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        selection = self._selection
        if selection is not None and index < selection.num_passes:
            for piece in stored.split(BLOCK_ELEMENTS):
                variances = Values(piece)
                num_varying = _write_variances(piece, variances)
                self._num_varying += num_varying if index == 0 else 0
                selection.measure_stored(index, variances.stored, 0)
            return
        pieces = stored.split(BLOCK_ELEMENTS)
        if selection is not None and self._site.num_elements <= MOST_REMEMBERED:
            for piece in pieces:
                self._masks[piece.start // BLOCK_ELEMENTS] = np.packbits(self._choose(piece)[1])
        # one thread where what is selected of a piece depends on the pieces before it
        calls = [partial(self._sum_squares, piece) for piece in pieces]
        for sums in run_all(calls) if selection is None or self._masks else [call() for call in calls]:
            self._squares = [total + square for total, square in zip(self._squares, sums.tolist(), strict=True)]

    def fork(self, pieces: Sequence[Stored], run_all: RunAll) -> Sequence[KernelRun]:
        if self._selection is None or self._masks:
            return [self] * len(pieces)
        runs = [copy.copy(self) for _ in pieces]
        for run, selection in zip(runs, self._selection.fork_by(pieces, run_all, _count_equal), strict=True):
            run._selection = selection
        return runs

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        item = len(out.buffer) // max(1, stored.num_elements)
        weights = np.array(self._weights, np.float32)
        scratch = sum_loops.make_scratch(4 + len(weights))
        finished = 0.0
        for piece in stored.split(BLOCK_ELEMENTS):
            where = *self._choose(piece), weights, np.float32(SMALLEST_DIVISOR), piece.start, piece.num_elements
            first = (piece.start - stored.start) * item
            slot = Slot(out.buffer[first : first + piece.num_elements * item], out.dtype, out.squares)
            finished += value_loops.combine_varying(*piece.sources(), *where, *slot.arguments(), scratch)
        return finished

    def _sum_squares(self, stored: Stored) -> NDArray[np.float64]:
        """Return the sum of the squares of each delta over a block."""
        sums: NDArray[np.float64] = np.empty((1, len(self._weights)))
        scratch = np.empty((4, sum_loops.TILE_ELEMENTS), np.uint32)
        value_loops.sum_squares(*stored.sources(), *self._choose(stored), stored.num_elements, sums, scratch)
        return sums.reshape(-1)

    def _choose(self, stored: Stored) -> tuple[int, NDArray[np.uint8]]:
        """Return 0 where all deltas count, 2 where none does; else 1, and a byte for each element, 1 if it counts.

        The elements lie in one block; blocks come in order.
        """
        if self._selection is None:
            return 0, np.empty(0, np.uint8)
        choice = 2 if self._is_nothing_selected() else 1
        mask = self._masks.get(stored.start // BLOCK_ELEMENTS)
        if mask is not None:
            offset = stored.start % BLOCK_ELEMENTS
            return choice, np.unpackbits(mask, count=offset + stored.num_elements)[offset:]
        variances = Values(stored)
        _write_variances(stored, variances)
        return choice, variances.find_kept(self._selection)

    def _is_nothing_selected(self) -> bool:
        return self._selection is not None and self._num_selected == 0

    def figures(self) -> Mapping[str, float]:
        """Return each model's weight, the first as `weight[0]`, and the share of elements that is selected."""
        figures = {f"weight[{position}]": weight for position, weight in enumerate(self._weights)}
        if self._selection is not None and self._weights and self._site.num_elements:
            figures["kept"] = self._num_selected / self._site.num_elements
        return figures

    def _load_deltas(self, block: Block) -> Sequence[torch.Tensor]:
        base, deltas = block.scratch[0], block.scratch[4:]
        block.load(0, base)
        for source, delta in enumerate(deltas, start=1):
            block.load(source, delta).sub_(base)
        return deltas

    def _select(self, block: Block, deltas: Sequence[torch.Tensor]) -> None:
        """Set deltas to zero where the models vary less than elsewhere."""
        if self._selection is None:
            return
        if self._is_nothing_selected():
            for delta in deltas:
                delta.zero_()
            return
        variance, first, second = block.scratch[1:4]
        _write_variance(deltas, variance, (first, second))
        self._selection.trim(block.start, variance, (first, second))
        is_selected = torch.ne(variance, 0, out=variance)
        for delta in deltas:
            delta.mul_(is_selected)


def _write_variances(stored: Stored, variances: Values) -> int:
    """Do as `_write_variance` does, by loops; return how many elements vary."""
    return int(
        value_loops.write_variance(*stored.sources(), stored.num_elements, variances.array, sum_loops.make_scratch(4))
    )


def _count_equal(stored: Stored, *thresholds: int) -> list[int]:
    """Return how many elements have the variances with these bits."""
    counts = [0] * len(thresholds)
    for piece in stored.split(BLOCK_ELEMENTS):
        variances = Values(piece)
        _write_variances(piece, variances)
        found = count_equal(variances.stored, 0, *thresholds)
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    return counts


def _write_variance(
    deltas: Sequence[torch.Tensor], variance: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Write the models' variance times n^2 for n models: n * sum(e_i^2) - sum(e_i)^2, with e_i = d_i - d_0.

    That is exact where models have few bits, so that equal variances are equal, and 0 where the models agree.
    """
    total, spare = spares
    total.zero_()
    variance.zero_()
    for delta in deltas[1:]:
        total.add_(torch.sub(delta, deltas[0], out=spare))
        variance.add_(spare.mul_(spare))
    variance.mul_(len(deltas)).sub_(total.mul_(total))
