"""Iso-CTS: directions that all differences share, and those that each has besides, with equal singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import MatrixDeltas, decompose, find_mean, find_root, invert
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, Share, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.matrix import Grams


@merge_op(title="Iso-CTS", base=Base.REQUIRED, reference="https://arxiv.org/abs/2502.04959")
def iso_cts(common_space_fraction: Share = 0.8, lambda_: float = 1.0) -> Kernel:
    """The base plus directions of the sum of all differences and some of each model's own, all equally strong.

    Of a matrix's singular directions the strongest `common_space_fraction` are those of the sum; the others are shared
    out among the models, whose own are what is left of their differences without the common ones. What is no matrix
    gets the mean of the differences.

    Formula: y = b + lambda * mean(S) * P(U) P(V)^T with U = [U_c U_1 ... U_T], where U_c S_c V_c^T are the strongest
    directions of sum(d_i), U_i S_i V_i^T those of (I - U_c U_c^T) d_i, and P the polar factor, for each matrix.

    When: fine-tunes for many tasks are merged: what is special to each survives better than in `iso_c`.

    Not when: differences have a low rank or are mostly noise, which gets as much weight as what was learnt.

    Raises:
        OpParameterError: `common_space_fraction` is not from 0 to 1.

    Source: Marczak et al. 2025, "No Task Left Behind", section 4.2 and algorithm 2 (Iso-CTS).
    """
    if not 0 <= common_space_fraction <= 1:
        raise OpParameterError(f"common_space_fraction = {common_space_fraction:g} must be from 0 to 1")
    return MatrixDeltas(_flatten, (common_space_fraction,), "pairs", (10, 4, 0), lambda_)


def _flatten(grams: Grams, share: float) -> list[torch.Tensor]:
    models, size = range(grams.num_models), grams.size
    kept = min(round((size - int(size * share)) / grams.num_models), size // grams.num_models)
    num_common = size - kept * grams.num_models
    with_sum = [sum((grams(j, i) for j in models[1:]), grams(0, i)) for i in models]
    values, vectors = decompose(sum(with_sum[1:], with_sum[0]))
    values, vectors = values[:num_common], vectors[:, :num_common]
    found, own, shared = [], [], []  # left vectors are X_i @ own[i] + sum(X) @ shared[i]
    for i in models:
        gram, total = grams(i, i), grams(i, i).trace().sqrt()
        if grams.is_wide:  # X_i is transposed: common directions are on the right
            rest = gram - vectors @ (vectors.T @ gram)
            rest -= rest @ vectors @ vectors.T
            projected = torch.zeros_like(rest)
        else:
            projected = vectors * invert(values).square() @ (vectors.T @ with_sum[i])
            rest = gram - with_sum[i].T @ projected
        s, v = decompose(rest, total)
        found.append((s[:kept], v[:, :kept]))
        own.append(v[:, :kept] * invert(s[:kept]))
        shared.append(projected.neg_() @ own[i])
    del with_sum, projected, rest, gram  # as large as the matrices that follow
    shared.append(vectors * invert(values))
    left = [torch.cat([own[i] + shared[i] if i == j else shared[i] for i in models] + shared[-1:], 1) for j in models]
    products = torch.zeros_like(left[0])
    for j in models:
        for k in models:
            products += left[j].T @ (grams(j, k) @ left[k])
    right = torch.cat([v for _, v in found] + [vectors], 1)
    mean = find_mean(torch.cat([s for s, _ in found] + [values]))
    merged = mean * find_root(products) @ find_root(right.T @ right) @ right.T
    return [left[j] @ merged for j in models]
