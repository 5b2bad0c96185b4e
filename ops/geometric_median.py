"""The geometric median: a mean that single outliers hardly move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import RESOLUTION, GramCombination, find_length
from raymerge.ops.lazy import np
from raymerge.ops.registry import Base, Count, NonNegative, PerModel, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram


@merge_op(title="Geometric Median", base=Base.INPUT, reference="https://doi.org/10.1073/pnas.97.4.1423")
def geometric_median(weight: PerModel[NonNegative] = (1.0,), max_iter: Count = 100, tol: NonNegative = 1e-7) -> Kernel:
    """The tensor with the least sum of weighted distances to those of the models.

    `max_iter` limits the steps, of which one shorter than `tol` ends them, as a share of the largest distance.

    Formula: y = argmin sum(w_i * |x_i - y|).

    When: one of several models may be far off, and is not to count by its distance.

    Not when: there are two models: every point between them is a median (linear).

    Raises:
        OpParameterError: a weight is negative or none is positive, or `max_iter` or `tol` is negative.

    Source: Weiszfeld 1937, y <- sum(w_i * x_i / |x_i - y|) / sum(w_i / |x_i - y|), from the mean on, unless a model is
    the median itself: Vardi and Zhang 2000, "The multivariate L1-median and associated data depth", tell when.
    """
    if min(weight) < 0 or not any(weight):
        raise OpParameterError(f"the weights {', '.join(map(str, weight))} must not be negative, and not all be 0")
    if max_iter < 0 or tol < 0:
        raise OpParameterError(f"max_iter = {max_iter} and tol = {tol:g} must not be negative")
    return GramCombination(_weigh, (weight, max_iter, tol), "first")


def _weigh(gram: Gram, weight: tuple[float, ...], max_iter: int, tol: float) -> Coefficients:
    """Return the coefficients of the differences of all models from the first one."""
    num_models = len(gram) + 1
    points = np.zeros((num_models, num_models))
    points[1:, 1:] = gram
    squares = points.diagonal()
    distances = np.sqrt(np.maximum(squares + squares[:, None] - 2 * points, 0))
    largest = distances.max()
    weights = np.resize(weight, num_models) / np.resize(weight, num_models).sum()
    for k in range(num_models):
        is_there = distances[k] <= RESOLUTION * largest
        pull = np.where(is_there, 0, weights / distances[k])
        pull[k] -= pull.sum()
        if find_length(points, pull) < weights[is_there].sum() * (1 - RESOLUTION):
            return np.eye(num_models)[k, 1:]
    mean: Coefficients = weights
    for _ in range(max_iter):
        products = (points * mean).sum(1)
        square = np.maximum(squares - 2 * products + (mean * products).sum(), (RESOLUTION * largest) ** 2)
        step = weights / np.sqrt(square)
        step = step / step.sum() - mean
        mean = mean + step
        if not find_length(points, step) > tol * largest:
            break
    return mean[1:]
