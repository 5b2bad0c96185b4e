"""MetaGPT: task arithmetic with weights that follow from the sizes of the differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import GramCombination
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram


@merge_op(title="MetaGPT", base=Base.REQUIRED, reference="https://arxiv.org/abs/2406.11385")
def metagpt() -> Kernel:
    """The base plus the models' differences to it, each by its share of the sum of their squared norms.

    Formula: y = b + sum(|d_i|^2 * d_i) / sum(|d_i|^2), tensor by tensor.

    When: fine-tunes for different tasks are added without any weights to choose.

    Not when: one fine-tune changed far more than the others: it is nearly all of the result.

    Source: Zhou et al. 2024, "MetaGPT", section 3: lambda_t = |tau_t|^2 / sum(|tau_k|^2), here tensor by tensor.
    """
    return GramCombination(_weigh, (), "first")


def _weigh(gram: Gram) -> Coefficients:
    squares = gram.diagonal()
    return squares / squares.sum() if squares.any() else np.zeros(len(squares))
