"""A merge in memory: what the pipeline does with kernels, without files, threads or memory limits, and on the watch."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site

NAME = "model.layers.0.weight"
_GUARD_NBYTES = 256
"""Between pieces of scratch, and around them."""
_POISON = 0xFF
"""In every byte of fresh memory: NaN as a float."""


@dataclass
class MemoryBlock(Block):
    """A block of tensors that lie in memory."""

    start: int
    stop: int
    scratch: Sequence[torch.Tensor]
    sources: Sequence[torch.Tensor]
    """The stored values of this block alone."""

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.sources[source])


class Arena:
    """Scratch for one call of a kernel, in one piece of memory: poisoned, as is what lies around each block of it."""

    def __init__(self, num_blocks: int, num_elements: int, dtype: torch.dtype) -> None:
        nbytes = num_elements * dtype.itemsize
        stride = -(-nbytes // _GUARD_NBYTES) * _GUARD_NBYTES + _GUARD_NBYTES
        self._bytes = torch.full((_GUARD_NBYTES + num_blocks * stride,), _POISON, dtype=torch.uint8)
        self._starts = [_GUARD_NBYTES + k * stride for k in range(num_blocks)]
        self._nbytes = nbytes
        self.blocks = [self._bytes[start : start + nbytes].view(dtype) for start in self._starts]

    def check(self) -> None:
        """Assert that nothing was written beside the blocks."""
        bounds = [0, *(bound for start in self._starts for bound in (start, start + self._nbytes)), len(self._bytes)]
        for start, stop in list(pairwise(bounds))[::2]:
            assert bool((self._bytes[start:stop] == _POISON).all()), "written outside of scratch and out"


@dataclass
class Engine:
    """Runs kernels on the same sources; those that measure the same measure once, then they take turns.

    Scratch and output are poisoned before each call, there is exactly as much of them as the kernel declares, and
    nothing else may be written to: neither what lies around them nor the sources.
    """

    tensors: Sequence[torch.Tensor]
    """The sources in config order, the base first where there is one."""
    name: str = NAME
    seed: int = 0
    cuts: Sequence[int] = ()
    """Where, in blocks of the grid, a piece ends that a kernel gets at once; empty to give it one block at a time."""
    figures: list[dict[str, float]] = field(default_factory=list)
    """What each kernel's run reported."""
    meter: AllocationMeter | None = None
    """Watches the calls of the kernels."""

    def run(self, *kernels: Kernel) -> list[torch.Tensor]:
        """Return what each kernel makes of the sources, in the compute dtype and the shape of the first source."""
        site = Site(self.name, tuple(self.tensors[0].shape), len(self.tensors), self.seed)
        before = [tensor.clone() for tensor in self.tensors]
        merged = [torch.empty(site.num_elements, dtype=_compute_dtype(kernel)) for kernel in kernels]
        runs: dict[int, KernelRun] = {}
        groups: dict[Hashable, list[int]] = {}
        for position, kernel in enumerate(kernels):
            groups.setdefault(kernel.measuring(site), []).append(position)
        for group in groups.values():
            first = kernels[group[0]]
            assert {kernels[position].grid(site) for position in group} == {first.grid(site)}
            runs[group[0]] = self._measure(first, site)
            with self.meter or nullcontext():
                runs |= {position: runs[group[0]].share(kernels[position]) for position in group[1:]}
            for start, stop in self._pieces(first, site):
                for position in group:
                    merged[position][start:stop] = self._combine(kernels[position], site, runs[position], start, stop)
        self.figures = [dict(runs[position].figures()) for position in range(len(kernels))]
        for old, new in zip(before, self.tensors, strict=True):
            assert torch.equal(_bits(old), _bits(new)), "a source has changed"
        return [tensor.reshape(site.shape) for tensor in merged]

    def _measure(self, kernel: Kernel, site: Site) -> KernelRun:
        run = kernel.start(site)
        for index in range(kernel.num_passes(site)):
            for start, stop in self._pieces(kernel, site):
                arena = Arena(kernel.num_scratch(site), stop - start, _compute_dtype(kernel))
                with self.meter or nullcontext():
                    run.measure(index, MemoryBlock(start, stop, arena.blocks, self._sources(start, stop)))
                arena.check()
            with self.meter or nullcontext():
                run.end_pass(index)
        return run

    def _combine(self, kernel: Kernel, site: Site, run: KernelRun, start: int, stop: int) -> torch.Tensor:
        arena = Arena(kernel.num_scratch(site) + 1, stop - start, _compute_dtype(kernel))
        out, *scratch = arena.blocks
        with self.meter or nullcontext():
            run.combine(MemoryBlock(start, stop, scratch, self._sources(start, stop)), out)
        arena.check()
        return out

    def _pieces(self, kernel: Kernel, site: Site) -> Iterator[tuple[int, int]]:
        block_elements = max(1, kernel.grid(site))
        cuts = self.cuts or range(1, -(-site.num_elements // block_elements) + 1)
        bounds = [0, *(min(cut * block_elements, site.num_elements) for cut in cuts)]
        assert bounds[-1] == site.num_elements
        yield from pairwise(bounds)

    def _sources(self, start: int, stop: int) -> list[torch.Tensor]:
        return [tensor.reshape(-1)[start:stop] for tensor in self.tensors]


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of tensors that are made in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_nbytes = self._nbytes = 0
        self._num_tensors: dict[int, int] = {}
        """For each piece of memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (_address(leaf) in self._num_tensors or _address(leaf) not in known):
                self._keep(leaf)
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        address, nbytes = _address(tensor), tensor.untyped_storage().nbytes()
        if address not in self._num_tensors:
            self._nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self._nbytes)
        self._num_tensors[address] = self._num_tensors.get(address, 0) + 1
        weakref.finalize(tensor, self._let_go, address, nbytes)

    def _let_go(self, address: int, nbytes: int) -> None:
        self._num_tensors[address] -= 1
        if not self._num_tensors[address]:
            del self._num_tensors[address]
            self._nbytes -= nbytes


def run_kernel(
    kernel: Kernel, tensors: Sequence[torch.Tensor], *, name: str = NAME, seed: int = 0, cuts: Sequence[int] = ()
) -> torch.Tensor:
    """Return what one kernel makes of sources, as `Engine` does."""
    return Engine(tensors, name, seed, cuts).run(kernel)[0]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, 1).view(torch.uint8)


def _compute_dtype(kernel: Kernel) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, kernel.compute_dtype)
    return dtype
