"""Tensors and parameters to try ops on."""

from __future__ import annotations

import numpy as np
import torch

from raymerge.ops.kernel import Kernel
from raymerge.ops.registry import Base, Op, Value

SAMPLE_VALUES: dict[str, Value] = {"t": 0.3, "density": 0.5}
SAMPLE_WEIGHTS = (0.5, 0.3, 0.4)


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
    return tensors if op.base is Base.REQUIRED else tensors[1:]


def make_kernel(op: Op, **changes: Value | tuple[Value, ...]) -> Kernel:
    """Return an op's kernel, with a value that makes it work for each parameter."""
    num_models = num_sample_models(op)
    parameters: dict[str, Value | tuple[Value, ...]] = {}
    for parameter in op.parameters:
        value = SAMPLE_VALUES.get(parameter.name, parameter.default)
        if parameter.name == "weight":
            parameters["weight"] = SAMPLE_WEIGHTS[:num_models]
        else:
            assert value is not None, f"give {op.name}'s parameter {parameter.name} a sample value"
            parameters[parameter.name] = (value,) * num_models if parameter.per_model else value
    return op.kernel(parameters | changes)
