"""TSV-Merge: the strongest directions of each difference, made orthogonal to those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import MatrixDeltas, decompose, find_root, invert
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.matrix import Grams


@merge_op(title="TSV-Merge", base=Base.REQUIRED, reference="https://arxiv.org/abs/2412.00081")
def tsv(lambda_: float = 1.0) -> Kernel:
    """The base plus the strongest singular directions of all differences to it, made orthogonal to each other.

    Of T models each keeps the largest T-th of a matrix's singular values. What is no matrix gets the mean of the
    differences.

    Formula: y = b + lambda * P(U) S P(V)^T with U = [U_1 ... U_T], S and V of the singular values that are kept, and
    the polar factors P(X) = X (X^T X)^(-1/2), for each matrix.

    When: fine-tunes for different tasks disturb each other in task arithmetic.

    Not when: models learnt the same: what they share is split among them, and weak directions of each are lost.

    Source: Gargiulo et al. 2025, "Task Singular Vectors", section 3.3 and algorithm 1 (TSV-Merge).
    """
    return MatrixDeltas(_orthogonalise, (), "pairs", (7, 2, 0), lambda_)


def _orthogonalise(grams: Grams) -> list[torch.Tensor]:
    models = range(grams.num_models)
    kept = max(1, grams.size // grams.num_models)
    found = [decompose(grams(i, i)) for i in models]
    values = torch.cat([s[:kept] for s, _ in found])
    right = torch.cat([v[:, :kept] for _, v in found], 1)
    left = [v[:, :kept] * invert(s[:kept]) for s, v in found]
    products = torch.cat([torch.cat([left[i].T @ grams(i, j) @ left[j] for j in models], 1) for i in models])
    merged = find_root(products) * values @ find_root(right.T @ right) @ right.T
    return [left[i] @ merged[i * kept : (i + 1) * kept] for i in models]
