"""Model Breadcrumbs with TIES: differences that are neither outliers nor small, where they agree in sign."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(
    title="Model Breadcrumbs with TIES", base=Base.REQUIRED, reference="https://arxiv.org/abs/2312.06795", min_models=0
)
def breadcrumbs_ties(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    gamma: PerModel[Share] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    """Keeps differences of middling size, and adds those that agree with the elected sign.

    Of each delta the share `gamma` that is largest is dropped, and of the rest the share `density` of all that is
    largest is kept; where the two are more than 1, less is dropped as outliers. A density of 1 keeps outliers, too.
    `int8_mask` is accepted and changes nothing.

    Formula: as breadcrumbs, but the sum is over the models whose t_i has the sign of sum(w_j * t_j).

    When: as for breadcrumbs, where the models' differences contradict each other.

    Not when: the largest changes are what a fine-tune is about (ties).

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs", section 3, as mergekit has it, which counts `density` from
    the top, where the paper has a share to drop from below, with the election of Yadav
    et al. 2023.
    """
    return SparseDeltas(weight, density, "magnitude", "sum", normalize, "l1" if rescale else "none", lambda_, gamma)
