"""Deltas of which each group of elements keeps its largest, and no two models the same ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import torch

_STRIP_ELEMENTS = 2**14
"""Elements of whole groups that are selected from at once, unless a single group has more."""
_TEMPORARY_NBYTES = 40
"""For each of them: magnitudes, the largest with their places, and counts of equal ones."""


@dataclass(frozen=True)
class GroupedDeltas(Kernel):
    """y = base + scale * sum(w_i * delta_i), with the largest of each group, of one model after another."""

    weights: tuple[float, ...]
    num_kept: tuple[int, ...]
    """Elements that each model keeps in each group."""
    group: int
    """Elements of a group: they follow one another."""
    scale: float = 1.0

    family = "deltas"

    def grid(self, site: Site) -> int:
        """Whole groups, about as many as a block has elements."""
        return max(1, BLOCK_ELEMENTS // self.group) * self.group

    def num_scratch(self, site: Site) -> int:
        """The base, a delta, and which elements are taken."""
        return 3

    def state_nbytes(self, site: Site) -> int:
        """Scratch that selecting from a strip takes."""
        return _TEMPORARY_NBYTES * max(_STRIP_ELEMENTS, self.group)

    def measuring(self, site: Site) -> Hashable:
        """Nothing is measured."""
        return GroupedDeltas

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _GroupedRun(self)


@dataclass(frozen=True)
class _GroupedRun(KernelRun):
    kernel: GroupedDeltas

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, GroupedDeltas)
        return _GroupedRun(kernel)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        kernel = self.kernel
        base, delta, spare = block.scratch
        is_taken = spare.view(torch.bool)[: out.numel()].zero_()
        block.load(0, base)
        out.zero_()
        for source, (weight, num_kept) in enumerate(zip(kernel.weights, kernel.num_kept, strict=True), start=1):
            block.load(source, delta).sub_(base).masked_fill_(is_taken, 0)
            whole = out.numel() // kernel.group * kernel.group
            step = max(1, _STRIP_ELEMENTS // kernel.group) * kernel.group
            for start in range(0, whole, step):
                groups = slice(start, min(start + step, whole))
                _keep_largest(delta[groups].view(-1, kernel.group), is_taken[groups].view(-1, kernel.group), num_kept)
            if whole < out.numel():
                rest = delta[whole:].view(1, -1)
                _keep_largest(rest, is_taken[whole:].view(1, -1), num_kept * rest.numel() // kernel.group)
            out.add_(delta.mul_(weight))
        out.mul_(kernel.scale).add_(base)


def _keep_largest(rows: torch.Tensor, is_taken: torch.Tensor, num_kept: int) -> None:
    """Set all but the largest elements of each row to zero, and note which are left; those that are NaN always are."""
    sizes = rows.abs()
    if num_kept:
        threshold = sizes.topk(num_kept, dim=1).values[:, -1:]
        is_above = sizes > threshold
        is_equal = sizes == threshold
        left = num_kept - is_above.sum(1, keepdim=True, dtype=torch.int32)
        is_kept = is_above | (is_equal & (is_equal.cumsum(1, dtype=torch.int32) <= left))
    else:
        is_kept = torch.zeros_like(is_taken)
    is_kept |= sizes.isnan()
    rows.masked_fill_(~is_kept, 0)
    is_taken |= is_kept & (rows != 0)
