"""Configs of mixtures of experts, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymerge import ConfigError
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import Expert
from raymerge.pipeline.config.reader import load_config

A, B, C = (ModelRef(f"org/{name}") for name in "abc")


def make(**changes: Any) -> dict[str, Any]:
    experts = [
        {"source_model": "org/b", "positive_prompts": ["code"]},
        {"source_model": "org/c", "positive_prompts": ["prose", "verse"]},
    ]
    return {"base_model": "org/a", "experts": experts} | changes


def explain(config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    return str(caught.value)


def test_is_told_by_its_keys() -> None:
    config = load_config(make())
    assert config.mixture is not None
    assert (config.method, config.base_model, config.referenced_models) == ("moe", A, (A, B, C))
    assert (config.mixture.gate_mode, config.mixture.experts_per_token) == ("hidden_last", 2)
    assert config.mixture.experts[1] == Expert(C, ("prose", "verse"), (), 1.0, 0.0)
    assert load_config(make(merge_method="moe")).mixture == config.mixture
    assert config.warnings == ()


def test_every_key() -> None:
    expert = {"source_model": "org/b@v1", "negative_prompts": ["x"], "residual_scale": "1e-1", "noise_scale": 2}
    config = load_config(
        make(
            experts=[expert],
            shared_experts=[{"source_model": "./a", "positive_prompts": ["y"]}],
            gate_mode="uniform_random",
            experts_per_token=1,
            architecture="Qwen MoE",
            dtype="bfloat16",
        ),
        strict=True,
    )
    assert config.mixture is not None
    assert config.mixture.experts == (Expert(ModelRef("org/b", "v1"), (), ("x",), 0.1, 2.0),)
    assert config.mixture.shared_experts[0].positive_prompts == ("y",)
    assert (config.mixture.architecture, config.dtype) == ("qwen", "BF16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": None}, "base_model: is missing: the model that gives all but the experts"),
        ({"experts": []}, "experts: no experts are given"),
        ({"experts": ["org/b", "org/c"]}, 'experts[0]: "org/b" is given, a mapping is needed'),
        ({"experts": [{"model": "org/b"}]}, "experts[0].model: unknown key; did you mean 'source_model'?"),
        ({"experts": [{"noise_scale": 0}]}, "experts[0].source_model: no model is named"),
        ({"experts": [{"source_model": "org/b"}]}, "experts[0].positive_prompts: no prompts are given"),
        ({"gate_mode": "hiden"}, "gate_mode: 'hiden' is unknown; did you mean 'hidden'?"),
        ({"architecture": "llama"}, 'architecture: "llama" is unknown'),
        ({"experts_per_token": 3}, "each token passes through 3, and there are 2 experts"),
        ({"experts_per_token": 0}, "experts_per_token: 0 is given"),
        ({"experts_per_token": True}, "experts_per_token: true is given"),
        ({"merge_method": "ties", "models": [{"model": "org/b"}]}, 'merge_method: "ties" is given, and experts make'),
    ],
)
def test_what_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    assert message in explain(make(**changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("residual_scale", "much", 'experts[1].residual_scale: "much" is given, a number is needed'),
        ("noise_scale", -1, "experts[1].noise_scale: -1 is given; a standard deviation is 0 or more"),
        ("noise_scale", float("inf"), "a number is needed"),
        ("positive_prompts", "code", 'experts[1].positive_prompts: "code" is given, a list is needed'),
        ("positive_prompts", [7], "experts[1].positive_prompts[0]: 7 is given, a string is needed"),
    ],
)
def test_a_wrong_expert(key: str, value: Any, message: str) -> None:
    config = make()
    config["experts"][1] |= {key: value}
    assert message in explain(config)


def test_a_prompt_may_be_empty() -> None:
    config = make(experts=[{"source_model": name, "positive_prompts": ["", " "]} for name in ("org/b", "org/c")])
    assert (mixture := load_config(config | {"gate_mode": "random"}, strict=True).mixture)
    assert mixture.experts[0].positive_prompts == ("", " ")


def test_all_mistakes_are_told_at_once() -> None:
    config = make(gate_mode="x", experts_per_token=9)
    config["experts"][0]["residual_scale"] = "y"
    assert [part in explain(config) for part in ("gate_mode", "experts_per_token", "residual_scale")] == [True] * 3


def test_doubts() -> None:
    same = make()
    same["experts"][1]["positive_prompts"] = ["code"]
    [warning] = load_config(same).warnings
    assert "org/c has the prompts of experts[0], org/b" in warning
    assert load_config(same | {"gate_mode": "random"}).warnings == ()
    [warning] = load_config(make(experts=[{"source_model": "org/b"}] * 3, gate_mode="random")).warnings
    assert "all 3 experts are org/b" in warning
    [warning] = load_config(make(merge_method="linear")).warnings
    assert 'merge_method: "linear" is given, and experts make a mixture: ignored' in warning
    [warning] = load_config(make(parameters={"t": 1})).warnings
    assert "parameters: unknown key" in warning


def test_one_expert_needs_no_second(tmp_path: Path) -> None:
    config = make()
    config["experts"].pop()
    assert "each token passes through 2 by default, and there is 1 expert" in explain(config)
