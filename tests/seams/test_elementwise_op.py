"""An element-wise op: one function of the values, and a line that says what the YAML may give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.registry import Base, merge_op
from tests.seams.merging import declared_ops, draw, merge_in_every_way, write_model


def _clip(tensors: Sequence[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], limit: float) -> None:
    base, x = tensors
    out.copy_(x.sub_(base).clamp_(-limit, limit).add_(base))


def clipped(limit: float = 1.0) -> Kernel:
    """The model, but no further from the base than a limit."""
    return Elementwise(_clip, (limit,))


def test_clipped(tmp_path: Path) -> None:
    base, tuned = {"w": draw(901, 333), "norm": draw(5)}, {"w": draw(901, 333, seed=1), "norm": draw(5, seed=1)}
    models = [write_model(tmp_path / name, x) for name, x in (("base", base), ("tuned", tuned))]
    with declared_ops():
        merge_op(title="Clipped", base=Base.REQUIRED, max_models=1)(clipped)
        config = {
            "merge_method": "clipped",
            "base_model": models[0],
            "models": [{"model": models[1]}],
            "parameters": {"limit": [{"filter": "norm", "value": 0.1}, {"value": 0.5}]},
        }
        merged = merge_in_every_way(config, tmp_path / "out")
    for name, limit in (("w", 0.5), ("norm", 0.1)):
        expected = (tuned[name] - base[name]).clamp(-limit, limit) + base[name]
        assert torch.equal(merged[name], expected)
