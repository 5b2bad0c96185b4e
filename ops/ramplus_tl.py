"""RAM+, tensor by tensor: RAM that strengthens what one model alone changed."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.changed_deltas import ChangedDeltas
from raymerge.ops.registry import Base, NonNegative, merge_op


@merge_op(
    title="Reinforced Agent Merging Plus (Tensor-Local)",
    base=Base.REQUIRED,
    reference="https://arxiv.org/abs/2601.13572",
    min_models=0,
)
def ramplus_tl(r: NonNegative = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5) -> Kernel:
    """RAM, with a model's differences where no other one changed anything grown by up to `r` * `alpha`.

    Formula: y = b + sum(d_i) / c over the c models with |d_i| > epsilon; where c = 1, y = b + d_i * (1 + r *
    min(alpha, shared_i / unique_i)), from how many elements of the tensor model i changed with others, and alone.

    When: as for ram, where what a model alone learned is too weak after merging.

    Not when: all models changed nearly everything, so that it is the average.

    Source: "Reinforced Agent Merging" 2026 (arXiv 2601.13572), RAM+, with the counts taken over each tensor: a
    difference of model i alone is multiplied by 1 + r * min(alpha, shared_i / unique_i), where shared_i and unique_i
    are the numbers of elements that it changed with others and alone.
    """
    return ChangedDeltas(epsilon, r, alpha)
