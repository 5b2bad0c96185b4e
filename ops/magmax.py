"""MagMax: for each element the largest difference."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, merge_op


@merge_op(title="MagMax", base=Base.REQUIRED, reference="https://arxiv.org/abs/2407.06322")
def magmax(lambda_: float = 0.5) -> Kernel:
    """The base plus, for each element, `lambda` times the models' largest difference to it; of equal ones the last.

    Formula: y = b + lambda * d_k with k = argmax_i |d_i|, for each element.

    When: one model was fine-tuned on several tasks one after the other, or many tasks are merged without any
    weights to choose.

    Not when: few elements matter: the largest difference may be noise.

    Source: Marczak et al. 2024, "MagMax", section 4: tau_k with k = argmax_i |tau_i|, and lambda = 0.5.
    """
    return Elementwise(add_largest, (lambda_,), num_spares=4, loop="add_largest")


def add_largest(tensors: list[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], scale: float) -> None:
    """Write y = b + scale * d_k to `out`, with the largest |d_k|."""
    base, *deltas = tensors
    torch.sub(deltas[0], base, out=out)
    largest, size = torch.abs(out, out=scratch[0]), scratch[1]
    is_larger, is_nan = (spare.view(torch.bool)[: out.numel()] for spare in scratch[2:4])
    for delta in deltas[1:]:
        torch.abs(delta.sub_(base), out=size)
        torch.ge(size, largest, out=is_larger).logical_or_(torch.ne(size, size, out=is_nan))
        torch.where(is_larger, delta, out, out=out)
        torch.maximum(largest, size, out=largest)
    out.mul_(scale).add_(base)
