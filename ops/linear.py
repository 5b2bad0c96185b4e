"""Linear: the weighted average of the inputs."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.linear import LinearCombination, check_sum
from raymerge.ops.registry import Base, PerModel, merge_op


@merge_op(title="Linear", base=Base.INPUT, reference="https://arxiv.org/abs/2203.05482")
def linear(weight: PerModel[float], normalize: bool = True) -> Kernel:
    """Weighted average of the models (a model soup).

    Formula: y = sum(w_i * x_i) / sum(w_i), and without `normalize` y = sum(w_i * x_i).

    When: fine-tunes of one base, or checkpoints of one run, are close to each other; the safe first try.

    Not when: the models were trained from different starts, or each has a skill that averaging halves.

    Raises:
        OpParameterError: the weights cancel, and are to be normalized.

    Source: Wortsman et al. 2022, "Model soups": y = sum(w_i * x_i) / sum(w_i).
    """
    return LinearCombination(weight, divisor=check_sum(weight, "normalize") if normalize else 1.0)
