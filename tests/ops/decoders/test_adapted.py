"""Rows of given norms, and vectors that are added: right, and the same bits however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raymerge.ops.decoders.adapted import AddedVector, ScaledRows
from raymerge.ops.decoders.decoder import Plain, Raw

ROWS, COLUMNS = 9, 333


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cut", [(0, 9 * 333), (5, 700), (333, 666), (1000, 1001)])
def test_scaled_rows(cut: tuple[int, int]) -> None:
    x, norms = draw(ROWS, COLUMNS, seed=0).bfloat16(), draw(ROWS, seed=1).abs()
    decoder = ScaledRows(Plain("bfloat16"), COLUMNS, "float32")
    expected = x.double() * (norms.double() / x.double().norm(dim=1))[:, None]
    first, last = cut[0] // COLUMNS, -(-cut[1] // COLUMNS)
    pieces = [as_bytes(x[first:last]), as_bytes(norms[first:last])]  # whole rows are read
    values = decoder.decode(Raw(pieces, *cut), *cut, torch.empty(cut[1] - cut[0]))
    torch.testing.assert_close(values.double(), expected.view(-1)[slice(*cut)], rtol=1e-6, atol=1e-6)
    stored = np.empty(cut[1] - cut[0], np.float32)
    decoder.decode_stored([piece.numpy().data for piece in pieces], cut, *cut, stored)
    assert stored.tobytes() == values.numpy().tobytes()


def test_an_added_vector() -> None:
    x, y = draw(100, seed=0), draw(100, seed=1).half()
    values = AddedVector(Plain("float32"), "float16", 0.3).decode(
        Raw([as_bytes(x), as_bytes(y)], 0, 100), 20, 50, torch.empty(30)
    )
    torch.testing.assert_close(values, (x.double() + 0.3 * y.double()).float()[20:50], rtol=0, atol=0)
