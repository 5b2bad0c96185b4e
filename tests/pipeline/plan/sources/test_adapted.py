"""Weighted sums of one base with different adapters: the base is read once, and the values are those of the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import plan
from raymerge.testing import merge_in_every_way, write_model
from tests.adapters import draw_factors, write_adapter

SHAPES = {"layers.0.q.weight": (40, 30), "layers.0.k.weight": (10, 30)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of two bases and of four models with adapters, by their names in configs."""
    directory = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number in range(2):
        base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        path = write_model(directory / f"base{number}", base)
        found[path] = base
        for k in range(3 - 2 * number):
            factors = draw_factors("layers.0.q", 40, 30, rank=2, seed=10 * number + k)
            adapter = write_adapter(directory / f"adapter{number}{k}", factors)
            update = 2 * factors["layers.0.q.lora_B.weight"] @ factors["layers.0.q.lora_A.weight"]
            found[f"{path}+{adapter}"] = {**base, "layers.0.q.weight": base["layers.0.q.weight"] + update}
    return found


def make_config(method: str, names: list[str], weights: list[float], **more: Any) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, weights, strict=True)]
    return {"merge_method": method, "models": entries, **more}


def count_sources(config: dict[str, Any]) -> dict[str, int]:
    return {merge.name: len(merge.sources) for task in plan(config).tasks for merge in task.merges}


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2, 1.0, 0.7, 0.1], [1.0, -1.0, 0.5, -0.5, 1.0, 1.0]])
def test_linear(models: dict[str, dict[str, torch.Tensor]], weights: list[float], tmp_path: Path) -> None:
    names = list(models)
    config = make_config("linear", names, weights)
    cancels = sum(weights[:4]) == 0
    assert count_sources(config) == dict.fromkeys(SHAPES, 5 if cancels else 2)
    merged = merge_in_every_way(config, tmp_path / "out")
    for name, values in merged.items():
        pairs = zip(names, weights, strict=True)
        expected = sum(weight * models[model][name].double() for model, weight in pairs) / sum(weights)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(models: dict[str, dict[str, torch.Tensor]], normalize: bool, tmp_path: Path) -> None:
    base, *names = list(models)[:4]
    weights = [0.5, -0.2, 0.9]
    more = {"base_model": base, "parameters": {"lambda": 0.7, "normalize": normalize}}
    config = make_config("task_arithmetic", names, weights, **more)
    assert count_sources(config) == dict.fromkeys(SHAPES, 1)
    merged = merge_in_every_way(config, tmp_path / "out")
    total = sum(weights) if normalize else 1
    for name, values in merged.items():
        x = models[base][name].double()
        pairs = zip(names, weights, strict=True)
        deltas = sum(weight * (models[model][name].double() - x) for model, weight in pairs)
        torch.testing.assert_close(values.double(), x + 0.7 * deltas / total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.1 + 0.2, -0.3]])
def test_weights_that_cancel_divide_nothing(
    models: dict[str, dict[str, torch.Tensor]], weights: list[float], tmp_path: Path
) -> None:
    base, *names = list(models)[:3]
    config = make_config("task_arithmetic", names, weights, base_model=base, parameters={"normalize": True})
    merged = merge_in_every_way(config, tmp_path / "out")
    for name, values in merged.items():
        deltas = sum(w * (models[model][name] - models[base][name]) for model, w in zip(names, weights, strict=True))
        torch.testing.assert_close(values, models[base][name] + deltas, rtol=1e-5, atol=1e-5)


def test_another_base_is_merged_as_ever(models: dict[str, dict[str, torch.Tensor]]) -> None:
    config = make_config("task_arithmetic", list(models)[1:4], [1, 1, 1], base_model=list(models)[4])
    assert count_sources(config) == dict.fromkeys(SHAPES, 4)
    assert count_sources({**config, "merge_method": "ties", "parameters": {"density": 0.5}})["layers.0.q.weight"] == 4
