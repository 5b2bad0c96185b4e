"""Spherical interpolation of two models by weights, of whole tensors or of their rows or columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import GramCombination
from raymerge.ops.kernels.gram_vectors import ColumnCombination, RowCombination
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, PerModel, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram

SMALLEST_TOTAL = 1e-6
"""Weights with a smaller sum, in size, count as equal."""
SMALLEST_NORM = 1e-7
"""A shorter vector counts as this long."""
COLINEAR = 2.0**-21
"""Below this square of the angle's sine, which may be rounding errors of float32 alone, the arc counts as its chord."""


@merge_op(title="NuSLERP", base=Base.OPTIONAL, min_models=2, max_models=2)
def nuslerp(weight: PerModel[float], nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True) -> Kernel:
    """Spherical interpolation of two models, or with a base of their differences from it.

    The second has the share w_1 / (w_0 + w_1). With `nuslerp_flatten: false`, each vector along the last dimension has
    an angle of its own; with `nuslerp_row_wise` besides, each vector along the first.

    Formula: y = slerp(x_0, x_1, t) with t = w_1 / (w_0 + w_1); with a base, y = b + slerp(d_0, d_1, t).

    When: two models are blended along the sphere, or their differences to a common base are.

    Not when: there are more than two models (multislerp).

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, applied to the vectors themselves.
    """
    if nuslerp_flatten:
        return GramCombination(_weigh, (weight,), "optional")
    if nuslerp_row_wise:
        return ColumnCombination(_weigh, (weight,), "optional")
    return RowCombination(_weigh, (weight,), "optional")


def _weigh(gram: Gram, weights: tuple[float, float]) -> Coefficients:
    total = sum(weights)
    t = weights[1] / total if abs(total) >= SMALLEST_TOTAL else 0.5
    norms = [np.maximum(np.sqrt(gram[k, k]), SMALLEST_NORM) for k in range(2)]
    cosine = np.clip(gram[0, 1] / norms[0] / norms[1], -1, 1)
    is_line = 1 - cosine * cosine <= COLINEAR
    angle = np.arccos(cosine)
    sine = np.where(is_line, 1, np.sin(angle))
    return np.array([np.where(is_line, share, np.sin(share * angle) / sine) for share in (1 - t, t)])
