"""A merge in memory: what the pipeline does with a kernel, without files, threads or memory limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from raymerge.ops.kernel import Block, Kernel, Site


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
    flat = [tensor.reshape(-1) for tensor in tensors]
    num_elements = flat[0].numel()
    num_scratch = kernel.num_scratch(len(flat))
    merged = torch.empty(num_elements, dtype=out_dtype)

    def blocks() -> Iterator[MemoryBlock]:
        for start in range(0, num_elements, kernel.block_elements):
            stop = min(start + kernel.block_elements, num_elements)
            pieces = [tensor[start:stop] for tensor in flat]
            scratch = [torch.full((stop - start,), torch.nan) for _ in range(num_scratch)]
            yield MemoryBlock(start, stop, scratch, [p.clone() for p in pieces] if separate else pieces)

    run = kernel.start(Site(name, num_elements, len(flat), seed))
    for index in range(kernel.num_passes):
        for block in blocks():
            run.measure(index, block)
        run.end_pass(index)
    for block in blocks():
        out = torch.full((block.stop - block.start,), torch.nan)
        run.combine(block, out)
        merged[block.start : block.stop] = out
    return merged.reshape(tensors[0].shape)
