"""DELLA: randomly chosen differences, large ones rather, where they agree in sign."""

from __future__ import annotations

from typing import Literal

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="DELLA", base=Base.REQUIRED, reference="https://arxiv.org/abs/2406.11617", min_models=0)
def della(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    epsilon: PerModel[Share] = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    rescale_mode: Literal["l1", "inverse_density"] = "l1",
) -> Kernel:
    """Keeps randomly chosen differences, large ones rather, and adds those that agree with the elected sign.

    The elements of each row are ranked by size: the smallest is kept with the probability `density - epsilon`, the
    largest with `density + epsilon`, those between in equal steps; sizes that agree in exponent and the first 6 binary
    places share their mean rank. What is kept is rescaled to the sum of absolute values that the delta had, or with
    `rescale_mode: inverse_density` each element by one over its probability, as in the paper. `int8_mask` is accepted
    and changes nothing.

    Formula: y = b + lambda * sum(w_i * r_i) / sum(w_i) over the models whose r_i has the sign of sum(w_j * r_j),
    where r_i is d_i with each element kept with a probability from density - epsilon to density + epsilon, by its
    rank in the row, times sum(|d_i|) / sum(|kept d_i|).

    When: differences are to be thinned out at random, yet the large ones are to stay rather than the small ones.

    Not when: density - epsilon or density + epsilon is not between 0 and 1.

    Source: Deep et al. 2024, "DELLA-Merging", section 3.
    """
    rescaling = rescale_mode if rescale else "none"
    return SparseDeltas(weight, density, "ranks", "sum", normalize, rescaling, lambda_, epsilons=epsilon)
