"""Loops that are compiled: from stored values to rounded results, one strip after another, in a core's first cache.

They give the bits of the torch operations of `ops.kernels`, on every processor: nothing is contracted or reordered.

Stored values lie in one buffer, seen as 16-bit words and as 32-bit words; the `places` of sources count in words of
their own size, and `forms` are the indexes of their dtypes in `stored.LOOP_DTYPES`. Results go to a buffer of their
own, seen likewise. `scratch` has as many strips as are used, at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.kernels.compiler import loop
from raymerge.ops.kernels.strips import (
    NUM_FOLDED_ROWS,
    NUM_ROW_STRIPS,
    add_columns,
    add_squares,
    count_columns,
    find_strip,
    load,
    store,
)
from raymerge.ops.stored import STRIP

if TYPE_CHECKING:
    from raymerge.ops.kernels.compiler import Array1, Array2


def make_scratch(num_strips: int) -> Array2[np.uint32]:
    """Return scratch for a loop."""
    return np.empty((num_strips, STRIP), np.uint32)


@loop
def combine(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    coefficients: Array1[np.float32], divisor: np.float32, position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Write sum(coefficients_i * x_i) / divisor; see `add_squares` for what is returned."""
    bits, other_bits = scratch[0], scratch[1]
    total, other = bits.view(np.float32), other_bits.view(np.float32)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        load(words, longs, places[0] + start, forms[0], size, bits, total)
        factor = coefficients[0]
        if factor != 1:
            for k in range(size):
                total[k] *= factor
        for source in range(1, len(places)):
            load(words, longs, places[source] + start, forms[source], size, other_bits, other)
            factor = coefficients[source]
            for k in range(size):
                total[k] += other[k] * factor
        if divisor != 1:
            for k in range(size):
                total[k] /= divisor
        finished += add_squares(total, position + start, size, squares)
        store(bits, total, size, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def sum_products(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    count: int, sums: Array2[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the sums of a * a, b * b and a * b over each block to a row of `sums`, added up as in `ops.sums`."""
    a_bits, b_bits, strips = scratch[0], scratch[1], scratch.view(np.float32)
    a, b = strips[0], strips[1]
    for number in range(len(sums)):
        first = number * BLOCK_ELEMENTS
        length = min(BLOCK_ELEMENTS, count - first)
        columns = count_columns(length)
        strips[2:] = 0
        for row in range(NUM_FOLDED_ROWS if columns else 0):
            for column in range(0, columns, STRIP):
                size = min(STRIP, columns - column)
                offset = first + row * columns + column
                load(words, longs, places[0] + offset, forms[0], size, a_bits, a)
                load(words, longs, places[1] + offset, forms[1], size, b_bits, b)
                strip = find_strip(row, column, 3)
                aa, bb, ab = strips[strip], strips[strip + NUM_ROW_STRIPS], strips[strip + 2 * NUM_ROW_STRIPS]
                for k in range(size):
                    aa[k] += a[k] * a[k]
                    bb[k] += b[k] * b[k]
                    ab[k] += a[k] * b[k]
        for figure in range(3):
            sums[number, figure] = add_columns(strips, figure, 3, columns)
        for offset in range(first + NUM_FOLDED_ROWS * columns, first + length, STRIP):
            size = min(STRIP, first + length - offset)
            load(words, longs, places[0] + offset, forms[0], size, a_bits, a)
            load(words, longs, places[1] + offset, forms[1], size, b_bits, b)
            for k in range(size):
                sums[number, 0] += np.float64(a[k] * a[k])
                sums[number, 1] += np.float64(b[k] * b[k])
                sums[number, 2] += np.float64(a[k] * b[k])
