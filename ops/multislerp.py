"""The mean direction of several models, at their mean length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import RESOLUTION, GramCombination, find_length
from raymerge.ops.kernels.linear import check_sum
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, NonNegative, PerModel, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram


@merge_op(
    title="Multi-SLERP", base=Base.OPTIONAL, reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
)
def multislerp(weight: PerModel[float], normalize_weights: bool = True, eps: NonNegative = 1e-8) -> Kernel:
    """Mean direction of the models, or with a base of their differences from it, at the mean of their norms.

    Formula: y = m * sum(w_i * |x_i|) with m = sum(w_i * u_i) scaled to length 1 and u_i = x_i / |x_i|; with a base,
    the same of the d_i, plus b.

    When: several models are averaged by direction, and the average is not to be shorter than they are.

    Not when: their directions cancel, or weights are negative.

    Raises:
        OpParameterError: the weights cancel, and are to be normalized; or `eps` is negative.

    Source: Goddard, "Multi-SLERP": y = exp_m(sum(w_i * log_m(u_i))) * sum(w_i * |x_i|) for unit vectors u_i, with
    m = sum(w_i * u_i) scaled to length 1 and the projection on its tangent plane for log_m. That makes the sum of the
    tangents zero, so that y = m * sum(w_i * |x_i|) is left of it, but for `eps`: it is added to norms and to the angle.
    """
    total = check_sum(weight, "normalize_weights") if normalize_weights and len(weight) > 1 else 1.0
    if eps < 0:
        raise OpParameterError(f"eps = {eps:g} must not be negative")
    return GramCombination(_weigh, (tuple(w / total for w in weight), eps), "optional")


def _weigh(gram: Gram, weights: tuple[float, ...], eps: float) -> Coefficients:
    if len(weights) == 1:
        return np.ones(1)
    norms = np.sqrt(gram.diagonal())
    if not norms.any():
        return np.zeros(len(weights))
    mean = np.divide(weights, norms + eps, out=np.zeros(len(weights)), where=norms > 0)
    length = find_length(gram, mean)
    if length < max(eps, RESOLUTION * np.abs(mean * norms).sum()):
        if len(weights) == 2:
            return np.array(weights)
        raise OpParameterError(
            f"the directions of the models, weighted by {', '.join(f'{w:g}' for w in weights)}, cancel, and have no"
            " mean; change a weight, or take another method"
        )
    scale: float = (norms * weights).sum() * math.cos(eps) / length
    return mean * scale
