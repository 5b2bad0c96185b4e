"""RAM: differences of their own for elements that one model changed, averages for those that several did."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.changed_deltas import ChangedDeltas
from raymerge.ops.registry import Base, NonNegative, merge_op


@merge_op(
    title="Reinforced Agent Merging", base=Base.REQUIRED, reference="https://arxiv.org/abs/2601.13572", min_models=0
)
def ram(epsilon: NonNegative = 1e-5) -> Kernel:
    """The base plus, for each element, the average difference of the models that changed it by more than `epsilon`.

    Formula: y = b + sum(d_i) / c over the c models with |d_i| > epsilon.

    When: models trained by reinforcement learning changed few elements each, and rarely the same ones.

    Not when: all models changed nearly everything, so that it is the average.

    Source: "Reinforced Agent Merging" 2026 (arXiv 2601.13572): y = b + sum(d_i) / c over the c models with
    |d_i| > epsilon.
    """
    return ChangedDeltas(epsilon)
