"""Windows on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from raymerge import merge
from raymerge.testing import read_model, write_model
from tests.adapters import draw_factors, write_adapter


def test_scratch_of_any_size_is_seen_as_float64(tmp_path: Path) -> None:
    """Decoding an update of odd rank takes an odd number of float32 values beside blocks of float64."""
    tensors = {"layers.0.q.weight": torch.randn(41, 31, dtype=torch.float64)}
    base = write_model(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", draw_factors("layers.0.q", 41, 31, rank=3), r=3)
    model = f"{base}+{adapter}"
    merge({"merge_method": "arcee_fusion", "base_model": base, "models": [{"model": model}]}, tmp_path / "out")
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "whole")
    fused, whole = (read_model(tmp_path / out)["layers.0.q.weight"] for out in ("out", "whole"))
    own = tensors["layers.0.q.weight"]
    is_updated, is_base = (torch.isclose(fused, values, rtol=1e-5, atol=1e-5) for values in (whole, own))
    assert (is_updated | is_base).all()
    assert 0.1 < is_updated.float().mean() < 0.9
