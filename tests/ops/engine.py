"""A merge in memory: what the pipeline does with a kernel, without files, threads or memory limits."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site


@dataclass
class MemoryBlock(Block):
    """A block of tensors that lie in memory, each in one piece or block by block in buffers of its own."""

    start: int
    stop: int
    scratch: Sequence[torch.Tensor]
    sources: Sequence[torch.Tensor]
    """The stored values of this block alone."""

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.sources[source])


def run_kernel(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    *,
    name: str = "model.layers.0.weight",
    seed: int = 0,
    out_dtype: torch.dtype = torch.float32,
    separate: bool = False,
) -> torch.Tensor:
    """Return the merged tensor, in the shape of the first.

    Scratch and output hold NaN before each call, and there is exactly as much of it as the kernel declares.

    Args:
        kernel: what to compute.
        tensors: the sources in config order, the base first where there is one.
        name: of the output tensor.
        seed: the merge's.
        out_dtype: rounded to once.
        separate: deliver each block from a buffer of its own, made anew for every pass.
    """
    return run_kernels([kernel], tensors, name=name, seed=seed, out_dtype=out_dtype, separate=separate)[0]


def run_kernels(
    kernels: Sequence[Kernel],
    tensors: Sequence[torch.Tensor],
    *,
    name: str = "model.layers.0.weight",
    seed: int = 0,
    out_dtype: torch.dtype = torch.float32,
    separate: bool = False,
) -> list[torch.Tensor]:
    """Return what each kernel makes of the same sources; those that measure the same measure once."""
    site = Site(name, tuple(tensors[0].shape), len(tensors), seed)
    flat = [tensor.reshape(-1) for tensor in tensors]
    merged = [torch.empty(site.num_elements, dtype=out_dtype) for _ in kernels]
    groups: dict[Hashable, list[int]] = {}
    for position, kernel in enumerate(kernels):
        groups.setdefault(kernel.measuring(site), []).append(position)

    def blocks(kernel: Kernel) -> Iterator[MemoryBlock]:
        block_elements = kernel.grid(site)
        for start in range(0, site.num_elements, block_elements):
            stop = min(start + block_elements, site.num_elements)
            pieces = [tensor[start:stop] for tensor in flat]
            scratch = [torch.full((stop - start,), torch.nan) for _ in range(kernel.num_scratch(site))]
            yield MemoryBlock(start, stop, scratch, [p.clone() for p in pieces] if separate else pieces)

    for group in groups.values():
        first = kernels[group[0]]
        runs: list[KernelRun] = [first.start(site)]
        for index in range(first.num_passes(site)):
            for block in blocks(first):
                runs[0].measure(index, block)
            runs[0].end_pass(index)
        runs += [runs[0].share(kernels[position]) for position in group[1:]]
        for pieces in zip(*(blocks(kernels[position]) for position in group), strict=True):
            for position, run, block in zip(group, runs, pieces, strict=True):
                out = torch.full((block.stop - block.start,), torch.nan)
                run.combine(block, out)
                merged[position][block.start : block.stop] = out
    return [tensor.reshape(site.shape) for tensor in merged]
