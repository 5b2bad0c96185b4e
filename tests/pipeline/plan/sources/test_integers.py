"""Integers beside the weights: compared while planning, and taken from the donor on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.ops.errors import IntegerOverflowError
from raymerge.pipeline.errors import TensorMismatchError
from tests.checkpoints import add_noise, llama_config, llama_tensors, read_tensors, write_checkpoint

STEPS, INDEX, NARROW = "audio.norm.num_batches_tracked", "audio.index", "audio.narrow"


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Two models whose integers differ."""
    base = llama_tensors(1)
    return [
        str(
            write_checkpoint(
                tmp_path / name,
                {
                    **add_noise(base, steps),
                    STEPS: torch.tensor(steps),
                    INDEX: torch.arange(steps, steps + 8),
                    NARROW: torch.tensor([-100, 7], dtype=torch.int16),
                },
                llama_config(),
                num_shards=2,
            )
        )
        for name, steps in (("a", 1000), ("b", 1500))
    ]


def linear(models: list[str], **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}


def test_differences_are_found_before_anything_is_merged(models: list[str], tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match="add `integers: donor`") as caught:
        merge(linear(models), tmp_path / "out")
    assert f"{STEPS}: 1000 in {models[0]}, 1500 in {models[1]}" in str(caught.value)
    assert f"{INDEX}: [8] of int64, sha256 " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", [0, 1])
def test_the_donors_integers(models: list[str], base: int, tmp_path: Path) -> None:
    config = {"merge_method": "slerp", "base_model": models[base], "models": [{"model": m} for m in models]}
    merge({**config, "parameters": {"t": 0.5}, "integers": "donor"}, tmp_path / "out")
    merged, donor = read_tensors(tmp_path / "out"), read_tensors(Path(models[base]))
    for name in (STEPS, INDEX):
        assert torch.equal(merged[name], donor[name])
    merge(linear(models[::-1], integers="donor"), tmp_path / "linear")
    assert read_tensors(tmp_path / "linear")[STEPS].item() == 1500


@pytest.mark.parametrize(("choice", "steps"), [("max", 1500), ("sum", 2500)])
def test_integers_of_all_models(models: list[str], choice: str, steps: int, tmp_path: Path) -> None:
    for shard_size in (1, 2**20):
        merge(linear(models, integers=choice), tmp_path / str(shard_size), shard_size=shard_size)
    merged, others = (read_tensors(tmp_path / str(shard_size)) for shard_size in (1, 2**20))
    assert (merged[STEPS].item(), merged[STEPS].dtype) == (steps, torch.int64)
    assert merged[INDEX].tolist() == [1500 + k if choice == "max" else 2500 + 2 * k for k in range(8)]
    assert merged[NARROW].tolist() == ([-100, 7] if choice == "max" else [-200, 14])
    assert all(torch.equal(tensor, others[name]) for name, tensor in merged.items())


def test_a_sum_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    narrow = {NARROW: torch.tensor([100], dtype=torch.int8)}
    models = [str(write_checkpoint(tmp_path / name, {**llama_tensors(1), **narrow}, llama_config())) for name in "ab"]
    with pytest.raises(IntegerOverflowError, match=f"{NARROW}: the models' sum does not fit into int8"):
        merge(linear(models, integers="sum"), tmp_path / "out")


def test_equal_integers_are_copied(models: list[str], tmp_path: Path) -> None:
    config = {"merge_method": "linear", "models": [{"model": models[0]}], "parameters": {"weight": 1}}
    merge({**config, "integers": "equal"}, tmp_path / "out")
    plan(linear([models[0], str(tmp_path / "out")]))
