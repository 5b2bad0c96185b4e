"""Adapters as they are stored: what is read, and what is refused with the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge import inspect
from raymerge.pipeline.checkpoint.adapters.adapter import open_adapter, open_adapters
from raymerge.pipeline.checkpoint.files import ADAPTER, ADAPTER_CONFIG
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores
from tests.adapters import draw_factors, write_adapter

FACTORS = draw_factors("model.layers.0.q_proj", 8, 6)


def test_the_tensors_and_the_config(tmp_path: Path) -> None:
    ref = ModelRef(write_adapter(tmp_path / "a", FACTORS, use_rslora=True))
    adapter = open_adapters(Stores(), [ref, ref])[ref]
    assert {tensor.name for tensor in adapter.tensors} == {f"base_model.model.{name}" for name in FACTORS}
    assert adapter.config.scale(4, 6.0) == 3.0
    assert repr(adapter) == f"Adapter({ref}, rank 2)"


def test_shards(tmp_path: Path) -> None:
    path = Path(write_adapter(tmp_path / "a", FACTORS))
    whole = load_file(path / ADAPTER)
    (path / ADAPTER).unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(whole.items()):
        weight_map[name] = f"adapter_model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensor}, path / weight_map[name])
    (path / f"{ADAPTER}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {tensor.name for tensor in open_adapter(Stores(), ModelRef(str(path))).tensors} == set(whole)
    (path / weight_map[name]).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model-00002-of-00002\.safetensors missing"):
        open_adapter(Stores(), ModelRef(str(path)))


def delete(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def pickle(path: Path) -> None:
    (path / ADAPTER).rename(path / "adapter_model.bin")


def make_model(path: Path) -> None:
    (path / ADAPTER_CONFIG).rename(path / "config.json")


def empty(path: Path) -> None:
    save_file({}, path / ADAPTER)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (delete(ADAPTER), r"no adapter_model\.safetensors"),
        (delete(ADAPTER_CONFIG), r"no adapter_config\.json; a LoRA adapter is a directory"),
        (pickle, r"only adapter_model\.bin.*convert it to safetensors"),
        (make_model, "this is a whole model"),
        (empty, "holds no tensors"),
    ],
)
def test_what_is_no_adapter(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_adapter(path, FACTORS)
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(Stores(), ModelRef(str(path)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", r"adapter_config\.json: peft_type is \"LOHA\"; only LORA"),
        ("r", 0, "whole numbers from 1"),
        ("r", "8", "whole numbers from 1"),
        ("lora_alpha", float("inf"), "finite numbers"),
        ("alpha_pattern", {"q": "x"}, "alpha_pattern.*finite numbers"),
        ("rank_pattern", [1], "a mapping of module to number"),
        ("use_dora", "yes", "true or false"),
        ("target_parameters", "x", "a list of names"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("trainable_token_indices", [1], "single trained tokens"),
        ("layer_replication", [[0, 4]], "slices"),
        ("alora_invocation_tokens", [1], "for some tokens only"),
    ],
)
def test_what_cannot_be_applied(field: str, value: Any, message: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", FACTORS, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        open_adapter(Stores(), ModelRef(path))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    path = Path(write_adapter(tmp_path / "a", FACTORS))
    (path / ADAPTER).rename(path / "b.safetensors")
    save_file(
        {"x": torch.ones(1), next(iter(load_file(path / "b.safetensors"))): torch.ones(1)}, path / "c.safetensors"
    )
    index = {"weight_map": {"x": "c.safetensors", "y": "b.safetensors"}}
    (path / f"{ADAPTER}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is in two files"):
        open_adapter(Stores(), ModelRef(str(path)))


def test_inspect_says_what_an_adapter_is_for(tmp_path: Path) -> None:
    other = draw_factors("model.layers.1.q_proj", 8, 6, rank=3)
    path = write_adapter(tmp_path / "a", {**FACTORS, **other, "norm.weight": torch.ones(2)})
    found = inspect(path)
    assert found.obstacle.startswith(
        "a LoRA adapter of rank 2, 3 for 2 modules, and 1 tensor stored whole, trained on 'org/base'"
    )
    assert len(found.tensors) == 5
