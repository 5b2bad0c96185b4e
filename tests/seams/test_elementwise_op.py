"""An element-wise op: one function of the values, and a line that says what the YAML may give."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.seams.merging import draw, merge_in_every_way, write_model

OPS = Path(__file__).with_name("clipped.py")


def test_clipped(tmp_path: Path) -> None:
    base, tuned = {"w": draw(901, 333), "norm": draw(5)}, {"w": draw(901, 333, seed=1), "norm": draw(5, seed=1)}
    models = [write_model(tmp_path / name, x) for name, x in (("base", base), ("tuned", tuned))]
    config = {
        "merge_method": "clipped",
        "base_model": models[0],
        "models": [{"model": models[1]}],
        "parameters": {"limit": [{"filter": "norm", "value": 0.1}, {"value": 0.5}]},
    }
    merged = merge_in_every_way(config, tmp_path / "out", ops=str(OPS))
    for name, limit in (("w", 0.5), ("norm", 0.1)):
        expected = (tuned[name] - base[name]).clamp(-limit, limit) + base[name]
        assert torch.equal(merged[name], expected)
