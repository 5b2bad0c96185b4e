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
    add_squares,
    count_columns,
    load,
    store,
)
from raymerge.ops.stored import STRIP

if TYPE_CHECKING:
    from raymerge.ops.kernels.compiler import Array1, Array2

_GROUP = 4
"""Vectors on each side of a group of pairs."""
NUM_PRODUCT_STRIPS = 1 + 2 * _GROUP + 2 * _GROUP * _GROUP
"""Strips of scratch that `sum_products` uses."""


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
    num_origins: int, count: int, sums: Array2[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the inner product of each pair of vectors over each block to a row of `sums`, added up as in `ops.sums`.

    The vectors are the sources, or the differences of all others from the first one. The pairs are (0, 0), (0, 1), ...
    (1, 1), ... They are worked off in groups of a few vectors by a few, whose sums stay in a core's first cache.
    """
    num_vectors = len(places) - num_origins
    products = scratch[1 + 2 * _GROUP :].view(np.float32)
    for number in range(len(sums)):
        first = number * BLOCK_ELEMENTS
        length = min(BLOCK_ELEMENTS, count - first)
        columns = count_columns(length)
        sums[number, :] = 0
        for left in range(0, num_vectors, _GROUP):
            for right in range(left, num_vectors, _GROUP):
                group = left, right, num_vectors
                for column in range(0, columns, STRIP):
                    size = min(STRIP, columns - column)
                    _clear(products, group)
                    for row in range(NUM_FOLDED_ROWS):
                        offset = first + row * columns + column
                        _load_group(words, longs, places, forms, num_origins, group, offset, size, scratch)
                        _add_products(scratch, group, size, products, row // (NUM_FOLDED_ROWS // 2))
                    _add_group(products, group, size, sums[number])
                for offset in range(first + NUM_FOLDED_ROWS * columns, first + length, STRIP):
                    size = min(STRIP, first + length - offset)
                    _clear(products, group)
                    _load_group(words, longs, places, forms, num_origins, group, offset, size, scratch)
                    _add_products(scratch, group, size, products, 0)
                    _add_group(products, group, size, sums[number])


def _clear(products, group):
    """Set the strips of the pairs in a group to zero."""
    left, right, num_vectors = group
    for i in range(min(_GROUP, num_vectors - left)):
        for j in range(i if left == right else 0, min(_GROUP, num_vectors - right)):
            strip = 2 * (i * _GROUP + j)
            products[strip : strip + 2] = 0


def _load_group(words, longs, places, forms, num_origins, group, offset, size, scratch):
    """Write strips of the vectors of both sides of a group to scratch, after that of the first source."""
    left, right, num_vectors = group
    origin = scratch[0].view(np.float32)
    if num_origins:
        load(words, longs, places[0] + offset, forms[0], size, scratch[0], origin)
    for side in range(1 if left == right else 2):
        start = right if side else left
        for vector in range(start, min(start + _GROUP, num_vectors)):
            source = vector + num_origins
            bits = scratch[1 + side * _GROUP + vector - start]
            values = bits.view(np.float32)
            load(words, longs, places[source] + offset, forms[source], size, bits, values)
            if num_origins:
                for k in range(size):
                    values[k] -= origin[k]


def _add_products(scratch, group, size, products, half):
    """Add the products of each pair in a group to one of its two strips of `products`."""
    left, right, num_vectors = group
    for i in range(min(_GROUP, num_vectors - left)):
        a = scratch[1 + i].view(np.float32)
        for j in range(i if left == right else 0, min(_GROUP, num_vectors - right)):
            b = scratch[1 + j if left == right else 1 + _GROUP + j].view(np.float32)
            total = products[2 * (i * _GROUP + j) + half]
            for k in range(size):
                total[k] += a[k] * b[k]


def _add_group(products, group, size, sums):
    """Add both strips of each pair in a group to the pair's sum, in float64."""
    left, right, num_vectors = group
    for i in range(min(_GROUP, num_vectors - left)):
        for j in range(i if left == right else 0, min(_GROUP, num_vectors - right)):
            low, high = left + i, right + j
            pair = low * num_vectors - low * (low - 1) // 2 + high - low
            total, other = products[2 * (i * _GROUP + j)], products[2 * (i * _GROUP + j) + 1]
            for k in range(size):
                sums[pair] += np.float64(total[k] + other[k])
