"""Arcee Fusion: what changed most, and where it changes what a row says."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.importance import ImportantElements
from raymerge.ops.registry import Base, merge_op


@merge_op(
    title="Arcee Fusion",
    base=Base.REQUIRED,
    reference="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    min_models=1,
    max_models=1,
)
def arcee_fusion() -> Kernel:
    """The model's elements where they are far more important than most, and the base's elsewhere.

    Formula: y = x where |x - b| * KL(softmax(row of x), softmax(row of b)) is at least the median of the tensor
    plus 1.5 times its interquartile range, else y = b.

    When: a base is to take over only the most telling changes of one model, some tenth of its elements.

    Not when: the two models are to have equal parts in the result (slerp).

    Source: Arcee AI 2025, "Meet MergeKit v0.1": importance is |x - b| times the divergence of the softmaxed row, and
    counts from the median plus 1.5 times the interquartile range on.
    """
    return ImportantElements()
