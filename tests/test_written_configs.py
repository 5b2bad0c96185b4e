"""Configs as people write them: shorter, longer or otherwise than the tidy ones, and what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.ops.errors import OpParameterError
from raymerge.pipeline.errors import ConfigError
from tests.checkpoints import read_tensors, write_family
from tests.tokenized_models import write_family as write_tokenized_family

WHOLE = {"layer_range": [0, 2]}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "parameters": {"t": [{"filter": "mlp", "value": 0.2}, {"value": 0.7}]},
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and two fine-tunes, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return [path.name for path in write_family(tmp_path, 2)]


def same(config: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Tell whether two configs give the same tensors."""
    ours, theirs = (Path(f"out{k}") for k in range(2))
    merge(config, ours, workers=1, overwrite=True)
    merge(expected, theirs, workers=1, overwrite=True)
    found, wanted = read_tensors(ours), read_tensors(theirs)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_slerp_of_two_models_without_a_base(names: list[str]) -> None:
    models = [{"model": name} for name in names[1:]]
    with_base = {**SLERP, "models": models, "base_model": names[1]}
    assert same({**SLERP, "models": models}, with_base)
    slices = [{"sources": [{**model, **WHOLE} for model in models]}]
    assert same({**SLERP, "slices": slices}, with_base)
    (note,) = plan({**SLERP, "slices": slices}).notes
    assert note == "base_model is not given, so the first model, tuned1, is the base (t = 0)"


def test_linear_without_weights(names: list[str]) -> None:
    config: dict[str, Any] = {"merge_method": "linear", "models": [{"model": name} for name in names]}
    assert same(config, {**config, "parameters": {"weight": 1.0}})


def test_one_module_of_slices_without_ranges(names: list[str]) -> None:
    base, *others = names
    sources = [{"model": name, "parameters": {"weight": 0.5, "density": 0.6}} for name in others]
    ties: dict[str, Any] = {"merge_method": "ties", "base_model": base, "dtype": "fp32"}
    module = {"slices": [{"sources": [*sources, {"model": f"./{base}/"}]}]}
    assert same({**ties, "name": "step1", "modules": {"default": module}}, {**ties, "models": sources})


def test_weights_of_0(names: list[str]) -> None:
    def config(*weights: float) -> dict[str, Any]:
        models = [
            {"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, weights, strict=False)
        ]
        return {"merge_method": "linear", "models": models}

    assert same(config(1, 0, 0), {"merge_method": "passthrough", "models": [{"model": names[0]}]})
    with pytest.raises(OpParameterError, match=r"the weights 0\.0, 0\.0 sum to 0"):
        plan(config(0, 0))


def test_sources_of_different_lengths(names: list[str]) -> None:
    sources = [{"model": names[0]}, {"model": names[1], "layer_range": [0, 1]}]
    config = {"merge_method": "linear", "slices": [{"sources": sources}]}
    with pytest.raises(
        ConfigError, match=r"\[0\]\.sources\[1\]\.layer_range: \[0, 1\] of tuned1 is 1 layer, but the fir"
    ):
        plan(config)


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_a_tokenizer_of_a_model_as_it_was_first_written(tmp_path: Path, key: str) -> None:
    names = [str(model) for model in write_tokenized_family(tmp_path)]

    def config(source: str) -> dict[str, Any]:
        models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
        return {"merge_method": "linear", "models": models, key: source if key != "tokenizer" else {"source": source}}

    assert plan(config(f"model:{names[1]}")).vocabulary == plan(config(names[1])).vocabulary


def test_of_a_key_given_twice_the_last_counts(names: list[str]) -> None:
    text = f"""merge_method: ties
models:
  - model: {names[0]}
    parameters: {{weight: 0.5, weight: 0.25}}
  - model: {names[1]}
merge_method: linear
parameters:
  t: 0.5
parameters:
  weight: 1.0
"""
    models = [{"model": names[0], "parameters": {"weight": 0.25}}, {"model": names[1]}]
    expected = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    assert plan(text).fingerprint == plan(expected).fingerprint
    assert plan(text).warnings == (
        "line 4: weight: is there already, on line 4; the last one counts",
        "line 6: merge_method: is there already, on line 1; the last one counts",
        "line 9: parameters: is there already, on line 7; the last one counts",
    )
    with pytest.raises(ConfigError, match="refused because of strict"):
        plan(text, strict=True)


def test_json_indented_by_tabs(names: list[str]) -> None:
    config = {**SLERP, "base_model": names[0], "models": [{"model": name} for name in names[:2]]}
    Path("merge.json").write_text(json.dumps(config, indent="\t"))
    assert plan("merge.json").fingerprint == plan(config).fingerprint


def test_all_that_is_wrong_is_told_in_one_message(names: list[str]) -> None:
    config = {
        "merge_method": "ties",
        "base_modl": names[0],
        "models": [{"model": names[1], "weight": 1}],
        "dtype": "bfloat",
        "sliding": True,
    }
    with pytest.raises(ConfigError) as refused:
        plan(config)
    told = str(refused.value)
    for what in ("base_modl: unknown key; did you mean 'base_model'", "models[0].weight", "dtype: 'bfloat'", "sliding"):
        assert what in told
