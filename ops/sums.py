"""Sums over a tensor that come out the same however its blocks are run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sum_exactly(x: torch.Tensor) -> float:
    """Return the sum of one block, added in float64.

    Add blocks up as Python floats, in their order. float64 has 29 bits to spare over float32: rounding, and with it the
    order of additions that a processor's vector width brings about, shows in the sixteenth digit if at all.
    """
    import torch

    return x.sum(dtype=torch.float64).item()
