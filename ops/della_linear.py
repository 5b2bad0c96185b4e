"""Linear DELLA: randomly chosen differences, large ones rather, added."""

from __future__ import annotations

from typing import Literal

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="Linear DELLA", base=Base.REQUIRED, reference="https://arxiv.org/abs/2406.11617", min_models=0)
def della_linear(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    epsilon: PerModel[Share] = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    rescale_mode: Literal["l1", "inverse_density"] = "l1",
) -> Kernel:
    """Keeps randomly chosen differences, large ones rather, and adds them.

    The elements of each row are ranked by size: the smallest is kept with the probability `density - epsilon`, the
    largest with `density + epsilon`, those between in equal steps; sizes that agree in exponent and the first 6 binary
    places share their mean rank. What is kept is rescaled to the sum of absolute values that the delta had, or with
    `rescale_mode: inverse_density` each element by one over its probability, as in the paper. `int8_mask` is accepted
    and changes nothing.

    Formula: as della, but the sum is over all models, and not divided unless `normalize` says so.

    When: as for della, where the models' differences do not contradict each other.

    Not when: density - epsilon or density + epsilon is not between 0 and 1.

    Source: Deep et al. 2024, "DELLA-Merging", section 3.
    """
    rescaling = rescale_mode if rescale else "none"
    return SparseDeltas(weight, density, "ranks", "none", normalize, rescaling, lambda_, epsilons=epsilon)
