"""Fits the factors of an adapter to the shape of the tensor that they change."""

from __future__ import annotations

from math import prod

from raymerge.ops.decoders.low_rank import Term
from raymerge.pipeline.checkpoint.adapters.source import Update, make_factor
from raymerge.pipeline.checkpoint.source import StoredTensor


def find_rank(a: StoredTensor, b: StoredTensor) -> int:
    """Return the rank of two factors of a module; 0 where they do not go together."""
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1] or prod(b.shape[2:]) != 1:
        return 0
    return a.shape[0]


def fit_matrix(
    shape: tuple[int, ...], a: StoredTensor, b: StoredTensor, scale: float, *, prefers_turned: bool
) -> Update | None:
    """Return the update of one matrix, or of a convolution as a matrix of its outputs; None where it does not fit.

    Args:
        shape: of the tensor, which is outputs x inputs, or inputs x outputs as in Conv1D and embeddings.
        a: rank x inputs.
        b: outputs x rank.
        scale: of the product.
        prefers_turned: whether to take a square tensor for inputs x outputs.
    """
    rank, rows, columns = a.shape[0], shape[0] if shape else 0, prod(shape[1:])
    is_straight = (b.shape[0], a.shape[1:]) == (rows, shape[1:])
    is_turned = len(a.shape) == len(shape) == 2 and (a.shape[1], b.shape[0]) == (rows, columns)
    if is_turned and (prefers_turned or not is_straight):
        left, right = make_factor(a, (0, 1, rows), is_whole=False), make_factor(b, (0, 1, rank))
        return Update(Term(rank, scale, left, right), a, b, is_turned=True)
    if is_straight:
        left, right = make_factor(b, (0, rank, 1), is_whole=False), make_factor(a, (0, columns, 1))
        return Update(Term(rank, scale, left, right), b, a, is_turned=False)
    return None


def fit_stack(shape: tuple[int, ...], a: StoredTensor, b: StoredTensor, scale: float) -> Update | None:
    """Return the update of each matrix of a stack; None where the factors do not fit, or fit in two ways.

    The ranks of all matrices lie one after the other in `a`, and in turn in `b`, as peft has them.

    Args:
        shape: matrices x outputs x inputs, or matrices x inputs x outputs.
        a: (matrices * rank) x inputs.
        b: outputs x (rank * matrices).
        scale: of the product.
    """
    number, rows, columns = shape
    rank = a.shape[0] // number
    is_straight = (b.shape[0], a.shape[1]) == (rows, columns)
    is_turned = (a.shape[1], b.shape[0]) == (rows, columns)
    if is_straight == is_turned:
        return None
    inputs, ranks = a.shape[1], rank * number
    if is_straight:
        left, right = make_factor(b, (1, ranks, number)), make_factor(a, (rank * inputs, inputs, 1))
        return Update(Term(rank, scale, left, right), b, a, is_turned=False)
    left, right = make_factor(a, (rank * inputs, 1, inputs)), make_factor(b, (1, number, ranks))
    return Update(Term(rank, scale, left, right), a, b, is_turned=True)
