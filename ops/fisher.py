"""Fisher-weighted averaging: each element of a model counts as much as its Fisher information says."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.lazy import torch
from raymerge.ops.registry import Base, NonNegative, PerModel, Statistics, merge_op

FISHER = Statistics("fisher", "diagonal elements of the Fisher information")


@merge_op(
    title="Fisher-Weighted Averaging", base=Base.INPUT, reference="https://arxiv.org/abs/2111.09832", statistics=FISHER
)
def fisher(weight: PerModel[NonNegative] = (1.0,)) -> Kernel:
    """Average of the models in which each element counts as much as its Fisher information says.

    Each model names a file or a directory with the diagonal of its Fisher information, under `fisher`: safetensors
    with the names and shapes of the model's tensors. What no model has any information on is averaged by `weight`.
    Only ratios between models count; the authors' code divides each model's Fisher information by its norm over all
    tensors, for which `weight` may have one over that norm.

    Formula: y = sum(w_i * F_i * x_i) / sum(w_i * F_i) for each element, and sum(w_i * x_i) / sum(w_i) where that is
    0 / 0.

    When: each model's Fisher information is known, or its training data is at hand to compute it: what matters to one
    model is kept from those to which it does not matter.

    Not when: the Fisher information was computed on other data or numbers of examples for each model, so that it
    cannot be compared.

    Raises:
        OpParameterError: a weight is negative, or all are 0; while merging: Fisher information is negative.

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3: theta_j = sum(lambda_i
    F_ij theta_ij) / sum(lambda_i F_ij).
    """
    if min(weight, default=0) < 0 or not any(weight):
        raise OpParameterError(f"the weights {', '.join(map(str, weight))} must be 0 or more, and not all 0")
    return Elementwise(average, (weight,), num_spares=2)


def average(
    tensors: list[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], weights: tuple[float, ...]
) -> None:
    """Write y = sum(w_i F_i x_i) / sum(w_i F_i) to `out`, for x_1 ... x_n and F_1 ... F_n.

    Shares of the largest w_i F_i are taken first: Fisher information may be too small for its sums in float32.
    """
    models, shares = tensors[: len(weights)], tensors[len(weights) :]
    largest, spare = scratch
    is_unknown = spare.view(torch.bool)[: out.numel()]
    largest.zero_()
    for share, weight in zip(shares, weights, strict=True):
        if (smallest := share.min().item()) < 0:
            raise OpParameterError(f"Fisher information of {smallest:g} is given; it is a mean of squares, 0 or more")
        torch.maximum(largest, share.mul_(weight), out=largest)
    torch.eq(largest, 0, out=is_unknown)
    for share, weight in zip(shares, weights, strict=True):
        share.div_(largest).masked_fill_(is_unknown, weight)
    total = largest.zero_()
    out.zero_()
    for model, share in zip(models, shares, strict=True):
        total.add_(share)
        out.add_(model.mul_(share))
    out.div_(total)
