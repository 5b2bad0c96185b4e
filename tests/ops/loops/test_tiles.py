"""Tiles of products: compiled, the same bits as in Python."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from raymerge.ops.decoders.low_rank import TILE_COLUMNS
from raymerge.ops.loops.tiles import TILE_ROWS, multiply_tile, write_tile

RANKS = 20


@pytest.fixture(scope="module")
def compiled() -> Any:
    tile = write_tile(numba)

    @numba.njit
    def multiply(left, at, ranks, right, begin, count, before, origin, out, place, step):  # type: ignore[no-untyped-def]
        tile(left, at, ranks, right, begin, count, before, origin, out, place, step)

    return multiply


@pytest.mark.parametrize("origin", [-1, 0, 5])
@pytest.mark.parametrize("count", [0, 4, 16])
def test_the_same_bits_as_in_python(compiled: Any, count: int, origin: int) -> None:
    """At all places and distances, some of them odd; values beside the tile stay as they are."""
    generator = np.random.default_rng(count)
    left, right, before, out = (
        generator.standard_normal(number).astype(np.float32)
        for number in (TILE_ROWS * RANKS, RANKS * TILE_COLUMNS, 5 + TILE_ROWS * TILE_COLUMNS, TILE_ROWS * 37)
    )
    expected = out.copy()
    place, begin = 3, 2 * TILE_COLUMNS
    multiply_tile(left, 2, RANKS - 2, right, begin, count, before, origin, expected, place, 37)
    compiled(left, 2, RANKS - 2, right, begin, count, before, origin, out, place, 37)
    assert out.tobytes() == expected.tobytes()
