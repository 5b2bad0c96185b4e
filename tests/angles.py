"""Methods that go by angles and norms, on whole tensors in float64: the vectors themselves, without a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Vectors = list[torch.Tensor]
Parameters = Mapping[str, Any]


def merge_angles(op: str, tensors: Sequence[torch.Tensor], values: Parameters) -> torch.Tensor:
    """Return what an op makes of sources, a base first where there is one."""
    sources = [tensor.double() for tensor in tensors]
    match op:
        case "karcher":
            return _karcher(sources, values["max_iter"], values["tol"])
        case "nuslerp":
            return _from_base(sources, 2, lambda vectors: _nuslerp(vectors, values))
        case "multislerp":
            return _from_base(sources, len(values["weight"]), lambda vectors: _multislerp(vectors, values))
        case "geometric_median":
            return _geometric_median(sources, values["weight"])
        case "metagpt":
            deltas = [x - sources[0] for x in sources[1:]]
            total = sum(float(delta.square().sum()) for delta in deltas)
            return sources[0] + sum(delta * (float(delta.square().sum()) / total) for delta in deltas)
        case "model_stock":
            return _from_base(sources, len(sources) - 1, lambda deltas: _model_stock(deltas, values["filter_wise"]))
    raise NotImplementedError(op)


def _from_base(sources: Vectors, num_models: int, merge: Callable[[Vectors], torch.Tensor]) -> torch.Tensor:
    if len(sources) == num_models:
        return merge(sources)
    return sources[0] + merge([x - sources[0] for x in sources[1:]])


def _nuslerp(vectors: Vectors, values: Parameters) -> torch.Tensor:
    a, b = vectors
    t = values["weight"][1] / sum(values["weight"])
    is_swapped = not values["nuslerp_flatten"] and values["nuslerp_row_wise"]
    if is_swapped:
        a, b = a.swapaxes(0, -1), b.swapaxes(0, -1)
    rows_a, rows_b = (x.reshape(1, -1) if values["nuslerp_flatten"] else x.reshape(-1, x.shape[-1]) for x in (a, b))
    merged = torch.stack([_interpolate(*pair, t) for pair in zip(rows_a, rows_b, strict=True)]).reshape(a.shape)
    return merged.swapaxes(0, -1) if is_swapped else merged


def _interpolate(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    cosine = float(a @ b / a.norm().clamp(min=1e-7) / b.norm().clamp(min=1e-7))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if 1 - cosine**2 < 4e-7:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def _multislerp(vectors: Vectors, values: Parameters) -> torch.Tensor:
    weights = torch.tensor(values["weight"], dtype=torch.float64)
    if values["normalize_weights"]:
        weights = weights / weights.sum()
    flat = torch.stack([x.reshape(-1) for x in vectors])
    norms = flat.norm(dim=1)
    units = flat / (norms + values["eps"])[:, None]
    mean = weights @ units
    mean = mean / mean.norm()
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    angle = tangent.norm() + values["eps"]
    merged: torch.Tensor = mean * angle.cos() + tangent * (angle.sin() / angle)
    merged *= weights @ norms
    return merged.reshape(vectors[0].shape)


def _karcher(vectors: Vectors, max_iter: int, tol: float) -> torch.Tensor:
    flat = torch.stack([x.reshape(-1) for x in vectors])
    norms = flat.norm(dim=1)
    units = flat[norms > tol] / norms[norms > tol, None]
    mean: torch.Tensor = units.mean(0)
    mean = units[0] if mean.norm() < tol else mean / mean.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(mean)
        for unit in units:
            cosine = float((unit @ mean).clamp(-1, 1))
            angle = math.acos(cosine)
            if angle >= tol:
                step += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        length = float(step.norm())
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= mean.norm()
    mean *= norms.mean()
    return mean.reshape(vectors[0].shape)


def _geometric_median(vectors: Vectors, weights: Sequence[float]) -> torch.Tensor:
    """Return the point with the least sum of distances, by a hundred of Weiszfeld's steps."""
    shares = list(weights)
    for _ in range(100):
        median = torch.stack([share * x for share, x in zip(shares, vectors, strict=True)]).sum(0) / sum(shares)
        shares = [w / float((x - median).norm() + 1e-300) for w, x in zip(weights, vectors, strict=True)]
    return median


def _model_stock(deltas: Vectors, filter_wise: bool) -> torch.Tensor:
    shape = deltas[0].shape
    rows = torch.stack([x.reshape(-1, shape[-1]) if filter_wise else x.reshape(1, -1) for x in deltas])
    num_models = len(deltas)
    norms = rows.norm(dim=2)
    cosines = torch.stack(
        [
            ((rows[i] * rows[j]).sum(1) / (norms[i] * norms[j]).clamp(min=1e-6)).clamp(-1, 1)
            for i in range(num_models)
            for j in range(i)
        ]
    ).mean(0)
    share = num_models * cosines / (1 + (num_models - 1) * cosines)
    return (share[:, None] * rows.mean(0)).reshape(shape)
