"""The best approximation of a matrix by a product of two thin ones, from blocks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raymerge.ops.lazy import torch

OVERSAMPLING = 16
"""Directions that are followed besides those that are wanted."""
_NUM_ITERATIONS = 4
"""Times that directions are multiplied with the matrix and back: what lies under the wanted ones fades."""

Blocks = Callable[[], Iterator["torch.Tensor"]]
"""Yields the rows of a matrix in order, some at a time, in float32; called once for each look at them."""


@dataclass(frozen=True, slots=True)
class Factors:
    """left @ right, nearest to a matrix among those of its rank, and how near it is."""

    left: torch.Tensor
    """Rows x rank; each column has the norm of the row of `right`."""
    right: torch.Tensor
    """Rank x columns."""
    error: float
    """Norm of what is missing, as a share of the norm of the matrix."""

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return int(self.left.shape[1])


def factorise(blocks: Blocks, rows: int, columns: int, rank: int, energy: float = 1.0) -> Factors | None:
    """Return the factors of a matrix; None where it is zero.

    Args:
        blocks: of its rows.
        rows: of the matrix.
        columns: of the matrix.
        rank: the most that the factors may have.
        energy: share of the sum of squares that is enough: fewer ranks are taken where they have it.

    Source: Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithms 4.4 and 5.3.
    """
    rank = min(rank, rows, columns)
    width = min(columns, rows, rank + OVERSAMPLING)
    total = sum(float(block.double().square().sum()) for block in blocks())
    if not total:
        return None
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    for _ in range(1 if width == columns else _NUM_ITERATIONS):
        directions = torch.linalg.qr(_multiply_twice(blocks, directions))[0]
    products = torch.cat([block @ directions.float() for block in blocks()]).double()
    values, vectors = torch.linalg.eigh(products.T @ products)
    order = torch.arange(len(values) - 1, -1, -1)[:rank]  # the largest first
    squares = values[order].clamp(min=0)
    shares = squares.cumsum(0) / total
    enough = int((shares < energy * (1 - 1e-12)).sum()) + 1 if energy < 1 else rank
    kept = max(1, min(enough, int((squares > squares[0] * 1e-14).sum())))
    singular = squares[:kept].sqrt()
    vectors = vectors[:, order[:kept]]
    left = (products @ vectors) / singular.sqrt()
    right = singular.sqrt()[:, None] * (directions @ vectors).T
    left, right = left.float(), right.float()
    missing, start = 0.0, 0
    for block in blocks():
        product = left[start : start + len(block)] @ right
        missing += float(product.sub_(block).double().square().sum())
        start += len(block)
    return Factors(left, right, (missing / total) ** 0.5)


def _multiply_twice(blocks: Blocks, directions: torch.Tensor) -> torch.Tensor:
    """Return D.T @ D @ directions for the matrix D."""
    narrow, found = directions.float(), torch.zeros_like(directions)
    for block in blocks():
        found += (block.T @ (block @ narrow)).double()
    return found
