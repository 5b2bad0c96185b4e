"""Decoding, rounding and adding up of one strip at a time, compiled into each loop."""

from __future__ import annotations

import numpy as np

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.stored import STRIP
from raymerge.ops.sums import NUM_COLUMNS, NUM_HALVES, NUM_ROWS, SMALLEST_FOLDED

_FLOAT16_SCALE = np.float32(2.0**112)

NUM_FOLDED_ROWS = NUM_HALVES * NUM_ROWS
TILE_ELEMENTS = NUM_FOLDED_ROWS * NUM_COLUMNS
"""A tile is as many columns of all rows that a block is folded into as all blocks have a multiple of."""
NUM_ROW_STRIPS = BLOCK_ELEMENTS // NUM_FOLDED_ROWS // STRIP
"""Strips that the longest row takes."""


def load(words, longs, place, form, count, bits, values) -> None:
    """Decode stored values into a strip, of which `bits` and `values` are two views."""
    if form == 2:
        stored = longs[place : place + count]
        for k in range(count):
            bits[k] = stored[k]
        return
    halves = words[place : place + count]
    if form == 0:
        for k in range(count):
            bits[k] = np.uint32(halves[k]) << np.uint32(16)
        return
    for k in range(count):
        bits[k] = np.uint32(halves[k] & np.uint16(0x7FFF)) << np.uint32(13)
    for k in range(count):  # shifts the exponent's bias, and makes subnormal numbers normal
        values[k] *= _FLOAT16_SCALE
    for k in range(count):
        word = np.uint32(halves[k])
        infinite = np.uint32(0x7F800000) if word & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
        bits[k] = bits[k] | infinite | (word & np.uint32(0x8000)) << np.uint32(16)


def load_rows(words, longs, place, step, form, bits, values) -> None:
    """Decode a tile, row after row; in the block, rows are `step` elements apart."""
    for row in range(NUM_FOLDED_ROWS):
        strip = bits[row * NUM_COLUMNS : (row + 1) * NUM_COLUMNS]
        start = place + row * step
        if form == 0:  # as `load` does, with a number of elements that the compiler knows
            halves = words[start : start + NUM_COLUMNS]
            for k in range(NUM_COLUMNS):
                strip[k] = np.uint32(halves[k]) << np.uint32(16)
        else:
            load(words, longs, start, form, NUM_COLUMNS, strip, values[row * NUM_COLUMNS : (row + 1) * NUM_COLUMNS])


def finish(bits, values, position, count, squares, words, longs, place, form) -> float:
    """Round a strip to the nearest stored values, and return the sum of the squares of a block that ends with it.

    Of two equally near values it takes the even one; there is one NaN only. Squares are added to `squares` by their
    place in a strip, so that whole blocks are added up in the same order wherever results are cut. Overwrites the
    strip, of which `bits` and `values` are two views.
    """
    lanes = squares[position % STRIP : position % STRIP + count]
    if form == 0:
        halves = words[place : place + count]
        for k in range(count):  # all at once: a value stays in a register
            value = np.float32(values[k])
            lanes[k] += value * value
            word = value.view(np.uint32)
            rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            halves[k] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
    else:
        for k in range(count):
            lanes[k] += values[k] * values[k]
        if form == 2:
            stored = longs[place : place + count]
            for k in range(count):
                is_nan = (bits[k] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                stored[k] = np.uint32(0x7FC00000) if is_nan else bits[k]
        else:
            _store_float16(bits, values, count, words[place : place + count])
    if (position + count) % BLOCK_ELEMENTS:
        return 0.0
    finished = sum_up(squares)
    squares[:] = 0
    return finished


def _store_float16(bits, values, count, halves):
    for k in range(count):
        size = bits[k] & np.uint32(0x7FFFFFFF)
        sign = (bits[k] >> np.uint32(16)) & np.uint32(0x8000)
        rounded = (size + np.uint32(0xC8000FFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        rounded = rounded & np.uint32(0x7FFF) if size < np.uint32(0x47800000) else np.uint32(0x7C00)
        halves[k] = np.uint16(0x7E00) if size > np.uint32(0x7F800000) else np.uint16(sign | rounded)
        bits[k] = size
    for k in range(count):  # its last bit is that of subnormal numbers
        values[k] += np.float32(0.5)
    for k in range(count):
        subnormal = bits[k] - np.uint32(0x3F000000)
        if subnormal <= np.uint32(0x400):
            halves[k] = np.uint16((halves[k] & np.uint16(0x8000)) | np.uint16(subnormal))


def sum_up(values) -> float:
    """Return the sum of values, in float64."""
    total = 0.0
    for k in range(len(values)):
        total += np.float64(values[k])
    return total


def add_wide(columns, wide):
    """Return the sum of the columns of a tile, in float64; `wide` has room for half of them.

    Halves are added to each other, for one sum would wait for the one before it.
    """
    half = NUM_COLUMNS // 2
    for k in range(half):
        wide[k] = np.float64(columns[k]) + np.float64(columns[half + k])
    for k in range(half // 2):
        wide[k] += wide[half // 2 + k]
    for k in range(half // 4):
        wide[k] += wide[half // 4 + k]
    total = 0.0
    for k in range(half // 4):
        total += wide[k]
    return total


def count_columns(length):
    """Return the length of the rows that a block is folded into, as in `ops.sums`."""
    return length // (NUM_FOLDED_ROWS * NUM_COLUMNS) * NUM_COLUMNS if length >= SMALLEST_FOLDED else 0


def find_strip(row, column, num_figures):
    """Return the strip in which a figure of a row is added to its half of the rows, from the given column on."""
    return 2 + (row // (NUM_FOLDED_ROWS // 2)) * num_figures * NUM_ROW_STRIPS + column // STRIP


def add_columns(strips, figure, num_figures, columns):
    """Return the sum over both halves, in float64."""
    total = 0.0
    for column in range(0, columns, STRIP):
        strip = find_strip(0, column, num_figures) + figure * NUM_ROW_STRIPS
        first_half, second_half = strips[strip], strips[strip + num_figures * NUM_ROW_STRIPS]
        for k in range(min(STRIP, columns - column)):
            total += np.float64(first_half[k] + second_half[k])
    return total
