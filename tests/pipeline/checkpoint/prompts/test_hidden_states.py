"""Hidden states of prompts, computed a layer at a time, against those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from raymerge.pipeline.checkpoint.checkpoint import resolve_model
from raymerge.pipeline.checkpoint.names import split_name
from raymerge.pipeline.checkpoint.prompts import hidden_states
from raymerge.pipeline.checkpoint.prompts.hidden_states import Request, compute, measure_hidden_states
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.table import index_tensors, list_tensors, read_table
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores
from tests.mixtures import write_family

PROMPTS = ((1, 5, 9, 4, 3), (1, 7), (1, *range(3, 30)), (1,))


def make_request(directory: Path, *, takes_mean: bool = False, **config: Any) -> Request:
    stores = Stores()
    checkpoint = resolve_model(stores, ModelRef(str(directory)))
    table = read_table(stores, {str(directory): checkpoint.weight_files}, lambda *_: None)
    tensors, _ = index_tensors(checkpoint, list_tensors(table)[str(directory)])
    layers: list[dict[str, Source]] = [{}, {}]
    for name, tensor in tensors.items():
        if split := split_name(name):
            layers[split.layer][split.rest] = tensor
    embedding = tensors["model.embed_tokens.weight"]
    return Request(stores, checkpoint.config | config, embedding, tuple(layers), PROMPTS, takes_mean)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("takes_mean", [False, True])
def test_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, takes_mean: bool) -> None:
    [directory] = write_family(tmp_path, family, 1, torch.bfloat16)
    monkeypatch.setattr(hidden_states, "NUM_TOKENS", 20)
    found = compute(make_request(directory, takes_mean=takes_mean))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for k, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in range(2):
            expected = states[layer][0].mean(0) if takes_mean else states[layer][0, -1]
            assert torch.allclose(found[layer, k], expected, atol=1e-5)


@pytest.mark.slow  # transformers is imported in a process of its own
def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    [directory] = write_family(tmp_path, "llama", 1)
    with pytest.raises(CheckpointError, match=r"org/a: transformers cannot compute .*nonesuch"):
        measure_hidden_states("org/a", make_request(directory, model_type="nonesuch"))
