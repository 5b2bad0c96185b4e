"""Every merge method as plain float64 code on whole tensors: what the block engine is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Weights = Sequence[float]


def linear(inputs: Sequence[torch.Tensor], weights: Weights, *, normalize: bool = True) -> torch.Tensor:
    total = sum((weight * x.double() for weight, x in zip(weights, inputs, strict=True)), torch.zeros(()).double())
    return total / sum(weights) if normalize else total


def slerp(inputs: Sequence[torch.Tensor], t: float) -> torch.Tensor:
    a, b = (x.double() for x in inputs)
    unit_a, unit_b = (x / x.norm() if x.norm() > 1e-8 else x for x in (a, b))
    cosine = float((unit_a * unit_b).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def task_arithmetic(inputs: Sequence[torch.Tensor], weights: Weights, lambda_: float = 1.0) -> torch.Tensor:
    base, deltas = _deltas(inputs)
    return base + lambda_ * sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros(()).double())


def ties(
    inputs: Sequence[torch.Tensor],
    weights: Weights,
    densities: Weights,
    *,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> torch.Tensor:
    base, deltas = _deltas(inputs)
    kept = [_keep_largest(delta, density) for delta, density in zip(deltas, densities, strict=True)]
    return base + lambda_ * _elect([w * d for w, d in zip(weights, kept, strict=True)], weights, normalize)


def dare_linear_unthinned(inputs: Sequence[torch.Tensor], weights: Weights) -> torch.Tensor:
    return task_arithmetic(inputs, weights)


def dare_ties_unthinned(inputs: Sequence[torch.Tensor], weights: Weights) -> torch.Tensor:
    return ties(inputs, weights, [1.0] * len(weights), normalize=False)


def passthrough(inputs: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    return scale * inputs[0].double()


def _deltas(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base and the differences to it; these are taken in float32, for their order decides what ties keeps."""
    return inputs[0].double(), [(x.float() - inputs[0].float()).double() for x in inputs[1:]]


def _keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    flat = delta.reshape(-1)
    num_kept = flat.numel() if density >= 1 else max(1, int(density * flat.numel()))
    order = torch.sort(flat.abs(), descending=True, stable=True).indices  # among equals the first
    kept = torch.zeros_like(flat)
    kept[order[:num_kept]] = flat[order[:num_kept]]
    return kept.reshape(delta.shape)


def _elect(deltas: Sequence[torch.Tensor], weights: Weights, normalize: bool) -> torch.Tensor:
    total = torch.stack(list(deltas)).sum(0)
    majority = torch.where(total >= 0, 1.0, -1.0).double()
    agrees = [(delta.sign() == majority).double() for delta in deltas]
    mixed = torch.stack([d * mask for d, mask in zip(deltas, agrees, strict=True)]).sum(0)
    if not normalize:
        return mixed
    divisor = torch.stack([w * mask for w, mask in zip(weights, agrees, strict=True)]).sum(0)
    return mixed / torch.where(divisor == 0, 1.0, divisor)
