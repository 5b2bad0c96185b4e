"""Tensors and parameters to try ops on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.registry import Base, Op, Value, load_ops

Change = Mapping[str, Any]
"""Values of parameters, by name; for a per-model parameter one for each of three models."""
NO_CHANGE: Change = MappingProxyType({})

SAMPLE_VALUES: dict[str, Value | tuple[Value, ...]] = {
    "t": 0.3,
    "density": 0.5,
    "weight": (0.5, 0.3, 0.4),
    "gamma": 0.1,
    "alpha": 0.3,
}
VARIANTS: dict[str, list[Any]] = {
    "weight": [(1.0, -0.25, 0.5), (0.5, 0.0, 0.5), (0.3, 0.3, 0.3)],
    "t": [0.0, 0.9, 0.001],
    "epsilon": [0.001],
    "r": [0.5],
    "select_topk": [0.3, 0.0],
    "alpha": [2.0],
    "density": [(0.5, 0.2, 1.0), (0.0, 0.7, -1.0)],
    "gamma": [(0.01, 0.0, 0.9)],
    "lambda": [0.4],
    "mask_lambda": [(0.2, 0.9, 0.6)],
    "k": [0, 1, 3],
    "scale": [-1.5],
    "delta": [0.0005, 0.002],
    "eta": [80.0],
    "n_val": [(3, 200, 0)],
    "common_space_fraction": [0.4],
}
"""For each parameter that a sweep may vary, values to try besides the sample."""


def make_fine_tunes(
    num_elements: int, num_models: int = 3, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[torch.Tensor]:
    """Return a base and models that differ from it about as much as fine-tunes do, the same ones on every processor."""
    random = np.random.default_rng(seed)

    def noise(deviation: float) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(num_elements, dtype=np.float32) * np.float32(deviation))

    base = noise(0.02).to(dtype)
    return [base, *((base.float() + noise(0.001)).to(dtype) for _ in range(num_models))]


def num_sample_models(op: Op) -> int:
    """Return how many models to try an op with, a required base not counted."""
    return 3 if op.max_models is None else op.max_models


def make_sources(op: Op, num_elements: int, *, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return sources for an op, the base first where it requires one."""
    tensors = make_fine_tunes(num_elements, num_sample_models(op), dtype=dtype)
    models = tensors if op.base is Base.REQUIRED else tensors[1:]
    return [*models, *make_statistics(op, tensors[1:])]


def make_statistics(op: Op, models: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what an op takes of each model besides, where that has a value for each element: 0 or more."""
    if op.statistics is None or op.statistics.is_whole:
        return []
    return [(model.float() * 1e-6).square().to(model.dtype) for model in models]


def repeat(op: Op, model: torch.Tensor) -> list[torch.Tensor]:
    """Return sources for an op that are all the same, besides statistics."""
    num_models = num_sample_models(op)
    models = [model.clone() for _ in range(num_models)]
    base = [model.clone()] if op.base is Base.REQUIRED else []
    return [*base, *models, *make_statistics(op, models)]


def make_tied_sources(op: Op, num_elements: int) -> list[torch.Tensor]:
    """Return sources whose differences take few values: of those at the threshold, blocks past the first keep some."""
    base, *models = make_fine_tunes(num_elements, num_sample_models(op), dtype=torch.float32)
    tied = [base + (model - base).mul_(1000).round_().div_(1024) for model in models]
    return [*([base] if op.base is Base.REQUIRED else []), *tied, *make_statistics(op, tied)]


def sample_parameters(op: Op, change: Change = NO_CHANGE) -> dict[str, Any]:
    """Return a value that makes an op work for each parameter, as in the YAML, one of them changed."""
    num_models = num_sample_models(op)
    parameters: dict[str, Any] = {}
    for parameter in op.parameters:
        value = SAMPLE_VALUES.get(parameter.name, parameter.default)
        if parameter.name in change:
            value = change[parameter.name]
        assert value is not None, f"give {op.name}'s parameter {parameter.name} a sample value"
        if parameter.per_model:
            parameters[parameter.name] = (value if isinstance(value, tuple) else (value,) * num_models)[:num_models]
        else:
            parameters[parameter.name] = value
    return parameters


def make_kernel(op: Op, change: Change = NO_CHANGE) -> Kernel:
    """Return an op's kernel with sample values."""
    return op.kernel(sample_parameters(op, change))


def list_changes(op: Op) -> list[dict[str, Any]]:
    """Return changes to the sample values: none, each switch the other way, and what a sweep may vary."""
    switches: list[dict[str, Any]] = [{p.name: not p.default} for p in op.parameters if p.type is bool]
    switches += [{p.name: choice} for p in op.parameters for choice in p.choices if choice != p.default]
    variants = [{p.name: value} for p in op.parameters for value in VARIANTS.get(p.name, [])]
    return [{}, *switches, *(change for change in variants if _is_taken(op, change))]


def _is_taken(op: Op, change: Change) -> bool:
    """Return whether an op does not refuse values, such as negative weights."""
    try:
        make_kernel(op, change)
    except OpParameterError:
        return False
    return True


CASES = [
    pytest.param(op, change, id="-".join([op.name, *(f"{name}={value}" for name, value in change.items())]))
    for op in load_ops().values()
    for change in list_changes(op)
]
