"""Statistics of models' tensors, as files beside the models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from raymerge.ops.registry import Op
from tests.checkpoints import read_tensors


def write_statistics(op: Op, model: Path | str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Write what an op takes of a model besides its tensors; return the key and the file as configs name them."""
    if op.statistics is None:
        return {}
    path = Path(f"{model}-{op.statistics.key}.safetensors")
    generator = torch.Generator().manual_seed(len(path.name))
    tensors = {}
    for name, tensor in read_tensors(Path(model)).items():
        shape = op.statistics.find_shape(tuple(tensor.shape))
        if shape is not None and op.statistics.is_whole:
            rows = torch.randn(2 * shape[0] + 1, shape[0], generator=generator)
            tensors[name] = (rows.T @ rows).to(dtype)
        elif shape is not None:
            tensors[name] = torch.rand(shape, generator=generator).to(dtype)
    save_file(tensors, path)
    return {op.statistics.key: str(path)}
