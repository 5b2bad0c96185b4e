"""Assembly of Experts: an average of the tensors that differ enough, and the base for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel, Site
from raymerge.ops.kernels.gram import GramCombination
from raymerge.ops.registry import Base, NonNegative, PerModel, merge_op

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram


@merge_op(title="Assembly of Experts", base=Base.REQUIRED, reference="https://arxiv.org/abs/2506.14794")
def assembly_of_experts(weight: PerModel[float], delta: NonNegative = 0.0) -> Kernel:
    """Weighted average of base and models where a model's tensor differs from the base's by more than `delta`.

    The base has what the weights leave of 1. The difference is normalised: the root of the mean square of its elements.
    A tensor with less in every model with a weight is the base's, as is one whose weights are all 0: filters choose the
    subset.

    Formula: y = (1 - sum(w_i)) * b + sum(w_i * x_i), where for some model with a weight sqrt(mean(d_i^2)) > delta,
    else y = b.

    When: experts of one model and the rest of another make a chimera: give weights by filters on names.

    Not when: every tensor is to be merged alike (linear).

    Raises:
        OpParameterError: `delta` is negative.

    Source: Klagges et al. 2025, "Assembly of Experts", section 3, with the threshold delta on the normalised Frobenius
    norm of the difference.
    """
    if delta < 0:
        raise OpParameterError(f"delta = {delta:g} must not be negative")
    return _Assembly(_weigh, (weight, delta), "first")


@dataclass(frozen=True)
class _Assembly(GramCombination):
    """The size of a tensor counts besides the inner products."""

    def weigh(self, gram: Gram, site: Site) -> Sequence[float] | Coefficients:
        return self.rule(gram, site.num_elements, *self.parameters)


def _weigh(gram: Gram, num_elements: int, weights: tuple[float, ...], delta: float) -> Sequence[float]:
    differences = [math.sqrt(gram[k, k] / max(1, num_elements)) for k, weight in enumerate(weights) if weight != 0]
    return (0.0,) * len(weights) if all(difference <= delta for difference in differences) else weights
