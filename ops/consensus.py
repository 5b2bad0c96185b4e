"""Consensus Task Arithmetic: the sum of all differences, where it matters to several models."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, Count, NonNegative, PerModel, merge_op


@merge_op(title="Consensus Task Arithmetic", base=Base.REQUIRED, reference="https://arxiv.org/abs/2405.07813")
def consensus(mask_lambda: PerModel[NonNegative] = (0.4,), k: Count = 2, lambda_: float = 1.0) -> Kernel:
    """The base plus `lambda` times the sum of all differences, for elements that at least `k` models need.

    A model needs an element where its difference is at least `mask_lambda` times as large as the sum of the others, so
    that k = 1 leaves out what no model needs, and k = 2 also what a single one does; k = 0 is task arithmetic.

    Formula: y = b + lambda * sum(d_i) where at least k models have |d_i| >= mask_lambda * |sum(d_j) - d_i|, else y
    = b.

    When: many tasks are merged, and what serves only one of them, or none, harms the rest.

    Not when: there are two models: nearly nothing has a consensus.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", sections 4 and
    5: tau = sum(tau_t), TALL masks m_t = [|tau_t| >= lambda_t |tau - tau_t|], kept where sum(m_t) >= k.
    """
    return Elementwise(add_agreed, (mask_lambda, k, lambda_), num_spares=2, loop="add_agreed")


def add_agreed(
    tensors: list[torch.Tensor],
    out: torch.Tensor,
    scratch: Sequence[torch.Tensor],
    mask_lambdas: tuple[float, ...],
    least: int,
    scale: float,
) -> None:
    """Write y = b + scale * m * sum(d_i) to `out`, where m is 1 if enough models need the sum."""
    base, *deltas = tensors
    votes, rest = scratch[0].zero_(), scratch[1]
    out.zero_()
    for delta in deltas:
        out.add_(delta.sub_(base))
    for delta, mask_lambda in zip(deltas, mask_lambdas, strict=True):
        torch.sub(out, delta, out=rest).abs_().mul_(mask_lambda)
        votes.add_(torch.ge(delta.abs_(), rest, out=rest))
    out.mul_(votes.ge_(least)).mul_(scale).add_(base)
