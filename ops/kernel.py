"""The seam between an op's arithmetic and the engine that feeds it blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 2**17
"""Elements of a block: about what a core's L2 cache holds as float32."""


@dataclass(frozen=True, slots=True)
class Site:
    """Which tensor a kernel works on; whatever it may depend on besides the values."""

    name: str
    """The output tensor's name."""
    num_elements: int
    """Of the whole tensor."""
    num_sources: int
    """How many tensors are merged, the base included."""
    seed: int
    """The merge's seed."""


class Block(ABC):
    """One piece of every source of a tensor, cut at the same elements: a block of the grid, or several neighbours."""

    start: int
    """Index of the first element in the flattened tensor."""
    stop: int
    """Index after the last element: the piece is [start, stop)."""
    scratch: Sequence[torch.Tensor]
    """`Kernel.num_scratch` flat tensors of `stop - start` elements each, in the compute dtype; overwrite freely."""

    @abstractmethod
    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        """Write the values of one source to `out`, converted to the compute dtype, and return it.

        Sources are in config order; with a base, the base is source 0.
        """


class KernelRun(ABC):
    """The state of one kernel on one tensor; called for all blocks, in order, and never from two threads."""

    def measure(self, index: int, block: Block) -> None:
        """Take the figures of measuring pass `index` (0, 1, ...) from one block."""
        raise AssertionError("this kernel measures nothing")

    def end_pass(self, index: int) -> None:
        """Evaluate measuring pass `index`, after its last block."""
        raise AssertionError("this kernel measures nothing")

    @abstractmethod
    def combine(self, block: Block, out: torch.Tensor) -> None:
        """Write the merged values of one block to `out` (flat, compute dtype)."""


class Kernel(ABC):
    """The arithmetic of one merged tensor: parameters only, frozen and picklable.

    The engine's order of calls, for each tensor:

        run = kernel.start(site)
        for index in range(kernel.num_passes):
            for block in blocks: run.measure(index, block)
            run.end_pass(index)
        for block in blocks: run.combine(block, out)

    The grid of blocks is anchored at the tensor's first element and depends on `block_elements` alone, so that
    the result does not depend on how much memory there is. A GPU gets several neighbouring blocks at once, which must
    give the same bits: whatever is added up is added up for each block of the grid (`sums.add_blocks`).
    """

    block_elements: int = BLOCK_ELEMENTS
    """Elements of a block of the grid; part of the kernel's definition, for sums over blocks depend on it."""

    @property
    @abstractmethod
    def num_passes(self) -> int:
        """How often the sources are measured before they are combined."""

    @abstractmethod
    def num_scratch(self, num_sources: int) -> int:
        """How many blocks of scratch in the compute dtype a block needs, besides `out`."""

    def state_nbytes(self, num_sources: int) -> int:
        """What a run holds besides scratch and tiny figures, at most, in bytes."""
        return 0

    @abstractmethod
    def start(self, site: Site) -> KernelRun:
        """Begin with one tensor."""
