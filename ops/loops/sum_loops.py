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
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import (
    NUM_FOLDED_ROWS,
    TILE_ELEMENTS,
    add_wide,
    count_columns,
    finish,
    load,
    load_rows,
)
from raymerge.ops.stored import STRIP
from raymerge.ops.sums import NUM_COLUMNS

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2


NUM_DECODED = 4
"""Sources that `combine` decodes at once."""


def make_scratch(num_strips: int) -> Array2[np.uint32]:
    """Return scratch for a loop."""
    return np.empty((num_strips, STRIP), np.uint32)


def make_product_scratch(num_vectors: int) -> Array2[np.uint32]:
    """Return scratch for `sum_products`: a tile of each vector, of their products, and of the origin."""
    return np.empty((num_vectors + 2, TILE_ELEMENTS), np.uint32)


@loop
def combine(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    coefficients: Array2[np.float32], divisors: Array1[np.float32], position: int, count: int,
    out_words: Array1[np.uint16], out_longs: Array1[np.uint32], out_places: Array1[np.int64], out_form: int,
    squares: Array2[np.float32], finished: Array1[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write sum(coefficients_i * x_i) / divisor for each output, of sources that are decoded once for all of them.

    Outputs have a row of `coefficients` and `squares` each, and `finish` tells of them in `finished`. The scratch has
    strips for `NUM_DECODED` sources, and for each output where there are more of them.
    """
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        for first in range(0, len(places), NUM_DECODED):
            stop = min(first + NUM_DECODED, len(places))
            for source in range(first, stop):
                bits = scratch[source - first]
                load(words, longs, places[source] + start, forms[source], size, bits, bits.view(np.float32))
            for output in range(len(divisors)):
                bits = scratch[NUM_DECODED + (output if len(places) > NUM_DECODED else 0)]
                total, divisor = bits.view(np.float32), divisors[output]
                _add_products(scratch.view(np.float32), coefficients[output], first, stop, size, total)
                if stop < len(places):
                    continue
                if divisor != 1:
                    for k in range(size):
                        total[k] /= divisor
                where = position + start, size, squares[output], out_words, out_longs, out_places[output] + start
                finished[output] += finish(bits, total, *where, out_form)
        start += size


def _add_products(decoded, factors, first, stop, count, total):
    """Add the products of sources [first, stop) to a strip, one after the other; those of the first ones to nothing."""
    source = first
    if not first:
        factor = factors[0]
        x = decoded[0]
        if stop > 1:
            other_factor = factors[1]
            other = decoded[1]
            for k in range(count):
                total[k] = x[k] * factor + other[k] * other_factor
        else:
            for k in range(count):
                total[k] = x[k] * factor
        source = 2
    while source < stop:
        factor = factors[source]
        x = decoded[source - first]
        for k in range(count):
            total[k] += x[k] * factor
        source += 1


@loop
def sum_products(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    num_origins: int, count: int, sums: Array2[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the inner product of each pair of vectors over each block to a row of `sums`, added up as in `ops.sums`.

    The vectors are the sources, or the differences of all others from the first one. The pairs are (0, 0), (0, 1), ...
    (1, 1), ... A tile of some columns of all vectors is decoded once, and stays in a core's cache for all pairs.
    """
    num_vectors = len(places) - num_origins
    values = scratch.view(np.float32)
    for number in range(len(sums)):
        first = number * BLOCK_ELEMENTS
        length = min(BLOCK_ELEMENTS, count - first)
        columns = count_columns(length)
        sums[number, :] = 0
        for column in range(0, columns, NUM_COLUMNS):
            for source in range(len(places)):
                row = source - num_origins  # the last one is that of the origin
                place = places[source] + first + column
                load_rows(words, longs, place, columns, forms[source], scratch[row], values[row])
            _subtract(values, num_origins, num_vectors, TILE_ELEMENTS)
            _add_tiles(values, num_vectors, sums[number])
        for offset in range(first + NUM_FOLDED_ROWS * columns, first + length, TILE_ELEMENTS):
            size = min(TILE_ELEMENTS, first + length - offset)
            for source in range(len(places)):
                row = source - num_origins
                load(words, longs, places[source] + offset, forms[source], size, scratch[row], values[row])
            _subtract(values, num_origins, num_vectors, size)
            _add_rest(values, num_vectors, size, sums[number])


def _subtract(values, num_origins, num_vectors, count):
    """Subtract the origin, if there is one, from each vector."""
    origin = values[-1]
    for vector in range(num_vectors if num_origins else 0):
        difference = values[vector]
        for k in range(count):
            difference[k] -= origin[k]


def _add_tiles(values, num_vectors, sums):
    """Add the products of each pair over a tile to the pair's sum; two pairs at a time share what is loaded."""
    products = values[num_vectors]
    wide = products[2 * NUM_COLUMNS :].view(np.float64)
    pair = 0
    for left in range(num_vectors):
        for right in range(left, num_vectors, 2):
            _multiply(values[left], values[right], values[min(right + 1, num_vectors - 1)], products)
            sums[pair] += add_wide(products, wide)
            pair += 1
            if right + 1 < num_vectors:
                sums[pair] += add_wide(products[NUM_COLUMNS:], wide)
                pair += 1


def _multiply(a, b, c, products):
    """Write the products of `a` with `b` and `c` to the columns of two rows; in a half, row is added to row."""
    for k in range(NUM_COLUMNS):
        with_b = with_c = np.float32(0)
        for row in range(NUM_FOLDED_ROWS // 2):
            with_b += a[row * NUM_COLUMNS + k] * b[row * NUM_COLUMNS + k]
            with_c += a[row * NUM_COLUMNS + k] * c[row * NUM_COLUMNS + k]
        products[k] = with_b
        products[NUM_COLUMNS + k] = with_c
    for k in range(NUM_COLUMNS):
        with_b = with_c = np.float32(0)
        for row in range(NUM_FOLDED_ROWS // 2, NUM_FOLDED_ROWS):
            with_b += a[row * NUM_COLUMNS + k] * b[row * NUM_COLUMNS + k]
            with_c += a[row * NUM_COLUMNS + k] * c[row * NUM_COLUMNS + k]
        products[k] += with_b
        products[NUM_COLUMNS + k] += with_c


def _add_rest(values, num_vectors, count, sums):
    """Add the products of each pair to the pair's sum, in float64."""
    pair = 0
    for left in range(num_vectors):
        a = values[left]
        for right in range(left, num_vectors):
            b = values[right]
            total = 0.0
            for k in range(count):
                total += np.float64(a[k] * b[k])
            sums[pair] += total
            pair += 1
