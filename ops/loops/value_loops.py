"""Loops that write what elements are chosen by: variances, divergences and importances; see `loops` for parameters.

They do the operations of the torch functions of their methods, one after the other, in the same precision.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.kernels.divergence import BITS_OF_ROOT, FRACTION_BITS, LOWEST_EXPONENT, SMALLEST_SHARE
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.delta_loops import take_delta
from raymerge.ops.loops.strips import (
    NUM_FOLDED_ROWS,
    add_wide,
    count_columns,
    finish,
    load,
    load_rows,
)
from raymerge.ops.stored import STRIP
from raymerge.ops.sums import NUM_COLUMNS

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2, Array3

LOG_2 = math.log(2)


@loop
def write_variance(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    count: int, variances: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Write the variance of the deltas, times the square of their number; return how many are not zero."""
    values = scratch.view(np.float32)
    base, first, delta, total = values[0], values[1], values[2], values[3]
    num_models = len(places) - 1
    factor = np.float32(num_models)
    num_varying = 0
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        variance = variances[start : start + size]
        load(words, longs, places[0] + start, forms[0], size, scratch[0], base)
        load(words, longs, places[1] + start, forms[1], size, scratch[1], first)
        for k in range(size):
            first[k] -= base[k]
        total[:size] = 0
        variance[:] = 0
        for source in range(2, num_models + 1):
            load(words, longs, places[source] + start, forms[source], size, scratch[2], delta)
            for k in range(size):
                delta[k] -= base[k]
            for k in range(size):
                delta[k] -= first[k]
            for k in range(size):
                total[k] += delta[k]
            for k in range(size):
                variance[k] += delta[k] * delta[k]
        for k in range(size):
            variance[k] = variance[k] * factor - total[k] * total[k]
        for k in range(size):
            num_varying += np.int64(variance[k] != 0)
    return num_varying


def _load_kept(words, longs, place, form, count, bits, base, delta, kept, choice):
    """Decode a strip, subtract the base and set what is not kept to zero; `choice` 0 keeps all, 2 nothing."""
    load(words, longs, place, form, count, bits, delta)
    if choice == 2:
        delta[:count] = 0
    elif choice:
        for k in range(count):
            delta[k] = (delta[k] - base[k]) * np.float32(kept[k])
    else:
        for k in range(count):
            delta[k] -= base[k]


@loop
def find_kept(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    position: int, count: int, kinds: Array1[np.int64], limits: Array2[np.uint32], word_limits: Array1[np.uint32],
    left: Array2[np.int64], table: Array1[np.uint32], keys: Array3[np.uint32], kept: Array2[np.uint8],
    out: Array1[np.uint8], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write 1 for each element of source 0 that is kept and not zero, and 0 for the others."""
    bits = scratch[1]
    values, taken = scratch[0].view(np.float32), bits.view(np.float32)
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        load(words, longs, places[0] + start, forms[0], size, scratch[0], values)
        where = kept[0, start : start + size], position + start, size
        take_delta(values, kinds[0], limits[0], word_limits[0], left[0], table, keys[0, 0], *where, bits, taken)
        marks = out[start : start + size]
        for k in range(size):
            marks[k] = taken[k] != 0


@loop
def sum_squares(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    choice: int, kept: Array1[np.uint8], count: int, sums: Array2[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the sum of the squares of each delta over each block to a row of `sums`, added up as in `ops.sums`."""
    values = scratch.view(np.float32)
    base, delta, lanes = values[0], values[1], values[2]
    wide = values[3].view(np.float64)
    for number in range(len(sums)):
        first = number * BLOCK_ELEMENTS
        length = min(BLOCK_ELEMENTS, count - first)
        columns = count_columns(length)
        sums[number, :] = 0
        for column in range(0, columns, NUM_COLUMNS):
            start = first + column
            load_rows(words, longs, places[0] + start, columns, forms[0], scratch[0], base)
            for source in range(1, len(places)):
                load_rows(words, longs, places[source] + start, columns, forms[source], scratch[1], delta)
                for k in range(NUM_FOLDED_ROWS * NUM_COLUMNS):
                    delta[k] -= base[k]
                if choice == 2:
                    delta[:] = 0
                for row in range(NUM_FOLDED_ROWS if choice == 1 else 0):
                    mask = kept[start + row * columns : start + row * columns + NUM_COLUMNS]
                    line = delta[row * NUM_COLUMNS : (row + 1) * NUM_COLUMNS]
                    for k in range(NUM_COLUMNS):
                        line[k] *= np.float32(mask[k])
                _square(delta, lanes)
                sums[number, source - 1] += add_wide(lanes, wide)
        for start in range(first + NUM_FOLDED_ROWS * columns, first + length, STRIP):
            size = min(STRIP, first + length - start)
            load(words, longs, places[0] + start, forms[0], size, scratch[0], base)
            for source in range(1, len(places)):
                mask = kept[start : start + size]
                place, form = places[source] + start, forms[source]
                _load_kept(words, longs, place, form, size, scratch[1], base, delta, mask, choice)
                for k in range(size):
                    sums[number, source - 1] += np.float64(delta[k] * delta[k])


def _square(tile, lanes):
    """Write the sums of the squares in the columns of a tile; in a half, row is added to row."""
    for k in range(NUM_COLUMNS):
        first = second = np.float32(0)
        for row in range(NUM_FOLDED_ROWS // 2):
            first += tile[row * NUM_COLUMNS + k] * tile[row * NUM_COLUMNS + k]
        for row in range(NUM_FOLDED_ROWS // 2, NUM_FOLDED_ROWS):
            second += tile[row * NUM_COLUMNS + k] * tile[row * NUM_COLUMNS + k]
        lanes[k] = first + second


@loop
def combine_varying(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    choice: int, kept: Array1[np.uint8], weights: Array1[np.float32], smallest: np.float32, position: int, count: int,
    out_words: Array1[np.uint16], out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32],
    scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Write base + the average of the kept deltas that agree with the sign of their sum; see `finish`."""
    values = scratch.view(np.float32)
    num_models = len(weights)
    base, signs, divisor, total = values[0], values[1 + num_models], values[2 + num_models], values[3 + num_models]
    zero, one = np.float32(0), np.float32(1)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        load(words, longs, places[0] + start, forms[0], size, scratch[0], base)
        mask = kept[start : start + size]
        for source in range(1, num_models + 1):
            delta = values[source]
            place, form = places[source] + start, forms[source]
            _load_kept(words, longs, place, form, size, scratch[source], base, delta, mask, choice)
            if source == 1:
                for k in range(size):
                    signs[k] = delta[k]
            else:
                for k in range(size):
                    signs[k] += delta[k]
        for k in range(size):
            signs[k] = one if signs[k] >= 0 else -one
            total[k] = 0
            divisor[k] = 0
        for source in range(1, num_models + 1):
            delta = values[source]
            weight = weights[source - 1]
            for k in range(size):
                agreeing = delta[k] * signs[k]
                total[k] += (zero if agreeing <= 0 else agreeing) * weight
                divisor[k] += weight if agreeing > 0 else zero
        for k in range(size):
            total[k] = total[k] / (smallest if divisor[k] < smallest else divisor[k]) * signs[k] + base[k]
        total_bits = scratch[3 + num_models]
        finished += finish(total_bits, total, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def write_divergences(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    row: int, divergences: Array1[np.float32], scratch: Array2[np.float64],
) -> None:  # fmt: skip
    """Write the divergence of the softmax of source 1 from that of source 0, row by row; see `divergence`."""
    q, p, spare = scratch[0], scratch[1], scratch[2]
    bits = spare.view(np.uint32)[:row]
    values = bits.view(np.float32)
    ratio_bits = q.view(np.int64)
    for number in range(len(divergences)):
        for source in range(2):
            load(words, longs, places[source] + number * row, forms[source], row, bits, values)
            rows = p if source else q
            for k in range(row):
                rows[k] = np.float64(values[k])
            _write_softmax(rows, spare, row)
            for k in range(row):
                rows[k] += SMALLEST_SHARE
        for k in range(row):
            q[k] = p[k] / q[k]
        for k in range(row):
            shift = np.int32((ratio_bits[k] - BITS_OF_ROOT) >> 32) >> np.int32(FRACTION_BITS - 32)
            spare[k] = np.float64(np.int32(shift)) * LOG_2
            ratio_bits[k] -= np.int64(shift) << FRACTION_BITS
        for k in range(row):
            ratio = (q[k] - 1.0) / (q[k] + 1.0)
            square = ratio * ratio
            series = square * (1 / 19)
            series = (series + 1 / 17) * square
            series = (series + 1 / 15) * square
            series = (series + 1 / 13) * square
            series = (series + 1 / 11) * square
            series = (series + 1 / 9) * square
            series = (series + 1 / 7) * square
            series = (series + 1 / 5) * square
            series = (series + 1 / 3) * square
            q[k] = ((series + 1.0) * (ratio * 2.0) + spare[k]) * p[k]
        total = _sum_halves(q, row)
        divergences[number] = np.float32(0.0 if total < 0 else total)


def _write_softmax(rows, spare, length):
    largest = rows[0]
    for k in range(1, length):
        largest = max(largest, rows[k])
    for k in range(length):
        x = rows[k] - largest
        x = LOWEST_EXPONENT if x < LOWEST_EXPONENT else x
        x *= 1 / 1024
        y = x * (1 / 120) + 1 / 24
        y = y * x + 1 / 6
        y = y * x + 1 / 2
        y = y * x + 1.0
        y = y * x + 1.0
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        y *= y
        rows[k] = y
        spare[k] = y
    factor = 1.0 / _sum_halves(spare, length)
    for k in range(length):
        rows[k] *= factor


def _sum_halves(values, length):
    """Return the sum; the second half is added to the first until one is left."""
    while length > 1:
        half = length - length // 2
        upper = values[half:length]
        for k in range(length - half):
            values[k] += upper[k]
        length = half
    return values[0]


@loop
def write_importance(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    position: int, count: int, row: int, divergences: Array1[np.float32], importances: Array1[np.float32],
    scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the distance of source 1 from source 0 times the divergence of its row; `divergences` has all rows."""
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        part = importances[start : start + size]
        _load_importance(words, longs, places, forms, start, size, position, row, divergences, scratch, part)


def _load_importance(words, longs, places, forms, start, size, position, row, divergences, scratch, importances):
    """Decode a strip of both sources, and write its importances."""
    values = scratch.view(np.float32)
    base, model = values[0], values[1]
    load(words, longs, places[0] + start, forms[0], size, scratch[0], base)
    load(words, longs, places[1] + start, forms[1], size, scratch[1], model)
    for k in range(size):
        importances[k] = abs(model[k] - base[k])
    offset = 0
    while offset < size:
        place = position + start + offset
        stop = min(size, offset + row - place % row)
        part = importances[offset:stop]
        divergence = divergences[place // row]
        for k in range(stop - offset):
            part[k] *= divergence
        offset = stop


@loop
def choose_important(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    row: int, divergences: Array1[np.float32], threshold: np.float32, position: int, count: int,
    out_words: Array1[np.uint16], out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32],
    scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Write source 1 where it is important, or its importance is NaN, and source 0 elsewhere; see `finish`."""
    values = scratch.view(np.float32)
    importance, chosen = values[2], values[3]
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        _load_importance(words, longs, places, forms, start, size, position, row, divergences, scratch, importance)
        base_bits, model_bits, chosen_bits = scratch[0], scratch[1], scratch[3]
        for k in range(size):
            is_taken = np.uint32(importance[k] < threshold) - np.uint32(1)  # all bits or none
            chosen_bits[k] = base_bits[k] ^ ((base_bits[k] ^ model_bits[k]) & np.uint32(is_taken))
        finished += finish(scratch[3], chosen, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished
