"""Element-wise rules: a kernel for any function of one element of every input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import torch


@dataclass(frozen=True)
class Elementwise(Kernel):
    """y = function(x_0, x_1, ...) for each element by itself."""

    family = "elements"
    function: Callable[..., None]
    """Called for each block as `function(tensors, out, scratch, *parameters)`; defined at the top level of its module.

    `tensors` has the values of every source in config order, a required base first; the function writes the result to
    `out`, and may overwrite `tensors` and `scratch`. All are flat, of one length, in the compute dtype.
    """
    parameters: tuple[Hashable, ...] = ()
    """Numbers, and tuples of numbers for each model."""
    num_spares: int = 0
    """Blocks of scratch that the function needs besides the tensors."""

    def num_scratch(self, site: Site) -> int:
        """The tensors, and what the function needs besides."""
        return site.num_sources + self.num_spares

    def measuring(self, site: Site) -> Hashable:
        """Nothing is measured."""
        return Elementwise

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _ElementwiseRun(self, site.num_sources)


@dataclass(frozen=True)
class _ElementwiseRun(KernelRun):
    kernel: Elementwise
    num_sources: int

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, Elementwise)
        return _ElementwiseRun(kernel, self.num_sources)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        tensors = [block.load(source, block.scratch[source]) for source in range(self.num_sources)]
        scratch: Sequence[torch.Tensor] = block.scratch[self.num_sources :]
        self.kernel.function(tensors, out, scratch, *self.kernel.parameters)
