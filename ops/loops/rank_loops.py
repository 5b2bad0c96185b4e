"""The loop that draws elements by their rank; see `loops` for its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.kernels.sparsifiers.random import HASH_FACTOR, HASH_SHIFT, PAGE_ELEMENTS
from raymerge.ops.kernels.sparsifiers.ranks import CHANCE_SHIFT, NUM_SIZES, SIZE_SHIFT
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import load

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2


@loop
def draw_by_rank(
    words: Array1[np.uint16], longs: Array1[np.uint32], places: Array1[np.int64], forms: Array1[np.int64],
    source: int, position: int, row: int, low: int, step: int, table: Array1[np.uint32], keys: Array2[np.uint32],
    tables: Array2[np.uint32], kept: Array1[np.uint8], scratch: Array2[np.uint32],
) -> None:  # fmt: skip
    """Write 1 for each element of a delta that is kept, and 0 for the others; `kept` has whole rows.

    A random word keeps an element of the size s if it is less than low + step * r, in units of 2^-CHANCE_SHIFT, where r
    is twice the mean rank in the row of all elements of the size s. `tables` has three of `NUM_SIZES`, two with zeros.
    """
    base_bits, bits = scratch[0], scratch[1]
    base, delta = base_bits.view(np.float32), bits.view(np.float32)
    even, odd, limits = tables[0], tables[1], tables[2]
    for start in range(0, len(kept), row):
        load(words, longs, places[0] + start, forms[0], row, base_bits, base)
        load(words, longs, places[source] + start, forms[source], row, bits, delta)
        smallest, largest = np.uint32(NUM_SIZES), np.uint32(0)
        for k in range(row):
            delta[k] -= base[k]
        for k in range(row):
            size = (bits[k] & np.uint32(0x7FFFFFFF)) >> np.uint32(SIZE_SHIFT)
            bits[k] = size
            largest = max(largest, size)
            smallest = min(smallest, size if size > 0 else np.uint32(NUM_SIZES))
        for k in range(0, row - 1, 2):  # two in a row are often the same, and the second would wait for the first
            even[bits[k]] += 1
            odd[bits[k + 1]] += 1
        if row % 2:
            even[bits[row - 1]] += 1
        num_below = _set_limits(even, odd, limits, 0, 1, 0, low, step)
        _set_limits(even, odd, limits, np.int64(smallest), np.int64(largest) + 1, num_below, low, step)
        offset = 0
        while offset < row:
            place = (position + start + offset) % PAGE_ELEMENTS
            count = min(row - offset, PAGE_ELEMENTS - place)
            page = (position + start + offset) // PAGE_ELEMENTS - position // PAGE_ELEMENTS
            key, factor = keys[page, 0], keys[page, 1]
            page_words = table[place : place + count]
            sizes, drawn = bits[offset : offset + count], base_bits[offset : offset + count]
            results = kept[start + offset : start + offset + count]
            for k in range(count):
                word = np.uint32((page_words[k] ^ key) * factor)
                drawn[k] = np.uint32((word ^ (word >> np.uint32(HASH_SHIFT))) * np.uint32(HASH_FACTOR))
            for k in range(count):
                results[k] = drawn[k] < limits[sizes[k]]
            offset += count


def _set_limits(even, odd, limits, start, stop, num_below, low, step):
    """Set the limits of some sizes from their counts, which become zero; return the elements up to these sizes."""
    counts, found = even[start:stop], limits[start:stop]
    others = odd[start:stop]
    for k in range(stop - start):
        found[k] = counts[k] + others[k]
    counts[:] = 0
    others[:] = 0
    twice = np.uint32(
        (2 * num_below - 1) & 0xFFFFFFFF
    )  # wraps where there is none below; a size that nothing has gets no limit
    for k in range(stop - start):
        count = found[k]
        found[k] = np.uint32(twice + count)
        twice = np.uint32(twice + count + count)
    for k in range(stop - start):
        found[k] = np.uint32(low + (np.int64(found[k]) * step >> CHANCE_SHIFT))
    return np.int64(np.uint32(twice + np.uint32(1)) >> np.uint32(1))
