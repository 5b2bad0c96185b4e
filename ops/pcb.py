"""PCB-Merging: elements compete, within each model by size and between models by agreement."""

from __future__ import annotations

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.competing_deltas import CompetingDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="PCB-Merging", base=Base.REQUIRED, reference="https://arxiv.org/abs/2410.02396")
def pcb(density: PerModel[Share] = (0.1,), lambda_: float = 1.0) -> Kernel:
    """The base plus a weighted mean of the differences, in which each element has the weight that it wins.

    An element's score grows with its size among those of its model, and with the agreement of all models on it. Each
    model keeps the share `density` with the highest scores, fewer where fewer have a positive one; weights are scores
    from the lowest to the highest that are kept, from 0 to 1. Sizes are cut off at the 0.01% smallest and largest.

    Formula: y = b + lambda * sum(v_i t_i) / sum(v_i), where t_i is d_i with |d_i| cut off at its order statistics l_i
    and h_i, v_i = max(0, s_i - q_i) / (max(s_i) - q_i) with the (1 - density)-quantile q_i of s_i, and s_i = exp(n *
    ((|t_i| - l_i) / (h_i - l_i))^2) * tanh(d_i * sum(d_j)) for n models.

    When: several fine-tunes interfere with each other and there is no data; it keeps what is large and agreed on.

    Not when: models change different elements: most of what each has learnt is dropped.

    Raises:
        OpParameterError: a `density` is not from 0 to 1.

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging", as in the authors' code, tensor by
    tensor, with scores divided by exp(n); the paper's equations 1 to 3 have softmax in place of exp and tanh.
    """
    if not all(0 <= share <= 1 for share in density):
        raise OpParameterError(f"density = {', '.join(map(str, density))} must be from 0 to 1")
    return CompetingDeltas(density, lambda_)
