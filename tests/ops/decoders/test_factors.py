"""Factors of a matrix: as near to it as its singular value decomposition says that factors of that rank can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from raymerge.ops.decoders.factors import factorise


def in_blocks(x: torch.Tensor) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: iter(torch.split(x, 7))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 200), (5, 200), (200, 1)])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_the_error_is_hardly_larger_than_the_least_that_is_possible(shape: tuple[int, int], rank: int) -> None:
    x = draw(*shape) @ torch.diag(0.9 ** torch.arange(shape[1]))
    factors = factorise(in_blocks(x), *shape, rank)
    assert factors is not None
    assert factors.rank == min(rank, *shape)
    squares = torch.linalg.svdvals(x.double()).square()
    least = float((squares[factors.rank :].sum() / squares.sum()).sqrt())
    error = float((x.double() - factors.left.double() @ factors.right.double()).norm() / x.double().norm())
    assert error <= 1.01 * least + 1e-6
    assert factors.error == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_no_more_ranks_than_there_are() -> None:
    x = draw(50, 3) @ draw(3, 80, seed=1)
    factors = factorise(in_blocks(x), 50, 80, 16)
    assert factors is not None
    torch.testing.assert_close(factors.left @ factors.right, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.89, 2), (0.95, 3), (1.0, 10)])
def test_as_many_ranks_as_a_share_of_the_squares_takes(energy: float, rank: int) -> None:
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0, *[0.2] * 7]))
    factors = factorise(in_blocks(x), 10, 10, 10, energy)
    assert factors is not None
    assert factors.rank == rank


def test_nothing_has_no_factors() -> None:
    assert factorise(in_blocks(torch.zeros(8, 8)), 8, 8, 2) is None
