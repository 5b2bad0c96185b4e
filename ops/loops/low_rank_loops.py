"""Compiled loops for low-rank updates: the same bits as `ops.decoders.low_rank` gives by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raymerge.ops.decoders.low_rank import BAND_ROWS, CHUNK, TILE_COLUMNS, WIDE
from raymerge.ops.loops.compiler import loop
from raymerge.ops.loops.strips import load
from raymerge.ops.loops.tiles import TILE_ROWS, multiply_tile

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1, Array2


@loop
def convert(words: Array1[np.uint16], longs: Array1[np.uint32], form: int, count: int, out: Array1[np.float32]) -> None:
    """Write stored values as float32; `form` is the index of their dtype in `stored.LOOP_DTYPES`."""
    load(words, longs, 0, form, count, out.view(np.uint32), out)


@loop
def add_update(
    words: Array1[np.uint16], longs: Array1[np.uint32], wides: Array1[np.float64], terms: Array2[np.int64],
    scales: Array1[np.float64], row: int, rows: int, columns: int, place: int, base_words: Array1[np.uint16],
    base_longs: Array1[np.uint32], base_form: int, out: Array1[np.float32], values: Array1[np.float32], ranks: int,
    left: Array1[np.float32], panel: Array1[np.float32], totals: Array1[np.float32], products: Array1[np.float32],
) -> None:  # fmt: skip
    """Add the products of all terms to some rows of a matrix, as far as `out` goes.

    Args:
        words: memory that all factors are in, as words of 16 bits.
        longs: the same, as words of 32 bits.
        wides: the same, as numbers of 64 bits.
        terms: for each term its rank; of the left factor the place of its first element, the distances of neighbouring
            rows and ranks, and the form; of the right factor the place, the distances of neighbouring ranks and
            columns, and the form. Forms are indices in `stored.LOOP_DTYPES`, or `WIDE`; all places and distances count
            elements.
        scales: of each term, by which left factors are multiplied before they are rounded.
        row: the first one, of the left factors.
        rows: how many.
        columns: of the whole matrix: the distance of neighbouring rows in `out`.
        place: of the first row's first element in `out`; negative where `out` begins later.
        base_words: stored values for `out`, where they have 16 bits.
        base_longs: the same where they have 32.
        base_form: of the stored values, as in `convert`; 3 where `out` has the values already.
        out: gets the values plus the sum of all terms.
        values: scratch for as many values as there are rows, columns of a panel, or ranks of a term.
        ranks: of all terms together, filled up to a multiple of four.
        left: scratch, rows x ranks; there are a multiple of `TILE_ROWS`.
        panel: scratch for right factors, ranks in chunks x the columns of a panel.
        totals: scratch for the sums of chunks, `BAND_ROWS` x columns of a panel.
        products: scratch for sums in the order of rows, as large.
    """
    _scale(words, longs, wides, terms, scales, row, rows, values, ranks, left)
    filled, width = len(left) // ranks, len(totals) // BAND_ROWS
    for column in range(0, columns, width):
        stop = min(columns, column + width)
        _pack(words, longs, wides, terms, column, stop, width, values, ranks, panel)
        for first in range(0, filled, BAND_ROWS):
            last = min(filled, first + BAND_ROWS)
            _multiply(left, ranks, panel, width, first, last, stop - column, totals, products)
            for number in range(first, min(last, rows)):
                begin = place + number * columns + column
                skipped, end = max(0, -begin), min(stop - column, len(out) - begin)
                if skipped < end:
                    part, at = out[begin + skipped : begin + end], (number - first) * width
                    if base_form < 3:
                        bits = part.view(np.uint32)
                        load(base_words, base_longs, begin + skipped, base_form, end - skipped, bits, part)
                    _add(products[at + skipped : at + end], part)


def _scale(words, longs, wides, terms, scales, first, rows, values, ranks, left):
    """Write all left factors, scaled, beside each other."""
    position = 0
    for number in range(len(terms)):
        rank, form, by = terms[number, 0], terms[number, 4], scales[number]
        of_row, of_rank = terms[number, 2], terms[number, 3]
        begin = terms[number, 1] + first * of_row
        if form == WIDE:
            for row in range(rows):
                for k in range(rank):
                    left[row * ranks + position + k] = np.float32(wides[begin + row * of_row + k * of_rank] * by)
        elif of_row == 1 and of_rank != 1:
            for k in range(rank):
                load(words, longs, begin + k * of_rank, form, rows, values.view(np.uint32), values)
                for row in range(rows):
                    left[row * ranks + position + k] = np.float32(np.float64(values[row]) * by)
        else:
            for row in range(rows):
                _load_apart(words, longs, begin + row * of_row, of_rank, form, rank, values)
                to = left[row * ranks + position : row * ranks + position + rank]
                for k in range(rank):
                    to[k] = np.float32(np.float64(values[k]) * by)
        position += rank
    for row in range(rows):
        left[row * ranks + position : (row + 1) * ranks] = 0
    left[rows * ranks :] = 0


def _pack(words, longs, wides, terms, column, stop, width, values, ranks, panel):
    """Write some columns of all right factors: chunks of strips, each of `CHUNK` x `TILE_COLUMNS`."""
    position = 0
    filled = (stop - column + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    for number in range(len(terms)):
        rank, form = terms[number, 0], terms[number, 8]
        begin, of_rank, of_column = terms[number, 5], terms[number, 6], terms[number, 7]
        if of_rank == 1 and of_column != 1 and form != WIDE:
            for c in range(column, stop):
                load(words, longs, begin + c * of_column, form, rank, values.view(np.uint32), values)
                for k in range(rank):
                    panel[_find_row(position + k, width) + _find_column(c - column)] = values[k]
        else:
            for k in range(rank):
                at = begin + k * of_rank + column * of_column
                if form == WIDE:
                    for c in range(stop - column):
                        values[c] = np.float32(wides[at + c * of_column])
                else:
                    _load_apart(words, longs, at, of_column, form, stop - column, values)
                values[stop - column : filled] = 0
                _write_row(values, filled, _find_row(position + k, width), panel)
        position += rank
    values[:filled] = 0
    for k in range(position, ranks):
        _write_row(values, filled, _find_row(k, width), panel)


def _find_row(rank, width):
    return rank // CHUNK * CHUNK * width + rank % CHUNK * TILE_COLUMNS


def _find_column(column):
    return column // TILE_COLUMNS * TILE_COLUMNS * CHUNK + column % TILE_COLUMNS


def _write_row(values, count, begin, panel):
    for column in range(0, count, TILE_COLUMNS):
        to, own = panel[begin + column * CHUNK :][:TILE_COLUMNS], values[column:][:TILE_COLUMNS]
        for k in range(TILE_COLUMNS):
            to[k] = own[k]


def _load_apart(words, longs, place, step, form, count, values):
    """Decode stored values that lie so many elements apart."""
    if step == 1:
        load(words, longs, place, form, count, values.view(np.uint32), values)
    else:
        for k in range(count):
            one = values[k : k + 1]
            load(words, longs, place + k * step, form, 1, one.view(np.uint32), one)


def _multiply(left, ranks, panel, width, first, last, columns, totals, products):
    """Write the products of a band of rows and a panel, chunk after chunk: what each takes stays in a core's cache."""
    for start in range(0, ranks, CHUNK):
        count = min(CHUNK, ranks - start)
        is_last = start + count == ranks
        for column in range(0, columns, TILE_COLUMNS):
            begin = start * width + column * CHUNK
            for row in range(first, last, TILE_ROWS):
                at, tile = row * ranks + start, column * BAND_ROWS + (row - first) * TILE_COLUMNS
                origin = tile if start > 0 else -1
                if is_last:
                    to = (row - first) * width + column
                    multiply_tile(left, at, ranks, panel, begin, count, totals, origin, products, to, width)
                else:
                    multiply_tile(left, at, ranks, panel, begin, count, totals, origin, totals, tile, TILE_COLUMNS)


def _add(values, out):
    for j in range(len(out)):
        out[j] += values[j]
