"""Sums over a tensor that come out the same on every processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NUM_ROWS = 32
_SMALLEST_FOLDED = 2**14
"""A block with fewer elements is added up in float64 from the start."""


def sum_block(x: torch.Tensor) -> float:
    """Return the sum of one block; add blocks up as Python floats, in their order.

    The block is cut into rows, these are added to each other in the compute dtype, and what they give in float64. Rows
    are added element by element, so that no processor's vector width shows, and float64 has 29 bits to spare over
    float32, so that the order of the last additions does not show either. The rounding errors of some thousand
    columns average out: the sum is right to about nine digits.
    """
    import torch

    num_elements = x.numel()
    if num_elements < _SMALLEST_FOLDED:
        return x.sum(dtype=torch.float64).item()
    cut = num_elements - num_elements % _NUM_ROWS
    total = x[:cut].view(_NUM_ROWS, -1).sum(0).sum(dtype=torch.float64).item()
    return total + x[cut:].sum(dtype=torch.float64).item() if cut < num_elements else total
