"""Compiled loops for low-rank updates: the same bits as `ops.low_rank` gives by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernels.compiler import loop
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
    left: Array1[np.float32], right: Array1[np.float32], start: int, count: int, ranks: int, is_last: int, rows: int,
    width: int, columns: int, place: int, words: Array1[np.uint16], longs: Array1[np.uint32], form: int,
    out: Array1[np.float32], totals: Array1[np.float32], products: Array1[np.float32],
) -> None:  # fmt: skip
    """Add one chunk of left @ right, for some columns of rows; after the last one, write `out`, as far as it goes.

    Args:
        left: rows x ranks; a multiple of four rows, of which some may be there to fill it up.
        right: ranks of the chunk x `COLUMNS`.
        start: first rank of the chunk.
        count: ranks of the chunk; a multiple of four.
        ranks: that `left` has.
        is_last: whether there are no more chunks.
        rows: that there are.
        width: columns that there are.
        columns: of the whole matrix: the distance of neighbouring rows in `out`.
        place: of the first element in `out`; negative where `out` begins later.
        words: stored values for `out`, where they have 16 bits.
        longs: the same where they have 32.
        form: of the stored values, as in `convert`; 3 where `out` has the values already.
        out: gets the values plus the sum of all chunks.
        totals: the sum of the chunks before, for all rows, zeros at first; unused where there is one chunk.
        products: scratch for four rows of the product.
    """
    for row in range(0, rows, 4):
        products[:] = np.float32(0)
        for k in range(0, count, 4):
            four = right[k * COLUMNS : (k + 4) * COLUMNS]
            _add_four(left, row * ranks + start + k, ranks, four, width, products)
        if is_last == 0:
            _add(products, totals[row * COLUMNS : (row + 4) * COLUMNS])
            continue
        if start > 0:
            _add(totals[row * COLUMNS : (row + 4) * COLUMNS], products)
        for i in range(min(4, rows - row)):
            begin = place + (row + i) * columns
            skipped, stop = max(0, -begin), min(width, len(out) - begin)
            if skipped < stop:
                part = out[begin + skipped : begin + stop]
                if form < 3:
                    load(words, longs, begin + skipped, form, stop - skipped, part.view(np.uint32), part)
                _add(products[i * COLUMNS + skipped : i * COLUMNS + stop], part)


def _add(values, out):
    for j in range(len(out)):
        out[j] += values[j]


def _add_four(left, at, ranks, right, width, total):
    """Add the products of four rows with four ranks, which are added to each other first."""
    a0, a1, a2, a3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    b0, b1, b2, b3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    c0, c1, c2, c3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    at += ranks
    d0, d1, d2, d3 = left[at], left[at + 1], left[at + 2], left[at + 3]
    for j in range(width):
        x0, x1, x2, x3 = right[j], right[j + COLUMNS], right[j + 2 * COLUMNS], right[j + 3 * COLUMNS]
        total[j] += (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3)
        total[j + COLUMNS] += (b0 * x0 + b1 * x1) + (b2 * x2 + b3 * x3)
        total[j + 2 * COLUMNS] += (c0 * x0 + c1 * x1) + (c2 * x2 + c3 * x3)
        total[j + 3 * COLUMNS] += (d0 * x0 + d1 * x1) + (d2 * x2 + d3 * x3)
