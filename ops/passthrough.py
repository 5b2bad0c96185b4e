"""One model's tensor as it is."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.registry import Base, PerModel, merge_op


@merge_op(title="Passthrough", base=Base.INPUT, min_models=1, max_models=1)
def passthrough(scale: PerModel[float] = (1.0,)) -> Kernel:
    """The tensor itself, times `scale`."""
    return LinearCombination(scale)
