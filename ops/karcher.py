"""The Karcher mean of the inputs' directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import RESOLUTION, GramCombination, find_length
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, Count, NonNegative, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram


@merge_op(title="Karcher Mean", base=Base.INPUT, reference="https://arxiv.org/abs/2603.04972")
def karcher(max_iter: Count = 10, tol: NonNegative = 1e-5) -> Kernel:
    """Mean direction along the sphere, all models alike, at the mean of their norms.

    `max_iter` limits the steps, of which one shorter than `tol` ends them. A tensor that is no longer than `tol` has no
    direction; its norm counts.

    Formula: y = m * mean(|x_i|), where m is the point of the unit sphere with the least sum of squared angles to
    all x_i.

    When: three or more models of equal standing are averaged by direction.

    Not when: models are to have weights (multislerp).

    Raises:
        OpParameterError: `max_iter` or `tol` is negative.

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing", section 1, as the fixed point of
    m <- exp_m(mean_i log_m(x_i / |x_i|)) on the unit sphere.
    """
    if max_iter < 0 or tol < 0:
        raise OpParameterError(f"max_iter = {max_iter} and tol = {tol:g} must not be negative")
    return GramCombination(_weigh, (max_iter, tol))


def _weigh(gram: Gram, max_iter: int, tol: float) -> Coefficients:
    norms = np.sqrt(gram.diagonal())
    found = np.zeros(len(gram))
    long = np.flatnonzero(~(norms <= tol))
    if not len(long):
        return found
    cosines_between = gram[np.ix_(long, long)] / norms[long] / norms[long, None]
    mean = np.full(len(long), 1 / len(long))
    length = find_length(cosines_between, mean)
    mean = np.eye(len(long))[0] if length < max(tol, RESOLUTION) else mean / length
    for _ in range(max_iter):
        cosines = np.clip((cosines_between * mean).sum(1), -1, 1)
        angles = np.arccos(cosines)
        is_opposite = angles > np.pi - 2 * RESOLUTION  # no shortest arc leads there
        factors = np.where((angles < tol) | is_opposite, 0, angles / np.sin(angles)) / len(long)
        step = factors - (factors * cosines).sum() * mean
        length = find_length(cosines_between, step)
        if not length >= max(tol, np.finfo(float).tiny):
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean /= find_length(cosines_between, mean)
    found[long] = mean / norms[long] * norms.mean()
    return found
