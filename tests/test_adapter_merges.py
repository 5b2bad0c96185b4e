"""LoRA adapters merged among each other: what peft's add_weighted_adapter gives, and peft loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raymerge import merge, verify

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 9, "target_modules": LINEAR},
    "two": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True},
    "like one": {"r": 4, "lora_alpha": 9, "target_modules": LINEAR},
    "wide": {
        "r": 6,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
}
WEIGHTS = {"one": 0.7, "two": -0.4, "like one": 0.7, "wide": 1.3}
EQUAL = dict.fromkeys(SETTINGS, 1.0)
"""For `ties`: peft multiplies the average of what agrees with the weights, and elects signs before it scales."""
SUM = {"merge_method": "task_arithmetic", "adapter": {}}
FACTORS = {"adapter": {"merge": "factors"}}
TRIM = {"density": 0.5}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "cat": ("cat", ("one", "two", "wide"), SUM, {}),
    "svd": ("svd", ("one", "two", "wide"), {**SUM, "adapter": {"rank": 5}}, {"svd_rank": 5}),
    "linear": ("linear", ("one", "two"), {**SUM, **FACTORS}, {}),
    "ties": ("ties", ("one", "like one"), {"merge_method": "ties", **FACTORS, "parameters": TRIM}, {"density": 0.5}),
    "magnitude prune": (
        "magnitude_prune",
        ("one", "two"),
        {"merge_method": "breadcrumbs", **FACTORS, "parameters": {"density": 0.5, "gamma": 0.0}},
        {"density": 0.5},
    ),
}
TRIMMED = {
    "ties": ("ties_svd", {"merge_method": "ties", "parameters": TRIM}),
    "magnitude prune": (
        "magnitude_prune_svd",
        {"merge_method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 0.0}},
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore peft's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(directory: Path, names: tuple[str, ...]) -> Any:
    """Return a model of peft with some adapters, each of which is saved in a directory of its name."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with quiet():
        first, *others = names
        tuned = peft.get_peft_model(model, _settings(first), adapter_name=first)
        for name in others:
            tuned.add_adapter(name, _settings(name))
        for name in names:
            tuned.save_pretrained(directory, selected_adapters=[name])
    return tuned


def _settings(name: str) -> Any:
    return peft.LoraConfig(init_lora_weights=False, **SETTINGS[name])


def read_updates(tuned: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the updates of an adapter by module."""
    layers = {module: layer for module, layer in tuned.named_modules() if hasattr(layer, "get_delta_weight")}
    with torch.no_grad():
        return {
            module: layer.get_delta_weight(name)
            for module, layer in layers.items()
            if name in layer.lora_A or name in layer.lora_embedding_A
        }


def list_models(directory: Path, weights: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"model": str(directory / name), "parameters": {"weight": weights[name]}}
        for name in SETTINGS
        if (directory / name).exists()
    ]


def combine(
    tuned: Any, directory: Path, kind: str, names: tuple[str, ...], weights: dict[str, float], **more: Any
) -> Any:
    """Have peft combine adapters, and load what raymerge has made; return the updates of both."""
    with quiet():
        tuned.add_weighted_adapter(list(names), [weights[name] for name in names], "theirs", kind, **more)
        tuned.load_adapter(directory / "out", "ours")
    verify(directory / "out")
    return read_updates(tuned, "theirs"), read_updates(tuned, "ours")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "svd" else pytest.mark.slow) for name in CASES]
)
def test_the_updates_are_those_of_peft(case: str, tmp_path: Path) -> None:
    kind, names, config, more = CASES[case]
    tuned = save(tmp_path, names)
    weights = EQUAL if kind == "ties" else WEIGHTS
    merge({**config, "models": list_models(tmp_path, weights)}, tmp_path / "out")
    theirs, ours = combine(tuned, tmp_path, kind, names, weights, **more)
    assert theirs.keys() == ours.keys()
    for module, update in theirs.items():
        torch.testing.assert_close(ours[module], update, rtol=1e-4, atol=1e-5 * float(update.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("case", TRIMMED)
def test_trimmed_updates_are_as_near_as_those_of_peft(case: str, tmp_path: Path) -> None:
    """The nearest product of a rank has a spectrum without gaps to find its directions by; its error is what counts."""
    kind, config = TRIMMED[case]
    tuned = save(tmp_path, ("one", "two"))
    parts = list_models(tmp_path, EQUAL)
    merge({**config, "adapter": {"rank": 4}, "models": parts}, tmp_path / "out")
    theirs, ours = combine(tuned, tmp_path, kind, ("one", "two"), EQUAL, density=0.5, svd_rank=4)
    merge({**config, "adapter": {"rank": 64}, "models": parts}, tmp_path / "whole")
    with quiet():
        tuned.load_adapter(tmp_path / "whole", "whole")
    for module, whole in read_updates(tuned, "whole").items():
        missing = [float((whole - found[module]).norm() / whole.norm()) for found in (theirs, ours)]
        assert missing[1] == pytest.approx(missing[0], rel=1e-3)
