"""Factors of merged updates: as near to the update as its singular value decomposition says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from raymerge.ops.decoders.decoder import Raw
from raymerge.ops.decoders.low_rank import Factor, Term
from raymerge.ops.decoders.update_factors import JoinedTerms


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(what: JoinedTerms, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the left and the right factor, decoded in two pieces."""
    raw = Raw([factor.contiguous().view(-1).view(torch.uint8) for factor in factors], 0, what.num_values)
    decoder, out = what.start(), torch.empty(what.num_values)
    for start, stop in ((0, 7), (7, what.num_values)):
        decoder.decode(raw, start, stop, out[start:stop])
    middle = what.rank * what.columns
    return out[middle:].view(what.rows, what.rank), out[:middle].view(what.rank, what.columns)


def join(rows: int, columns: int, rank: int, scales: Sequence[float], ranks: Sequence[int]) -> JoinedTerms:
    terms = [
        Term(of, scale, Factor("float32", (0, of, 1), is_whole=False), Factor("float32", (0, columns, 1)))
        for scale, of in zip(scales, ranks, strict=True)
    ]
    return JoinedTerms(rows, columns, rank, tuple(terms))


@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (30, 40), (9, 70), (1500, 20), (1, 12)])
@pytest.mark.parametrize("rank", [1, 6, 12])
def test_the_nearest_product_of_a_rank(rows: int, columns: int, rank: int) -> None:
    scales, ranks = (2.0, -0.5, 1e-3), (3, 5, 4)
    factors, update = [], torch.zeros(rows, columns, dtype=torch.float64)
    for k, (scale, of) in enumerate(zip(scales, ranks, strict=True)):
        left, right = draw(rows, of, seed=2 * k), draw(of, columns, seed=2 * k + 1)
        factors += [left, right]
        update += scale * left.double() @ right.double()
    left, right = decode(join(rows, columns, rank, scales, ranks), factors)
    u, values, v = torch.linalg.svd(update, full_matrices=False)
    expected = (u[:, :rank] * values[:rank]) @ v[:rank]
    torch.testing.assert_close(left.double() @ right.double(), expected, rtol=0, atol=2e-6 * float(values[0]))


def test_ranks_that_there_are_not_are_zero() -> None:
    left, right = draw(20, 2, seed=0), draw(2, 30, seed=1)
    found = decode(join(20, 30, 3, (1.0, 1.0), (2, 2)), [left, right, left, right])
    assert not found[0][:, 2:].any()
    assert not found[1][2:].any()
    torch.testing.assert_close(found[0] @ found[1], 2 * left @ right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_values_that_are_not_finite_are_seen(value: float, where: int) -> None:
    factors = [draw(20, 2, seed=0), draw(2, 30, seed=1)]
    factors[where][1, 1] = value
    left, right = decode(join(20, 30, 1, (1.0,), (2,)), factors)
    assert left.isnan().all()
    assert right.isnan().all()
