"""EMR-Merging's elected differences: the largest one in the direction of the sum."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, merge_op


@merge_op(title="EMR-Merging (elect)", base=Base.REQUIRED, reference="https://arxiv.org/abs/2405.17461")
def emr(lambda_: float = 1.0) -> Kernel:
    """The base plus, for each element, the largest difference of those that have the sign of their sum.

    This is the unified model of EMR-Merging alone: its masks and rescalers, which turn it into that of one task, are
    no weights of a model.

    Formula: y = b + lambda * s * max(|d_i| over the models whose d_i has the sign s of sum(d_j)), for each element.

    When: fine-tunes for different tasks are to keep their full strength without any weights to choose.

    Not when: the masks and rescalers of the tasks are needed, which turn it into the model of one task.

    Source: Huang et al. 2024, "EMR-Merging", section 3.2 (Elect): sgn(sum(tau_t)) times the largest |tau_t| of
    that sign.
    """
    return Elementwise(add_elected, (lambda_,), loop="add_elected")


def add_elected(tensors: list[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], scale: float) -> None:
    """Write y = b + scale * s * max(0, s * d_1, s * d_2, ...) to `out`, where s is the sign of sum(d_i)."""
    base, *deltas = tensors
    out.zero_()
    for delta in deltas:
        out.add_(delta.sub_(base))
    signs = out.sign_()
    largest = deltas[0].mul_(signs).clamp_(min=0)
    for delta in deltas[1:]:
        torch.maximum(largest, delta.mul_(signs), out=largest)
    out.mul_(largest).mul_(scale).add_(0).add_(base)  # 0.0, whichever sign a zero has
