"""One model's tensor as it is."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.registry import Base, PerModel, merge_op


@merge_op(title="Passthrough", base=Base.INPUT, min_models=1, max_models=1)
def passthrough(scale: PerModel[float] = (1.0,)) -> Kernel:
    """The tensor itself, times `scale`.

    Formula: y = scale * x.

    When: layers of one or several models are stacked by `slices`, or tensors are copied or scaled.

    Not when: anything is to be combined; it takes one model for each slice.

    Source: Kim et al. 2024, "SOLAR 10.7B", section 2, stacks the layers of copies of a model.
    """
    return LinearCombination(scale)
