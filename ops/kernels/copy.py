"""Copies of what all inputs have in common, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.errors import SourceMismatchError
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import np, torch
from raymerge.ops.stored import Slot, Stored


@dataclass(frozen=True)
class Identical(Kernel):
    """y = x_0, where every other source has the same bytes; an element is a byte."""

    compute_dtype = "uint8"
    loop_dtypes = ("uint8",)

    def num_scratch(self, site: Site) -> int:
        """One, for the source that is compared."""
        return min(1, site.num_sources - 1)

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _IdenticalRun(site.num_sources)


@dataclass(frozen=True)
class _IdenticalRun(KernelRun):
    num_sources: int

    def combine(self, block: Block, out: torch.Tensor) -> None:
        """Copy one block.

        Raises:
            SourceMismatchError: a source has other bytes than source 0.
        """
        block.load(0, out)
        for source in range(1, self.num_sources):
            if not torch.equal(block.load(source, block.scratch[0]), out):
                raise SourceMismatchError(source)

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        """Copy bytes.

        Raises:
            SourceMismatchError: a source has other bytes than source 0.
        """
        first = np.frombuffer(stored.view(0), np.uint8)
        for source in range(1, self.num_sources):
            if not np.array_equal(np.frombuffer(stored.view(source), np.uint8), first):
                raise SourceMismatchError(source)
        out.buffer[:] = stored.view(0)
        return 0.0
