"""NearSwap: the other model where it is close to the base, and less of it the further it is away."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, NonNegative, merge_op

SMALLEST_DISTANCE = 1e-6
"""Elements that are closer count as this far apart."""


@merge_op(
    title="NearSwap",
    base=Base.REQUIRED,
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    min_models=1,
    max_models=1,
)
def nearswap(t: NonNegative) -> Kernel:
    """Moves each element of the base towards the model by `t`; all the way where they are closer than that.

    Formula: y = b + w * (x - b) with w = min(1, t / |x - b|).

    When: a base is to take over small changes of a model, and none of its large ones in full.

    Not when: the model's large changes are its skill (slerp, task_arithmetic).

    Source: alchemonaut 2024, QuartetAnemoi-70B's model card: y = b + w * (x - b) with w = min(1, t / |x - b|).
    """
    return Elementwise(approach, (t,), loop="approach", constants=(SMALLEST_DISTANCE,))


def approach(tensors: list[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], t: float) -> None:
    """Write y = w * x + (1 - w) * b to `out`."""
    base, model = tensors
    weights = torch.sub(base, model, out=out).abs_().clamp_(min=SMALLEST_DISTANCE).reciprocal_().mul_(t).clamp_(0, 1)
    model.mul_(weights)
    out.neg_().add_(1).mul_(base).add_(model)
