"""Linear: the weighted average of the inputs."""

from __future__ import annotations

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.registry import Base, PerModel, merge_op

SMALLEST_SHARE = 1e-9
"""Weights that cancel to less than this share of their absolute sum would leave rounding errors to divide by."""


@merge_op(title="Linear", base=Base.INPUT, reference="https://arxiv.org/abs/2203.05482")
def linear(weight: PerModel[float], normalize: bool = True) -> Kernel:
    """Weighted average of the models (a model soup).

    Raises:
        OpParameterError: the weights cancel, and are to be normalized.

    Source: Wortsman et al. 2022, "Model soups": y = sum(w_i * x_i) / sum(w_i).
    """
    total = sum(weight)
    if normalize and abs(total) <= SMALLEST_SHARE * sum(map(abs, weight)):
        raise OpParameterError(
            f"the weights {', '.join(map(str, weight))} sum to {total:g}, so they cannot be normalized; "
            "change a weight or set normalize: false"
        )
    return LinearCombination(weight, divisor=total if normalize else 1.0)
