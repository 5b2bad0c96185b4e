"""Model Breadcrumbs: differences that are neither outliers nor small."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="Model Breadcrumbs", base=Base.REQUIRED, reference="https://arxiv.org/abs/2312.06795", min_models=0)
def breadcrumbs(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    gamma: PerModel[Share] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    """Keeps differences of middling size, and adds them.

    Of each delta the share `gamma` that is largest is dropped, and of the rest the share `density` of all that is
    largest is kept; where the two are more than 1, less is dropped as outliers. A density of 1 keeps outliers, too.
    `int8_mask` is accepted and changes nothing.

    Formula: y = b + lambda * sum(w_i * t_i), where t_i is d_i without its `gamma` largest elements and with the
    `density` next ones.

    When: a few outliers of each difference do harm, and its small elements are noise.

    Not when: the largest changes are what a fine-tune is about (ties).

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs", section 3, as mergekit has it, which counts `density` from
    the top, where the paper has a share to drop from below.
    """
    return SparseDeltas(weight, density, "magnitude", "none", normalize, "l1" if rescale else "none", lambda_, gamma)
