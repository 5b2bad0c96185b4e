"""Divergence of softmaxed rows, with the same bits on every processor.

Exponentials and logarithms of libraries differ among processors in their last bits. Those of here consist of operations
that IEEE 754 rounds correctly, one after the other, in float64; rows are added up in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raymerge.ops.lazy import torch

SMALLEST_SHARE = 1e-8
"""Added to each element of a softmax."""

_NUM_SQUARINGS = 10
FRACTION_BITS = 52
BITS_OF_ROOT = 0x3FE6A09E667F3BCD
"""Bits of sqrt(1 / 2) in float64."""
LOWEST_EXPONENT = -48.0
"""Lower bound of exponents: below it, an exponential vanishes beside `SMALLEST_SHARE`."""


def measure_divergence(p: torch.Tensor, q: torch.Tensor, spares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return sum(P * log(P / Q)) of each row, with the softmax of p as P and that of q as Q, in float64.

    Args:
        p: a matrix in float64; overwritten.
        q: another one; overwritten, and the result lies in it.
        spares: three blocks of scratch of the same shape.

    Source: Kullback and Leibler 1951, "On Information and Sufficiency".
    """
    for rows in (p, q):
        _write_softmax(rows, spares[0])
        rows.add_(SMALLEST_SHARE)
    torch.div(p, q, out=q)
    return _sum_rows(write_logarithms(q, spares).mul_(p)).clamp_(min=0)


def _write_softmax(rows: torch.Tensor, spare: torch.Tensor) -> None:
    largest = spare.view(-1)[: len(rows)]
    rows.sub_(torch.amax(rows, 1, out=largest).unsqueeze(1))
    write_exponentials(rows, spare)
    rows.mul_(_sum_rows(spare.copy_(rows)).reciprocal_().unsqueeze(1))  # on all processors rounded like a quotient


def write_exponentials(x: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Replace each x, none of which is positive, by its exponential, and return x.

    It is right to 11 digits from -10 on, and to 10 digits from -20 on: a polynomial for x / 1024, squared ten times.
    """
    x.clamp_(min=LOWEST_EXPONENT).mul_(2**-_NUM_SQUARINGS)
    torch.mul(x, 1 / 120, out=spare).add_(1 / 24)
    for coefficient in (1 / 6, 1 / 2, 1, 1):
        spare.mul_(x).add_(coefficient)
    for _ in range(_NUM_SQUARINGS):
        spare.mul_(spare)
    return x.copy_(spare)


def write_logarithms(x: torch.Tensor, spares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Replace each x, all of which are positive and normal numbers, by its logarithm, and return x.

    It is right to 15 digits: the exponent times log(2), and the series of 2 * artanh((m - 1) / (m + 1)) for a
    mantissa m from sqrt(1 / 2) to sqrt(2).
    """
    exponents, ratio, square = spares
    bits, shifts, fields = x.view(torch.int64), ratio.view(torch.int64), square.view(torch.int64)
    torch.sub(bits, BITS_OF_ROOT, out=shifts).bitwise_right_shift_(FRACTION_BITS)
    exponents.copy_(shifts).mul_(math.log(2))
    bits.sub_(torch.bitwise_left_shift(shifts, FRACTION_BITS, out=fields))
    torch.sub(x, 1, out=ratio).div_(x.add_(1))
    torch.mul(ratio, ratio, out=square)
    torch.mul(square, 1 / 19, out=x)
    for divisor in range(17, 1, -2):
        x.add_(1 / divisor).mul_(square)
    return x.add_(1).mul_(ratio.mul_(2)).add_(exponents)


def _sum_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row, in its first element: the second half is added to the first until one is left."""
    width = rows.shape[1]
    while width > 1:
        half = -(-width // 2)
        rows[:, : width - half].add_(rows[:, half:width])
        width = half
    return rows[:, 0]
