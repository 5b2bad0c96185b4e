"""A kernel that needs the whole matrix: the delta, cut down to its largest singular values."""

from __future__ import annotations

from pathlib import Path

import torch

from raymerge.testing import merge_in_every_way, write_model
from tests.seams.merging import draw

OPS = Path(__file__).with_name("truncated_delta.py")


def test_truncated_delta(tmp_path: Path) -> None:
    base, tuned = {"w": draw(600, 300), "norm": draw(5)}, {"w": draw(600, 300, seed=1), "norm": draw(5, seed=1)}
    models = [write_model(tmp_path / name, x) for name, x in (("base", base), ("tuned", tuned))]
    config = {
        "merge_method": "truncated_delta",
        "base_model": models[0],
        "models": [{"model": models[1], "parameters": {"rank": 3}}],
    }
    merged = merge_in_every_way(config, tmp_path / "out", ops=str(OPS))
    delta = merged["w"] - base["w"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 3
    smallest = torch.linalg.svdvals((tuned["w"] - base["w"]).double())[3:]  # Eckart and Young: what is lost
    lost = torch.linalg.norm((tuned["w"] - merged["w"]).double())
    torch.testing.assert_close(lost, torch.linalg.norm(smallest), rtol=1e-5, atol=0)
    torch.testing.assert_close(merged["norm"], tuned["norm"])
