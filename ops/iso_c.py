"""Iso-C: the sum of all differences, with equal singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import MatrixDeltas, decompose, find_mean, invert
from raymerge.ops.registry import Base, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.matrix import Grams
    from raymerge.ops.lazy import torch


@merge_op(title="Iso-C", base=Base.REQUIRED, reference="https://arxiv.org/abs/2502.04959")
def iso_c(lambda_: float = 1.0) -> Kernel:
    """The base plus the sum of all differences to it, each matrix with its singular values set to their mean.

    What is no matrix gets the mean of the differences. A sum of lower rank keeps its rank: the mean is that of the
    singular values that are not zero.

    Formula: y = b + lambda * mean(S) * U V^T with U S V^T = sum(d_i), for each matrix.

    When: fine-tunes for many tasks share directions that would drown the others, and nothing is known of weights.

    Not when: differences have a low rank or are mostly noise, which gets as much weight as what was learnt.

    Source: Marczak et al. 2025, "No Task Left Behind", section 4.1 (Iso-C).
    """
    return MatrixDeltas(_flatten, (), "sum", (4, 0, 0), lambda_)


def _flatten(grams: Grams) -> list[torch.Tensor]:
    values, vectors = decompose(grams(0, 0))
    return [vectors * (find_mean(values) * invert(values)) @ vectors.T]
