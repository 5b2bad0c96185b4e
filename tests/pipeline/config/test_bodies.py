from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymerge.ops.registry import find_op
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.values import resolve
from raymerge.pipeline.errors import ConfigError
from tests.pipeline.config.samples import LINEAR, SLERP


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"text": {"models": []}}, r"modules\.text: models is empty"),
        ({"text": {}}, r"modules\.text: no models are given"),
        ({"text": {"models": LINEAR["models"], "slices": [{}]}}, r"modules\.text: models and slices are given"),
        ({"text": {"models": LINEAR["models"]}, "vision": {}}, r"modules\.vision: no models are given"),
        ({"text": {"models": LINEAR["models"]}, "vision": [1]}, r"modules\.vision: .* a mapping"),
        (["text"], "modules: .* a mapping"),
        ({"text": {"modles": LINEAR["models"]}}, r"modules\.text\.modles: unknown key; did you mean 'models'"),
    ],
)
def test_modules_that_cannot_be(modules: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules})


def test_the_default_module_is_the_whole_model() -> None:
    inner = {"parameters": {"t": {"filter": "mlp", "value": 0.1}}, "slices": SLERP["slices"]}
    outer = {"merge_method": "slerp", "base_model": "org/a", "parameters": {"t": 0.9}}
    config = load_config({**outer, "modules": {"default": inner}}, strict=True)
    (t,) = find_op("slerp").parameters
    assert config.slices == load_config(SLERP).slices
    assert [resolve(t, (config.parameters,), name, 0.0) for name in ("mlp.up", "norm")] == [0.1, 0.9]
    assert config.notes == ()
    run = {"merge_method": "linear", "modules": {"default": {"models": LINEAR["models"]}}}
    assert load_config(run, strict=True).models == load_config(LINEAR).models


def test_modules_have_models_and_parameters_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(
        "merge_method: ties\nbase_model: b\nparameters: {weight: 0.5, density: 1}\ncopy_rest_from: vl\nmodules:\n"
        "  text_decoder:\n    parameters: {density: 0.2}\n    models: [{model: a}, {model: vl}]\n"
        "  vision_tower: {models: [{model: c}]}\n"
        "  visual.merger: {models: [{model: b}]}\n"
    )
    config = load_config(path, strict=True)
    text, _, _ = config.modules
    assert (config.models, config.slices, str(config.copy_rest_from)) == ((), (), "vl")
    assert [str(model) for model in config.referenced_models] == ["vl", "b", "a", "c"]
    assert [entry.model.path for entry in text.models] == ["a", "vl"]
    density = next(parameter for parameter in find_op("ties").parameters if parameter.name == "density")
    assert [resolve(density, (part.parameters,), "w", 0.0) for part in config.modules] == [0.2, 1, 1]
    assert [part.place for part in config.modules] == [
        "merge.yml:6: modules.text_decoder",
        "merge.yml:9: modules.vision_tower",
        "merge.yml:10: modules.visual.merger",
    ]
    assert [part.is_copied for part in config.modules] == [False, False, True], "ties of the base alone"


@pytest.mark.parametrize(
    ("method", "more", "is_copied"),
    [
        ("linear", {}, True),
        ("linear", {"parameters": {"weight": 1}}, False),
        ("passthrough", {}, False),
        ("nuslerp", {}, True),
        ("karcher", {}, False),
        ("slerp", {"base_model": "a", "parameters": {"t": 0.5}}, False),
        ("slerp", {"base_model": "b", "parameters": {"t": 0.5}}, True),
    ],
)
def test_a_module_of_one_model_needs_no_more_than_that(method: str, more: dict[str, Any], is_copied: bool) -> None:
    both = [{"model": "a"}, {"model": "b"}] if method != "passthrough" else [{"model": "a"}]
    weights = {"parameters": {"weight": 1}} if method in ("linear", "nuslerp") else {}
    modules = {"text": {"models": both, **weights}, "vision": {"models": [{"model": "b"}]}}
    config = load_config({"merge_method": method, **more, "modules": modules})
    assert [part.is_copied for part in config.modules] == [False, is_copied]


def test_modules_that_leave_nothing_to_merge() -> None:
    modules = {name: {"models": [{"model": "a"}]} for name in ("text", "vision")}
    with pytest.raises(
        ConfigError, match="each module has one model, and nuslerp merges more; write `merge_method: pa"
    ):
        load_config({"merge_method": "nuslerp", "parameters": {"weight": 1}, "modules": modules})
