"""CABS: the largest differences of each group of elements, of one model after another, so that none overlap."""

from __future__ import annotations

from typing import Annotated

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.grouped_deltas import GroupedDeltas
from raymerge.ops.registry import Base, Count, PerModel, Range, merge_op


@merge_op(
    title="Conflict-Aware and Balanced Sparsification",
    base=Base.REQUIRED,
    reference="https://arxiv.org/abs/2503.01874",
)
def cabs(
    weight: PerModel[float] = (1.0,),
    n_val: PerModel[Count] = (64,),
    m_val: Annotated[int, Range(1, 2**17)] = 256,
    lambda_: float = 1.0,
) -> Kernel:
    """Keeps the `n_val` largest differences in each group of `m_val` elements, which earlier models have not kept.

    Models take their turns as they are listed. Groups are consecutive elements of a tensor; of the last one, if it is
    smaller, the same share is kept, rounded down. Of equally large differences those of lowest index are kept.

    Formula: y = b + lambda * sum(w_i * m_i * d_i), where m_i is 1 for the n_val largest |d_i| of each group of m_val
    elements that are not 0 and for which no m_j of an earlier model is 1, else 0.

    When: two to four fine-tunes, the most important one first, whose largest differences fall on the same elements.

    Not when: all models are of one rank: the order decides who keeps what they all changed.

    Raises:
        OpParameterError: `m_val` is not from 1 to 131072, or an `n_val` not from 0 to `m_val`.

    Source: Yang et al. 2025, "CABS: Conflict-Aware and Balanced Sparsification for Enhancing Model Merging", algorithm
    1, with 64:256 as for language models; the authors' code drops what is left of a last group.
    """
    if not 1 <= m_val <= 2**17 or not all(0 <= n <= m_val for n in n_val):
        given = ", ".join(map(str, n_val))
        raise OpParameterError(f"n_val = {given} must be from 0 to m_val = {m_val}, which must be from 1 to 131072")
    return GroupedDeltas(weight, n_val, m_val, lambda_)
