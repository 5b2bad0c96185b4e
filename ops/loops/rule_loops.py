"""Loops of element-wise rules; see `loops` for their parameters.

Each does the operations of the torch function of its method in the same order: products are not contracted, and what is
smaller or larger is told as torch tells it where a value is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import finish, load
from raymerge.ops.stored import STRIP

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2


def _load_all(words, longs, places, forms, start, size, scratch):
    """Decode a strip of each source; return the sources, and after them what scratch is left."""
    values = scratch.view(np.float32)
    for source in range(len(places)):
        load(words, longs, places[source] + start, forms[source], size, scratch[source], values[source])
    return values


def _load_deltas(words, longs, places, forms, start, size, scratch):
    """Do as `_load_all` does, with differences to the first source in place of the others."""
    values = _load_all(words, longs, places, forms, start, size, scratch)
    base = values[0]
    for source in range(1, len(places)):
        delta = values[source]
        for k in range(size):
            delta[k] -= base[k]
    return values


@loop
def approach(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    parameters: Array1[np.float32], position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Do as `nearswap` does; its parameters are t and the smallest distance."""
    t, least = parameters[0], parameters[1]
    zero, one = np.float32(0), np.float32(1)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        values = _load_all(words, longs, places, forms, start, size, scratch)
        base, model = values[0], values[1]
        for k in range(size):
            distance = abs(base[k] - model[k])
            distance = least if distance < least else distance
            weight = one / distance * t
            weight = zero if weight < zero else weight
            weight = one if weight > one else weight
            base[k] = (one - weight) * base[k] + model[k] * weight
        finished += finish(scratch[0], base, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def share_changes(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    parameters: Array1[np.float32], position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Do as `ram` and `ramplus_tl` do; parameters are epsilon, and by what each model's deltas grow that are alone."""
    epsilon = parameters[0]
    zero, one = np.float32(0), np.float32(1)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        values = _load_deltas(words, longs, places, forms, start, size, scratch)
        base, changes, total = values[0], values[len(places)], values[len(places) + 1]
        changes[:size] = 0
        total[:size] = 0
        for source in range(1, len(places)):
            delta = values[source]
            for k in range(size):
                is_changed = one if abs(delta[k]) > epsilon else zero
                changes[k] += is_changed
                delta[k] *= is_changed
        for k in range(size):
            changes[k] = one if changes[k] < one else changes[k]
        for source in range(1, len(places)):
            delta = values[source]
            growth = parameters[source]
            for k in range(size):
                total[k] += delta[k] * (growth if changes[k] == one else one) / changes[k]
        for k in range(size):
            base[k] = total[k] + base[k]
        finished += finish(scratch[0], base, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def count_changes(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    epsilon: np.float32, count: int, counts: Array2[np.int64], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Add to `counts` how many elements each model changed by more than epsilon, and how many of them it alone."""
    one, zero = np.float32(1), np.float32(0)
    for start in range(0, count, STRIP):
        size = min(STRIP, count - start)
        values = _load_deltas(words, longs, places, forms, start, size, scratch)
        changes = values[len(places)]
        changes[:size] = 0
        for source in range(1, len(places)):
            delta = values[source]
            for k in range(size):
                delta[k] = one if abs(delta[k]) > epsilon else zero
                changes[k] += delta[k]
        for source in range(1, len(places)):
            delta = values[source]
            num_changed = num_unique = 0
            for k in range(size):
                num_changed += np.int64(delta[k] == one)
                num_unique += np.int64((delta[k] == one) & (changes[k] == one))
            counts[0, source - 1] += num_changed
            counts[1, source - 1] += num_unique


@loop
def add_largest(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    parameters: Array1[np.float32], position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Do as `magmax` does; its parameter is lambda."""
    scale = parameters[0]
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        values = _load_deltas(words, longs, places, forms, start, size, scratch)
        base, chosen, largest = values[0], values[1], values[len(places)]
        rest, spare = (
            values[len(places) + 1],
            values[len(places) + 2],
        )  # written to what it is read from, a choice is slow
        for k in range(size):
            largest[k] = abs(chosen[k])
        for source in range(2, len(places)):
            delta = values[source]
            for k in range(size):
                length = abs(delta[k])
                rest[k] = delta[k] if length >= largest[k] or length != length else chosen[k]
                spare[k] = length if length > largest[k] or length != length else largest[k]
            chosen, rest = rest, chosen
            largest, spare = spare, largest
        for k in range(size):
            base[k] = chosen[k] * scale + base[k]
        finished += finish(scratch[0], base, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def add_agreed(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    parameters: Array1[np.float32], position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Do as `consensus` does; its parameters are the lambda of each model's mask, the least of votes, and the scale."""
    num_models = len(places) - 1
    least, scale = parameters[num_models], parameters[num_models + 1]
    zero, one = np.float32(0), np.float32(1)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        values = _load_deltas(words, longs, places, forms, start, size, scratch)
        base, votes, total = values[0], values[len(places)], values[len(places) + 1]
        votes[:size] = 0
        total[:size] = 0
        for source in range(1, len(places)):
            delta = values[source]
            for k in range(size):
                total[k] += delta[k]
        for source in range(1, len(places)):
            delta, share = values[source], parameters[source - 1]
            for k in range(size):
                rest = abs(total[k] - delta[k]) * share
                votes[k] += one if abs(delta[k]) >= rest else zero
        for k in range(size):
            agreed = one if votes[k] >= least else zero
            base[k] = total[k] * agreed * scale + base[k]
        finished += finish(scratch[0], base, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished


@loop
def add_elected(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    parameters: Array1[np.float32], position: int, count: int, out_words: Array1[np.uint16],
    out_longs: Array1[np.uint32], out_form: int, squares: Array1[np.float32], scratch: Array2[np.uint32],
) -> float:  # fmt: skip
    """Do as `emr` does; its parameter is lambda."""
    scale = parameters[0]
    zero, one = np.float32(0), np.float32(1)
    finished = 0.0
    start = 0
    while start < count:
        size = min(count - start, STRIP - (position + start) % STRIP)
        values = _load_deltas(words, longs, places, forms, start, size, scratch)
        base, signs, largest = values[0], values[len(places)], values[len(places) + 1]
        signs[:size] = 0
        largest[:size] = 0
        for source in range(1, len(places)):
            delta = values[source]
            for k in range(size):
                signs[k] += delta[k]
        for k in range(size):
            above = one if signs[k] > zero else zero
            below = one if signs[k] < zero else zero
            signs[k] = above - below
        for source in range(1, len(places)):
            delta = values[source]
            for k in range(size):
                along = delta[k] * signs[k]
                largest[k] = along if along > largest[k] or along != along else largest[k]
        for k in range(size):
            base[k] = signs[k] * largest[k] * scale + zero + base[k]
        finished += finish(scratch[0], base, position + start, size, squares, out_words, out_longs, start, out_form)
        start += size
    return finished
