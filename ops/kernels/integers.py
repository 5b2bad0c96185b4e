"""Integers made of those of all inputs, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.errors import IntegerOverflowError
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import torch


@dataclass(frozen=True)
class Accumulation(Kernel):
    """y = max(x_0, x_1, ...), or y = x_0 + x_1 + ..."""

    is_sum: bool
    dtype: str
    """The result's, by torch's name; int64 holds all of its values."""
    compute_dtype = "int64"

    def num_scratch(self, site: Site) -> int:
        """Return one for a source, and one for the next sum."""
        return 1 + self.is_sum

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _AccumulationRun(self, site)


@dataclass(frozen=True)
class _AccumulationRun(KernelRun):
    kernel: Accumulation
    site: Site

    def combine(self, block: Block, out: torch.Tensor) -> None:
        """Go through the sources of one block.

        Raises:
            IntegerOverflowError: the dtype does not hold a sum.
        """
        limits = torch.iinfo(getattr(torch, self.kernel.dtype))
        block.load(0, out)
        for source in range(1, self.site.num_sources):
            other = block.load(source, block.scratch[0])
            if self.kernel.is_sum:
                self._add(other, out, block.scratch[1])
            else:
                torch.maximum(out, other, out=out)
        if out.amax() > limits.max or out.amin() < limits.min:
            raise self._explain()

    def _add(self, other: torch.Tensor, out: torch.Tensor, total: torch.Tensor) -> None:
        torch.add(out, other, out=total)
        # two numbers of one sign whose sum has the other
        wrapped = out.bitwise_xor_(total).bitwise_and_(other.bitwise_xor_(total)).amin() < 0
        if wrapped:
            raise self._explain()
        out.copy_(total)

    def _explain(self) -> IntegerOverflowError:
        return IntegerOverflowError(
            f"{self.site.name}: the models' sum does not fit into {self.kernel.dtype}; write `integers: max` or `donor`"
        )
