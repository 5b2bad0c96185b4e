"""Linear DARE: randomly chosen differences, added."""

from __future__ import annotations

from typing import Literal

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="Linear DARE", base=Base.REQUIRED, reference="https://arxiv.org/abs/2311.03099", min_models=0)
def dare_linear(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    rescale_mode: Literal["l1", "inverse_density"] = "l1",
) -> Kernel:
    """Keeps randomly chosen differences, rescales them to the sum of absolute values they had, and adds them.

    With `rescale_mode: inverse_density` they are divided by the density, as in the paper, and nothing is measured.
    `int8_mask` is accepted and changes nothing: it saved memory for masks, which there are none of here.

    Formula: y = b + lambda * sum(w_i * r_i), where r_i is d_i with each element kept with the probability
    `density`, times sum(|d_i|) / sum(|kept d_i|).

    When: fine-tunes changed little of the base, so that most of each difference can be spared.

    Not when: differences are large, as after continued pretraining: dropping some at random adds noise.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.2; the rescaling is mergekit's.
    """
    return SparseDeltas(weight, density, "random", "none", normalize, rescale_mode if rescale else "none", lambda_)
