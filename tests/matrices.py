"""Methods that go by singular values, as their papers write them: by decompositions of the deltas in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Matrices = list[torch.Tensor]
Parameters = Mapping[str, Any]


def merge_matrices(op: str, tensors: Sequence[torch.Tensor], values: Parameters) -> torch.Tensor:
    """Return what an op makes of sources, the base first."""
    base, *models = [tensor.double() for tensor in tensors]
    deltas = [model - base for model in models]
    if base.dim() == 3:
        stack = [merge_matrices(op, matrices, values) for matrices in zip(*tensors, strict=True)]
        return torch.stack(stack)
    if base.dim() != 2 or min(base.shape) < 2:
        merged = _ties(deltas, values) if op == "knots" else torch.stack(deltas).mean(0)
    else:
        functions = {"tsv": _tsv, "iso_c": _iso_c, "iso_cts": _iso_cts, "star": _star, "wudi": _wudi, "knots": _knots}
        merged = functions[op](deltas, values)
    scale: float = values["lambda"]
    return base + scale * merged


def _svd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return u, s, vt


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return the matrix with orthogonal columns that is nearest to x."""
    u, _, vt = _svd(x)
    return u @ vt


def _tsv(deltas: Matrices, values: Parameters) -> torch.Tensor:
    kept = max(1, min(deltas[0].shape) // len(deltas))
    found = [_svd(delta) for delta in deltas]
    u = torch.cat([u[:, :kept] for u, _, _ in found], 1)
    s = torch.cat([s[:kept] for _, s, _ in found])
    vt = torch.cat([vt[:kept] for _, _, vt in found])
    return _orthogonal(u) @ torch.diag(s) @ _orthogonal(vt)


def _iso_c(deltas: Matrices, values: Parameters) -> torch.Tensor:
    u, s, vt = _svd(torch.stack(deltas).sum(0))
    return s.mean() * u @ vt


def _iso_cts(deltas: Matrices, values: Parameters) -> torch.Tensor:
    size, num_models = min(deltas[0].shape), len(deltas)
    kept = round((size - int(size * values["common_space_fraction"])) / num_models)
    num_common = size - kept * num_models
    u, s, vt = _svd(torch.stack(deltas).sum(0))
    u, s, vt = u[:, :num_common], s[:num_common], vt[:num_common]
    found = [_svd(delta - u @ (u.T @ delta)) for delta in deltas]
    left = torch.cat([u, *(u[:, :kept] for u, _, _ in found)], 1)
    strengths = torch.cat([s, *(s[:kept] for _, s, _ in found)])
    right = torch.cat([vt, *(vt[:kept] for _, _, vt in found)])
    return strengths.mean() * _orthogonal(left) @ _orthogonal(right)


def _star(deltas: Matrices, values: Parameters) -> torch.Tensor:
    merged = torch.zeros_like(deltas[0])
    for delta in deltas:
        u, s, vt = _svd(delta)
        kept = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= values["eta"] / 100 * s.sum() * (1 - 1e-9))
        merged += s.sum() / s[:kept].sum() * u[:, :kept] @ torch.diag(s[:kept]) @ vt[:kept]
    return merged / len(deltas)


def _knots(deltas: Matrices, values: Parameters) -> torch.Tensor:
    u, s, vt = _svd(torch.cat(deltas, 1))
    is_kept = s > 1e-6 * s[0]
    aligned = torch.tensor_split(torch.diag(s[is_kept]) @ vt[is_kept], len(deltas), dim=1)
    return u[:, is_kept] @ _ties(list(aligned), values)


def _ties(deltas: Matrices, values: Parameters) -> torch.Tensor:
    weights = torch.tensor(values["weight"], dtype=torch.float64).reshape(-1, *(1 for _ in deltas[0].shape))
    kept = []
    for delta, density in zip(deltas, values["density"], strict=True):
        num_kept = delta.numel() if density >= 1 else max(1, int(density * delta.numel()))
        threshold = delta.abs().flatten().topk(num_kept).values[-1]
        kept.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    votes = weights * torch.stack(kept)
    agrees = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    return (votes * agrees).sum(0) / (weights * agrees).sum(0).clamp(min=1e-30)


def _wudi(deltas: Matrices, values: Parameters) -> torch.Tensor:
    inputs = torch.cat([delta.T / delta.norm() for delta in deltas], 1)
    targets = torch.cat([delta @ delta.T / delta.norm() for delta in deltas], 1)
    inverse: torch.Tensor = torch.linalg.pinv(inputs, rtol=1e-9)
    return targets @ inverse
