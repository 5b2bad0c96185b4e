"""SCE: select where the models differ most, calculate weights from their differences, erase what disagrees."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.varying_deltas import VaryingDeltas
from raymerge.ops.registry import Base, merge_op


@merge_op(title="SCE", base=Base.REQUIRED, reference="https://arxiv.org/abs/2408.07990", min_models=0)
def sce(int8_mask: bool = False, select_topk: float = 1.0) -> Kernel:
    """Averages differences where the models vary most, weighted by their mean square, as far as they agree in sign.

    `int8_mask` is accepted and changes nothing: it saved memory for masks, which there are none of here.

    Source: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", section 3.3.
    """
    return VaryingDeltas(select_topk)
