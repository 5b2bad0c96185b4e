"""Sums over a tensor that come out the same on every processor."""

from __future__ import annotations

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.lazy import torch

NUM_HALVES, NUM_ROWS = 2, 16
"""A block is folded to a 32nd of its length: the rows of each half are added up one by one, then the halves."""
NUM_COLUMNS = 64
"""Rows have a multiple of this: torch adds up what is left of a row, on a processor with short vectors or long ones, in
another order. What is left of a block is added up in float64."""
SMALLEST_FOLDED = 2**14
"""A block with fewer elements is added up in float64 from the start."""


def add_blocks(total: float, x: torch.Tensor, block_elements: int = BLOCK_ELEMENTS) -> float:
    """Return `total` plus the sum of each block in `x`, one after the other; blocks are those of the kernel's grid.

    A block is cut into rows, these are added to each other in the compute dtype, and what they give in float64. Rows
    are added element by element, so that no processor's vector width shows, and float64 has 29 bits to spare over
    float32, so that the order of the last additions does not show either. The rounding errors of some thousand
    columns average out: the sum is right to about nine digits.
    """
    if block_elements > BLOCK_ELEMENTS:  # each is as several, the last one shorter
        for start in range(0, x.numel(), block_elements):
            total = add_blocks(total, x[start : start + block_elements])
        return total
    if x.device.type == "cpu":
        for start in range(0, x.numel(), block_elements):
            total += _sum_on_cpu(x[start : start + block_elements])
        return total
    cut = x.numel() - x.numel() % block_elements
    for blocks in (x[:cut].view(-1, block_elements), x[cut:].view(1, -1)):
        if blocks.numel():
            for value in _sum_together(blocks).cpu().tolist():  # not sum(): some Pythons compensate in it
                total += value
    return total


def _sum_on_cpu(x: torch.Tensor) -> float:
    num_elements = x.numel()
    if num_elements < SMALLEST_FOLDED:
        return x.sum(dtype=torch.float64).item()
    cut = num_elements - num_elements % (NUM_HALVES * NUM_ROWS * NUM_COLUMNS)
    total = x[:cut].view(NUM_HALVES * NUM_ROWS, -1).sum(0).sum(dtype=torch.float64).item()
    return total + x[cut:].sum(dtype=torch.float64).item() if cut < num_elements else total


def _sum_together(blocks: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row of `blocks`, with the additions in the order in which torch does them on the CPU."""
    num_elements = blocks.shape[1]
    if num_elements < SMALLEST_FOLDED:
        return blocks.sum(1, dtype=torch.float64)
    cut = num_elements - num_elements % (NUM_HALVES * NUM_ROWS * NUM_COLUMNS)
    rows = blocks[:, :cut].view(len(blocks), NUM_HALVES, NUM_ROWS, -1)
    folded = rows[:, :, 0].clone()
    for k in range(1, NUM_ROWS):
        folded.add_(rows[:, :, k])
    sums = (folded[:, 0] + folded[:, 1]).sum(1, dtype=torch.float64)
    return sums.add_(blocks[:, cut:].sum(1, dtype=torch.float64)) if cut < num_elements else sums
