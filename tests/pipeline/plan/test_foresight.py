"""Kernels guessed from a config are those of the plan, as far as loops are concerned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.plan.foresight import guess_kernels
from tests.method_configs import METHODS, make_config
from tests.pipeline.plan.layouts import expand_layouts, llama

SLICES = {
    "merge_method": "slerp",
    "base_model": "a",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 1]}]},
        {
            "sources": [{"model": "a", "layer_range": [1, 2]}, {"model": "b", "layer_range": [1, 2]}],
            "parameters": {"t": {"value": 0.1}},
        },
    ],
    "parameters": {"t": [{"filter": "mlp", "value": 0.2}, {"value": [0, 1]}]},
}
FILTERED = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": {"filter": "mlp", "value": 1}}} for name in "ab"],
}
"""Which fails, for other tensors have no weight."""


@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_of_the_planned_kind(method: str) -> None:
    written = make_config(method, [Path("a"), Path("b"), Path("c")])
    config = load_config(written)
    guessed = list(guess_kernels(config))
    planned = {
        (variant.kernel, len(merge.sources))
        for merge in expand_layouts(written, {name: llama() for name in "abc"}).merges
        for variant in merge.variants
    }
    assert {(type(kernel), n) for kernel, n in guessed} == {(type(kernel), n) for kernel, n in planned}
    assert method == "slerp" or {*guessed} == planned  # slerp's t follows the layers


@pytest.mark.parametrize(("config", "expected"), [(SLICES, [(0.5,), (0.1,)]), (FILTERED, [])])
def test_each_slice_has_its_own(config: dict[str, Any], expected: list[tuple[float]]) -> None:
    guessed = list(guess_kernels(load_config(config)))
    assert [getattr(kernel, "parameters", None) for kernel, _ in guessed] == expected
