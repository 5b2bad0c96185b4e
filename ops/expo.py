"""ExPO: on along the way from a base to one model."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.gram import combine_deltas
from raymerge.ops.registry import Base, merge_op


@merge_op(title="ExPO", base=Base.REQUIRED, reference="https://arxiv.org/abs/2404.16792", min_models=1, max_models=1)
def expo(alpha: float) -> Kernel:
    """Extrapolates the change from the base, before alignment, to the model, after it, by `alpha` times as much.

    Formula: y = x + alpha * d.

    When: a model was aligned by preferences from the base, and more of the same change helps; try alpha from 0.1 to
    0.5.

    Not when: base and model are more than a short alignment apart: what is extrapolated is noise.

    Source: Zheng et al. 2024, "Model Extrapolation Expedites Alignment", section 2: theta_1 + a * (theta_1 - theta_0).
    """
    return combine_deltas((1 + alpha,))
