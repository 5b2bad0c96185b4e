"""Gathered rows, against a row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.ops.decoders.decoder import Plain, Raw
from raymerge.ops.decoders.rows import MEAN, PAD, ZERO, GatherRows, lay_out, make_row_map

COLUMNS = 5
SIZES = (7, 4)


@st.composite
def maps(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]], int]:
    """Draw rows, the means among them, and how many rows of padding follow."""
    own = st.integers(0, 1).flatmap(lambda part: st.tuples(st.just(part), st.integers(0, SIZES[part] - 1)))
    rows = draw(st.lists(st.one_of(own, st.just((ZERO, 0)), st.just((MEAN, 0))), min_size=1, max_size=12))
    means: list[list[tuple[int, int]]] = []
    for k, (part, _) in enumerate(rows):
        if part == MEAN:
            rows[k] = MEAN, len(means)
            means.append(draw(st.lists(own, min_size=2, max_size=3)))
    return rows, means, draw(st.integers(0, 2))


@settings(max_examples=80, deadline=None)
@given(maps(), st.data())
def test_rows_are_those_that_are_asked_for(
    drawn: tuple[list[tuple[int, int]], list[list[tuple[int, int]]], int], data: st.DataObject
) -> None:
    rows, means, num_pad = drawn
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, COLUMNS, generator=generator) for size in SIZES]
    parts[1] = parts[1].bfloat16()
    expected = [
        parts[part][row].float() if part >= 0
        else torch.stack([parts[p][r].float() for p, r in means[row]]).mean(0) if part == MEAN
        else torch.zeros(COLUMNS)
        for part, row in rows
    ]  # fmt: skip
    padding = torch.arange(COLUMNS, dtype=torch.float32)
    table = torch.stack([*expected, *[padding] * num_pad]).reshape(-1)
    places = [*rows, *[(PAD, 0)] * num_pad]
    rows_map = make_row_map(np.array([p for p, _ in places]), np.array([r for _, r in places]), means)
    assert rows_map.num_pad == num_pad
    decoder = GatherRows((Plain("float32"), Plain("bfloat16")), (1, 1), rows_map, COLUMNS, padding.numpy().tobytes())
    low = data.draw(st.integers(0, len(table) - 1))
    high = data.draw(st.integers(low + 1, len(table)))
    start = data.draw(st.integers(low, high - 1))
    stop = data.draw(st.integers(start + 1, high))
    pieces = []
    for part, row, count in lay_out(rows_map, low // COLUMNS, -(-high // COLUMNS)).spans:
        pieces.append(parts[part][row : row + count].contiguous().view(torch.uint8).reshape(-1))
    out = decoder.decode(Raw(pieces, low, high), start, stop, torch.empty(stop - start))
    torch.testing.assert_close(out, table[start:stop], rtol=1e-6, atol=1e-6)


def test_neighbouring_rows_are_one_run() -> None:
    parts, rows = np.array([0] * 1000 + [1] * 500 + [ZERO] * 20), np.array([*range(1000), *range(7, 507), *[0] * 20])
    rows_map = make_row_map(parts, rows, [])
    assert len(rows_map.table) == 3
    assert lay_out(rows_map, 999, 1001).spans == [(0, 999, 1), (1, 7, 1)]


@pytest.mark.parametrize("stop", [1, 2])
def test_equal_maps_are_equal(stop: int) -> None:
    one, other = (make_row_map(np.zeros(2, int), np.arange(2), []) for _ in range(2))
    third = make_row_map(np.zeros(stop, int), np.arange(stop), [])
    assert one == other
    assert hash(one) == hash(other)
    assert (one.digest == third.digest) is (stop == 2)
