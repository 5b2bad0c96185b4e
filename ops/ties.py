"""TIES: the largest differences, where they agree in sign."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="TIES", base=Base.REQUIRED, reference="https://arxiv.org/abs/2306.01708", min_models=0)
def ties(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    """Keeps each model's largest differences, elects a sign for each element, and averages what agrees with it.

    `int8_mask` is accepted and changes nothing: it saved memory for masks, which there are none of here.

    Formula: y = b + lambda * sum(w_i * t_i) / sum(w_i) over the models whose t_i has the sign of sum(w_j * t_j),
    where t_i is d_i with all but its `density` largest elements set to 0; without `normalize`, it is not divided.

    When: several fine-tunes of one base interfere with each other; start with densities from 0.2 to 0.7.

    Not when: the models have no base in common.

    Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    return SparseDeltas(weight, density, "magnitude", "sum", normalize, "l1" if rescale else "none", lambda_)
