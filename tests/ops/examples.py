"""Kernels that the product has none of yet, to try the seam on: one that takes whole matrices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site


@dataclass(frozen=True)
class LowRankDelta(Kernel):
    """y = base + the best approximation of x - base by a matrix of low rank."""

    rank: int

    def grid(self, site: Site) -> int:
        """The whole matrix."""
        return site.num_elements

    def num_passes(self, site: Site) -> int:
        return 1

    def num_scratch(self, site: Site) -> int:
        return 2

    def state_nbytes(self, site: Site) -> int:
        """The factors, and as much again while they are computed."""
        rows, columns = site.shape
        return 4 * 4 * min(site.shape) * (rows + columns + 1)

    def measuring(self, site: Site) -> Hashable:
        """All singular vectors, whatever the rank."""
        return LowRankDelta

    def start(self, site: Site) -> KernelRun:
        return _LowRankRun(self.rank, site)


class _LowRankRun(KernelRun):
    def __init__(self, rank: int, site: Site) -> None:
        self._rank = rank
        self._site = site
        self._left = self._values = self._right = torch.empty(0)

    def measure(self, index: int, block: Block) -> None:
        base, delta = block.scratch
        block.load(1, delta).sub_(block.load(0, base))
        self._left, self._values, self._right = torch.linalg.svd(delta.view(self._site.shape), full_matrices=False)

    def end_pass(self, index: int) -> None:
        pass

    def combine(self, block: Block, out: torch.Tensor) -> None:
        scaled, delta = block.scratch
        left = scaled[: self._site.shape[0] * self._rank].view(-1, self._rank)
        torch.mul(self._left[:, : self._rank], self._values[: self._rank], out=left)
        torch.mm(left, self._right[: self._rank], out=delta.view(self._site.shape))
        block.load(0, out).add_(delta)

    def figures(self) -> Mapping[str, float]:
        return {"largest": self._values[0].item()}

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, LowRankDelta)
        run = _LowRankRun(kernel.rank, self._site)
        run._left, run._values, run._right = self._left, self._values, self._right
        return run
