"""Elements of a model where they are important, and those of the base elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.divergence import measure_divergence
from raymerge.ops.kernels.ranks import count_row, count_row_block
from raymerge.ops.kernels.select import CUT_NBYTES, SELECTION_TEMPORARY_NBYTES, MagnitudeSparsifier
from raymerge.ops.lazy import torch

QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ImportantElements(Kernel):
    """y = x where |x - base| * KL(softmax(row of x), softmax(row of base)) reaches a threshold, else base.

    Rows lie along the last dimension. The threshold is the median plus 1.5 times the distance of the quartiles.
    """

    family = "elements"
    compute_dtype = "float64"

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
        self._num_rows = site.num_elements // self._length
        # the element of index floor(q * (n - 1)), counted from the largest one
        ranks = [site.num_elements - math.floor(q * max(0, site.num_elements - 1)) for q in QUARTILES]
        self._quartiles = [MagnitudeSparsifier(rank) for rank in ranks]
        self._divergences: torch.Tensor | None = None
        self._threshold = 0.0

    def measure(self, index: int, block: Block) -> None:
        base, model, *spares = block.scratch
        block.load(0, base)
        block.load(1, model)
        if index == 0:
            self._measure_divergences(block)
        importance = self._write_importance(block)
        copy, first, second = (_as_float32(spare) for spare in spares[1:4])
        for quartile in self._quartiles:
            quartile.measure(index, copy.copy_(importance), (first, second))

    def end_pass(self, index: int) -> None:
        for quartile in self._quartiles:
            quartile.end_pass(index)
        if index == 1:
            low, median, high = torch.tensor([quartile.figures()["threshold"] for quartile in self._quartiles])
            self._threshold = (median + 1.5 * (high - low)).item()

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base, model, *spares = block.scratch
        block.load(0, base)
        block.load(1, model)
        is_important = spares[1].view(torch.bool)[: len(out)]
        torch.lt(self._write_importance(block), self._threshold, out=is_important).logical_not_()  # NaN is, too
        block.load(1, model)
        torch.where(is_important, model, base, out=out)

    def figures(self) -> Mapping[str, float]:
        """Return the smallest importance that counts."""
        return {"threshold": self._threshold}

    def _measure_divergences(self, block: Block) -> None:
        base, model, *spares = (piece.view(-1, self._length) for piece in block.scratch)
        if self._divergences is None:
            self._divergences = torch.zeros(self._num_rows, dtype=torch.float32, device=base.device)
        divergences = self._divergences[block.start // self._length : block.stop // self._length]
        p, q, *spares = spares
        divergences.copy_(measure_divergence(p.copy_(model), q.copy_(base), spares))

    def _write_importance(self, block: Block) -> torch.Tensor:
        """Return the importance of each element, in float32, in the first spare; overwrites the model's values."""
        assert self._divergences is not None
        base, model, spare = block.scratch[:3]
        importance = _as_float32(spare).copy_(model.sub_(base).abs_())
        divergences = self._divergences[block.start // self._length : block.stop // self._length]
        importance.view(-1, self._length).mul_(divergences.unsqueeze(1))
        return importance


def _as_float32(scratch: torch.Tensor) -> torch.Tensor:
    """Return as many elements of float32, in the memory of scratch."""
    return scratch.view(torch.float32)[: len(scratch)]
