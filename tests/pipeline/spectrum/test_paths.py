from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.spectrum.paths import Methods, parse_path, set_value

TIES = yaml.safe_load("""
merge_method: ties
base_model: org/base
models:
  - model: org/a
  - model: org/b
    parameters: {weight: 0.3, density: 0.5}
parameters: {density: 0.4}
""")
SLERP = yaml.safe_load("""
merge_method: slerp
base_model: org/a
slices:
  - sources: [{model: org/a, layer_range: [0, 2]}, {model: org/b, layer_range: [0, 2]}]
  - sources: [{model: org/a, layer_range: [2, 4]}, {model: org/b, layer_range: [2, 4]}]
    parameters: {t: 0.7}
parameters:
  t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]
""")
MODULES = yaml.safe_load("""
merge_method: linear
modules:
  text_decoder:
    models: [{model: org/a, parameters: {weight: 1}}, {model: org/b}]
    parameters: {weight: 0.5}
""")


METHODS = Methods(("ties", "slerp"), ("t", "weight", "density", "normalize"), {"t", "normalize"})


def set_in(config: dict[str, Any], path: str, value: object) -> Any:
    changed = copy.deepcopy(config)
    set_value(changed, parse_path(path), value, METHODS)
    return changed


@pytest.mark.parametrize("path", ["weight[1]", "models[1].parameters.weight"])
def test_a_number_means_one_model(path: str) -> None:
    changed = set_in(TIES, path, 0.9)
    assert changed["models"][1]["parameters"] == {"weight": 0.9, "density": 0.5}
    assert changed["models"][0] == TIES["models"][0]
    assert set_in(TIES, "weight[0]", 0.9)["models"][0] == {"model": "org/a", "parameters": {"weight": 0.9}}


def test_a_number_means_one_source_of_each_slice() -> None:
    changed = set_in(SLERP, "weight[1]", 0.9)
    assert [part["sources"][1]["parameters"] for part in changed["slices"]] == [{"weight": 0.9}] * 2


def test_a_parameter_by_itself_is_set_for_the_whole_merge() -> None:
    changed = set_in(TIES, "density", 0.2)
    assert changed["parameters"] == {"density": 0.2}
    assert changed["models"][1]["parameters"] == {"weight": 0.3}
    assert set_in(SLERP, "t", [0, 1])["slices"][1]["parameters"] == {}
    changed = set_in(MODULES, "weight", 2)
    assert changed["parameters"] == {"weight": 2}
    assert changed["modules"]["text_decoder"]["parameters"] == {}
    bare: dict[str, Any] = {"modules": {"text_decoder": {"models": []}}}
    changed = set_in(bare, "modules.text_decoder.parameters.weight", 3)
    assert changed["modules"]["text_decoder"]["parameters"]["weight"] == 3
    assert set_in(MODULES, "weight[1]", 2)["modules"]["text_decoder"]["models"][1]["parameters"] == {"weight": 2}


def test_modules_and_slices_of_a_single_model_are_left_alone() -> None:
    copied = copy.deepcopy(MODULES)
    copied["modules"]["vision_tower"] = {"models": [{"model": "org/a"}]}
    changed = set_in(copied, "weight[1]", 2)["modules"]
    assert changed["text_decoder"]["models"][1]["parameters"] == {"weight": 2}
    assert changed["vision_tower"] == {"models": [{"model": "org/a"}]}
    with pytest.raises(ConfigError, match=r"modules.text_decoder.models has 2 models, counted from 0"):
        set_in(copied, "weight[2]", 2)


@pytest.mark.parametrize(
    ("path", "where", "value"),
    [
        ("parameters.density", ["parameters", "density"], 0.2),
        ("slices[1].parameters.t", ["slices", 1, "parameters", "t"], 0.2),
        ("slices[0].parameters.t", ["slices", 0, "parameters", "t"], 0.2),
        ("slices[0].sources[1].layer_range", ["slices", 0, "sources", 1, "layer_range"], [1, 3]),
        ("base_model", ["base_model"], "org/b"),
        ("dtype", ["dtype"], "float16"),
        ("parameters.t[0].value[1]", ["parameters", "t", 0, "value", 1], 0.9),
    ],
)
def test_a_path_is_that_place(path: str, where: list[str | int], value: object) -> None:
    changed = set_in(TIES if "density" in path else SLERP, path, value)
    for step in where:
        changed = changed[step]
    assert changed == value


def test_a_filter_has_a_value_of_its_own() -> None:
    models = copy.deepcopy(SLERP)
    del models["slices"][1]["parameters"]
    assert set_in(models, "t[self_attn]", 0.1)["parameters"]["t"][0] == {"filter": "self_attn", "value": 0.1}
    assert set_in(models, "t[*]", 0.1)["parameters"]["t"][1] == {"value": 0.1}
    assert set_in(models, "t[mlp]", 0.1)["parameters"]["t"][1:] == [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]
    assert set_in(models, 'parameters.t["regex:[13].mlp"]', 1)["parameters"]["t"][1]["filter"] == "regex:[13].mlp"
    assert set_in(TIES, "weight[1][mlp]", 1)["models"][1]["parameters"]["weight"] == [
        {"filter": "mlp", "value": 1},
        {"value": 0.3},
    ]
    with pytest.raises(ConfigError, match=r"slices\[1\].parameters has a t of its own; write slices\[1\].parameters.t"):
        set_in(SLERP, "t[mlp]", 0.1)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("tt", "the config has no 'tt'; did you mean 't'?"),
        ("warmth", "the config has no 'warmth'; ties and slerp take t, weight, density, normalize"),
        ("parameters.warmth", "parameters has no 'warmth'; ties and slerp take t, weight"),
        ("dytpe", "the config has no 'dytpe'; did you mean 'dtype'?"),
        ("wieght[1]", "did you mean 'weight\\[1\\]'"),
        ("parameters.densty", "parameters has no 'densty'; did you mean 'parameters.density'"),
        ("weight[7]", "models has 2 models, counted from 0"),
        ("models[7].parameters.weight", "models has 2 entries, counted from 0"),
        ("models.parameters", "models is .*, and has no 'parameters'"),
        ("modles[0].parameters.weight", "did you mean 'models\\[0\\].parameters.weight'"),
        ("t[self_atn]", "no filter 'self_atn'; did you mean 'self_attn'"),
        (
            "normalize[0]",
            "normalize is one value for all models; weight\\[1\\] is for a parameter of each model:",
        ),
        ("base_model[0]", "base_model is no list"),
        ("models[0][mlp]", "a filter belongs after a parameter"),
        ("", "is no path"),
        ("[0]", "is no path"),
        ("t.", "is no path"),
        ("t t", "is no path"),
    ],
)
def test_a_path_that_names_nothing_is_refused(path: str, said: str) -> None:
    config = copy.deepcopy(SLERP if "self" in path else TIES)
    for part in config.get("slices", ()):
        part.pop("parameters", None)
    with pytest.raises(ConfigError, match=said):
        set_in(config, path, 1)
