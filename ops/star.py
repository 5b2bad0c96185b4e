"""STAR: the mean of all differences, each with its weakest directions moved to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import MatrixDeltas, decompose
from raymerge.ops.registry import Base, Range, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.matrix import Grams
    from raymerge.ops.lazy import torch


@merge_op(title="STAR", base=Base.REQUIRED, reference="https://arxiv.org/abs/2502.10339")
def star(eta: Annotated[float, Range(0, 100)] = 40.0, lambda_: float = 1.0) -> Kernel:
    """The base plus the mean of all differences to it, of which each matrix keeps only its largest singular values.

    As many are kept as make up `eta` percent of their sum, at least one, and then multiplied so that the sum is what it
    was. What is no matrix gets the mean of the differences.

    Formula: y = b + lambda * mean(|S_i| / |S_i'| * U_i S_i' V_i^T) with U_i S_i V_i^T = d_i, where S_i' are the fewest
    of the largest values with |S_i'| >= eta / 100 * |S_i|, and |S| is their sum, for each matrix.

    When: many fine-tunes are merged, above all of low rank (LoRA), and their weak directions disturb each other.

    Not when: what was learnt is spread over many directions; a larger `eta` keeps more of them.

    Raises:
        OpParameterError: `eta` is not from 0 to 100.

    Source: Lee et al. 2025, "STAR: Spectral Truncation and Rescale for Model Merging", section 3.2, with eta = 40.
    """
    if not 0 <= eta <= 100:
        raise OpParameterError(f"eta = {eta:g} must be from 0 to 100, in percent")
    return MatrixDeltas(_truncate, (eta,), "each", (3, 1, 0), lambda_)


def _truncate(grams: Grams, eta: float) -> list[torch.Tensor]:
    factors = []
    for i in range(grams.num_models):
        values, vectors = decompose(grams(i, i))
        before = values.cumsum(0) - values
        kept = values * (before < max(eta / 100, 1e-12) * values.sum())
        growth = values.sum() / kept.sum().clamp(min=1e-300)
        factors.append(vectors * ((kept > 0) * growth / grams.num_models) @ vectors.T)
    return factors
