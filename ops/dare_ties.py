"""DARE TIES: randomly chosen differences, where they agree in sign."""

from __future__ import annotations

from typing import Literal

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="DARE TIES", base=Base.REQUIRED, reference="https://arxiv.org/abs/2311.03099", min_models=0)
def dare_ties(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    rescale_mode: Literal["l1", "inverse_density"] = "l1",
) -> Kernel:
    """Keeps randomly chosen differences, rescaled, and adds those that agree with the elected sign.

    They are rescaled to the sum of absolute values they had, or divided by the density with `rescale_mode:
    inverse_density`.
    `int8_mask` is accepted and changes nothing: it saved memory for masks, which there are none of here.

    Formula: as dare_linear, but the sum is over the models whose r_i has the sign of sum(w_j * r_j).

    When: as for dare_linear, where the models' differences contradict each other.

    Not when: differences are large, as after continued pretraining: dropping some at random adds noise.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.2, with the election of Yadav et al. 2023.
    """
    return SparseDeltas(weight, density, "random", "sum", normalize, rescale_mode if rescale else "none", lambda_)
