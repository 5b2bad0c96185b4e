"""RAM+, tensor by tensor: RAM that strengthens what one model alone changed."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.changed_deltas import ChangedDeltas
from raymerge.ops.registry import Base, merge_op


@merge_op(
    title="Reinforced Agent Merging Plus (Tensor-Local)",
    base=Base.REQUIRED,
    reference="https://arxiv.org/abs/2601.13572",
    min_models=0,
)
def ramplus_tl(r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Kernel:
    """RAM, with a model's differences where no other one changed anything grown by up to `r` * `alpha`.

    Source: "Reinforced Agent Merging" 2026 (arXiv 2601.13572), RAM+, with the counts taken over each tensor: a
    difference of model i alone is multiplied by 1 + r * min(alpha, shared_i / unique_i), where shared_i and unique_i
    are the numbers of elements that it changed with others and alone.
    """
    return ChangedDeltas(epsilon, r, alpha)
