"""Model Stock: between the base and the average, as far as the angle between the models tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import GramCombination
from raymerge.ops.kernels.gram_vectors import RowCombination
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram

SMALLEST_PRODUCT = 1e-6
"""A product of two norms that is smaller counts as this."""
SMALLEST_DENOMINATOR = 1e-6
"""A smaller one leaves the base as it is."""


@merge_op(title="Model Stock", base=Base.REQUIRED, reference="https://arxiv.org/abs/2403.19522", min_models=2)
def model_stock(filter_wise: bool = False) -> Kernel:
    """Average of the models, drawn to the base the more, the wider the angles between their differences from it are.

    With `filter_wise`, each row of the last dimension has angles of its own.

    Formula: y = t * mean(x_i) + (1 - t) * b with t = N * c / (1 + (N - 1) * c) for the mean cosine c between two
    d_i.

    When: a few fine-tunes of one base by the same data and other seeds are averaged.

    Not when: the fine-tunes learned different tasks: their differences are at right angles, and the result is the
    base.

    Source: Jang et al. 2024, "Model Stock", equations 4 and 5 for N models: t * mean(x_i) + (1 - t) * base with
    t = N * c / (1 + (N - 1) * c), where c is the mean cosine of the angles between two differences.
    """
    return RowCombination(_weigh, (), "first") if filter_wise else GramCombination(_weigh, (), "first")


def _weigh(gram: Gram) -> Coefficients:
    num_models = len(gram)
    norms = [np.sqrt(gram[k, k]) for k in range(num_models)]
    cosines = [
        np.clip(gram[i, j] / np.maximum(norms[i] * norms[j], SMALLEST_PRODUCT), -1, 1)
        for i in range(num_models)
        for j in range(i)
    ]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (num_models - 1) * cosine
    share = np.where(np.abs(denominator) < SMALLEST_DENOMINATOR, 0, cosine / denominator)
    return np.array([share] * num_models)
