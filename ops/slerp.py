"""Spherical interpolation between a base and one model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import GramCombination, find_cosine
from raymerge.ops.registry import Base, Share, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Gram

PARALLEL = 0.9995
"""Above this cosine, in size, the arc counts as its chord."""


@merge_op(
    title="SLERP", base=Base.REQUIRED, reference="https://en.wikipedia.org/wiki/Slerp", min_models=1, max_models=1
)
def slerp(t: Share) -> Kernel:
    """Spherical interpolation: t = 0 gives the base, t = 1 the other model.

    Formula: y = (sin((1 - t) * a) * b + sin(t * a) * x) / sin(a) for the angle a between b and x; y = (1 - t) * b +
    t * x where its cosine is above 0.9995.

    When: two models are blended, by other shares in different layers, and their norms are to be kept.

    Not when: there are more than two models (multislerp, karcher), or what was learned is to be added up
    (task_arithmetic).

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, with the angle taken between the
    whole tensors and the formula applied to the tensors themselves, not to their unit vectors.
    """
    return GramCombination(_weigh, (t,))


def _weigh(gram: Gram, t: float) -> tuple[float, float]:
    return slerp_coefficients(t, float(gram[0, 0]), float(gram[1, 1]), float(gram[0, 1]))


def slerp_coefficients(t: float, aa: float, bb: float, ab: float) -> tuple[float, float]:
    """Return (c_a, c_b) of the interpolation c_a * a + c_b * b.

    Args:
        t: 0 is a, 1 is b; outside of [0, 1] it goes on along the arc.
        aa: the square of a's norm.
        bb: the square of b's norm.
        ab: the inner product of a and b.

    >>> slerp_coefficients(0.5, 1.0, 1.0, 1.0)
    (0.5, 0.5)
    >>> [round(c, 4) for c in slerp_coefficients(0.5, 1.0, 1.0, 0.0)]
    [0.7071, 0.7071]
    """
    cosine = find_cosine(aa, bb, ab)
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
