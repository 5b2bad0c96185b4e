"""The seam between an op's arithmetic and the engine that feeds it blocks."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from raymerge.ops.lazy import torch
from raymerge.ops.stored import RunAll, Slot, Stored

BLOCK_ELEMENTS = 2**17
"""Elements of a block: about what a core's L2 cache holds as float32."""


def count_blocks(num_elements: int) -> int:
    """Return the number of blocks that hold so many elements, counted from the start of a block."""
    return -(-num_elements // BLOCK_ELEMENTS)


@dataclass(frozen=True, slots=True)
class Site:
    """The tensor that a kernel works on: everything that it may depend on besides the values."""

    name: str
    """The output tensor's name."""
    shape: tuple[int, ...]
    """Shape of the output tensor and of every source, statistics left out."""
    num_sources: int
    """Number of tensors to load, the base and statistics included."""
    seed: int
    """The merge's seed."""
    num_statistics: int = 0
    """Number of the last sources that are statistics of the others; see `registry.Statistics`."""

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


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

        Sources are in config order; with a base, the base is source 0. Statistics that are loaded whole have as many
        elements as their shape says, and so has `out`.
        """


class KernelRun(ABC):
    """The state of one kernel on one tensor; called for all blocks, in order, and never from two threads.

    But `combine_outputs` of the runs that `fork` returns is called from several threads at once, in any order.
    """

    def measure(self, index: int, block: Block) -> None:
        """Take the figures of measuring pass `index` (0, 1, ...) from one block."""
        raise AssertionError("this kernel measures nothing")

    def end_pass(self, index: int) -> None:
        """Evaluate measuring pass `index`, after its last block."""
        raise AssertionError("this kernel measures nothing")

    @abstractmethod
    def combine(self, block: Block, out: torch.Tensor) -> None:
        """Write the merged values of one block to `out` (flat, compute dtype)."""

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        """Do as `measure` does, by loops, with one or several neighbouring blocks; see `Kernel.loop_dtypes`."""
        raise AssertionError("this kernel has no loops")

    def measure_outputs(self, index: int, runs: Sequence[KernelRun], stored: Stored, run_all: RunAll) -> None:
        """Do as `measure_stored` of each of some runs, the first of which this is.

        The default does so one after the other. Override it where they count the same in part.
        """
        for run in runs:
            run.measure_stored(index, stored, run_all)

    def fork(self, pieces: Sequence[Stored], run_all: RunAll) -> Sequence[KernelRun]:
        """Return a run for each of some neighbouring pieces, in order, to combine them all at once by loops.

        This run goes on after them. The default is right for a run that combining does not change.
        """
        return [self] * len(pieces)

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        """Do as `combine` does, by compiled loops and rounded, with any neighbouring elements, in order.

        Returns:
            The sum of the squares of all that ends with the blocks that end in `stored`; `out.squares` has the rest.
        """
        raise AssertionError("this kernel has no loops")

    def combine_outputs(self, runs: Sequence[KernelRun], stored: Stored, outs: Sequence[Slot]) -> Sequence[float]:
        """Do as `combine_stored` of each of some runs, the first of which this is; return what these return.

        The default does so one after the other. Override it where one look at the sources is enough for all of them.
        """
        return [run.combine_stored(stored, out) for run, out in zip(runs, outs, strict=True)]

    def figures(self) -> Mapping[str, float]:
        """Return figures measured on the way, after the last block; per model as `name[0]`, `name[1]`, ..."""
        return {}

    def share(self, kernel: Kernel) -> KernelRun:
        """Return a run of another kernel that starts from what this run has measured.

        Called after the last measuring pass and before `combine`. The runs refer to the same `state_nbytes`, but do not
        disturb each other: each combines all blocks in order, and they take turns. The default is right for a run that
        only replaces its own attributes from then on.

        Args:
            kernel: its `measuring` equals that of this run's kernel at this site; by default, it is that kernel.
        """
        return copy.copy(self)


class Kernel(ABC):
    """The arithmetic of one merged tensor: parameters only, frozen, hashable and picklable.

    The engine's order of calls, for each tensor:

        run = kernel.start(site)
        for index in range(kernel.num_passes(site)):
            for block in blocks: run.measure(index, block)
            run.end_pass(index)
        for block in blocks: run.combine(block, out)
        run.figures()

    By loops it calls, in place of `measure`, `measure_outputs` of the first of the runs that measure one tensor; and in
    place of `combine`, `combine_outputs` of the first of those that make its outputs, or `fork` of each of them and
    `combine_outputs` of what this returns.

    Kernels whose `measuring` is equal measure once: after the last pass, every other one gets its run by
    `run.share(other)`, and then each combines the block that is at hand in turn.

    The grid of blocks is anchored at the tensor's first element and depends on `grid` alone, so that the result does
    not depend on how much memory there is. A GPU gets several neighbouring blocks at once, which must give the same
    bits: whatever is added up is added up for each block of the grid (`sums.add_blocks`).

    What a kernel answers about a site may depend on its shape and its sources, not on its name and seed.
    """

    family: str = ""
    """Kind of methods that it is for, as `raymerge methods` tells it."""
    loop_dtypes: tuple[str, ...] = ()
    """Stored dtypes that its runs read and round to by compiled loops, with the same bits as `combine`.

    A run gets either blocks or stored values, from the first pass to the last.
    """
    compute_dtype: str = "float32"
    """The dtype of converted sources, blocks and scratch, by torch's name."""
    tolerance: float = 0.0
    """How much results differ between processors, devices and numbers of threads: the norm of the difference, as a
    share of what the merge changed in source 0, besides rounding to the compute dtype. 0 if bits are the same, as they
    are for all but decompositions of matrices."""

    @property
    def is_random(self) -> bool:
        """Whether runs draw random numbers, which follow from the seed of the site."""
        return False

    def grid(self, site: Site) -> int:
        """Return how many elements a block has; `site.num_elements` where a kernel needs the whole tensor at once.

        Part of the kernel's definition, for sums over blocks depend on it.
        """
        return BLOCK_ELEMENTS

    def num_passes(self, site: Site) -> int:
        """Return how often the sources are measured before they are combined."""
        return 0

    @abstractmethod
    def num_scratch(self, site: Site) -> int:
        """Return how many blocks of scratch in the compute dtype a block needs, besides `out`."""

    def state_nbytes(self, site: Site) -> int:
        """Return the most that a run holds, in bytes, besides scratch and tiny figures: tables, factors of a matrix."""
        return 0

    def measuring(self, site: Site) -> Hashable:
        """Return the part of the kernel that decides the measuring passes.

        Kernels for which this is equal take the same figures from the same sources, on the same grid.
        """
        return self

    @abstractmethod
    def start(self, site: Site) -> KernelRun:
        """Begin with one tensor."""
