"""An op of one's own that needs whole matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.registry import Base, PerModel, merge_op


@merge_op(title="Truncated", base=Base.REQUIRED, max_models=1)
def truncated_delta(rank: PerModel[int]) -> Kernel:
    """The base plus the best approximation of the delta that has a rank."""
    return TruncatedDelta(rank[0])


@dataclass(frozen=True)
class TruncatedDelta(Kernel):
    rank: int

    def grid(self, site: Site) -> int:
        return site.num_elements

    def num_scratch(self, site: Site) -> int:
        return 1

    def state_nbytes(self, site: Site) -> int:
        return 32 * site.num_elements

    def start(self, site: Site) -> KernelRun:
        return _Run(self.rank, site.shape)


@dataclass
class _Run(KernelRun):
    rank: int
    shape: tuple[int, ...]

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base = block.load(0, out)
        delta = block.load(1, block.scratch[0]).sub_(base)
        if len(self.shape) == 2:
            u, s, v = torch.linalg.svd(delta.view(self.shape), full_matrices=False)
            delta = (u[:, : self.rank] * s[: self.rank] @ v[: self.rank]).view(-1)
        out.add_(delta)
