"""Element-wise rules: a kernel for any function of one element of every input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import np, rule_loops, sum_loops, torch
from raymerge.ops.stored import LOOP_DTYPES, Slot, Stored


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
    loop: str = ""
    """Name of the loop in `rule_loops` that gives the same bits; empty where there is none."""
    constants: tuple[float, ...] = ()
    """Further arguments of the loop, after the parameters."""

    @property
    def loop_dtypes(self) -> tuple[str, ...]:  # type: ignore[override]  # an attribute of the class elsewhere
        """Dtypes of the loop, where there is one."""
        return LOOP_DTYPES if self.loop else ()

    def num_scratch(self, site: Site) -> int:
        """The tensors, and what the function needs besides."""
        return site.num_sources + self.num_spares

    def measuring(self, site: Site) -> Hashable:
        """Nothing is measured; a loop works, or not, whatever its parameters."""
        return Elementwise, self.loop

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

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        kernel = self.kernel
        return combine_by_rule(stored, kernel.loop, (*kernel.parameters, *kernel.constants), out)


def combine_by_rule(stored: Stored, name: str, parameters: Iterable[Any], out: Slot) -> float:
    """Round what a loop of `rule_loops` makes of stored values; see `KernelRun.combine_stored`."""
    flat = [x for value in parameters for x in (value if isinstance(value, tuple) else (value,))]
    where = np.array(flat, np.float32), stored.start, stored.num_elements
    scratch = sum_loops.make_scratch(len(stored.dtypes) + 3)
    finished: float = getattr(rule_loops, name)(*stored.sources(), *where, *out.arguments(), scratch)
    return finished
