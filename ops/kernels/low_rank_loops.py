"""Compiled loops for low-rank updates: the same bits as `ops.low_rank` gives by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernels.compiler import fused, loop
from raymerge.ops.kernels.strips import load
from raymerge.ops.low_rank import COLUMNS

if TYPE_CHECKING:
    from raymerge.ops.kernels.compiler import Array1


@loop
def convert(words: Array1[np.uint16], longs: Array1[np.uint32], form: int, count: int, out: Array1[np.float32]) -> None:
    """Write stored values as float32; `form` is the index of their dtype in `stored.LOOP_DTYPES`."""
    load(words, longs, 0, form, count, out.view(np.uint32), out)


@loop
def add_products(
    left: Array1[np.float64], right: Array1[np.float64], ends: Array1[np.int64], rows: int, width: int, columns: int,
    place: int, words: Array1[np.uint16], longs: Array1[np.uint32], form: int, out: Array1[np.float32],
    products: Array1[np.float64],
) -> None:  # fmt: skip
    """Write stored values plus left @ right, for some columns of rows, to `out`, as far as they are in it.

    Args:
        left: rows x ranks; a multiple of four rows, of which some may be there to fill it up.
        right: ranks x `COLUMNS`.
        ends: first rank of each chunk, and the number of ranks; multiples of four.
        rows: that there are.
        width: columns that there are.
        columns: of the whole matrix: the distance of neighbouring rows in `out`.
        place: of the first element in `out`; negative where `out` begins later.
        words: stored values for `out`, where they have 16 bits.
        longs: the same where they have 32.
        form: of the stored values, as in `convert`; 3 where `out` has the values already.
        out: gets the values, to which the sum of all chunks is added in float64.
        products: scratch for two times four rows of the product.
    """
    total, chunk_total = products[: 4 * COLUMNS], products[4 * COLUMNS :]
    ranks = ends[-1]
    for row in range(0, rows, 4):
        total[:] = 0.0
        for k in range(0, ends[1], 4):
            _add_four(left, row * ranks + k, ranks, right[k * COLUMNS : (k + 4) * COLUMNS], width, total)
        for chunk in range(1, len(ends) - 1):
            chunk_total[:] = 0.0
            for k in range(ends[chunk], ends[chunk + 1], 4):
                four = right[k * COLUMNS : (k + 4) * COLUMNS]
                _add_four(left, row * ranks + k, ranks, four, width, chunk_total)
            for j in range(4 * COLUMNS):
                total[j] += chunk_total[j]
        for i in range(min(4, rows - row)):
            begin = place + (row + i) * columns
            skipped, stop = max(0, -begin), min(width, len(out) - begin)
            if skipped < stop:
                part = out[begin + skipped : begin + stop]
                if form < 3:
                    load(words, longs, begin + skipped, form, stop - skipped, part.view(np.uint32), part)
                _add_row(total[i * COLUMNS + skipped : i * COLUMNS + stop], part)


def _add_row(total, out):
    for j in range(len(out)):
        out[j] = np.float32(np.float64(out[j]) + total[j])


@fused
def _add_four(left, at, ranks, right, width, total):
    """Add products of four rows with four ranks: the sums are exact, so that fusing does not show."""
    a0, a1, a2, a3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    b0, b1, b2, b3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    c0, c1, c2, c3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    d0, d1, d2, d3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    for j in range(width):
        x0, x1, x2, x3 = right[j], right[j + COLUMNS], right[j + 2 * COLUMNS], right[j + 3 * COLUMNS]
        total[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        total[j + COLUMNS] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
        total[j + 2 * COLUMNS] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
        total[j + 3 * COLUMNS] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
