"""SCE: select where the models differ most, calculate weights from their differences, erase what disagrees."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.varying_deltas import VaryingDeltas
from raymerge.ops.registry import Base, Share, merge_op


@merge_op(title="SCE", base=Base.REQUIRED, reference="https://arxiv.org/abs/2408.07990", min_models=0)
def sce(int8_mask: bool = False, select_topk: Share = 1.0) -> Kernel:
    """Averages differences where the models vary most, weighted by their mean square, as far as they agree in sign.

    `int8_mask` is accepted and changes nothing: it saved memory for masks, which there are none of here.

    Formula: y = b + sum(w_i * d_i) / sum(w_i) over the models whose d_i has the sign of sum(d_j), where w_i is the
    mean square of d_i; d_i counts where the variance over the models is among the `select_topk` largest.

    When: models of different strength are fused without any weights to choose.

    Not when: differences are small: mean squares that sum to less than 1e-6 give all models the same weight, as in
    mergekit.

    Source: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", section 3.3.
    """
    return VaryingDeltas(select_topk)
