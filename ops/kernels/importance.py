"""Elements of a model where they are important, and those of the base elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.divergence import measure_divergence
from raymerge.ops.kernels.sparsifiers.ranks import count_row, count_row_block
from raymerge.ops.kernels.sparsifiers.select import CUT_NBYTES, SELECTION_TEMPORARY_NBYTES, MagnitudeSparsifier
from raymerge.ops.kernels.values import Values
from raymerge.ops.lazy import np, sum_loops, torch, value_loops
from raymerge.ops.stored import LOOP_DTYPES, RunAll, Slot, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ImportantElements(Kernel):
    """y = x where |x - base| * KL(softmax(row of x), softmax(row of base)) reaches a threshold, else base.

    Rows lie along the last dimension. The threshold is the median plus 1.5 times the distance of the quartiles.
    """

    family = "elements"
    compute_dtype = "float64"
    loop_dtypes = LOOP_DTYPES

    def grid(self, site: Site) -> int:
        """Whole rows."""
        return count_row_block(site)

    def num_passes(self, site: Site) -> int:
        """Return two, to select."""
        return 2

    def num_scratch(self, site: Site) -> int:
        """Both sources, their softmax, and three spares."""
        return 7

    def state_nbytes(self, site: Site) -> int:
        """Histograms and collected bits for each quartile, and each row's divergence."""
        num_rows = site.num_elements // count_row(site)
        return len(QUARTILES) * CUT_NBYTES + SELECTION_TEMPORARY_NBYTES + 4 * num_rows

    def start(self, site: Site) -> KernelRun:
        """Begin with one tensor."""
        return _ImportantElementsRun(site)


class _ImportantElementsRun(KernelRun):
    def __init__(self, site: Site) -> None:
        self._length = count_row(site)
        self._block = count_row_block(site)
        self._num_rows = site.num_elements // self._length
        # the element of index floor(q * (n - 1)), counted from the largest one
        low, median, high = (site.num_elements - math.floor(q * max(0, site.num_elements - 1)) for q in QUARTILES)
        num_above = max(0, high - 1)
        self._quartiles = MagnitudeSparsifier(low - num_above, num_above), MagnitudeSparsifier(median)
        self._divergences: torch.Tensor | NDArray[np.float32] | None = None
        self._threshold = 0.0

    def measure(self, index: int, block: Block) -> None:
        base, model, *spares = block.scratch
        block.load(0, base)
        block.load(1, model)
        if index == 0:
            self._measure_divergences(block)
        importance = self._write_importance(block)
        copy, first, second = (_as_float32(spare) for spare in spares[1:4])
        for quartile in self._list_measured(index):
            quartile.measure(index, copy.copy_(importance), (first, second))

    def end_pass(self, index: int) -> None:
        outer, median = self._quartiles
        if index == 0:
            median.share_counts(outer)
        for quartile in self._quartiles:
            quartile.end_pass(index)
        if index == 1:
            figures = outer.figures()
            low, high = figures["threshold"], figures.get("upper_threshold", figures["threshold"])
            middle, spread = np.float32(median.figures()["threshold"]), np.float32(high) - np.float32(low)
            self._threshold = float(middle + np.float32(1.5) * spread)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base, model, *spares = block.scratch
        block.load(0, base)
        block.load(1, model)
        is_important = spares[1].view(torch.bool)[: len(out)]
        torch.lt(self._write_importance(block), self._threshold, out=is_important).logical_not_()  # NaN is, too
        block.load(1, model)
        torch.where(is_important, model, base, out=out)

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        if index == 0:
            if self._divergences is None:
                self._divergences = np.zeros(self._num_rows, np.float32)
            run_all([partial(self._write_divergences, block) for block in stored.split(self._block)])
        for piece in stored.split(BLOCK_ELEMENTS):
            importances = Values(piece)
            where = piece.start, piece.num_elements, self._length, self._divergences
            value_loops.write_importance(*piece.sources(), *where, importances.array, sum_loops.make_scratch(2))
            for quartile in self._list_measured(index):
                quartile.measure_stored(index, importances.stored, 0)

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        rule = self._length, self._divergences, np.float32(self._threshold), stored.start, stored.num_elements
        scratch = sum_loops.make_scratch(4)
        finished: float = value_loops.choose_important(*stored.sources(), *rule, *out.arguments(), scratch)
        return finished

    def _list_measured(self, index: int) -> Sequence[MagnitudeSparsifier]:
        """Return what takes figures in a pass: in the first one, all quartiles are told by the same counts."""
        return self._quartiles[: 1 + index]

    def _write_divergences(self, stored: Stored) -> None:
        assert isinstance(self._divergences, np.ndarray)
        divergences = self._divergences[stored.start // self._length : stored.stop // self._length]
        value_loops.write_divergences(*stored.sources(), self._length, divergences, np.empty((3, self._length)))

    def figures(self) -> Mapping[str, float]:
        """Return the smallest importance that counts."""
        return {"threshold": self._threshold}

    def _measure_divergences(self, block: Block) -> None:
        base, model, *spares = (piece.view(-1, self._length) for piece in block.scratch)
        if self._divergences is None:
            self._divergences = torch.zeros(self._num_rows, dtype=torch.float32, device=base.device)
        assert isinstance(self._divergences, torch.Tensor)
        divergences = self._divergences[block.start // self._length : block.stop // self._length]
        p, q, *spares = spares
        divergences.copy_(measure_divergence(p.copy_(model), q.copy_(base), spares))

    def _write_importance(self, block: Block) -> torch.Tensor:
        """Return the importance of each element, in float32, in the first spare; overwrites the model's values."""
        assert isinstance(self._divergences, torch.Tensor)
        base, model, spare = block.scratch[:3]
        importance = _as_float32(spare).copy_(model.sub_(base).abs_())
        divergences = self._divergences[block.start // self._length : block.stop // self._length]
        importance.view(-1, self._length).mul_(divergences.unsqueeze(1))
        return importance


def _as_float32(scratch: torch.Tensor) -> torch.Tensor:
    """Return as many elements of float32, in the memory of scratch."""
    return scratch.view(torch.float32)[: len(scratch)]
