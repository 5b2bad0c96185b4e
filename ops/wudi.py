"""WUDI: the matrix that disturbs each difference least in the directions which that difference uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import MatrixDeltas, decompose, invert
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.matrix import Grams


@merge_op(title="WUDI-Merging", base=Base.REQUIRED, reference="https://arxiv.org/abs/2503.08099")
def wudi(lambda_: float = 1.0) -> Kernel:
    """The base plus the matrix that is nearest to all differences in the directions of their rows.

    The paper's objective is |t A - B|^2 with A = [d_i^T / |d_i| ...] and B = [d_i d_i^T / |d_i| ...]. This takes its
    minimiser, and of several the one that gradient descent from the sum of the differences comes to: t = B A^+. The
    paper takes 300 small steps of Adam from there and so stops before it: the result is not the paper's, and may be
    worse where A is ill-conditioned. What is no matrix gets the mean of the differences.

    Formula: y = b + lambda * t with the t that minimises sum(|(t - d_i) d_i^T|^2 / |d_i|^2), for each linear layer.

    When: fine-tunes for different tasks disturb each other, and nothing is known of weights.

    Not when: models learnt nearly the same, or differ from the base by little more than noise.

    Source: Cheng et al. 2025, "Whoever Started the Interference Should End It", section 3.3, the objective alone.
    """
    return MatrixDeltas(_solve, (), "pairs", (3, 2, 0), lambda_, num_wide_squares=(1, 1, 11))


def _solve(grams: Grams) -> list[torch.Tensor]:
    models = range(grams.num_models)
    weights = [invert(grams(i, i).trace()) for i in models]  # 1 / |d_i|^2
    if not grams.is_wide:  # B A^+ = sum(d_i w_i d_i^T d_i) (sum(w_i d_i^T d_i))^+
        weighted = [weight * grams(i, i) for i, weight in enumerate(weights)]
        inverse = _invert(sum(weighted[1:], weighted[0]))
        return [gram @ inverse for gram in weighted]
    roots = [weight.sqrt() for weight in weights]  # and here B (A^T A)^+ A^T, which is as large as all rows
    rows = [torch.cat([roots[i] * roots[j] * grams(i, j) for j in models], 1) for i in models]
    solution = torch.cat([roots[i] * grams(i, i) for i in models], 1) @ _invert(torch.cat(rows))
    return [roots[j] * solution[:, j * grams.size : (j + 1) * grams.size].T for j in models]


def _invert(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = decompose(gram)
    return vectors * invert(values).square() @ vectors.T
