"""Task Arithmetic: the base plus weighted differences to it."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="Task Arithmetic", base=Base.REQUIRED, reference="https://arxiv.org/abs/2212.04089", min_models=0)
def task_arithmetic(
    weight: PerModel[float],
    density: PerModel[Share] = (1.0,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    """The base plus the weighted sum of the models' differences to it.

    `density` and `rescale` are accepted and change nothing, for nothing is dropped; nor does `int8_mask`.

    Formula: y = b + lambda * sum(w_i * d_i), with `normalize` divided by sum(w_i).

    When: the skills of fine-tunes of one base are added, or one is taken away by a negative weight.

    Not when: differences of many models contradict each other in sign (ties).

    Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2.
    """
    return SparseDeltas(weight, density, "none", "none", normalize, "l1" if rescale else "none", lambda_)
