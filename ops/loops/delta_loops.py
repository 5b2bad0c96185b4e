"""Loops on deltas, the differences between the other sources and the first; see `loops` for their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.kernels.sparsifiers.random import HASH_FACTOR, HASH_SHIFT, PAGE_ELEMENTS
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import (
    NUM_FOLDED_ROWS,
    NUM_ROW_STRIPS,
    add_columns,
    count_columns,
    find_strip,
    finish,
    load,
)
from raymerge.ops.stored import STRIP

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2, Array3

ALL, MAGNITUDE, RANDOM, MASKED = 0, 1, 2, 3
"""Kinds of trimming: keep all of a delta, elements between two limits, those that random bits choose, or that a mask
has."""


def _load_delta(words, longs, places, forms, source, start, size, scratch):
    """Write a strip of a delta to the second strip of scratch, or of source 0 as it is; overwrites the first."""
    base_bits, bits = scratch[0], scratch[1]
    base, delta = base_bits.view(np.float32), bits.view(np.float32)
    load(words, longs, places[source] + start, forms[source], size, bits, delta)
    if source:
        load(words, longs, places[0] + start, forms[0], size, base_bits, base)
        for k in range(size):
            delta[k] -= base[k]


@loop
def count_high(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, count: int, counts: Array2[np.int64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Count the magnitudes of a delta by the 15 high bits of their floats, in one of two rows of `counts` for each."""
    bits = scratch[1]
    even, odd = counts[0], counts[1]  # two in a row are often the same, and the second would wait for the first
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        _load_delta(words, longs, places, forms, source, start, size, scratch)
        for k in range(size):
            bits[k] = (bits[k] >> np.uint32(16)) & np.uint32(0x7FFF)
        for k in range(0, size - 1, 2):
            even[bits[k]] += 1
            odd[bits[k + 1]] += 1
        if size % 2:
            even[bits[size - 1]] += 1


@loop
def count_low(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, count: int, high: int, other_high: int, counts: Array1[np.int64], other_counts: Array1[np.int64],
    scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Count the magnitudes of a delta with the one or the other high bits by their 16 low bits, in two tables."""
    bits = scratch[1]
    is_found = scratch[2].view(np.uint8)
    is_any_found = scratch[2].view(np.uint64)
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        _load_delta(words, longs, places, forms, source, start, size, scratch)
        for k in range(size):
            word = (bits[k] >> np.uint32(16)) & np.uint32(0x7FFF)
            is_found[k] = (word == high) | (word == other_high)
        for k in range(size, -(-size // 8) * 8):
            is_found[k] = False
        for eight in range(-(-size // 8)):
            if is_any_found[eight]:
                for k in range(8 * eight, 8 * eight + 8):
                    if is_found[k]:
                        low = bits[k] & np.uint32(0xFFFF)
                        if (bits[k] >> np.uint32(16)) & np.uint32(0x7FFF) == high:
                            counts[low] += 1
                        else:
                            other_counts[low] += 1


@loop
def count_bins(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, count: int, starts: Array1[np.int32], counts: Array1[np.int64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Count the magnitudes of a delta by their low bits, from where `starts` has the table of their high bits.

    Those that have none, -1 there, are counted at the beginning: that takes no branch. Many bins hold many elements.
    """
    bits = scratch[1]
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        _load_delta(words, longs, places, forms, source, start, size, scratch)
        for k in range(size):
            table = starts[(bits[k] >> np.uint32(16)) & np.uint32(0x7FFF)]
            low = np.int64(bits[k] & np.uint32(0xFFFF))
            counts[table + low if table >= 0 else k % 64] += 1


@loop
def count_equal(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, count: int, magnitude: int, scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Return how many elements of a delta have the magnitude with these bits."""
    bits = scratch[1]
    num_equal = 0
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        _load_delta(words, longs, places, forms, source, start, size, scratch)
        num_equal += _count_at(np.uint32(magnitude), size, bits)
    return num_equal


def _count_at(magnitude, count, bits):
    """Return how many elements of a strip have the magnitude with these bits."""
    num_equal = 0
    for k in range(count):
        num_equal += np.int64(bits[k] & np.uint32(0x7FFFFFFF) == magnitude)
    return num_equal


def take_delta(delta, kind, limits, word_limit, left, table, keys, kept, position, count, bits, taken):
    """Write what is kept of a strip of a delta to another one, of which `bits` and `taken` are views; zeros elsewhere.

    A strip is inside of one page. `limits` and `left`, which counts down, are those of `sparsifier.Trim`: the bits of
    floats order as their magnitudes do.
    """
    if kind == MAGNITUDE:
        sizes = limits.view(np.float32)
        lower, upper = sizes[1 if left[0] == 0 else 0], sizes[3 if left[1] == 0 else 2]
        if left[0] > 0 or left[1] > 0:
            for k in range(count):
                taken[k] = delta[k]
            for side in range(2):
                if left[side] > 0:
                    left[side] = _drop_ties(limits[1 + side], left[side], count, bits)
            for k in range(count):  # not `0 if ... else ...`, which compiles to slow stores under a mask
                is_dropped = (abs(taken[k]) <= lower) | (abs(taken[k]) > upper)
                bits[k] &= np.uint32(np.uint32(is_dropped) - np.uint32(1))
        else:
            for k in range(count):
                value = delta[k]
                taken[k] = np.float32(0) if (abs(value) <= lower) | (abs(value) > upper) else value
    elif kind == RANDOM:
        place = position % PAGE_ELEMENTS
        page = table[place : place + count]
        key, factor = keys[0], keys[1]
        for k in range(count):
            word = np.uint32((page[k] ^ key) * factor)
            word = np.uint32((word ^ (word >> np.uint32(HASH_SHIFT))) * np.uint32(HASH_FACTOR))
            taken[k] = delta[k] * (np.float32(1) if word < word_limit else np.float32(0))
    elif kind == MASKED:
        for k in range(count):
            taken[k] = delta[k] * np.float32(kept[k])
    else:
        for k in range(count):
            taken[k] = delta[k]


def _drop_ties(threshold, left, count, bits):
    """Set all but the first `left` elements at the threshold to zero, and return how many more may be kept."""
    num_equal = _count_at(threshold, count, bits)
    if num_equal <= left:
        return left - num_equal
    for k in range(count):
        if bits[k] & np.uint32(0x7FFFFFFF) == threshold:
            if left == 0:
                bits[k] = 0
            else:
                left -= 1
    return left


@loop
def sum_delta(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, position: int, count: int, kinds: Array1[np.int64], limits: Array2[np.uint32],
    word_limits: Array1[np.uint32], left: Array2[np.int64], table: Array1[np.uint32], keys: Array3[np.uint32],
    kept: Array2[np.uint8], sums: Array2[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write the sums of a delta's magnitudes over each block, all of them and the kept ones, to a row of `sums`."""
    base_bits, bits, strips = scratch[0], scratch[1], scratch.view(np.float32)
    base, taken, delta = strips[0], strips[1], strips[2 + 4 * NUM_ROW_STRIPS]
    delta_bits = scratch[2 + 4 * NUM_ROW_STRIPS]
    for number in range(len(sums)):
        first = number * BLOCK_ELEMENTS
        length = min(BLOCK_ELEMENTS, count - first)
        columns = count_columns(length)
        folded = NUM_FOLDED_ROWS * columns
        strips[2:] = 0
        sums[number, :] = 0
        offset = 0
        while offset < length:
            is_folded = offset < folded
            row, column = (offset // columns, offset % columns) if is_folded else (0, 0)
            start = first + offset
            room = min(STRIP - column % STRIP, columns - column) if is_folded else min(STRIP, length - offset)
            size = min(room, PAGE_ELEMENTS - (position + start) % PAGE_ELEMENTS)
            load(words, longs, places[0] + start, forms[0], size, base_bits, base)
            load(words, longs, places[source] + start, forms[source], size, delta_bits, delta)
            for k in range(size):
                delta[k] -= base[k]
            page = (position + start) // PAGE_ELEMENTS - position // PAGE_ELEMENTS
            where = kept[0, start : start + size], position + start, size
            take_delta(delta, kinds[0], limits[0], word_limits[0], left[0], table, keys[0, page], *where, bits, taken)
            if is_folded:
                strip = find_strip(row, column, 2)
                whole, rest = strips[strip, column % STRIP :], strips[strip + NUM_ROW_STRIPS, column % STRIP :]
                for k in range(size):
                    whole[k] += abs(delta[k])
                    rest[k] += abs(taken[k])
            else:
                for k in range(size):
                    sums[number, 0] += np.float64(abs(delta[k]))
                    sums[number, 1] += np.float64(abs(taken[k]))
            offset += size
        for figure in range(2):
            sums[number, figure] += add_columns(strips, figure, 2, columns)


@loop
def combine_deltas(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    models: Array1[np.int64], factors: Array2[np.float32], weights: Array2[np.float32], agree: int, normalize: int,
    scales: Array1[np.float32], smallest_weights: Array1[np.float32], position: int, count: int,
    kinds: Array1[np.int64], limits: Array2[np.uint32], word_limits: Array1[np.uint32], left: Array2[np.int64],
    table: Array1[np.uint32], keys: Array3[np.uint32], kept: Array2[np.uint8], out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_places: Array1[np.int64], out_form: int, squares: Array2[np.float32],
    finished: Array1[np.float64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write base + scale * consensus(factors_i * trimmed delta_i) for each output, of deltas that are decoded once.

    `agree` is the index of the consensus: none, sum or overlap; see `SparseDeltas`. Rules of trimming are those of the
    first output's models, then those of the next one's. `finish` tells of each output in `finished`. The scratch has
    four strips, and two for each model.
    """
    num_models = len(models)
    strips = scratch.view(np.float32)
    base, total, signs, divisor = strips[0], strips[1], strips[2], strips[3]
    deltas, taken, taken_bits = strips[4:], strips[4 + num_models :], scratch[4 + num_models :]
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        page = (position + start) // PAGE_ELEMENTS - position // PAGE_ELEMENTS
        load(words, longs, places[0] + start, forms[0], size, scratch[0], base)
        for m in range(num_models):
            delta = deltas[m]
            load(words, longs, places[models[m]] + start, forms[models[m]], size, scratch[4 + m], delta)
            for k in range(size):
                delta[k] -= base[k]
        for output in range(len(scales)):
            for m in range(num_models):
                row, factor = output * num_models + m, factors[output, m]
                is_whole = kinds[row] == ALL and agree == 0
                if not is_whole:
                    rule = kinds[row], limits[row], word_limits[row], left[row], table, keys[row, page]
                    where = kept[row, start : start + size], position + start, size
                    take_delta(deltas[m], *rule, *where, taken_bits[m], taken[m])
                if agree:
                    _scale_and_add(taken[m], factor, m, size, total)
                else:
                    _add_scaled(deltas[m] if is_whole else taken[m], factor, m, size, total)
            smallest, scale = smallest_weights[output], scales[output]
            _find_consensus(taken, weights[output], agree, normalize, smallest, size, signs, divisor, total)
            for k in range(size):
                total[k] = total[k] * scale + base[k]
            where = position + start, size, squares[output], out_words, out_longs, out_places[output] + start
            finished[output] += finish(scratch[1], total, *where, out_form)
        start += size


def _scale_and_add(values, factor, position, count, total):
    """Multiply values with a factor, and add them to a strip; those at position 0 to nothing."""
    if position:
        for k in range(count):
            values[k] *= factor
            total[k] += values[k]
    else:
        for k in range(count):
            values[k] *= factor
            total[k] = values[k]


def _add_scaled(values, factor, position, count, total):
    """Add the products of values and a factor to a strip; those at position 0 to nothing."""
    if position:
        for k in range(count):
            total[k] += values[k] * factor
    else:
        for k in range(count):
            total[k] = values[k] * factor


def _find_consensus(deltas, weights, agree, normalize, smallest_weight, count, signs, divisor, total):
    """Turn the sum of deltas into what is added to the base."""
    if agree == 2:
        for m in range(len(weights)):
            _add_weight(deltas[m], weights[m], m, count, divisor)
        for k in range(count):
            total[k] /= divisor[k] + (np.float32(1) if divisor[k] == 0 else np.float32(0))
    elif agree:
        for m in range(len(weights)):
            _add_agreeing(deltas[m], weights[m], m, count, signs, divisor, total)
        if not normalize:
            for k in range(count):
                total[k] *= signs[k]
        elif smallest_weight > 0:
            for k in range(count):
                total[k] = total[k] / (divisor[k] if divisor[k] > smallest_weight else smallest_weight) * signs[k]
        else:
            for k in range(count):
                total[k] = total[k] / (divisor[k] + (np.float32(1) if divisor[k] == 0 else np.float32(0))) * signs[k]


def _add_weight(delta, weight, position, count, divisor):
    """Add the weight of a model where its delta is not zero."""
    if position:
        for k in range(count):
            divisor[k] += weight if delta[k] != 0 else np.float32(0)
    else:
        for k in range(count):
            divisor[k] = weight if delta[k] != 0 else np.float32(0)


def _add_agreeing(delta, weight, position, count, signs, divisor, total):
    """Add what has the sign of the sum of all deltas, which the first one finds in `total`, and the model's weight."""
    if position:
        for k in range(count):
            agreeing = delta[k] * signs[k]
            total[k] += np.float32(0) if agreeing <= 0 else agreeing
            divisor[k] += weight if agreeing > 0 else np.float32(0)
    else:
        for k in range(count):
            sign = np.float32(1) if total[k] >= 0 else np.float32(-1)
            agreeing = delta[k] * sign
            signs[k] = sign
            total[k] = np.float32(0) if agreeing <= 0 else agreeing
            divisor[k] = weight if agreeing > 0 else np.float32(0)
