"""Compiled loops for low-rank updates: the same bits as `ops.low_rank` gives by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.decoders.low_rank import CHUNK, COLUMNS, TILE_COLUMNS
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import load
from raymerge.ops.loops.tiles import TILE_ROWS, multiply_tile

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1


@loop
def convert(words: Array1[np.uint16], longs: Array1[np.uint32], form: int, count: int, out: Array1[np.float32]) -> None:
    """Write stored values as float32; `form` is the index of their dtype in `stored.LOOP_DTYPES`."""
    load(words, longs, 0, form, count, out.view(np.uint32), out)


@loop
def scale_factor(
    words: Array1[np.uint16], longs: Array1[np.uint32], form: int, scale: Array1[np.float64], rank: int,
    values: Array1[np.float32], position: int, ranks: int, left: Array1[np.float32],
) -> None:  # fmt: skip
    """Write a left factor, scaled, to its place among all of them.

    Args:
        words: stored values, rows x rank, where they have 16 bits.
        longs: the same where they have 32.
        form: of the stored values, as in `convert`.
        scale: one number, by which values are multiplied before they are rounded.
        rank: of this factor.
        values: scratch for as many values.
        position: of the first rank in `left`.
        ranks: that `left` has.
        left: rows x ranks.
    """
    load(words, longs, 0, form, len(values), values.view(np.uint32), values)
    by = scale[0]
    for row in range(len(values) // rank):
        own = values[row * rank : (row + 1) * rank]
        to = left[row * ranks + position : row * ranks + position + rank]
        for k in range(rank):
            to[k] = np.float32(np.float64(own[k]) * by)


@loop
def add_products(
    left: Array1[np.float32], right: Array1[np.float32], start: int, count: int, ranks: int, is_last: int, rows: int,
    width: int, columns: int, place: int, words: Array1[np.uint16], longs: Array1[np.uint32], form: int,
    out: Array1[np.float32], totals: Array1[np.float32], products: Array1[np.float32],
) -> None:  # fmt: skip
    """Add one chunk of left @ right, for some columns of rows; after the last one, write `out`, as far as it goes.

    Args:
        left: rows x ranks; a multiple of four rows, of which some may be there to fill it up.
        right: strips of columns, each of `CHUNK` x `TILE_COLUMNS`, of which the ranks of this chunk count.
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
        totals: the sum of the chunks before, tile after tile, zeros at first; unused where there is one chunk.
        products: scratch for some rows of the product, a multiple of four.
    """
    filled = (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    for first in range(0, filled, len(products) // COLUMNS):
        end = min(filled, first + len(products) // COLUMNS)
        for j in range(0, width, TILE_COLUMNS):  # a strip stays in the first cache for all of these rows
            for row in range(first, end, TILE_ROWS):
                at, begin = row * ranks + start, j * CHUNK
                tile = first * COLUMNS + j * (end - first) + (row - first) * TILE_COLUMNS
                if is_last == 0:
                    multiply_tile(left, at, ranks, right, begin, count, totals, tile, totals, tile, TILE_COLUMNS)
                else:
                    origin, to = tile if start > 0 else -1, (row - first) * COLUMNS + j
                    multiply_tile(left, at, ranks, right, begin, count, totals, origin, products, to, COLUMNS)
        if is_last == 0:
            continue
        for row in range(first, min(end, rows)):
            begin = place + row * columns
            skipped, stop = max(0, -begin), min(width, len(out) - begin)
            if skipped < stop:
                part = out[begin + skipped : begin + stop]
                if form < 3:
                    load(words, longs, begin + skipped, form, stop - skipped, part.view(np.uint32), part)
                _add(products[(row - first) * COLUMNS + skipped : (row - first) * COLUMNS + stop], part)


def _add(values, out):
    for j in range(len(out)):
        out[j] += values[j]
