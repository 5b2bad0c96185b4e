"""An element-wise op: one function of the values, and a line that says what the YAML may give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.testing import merge_in_every_way, write_model
from tests.seams.merging import draw

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


def test_the_content_of_the_file_decides_what_a_merge_is(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, {"w": draw(9, seed=seed)}) for seed, name in enumerate(("base", "tuned"))]
    config = {"merge_method": "clipped", "base_model": models[0], "models": [{"model": models[1]}]}
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(OPS.read_text())
    other.write_text(OPS.read_text().replace("clamp_(-limit", "clamp_(-0.5 * limit"))
    fingerprints = [plan(config, ops=str(file)).fingerprint for file in (OPS, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    merge(config, tmp_path / "out", ops=str(OPS))
    with pytest.raises(OutputError, match="--overwrite"):
        merge(config, tmp_path / "out", ops=str(other))
    with pytest.raises(ConfigError, match="'clipped' is unknown"):
        merge(config, tmp_path / "out")
