"""Adapters merged among each other: which tensors result, and what is refused with the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import RaymergeError, merge, plan
from raymerge.pipeline.errors import CheckpointError, ConfigError, TensorMismatchError
from raymerge.pipeline.plan.report import format_plan
from raymerge.testing import read_model, write_model
from tests.adapters import draw_factors, write_adapter

Q, UP = "model.layers.0.q_proj", "model.layers.1.up_proj"
WHOLE = torch.arange(6.0)


def merge_adapters(tmp_path: Path, *models: str, **config: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter that is made of some, without the beginning of their names."""
    given = {"merge_method": "linear", "models": [{"model": model} for model in models], **config}
    merge(given, tmp_path / "out", workers=1)
    tensors = read_model(tmp_path / "out")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def update(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def read_config(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    return found


def test_ranks_and_modules_that_differ(tmp_path: Path) -> None:
    one = {**draw_factors(Q, 12, 8, seed=1), **draw_factors(UP, 20, 8, seed=2)}
    two = draw_factors(Q, 12, 8, 3, seed=3)
    models = write_adapter(tmp_path / "1", one), write_adapter(tmp_path / "2", two, r=3, lora_alpha=6)
    config = {"merge_method": "linear", "models": [{"model": model} for model in models], "parameters": {"weight": 1}}
    assert "the adapter changes 2 modules: rank 5 for 1, rank 2 for 1" in format_plan(plan(config))
    merged = merge_adapters(tmp_path, *models, parameters={"weight": 1})
    torch.testing.assert_close(update(merged, Q), update(one, Q) + update(two, Q))
    torch.testing.assert_close(update(merged, UP), update(one, UP))
    found = read_config(tmp_path)
    assert (found["r"], found["lora_alpha"], found["rank_pattern"]) == (5, 5, {UP: 2})
    assert found["target_modules"] == [Q, UP]
    assert found["base_model_name_or_path"] == "org/base"


def test_gradients_run_up_to_the_last_layer_that_is_changed(tmp_path: Path) -> None:
    models = [write_adapter(tmp_path / str(layer), draw_factors(f"h.{layer}.q", 12, 8)) for layer in (2, 4)]
    weights = {"weight": [0, 1]}
    merged = merge_adapters(tmp_path, *models, merge_method="task_arithmetic", adapter={}, parameters=weights)
    expected = 2 * update(draw_factors("q", 12, 8), "q")
    torch.testing.assert_close(update(merged, "h.2.q"), 0.5 * expected)
    torch.testing.assert_close(update(merged, "h.4.q"), expected)
    config = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    assert "gradients" not in format_plan(plan(config))
    assert "gradients run over the layers up to" in format_plan(plan({**config, "parameters": {"weight": [1, 2]}}))


def test_no_more_ranks_than_rows_or_columns(tmp_path: Path) -> None:
    factors = [draw_factors(Q, 12, 5, seed=seed) for seed in range(8)]
    models = [write_adapter(tmp_path / str(k), tensors) for k, tensors in enumerate(factors)]
    merged = merge_adapters(tmp_path, *models, parameters={"weight": 1, "normalize": False})
    assert merged[f"{Q}.lora_A.weight"].shape == (5, 5)
    expected = sum(2 * update(tensors, Q) for tensors in factors)
    torch.testing.assert_close(update(merged, Q), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_convolutions_and_biases_of_updates(tmp_path: Path) -> None:
    tensors = [
        {
            "embed.lora_embedding_A": torch.randn(2, 11),
            "embed.lora_embedding_B": torch.randn(6, 2),
            "embed.base_layer.weight": torch.ones(11, 6),
            "conv.lora_A.weight": torch.randn(2, 3, 2, 2),
            "conv.lora_B.weight": torch.randn(4, 2, 1, 1),
            **draw_factors(Q, 12, 8, seed=seed),
            **({f"{Q}.lora_B.bias": torch.randn(12)} if seed else {}),
        }
        for seed in range(2)
    ]
    models = [write_adapter(tmp_path / str(k), each, lora_bias=True) for k, each in enumerate(tensors)]
    merged = merge_adapters(tmp_path, *models, parameters={"weight": 0.5})
    torch.testing.assert_close(
        merged["embed.lora_embedding_B"] @ merged["embed.lora_embedding_A"],
        sum(each["embed.lora_embedding_B"] @ each["embed.lora_embedding_A"] for each in tensors),
    )
    assert torch.equal(merged["embed.base_layer.weight"], tensors[0]["embed.base_layer.weight"])
    assert (merged["conv.lora_A.weight"].shape, merged["conv.lora_B.weight"].shape) == ((4, 3, 2, 2), (4, 4, 1, 1))
    torch.testing.assert_close(merged[f"{Q}.lora_B.bias"], tensors[1][f"{Q}.lora_B.bias"])
    assert read_config(tmp_path)["lora_bias"] is True
    torch.testing.assert_close(update(merged, Q), sum(update(each, Q) for each in tensors))


def test_whole_tensors_are_averaged(tmp_path: Path) -> None:
    models = [
        write_adapter(tmp_path / str(k), {**draw_factors(Q, 12, 8), "norm.weight": WHOLE * k, f"{Q}.bias": WHOLE + k})
        for k in (1, 2)
    ]
    merged = merge_adapters(tmp_path, *models, parameters={"weight": 0.25})
    torch.testing.assert_close(merged["norm.weight"], WHOLE * 1.5)
    torch.testing.assert_close(merged[f"{Q}.base_layer.bias"], WHOLE + 1.5)
    found = read_config(tmp_path)
    assert (found["modules_to_save"], found["bias"]) == (["norm"], "all")


def test_a_whole_tensor_of_one_adapter_with_all_the_weight_there_is(tmp_path: Path) -> None:
    models = [write_adapter(tmp_path / "1", {**draw_factors(Q, 12, 8), "norm.weight": WHOLE})]
    models.append(write_adapter(tmp_path / "2", draw_factors(Q, 12, 8)))
    merged = merge_adapters(tmp_path, *models, merge_method="task_arithmetic", adapter={}, parameters={"weight": 1})
    assert torch.equal(merged["norm.weight"], WHOLE)


FACTORS = draw_factors(Q, 12, 8)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], type[RaymergeError], str]] = {
    "shapes": (
        draw_factors(Q, 12, 9),
        {},
        {},
        TensorMismatchError,
        rf"{Q} is \[12, 8\] in .*one and \[12, 9\] in",
    ),
    "bases": (
        draw_factors(Q, 12, 9),
        {"base_model_name_or_path": "org/other"},
        {},
        TensorMismatchError,
        "different models, 'org/base' and 'org/other'",
    ),
    "turned": (FACTORS, {"fan_in_fan_out": True}, {}, TensorMismatchError, "fan_in_fan_out is false in .* and true in"),
    "DoRA": (
        {**FACTORS, f"{Q}.lora_magnitude_vector.weight": torch.ones(12)},
        {"use_dora": True},
        {},
        CheckpointError,
        rf"two: {Q} has DoRA's norms .* `model: BASE\+ADAPTER`",
    ),
    "experts": (
        FACTORS,
        {"target_parameters": ["up"]},
        {},
        CheckpointError,
        r"target_parameters is \['up",
    ),
    "rank": (FACTORS, {"r": 3}, {}, CheckpointError, "factors of rank 2, and adapter_config.json says 3"),
    "ranks of factors": (
        draw_factors(Q, 12, 8, 3),
        {"r": 3},
        {"adapter": {"merge": "factors"}},
        TensorMismatchError,
        f"{Q} has rank 2 in .*one and 3 in .*two",
    ),
    "half of a whole tensor": (
        {**FACTORS, "norm.weight": WHOLE},
        {},
        {},
        TensorMismatchError,
        r"norm\.weight is stored whole in .*two .* add up to 0\.5",
    ),
    "an update of what another adapter stores whole": (
        {**draw_factors(UP, 20, 8), f"{Q}.weight": torch.ones(12, 8)},
        {},
        {},
        TensorMismatchError,
        rf"{Q}\.weight is stored whole in .*two \(modules_to_save\), and .*one has an update of the base's",
    ),
    "a whole tensor and ties": (
        {**FACTORS, "norm.weight": WHOLE},
        {},
        {"merge_method": "ties", "adapter": {}},
        TensorMismatchError,
        "ties needs what it changes in the base's",
    ),
    "a bias of another size": (
        {**FACTORS, f"{Q}.lora_B.bias": torch.ones(3)},
        {},
        {},
        TensorMismatchError,
        r"lora_B\.bias \[3\] does not fit",
    ),
    "a base": (FACTORS, {}, {"adapter": {}, "base_model": "org/base"}, ConfigError, "base_model: `adapter` makes one"),
    "no base": (FACTORS, {}, {"merge_method": "ties"}, ConfigError, "needs a base model.* `adapter: {}`"),
    "a template": (
        FACTORS,
        {},
        {"adapter": {}, "chat_template": "chatml"},
        ConfigError,
        "chat_template: `adapter` makes",
    ),
    "rank and factors": (FACTORS, {}, {"adapter": {"merge": "factors", "rank": 2}}, ConfigError, "keep their rank"),
    "no rank": (FACTORS, {}, {"adapter": {"rank": 0}}, ConfigError, r"adapter\.rank: 0 is given"),
    "no way": (FACTORS, {}, {"adapter": {"merge": "factor"}}, ConfigError, "did you mean 'factors'"),
    "no mapping": (FACTORS, {}, {"adapter": 16}, ConfigError, r"write `adapter: \{rank: 16\}`"),
    "statistics": (FACTORS, {}, {"merge_method": "fisher", "adapter": {}}, ConfigError, "fisher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    tensors, settings, more, error, message = REFUSED[case]
    models = write_adapter(tmp_path / "one", FACTORS), write_adapter(tmp_path / "two", tensors, **settings)
    config = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": model} for model in models]}
    with pytest.raises(error, match=message):
        plan({**config, **more})


def test_adapters_among_models(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", FACTORS)
    model = str(write_model(tmp_path / "model", {f"{Q}.weight": torch.ones(12, 8)}))
    for names in ((adapter, model), (model, adapter)):
        with pytest.raises(CheckpointError, match=r"adapter: a LoRA adapter .* as MODEL\+ADAPTER"):
            plan({"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": name} for name in names]})
    config = {"merge_method": "task_arithmetic", "base_model": model, "models": [{"model": adapter}]}
    with pytest.raises(ConfigError, match=r"model\+.*adapter`; for an adapter, write `adapter: \{\}`"):
        plan({**config, "parameters": {"weight": 1}})
    with pytest.raises(CheckpointError, match="a whole model"):
        plan({"merge_method": "linear", "adapter": {}, "parameters": {"weight": 1}, "models": [{"model": model}]})
    models: dict[str, Any] = {"models": [{"model": adapter}]}
    for more in ({**models, "copy_rest_from": model}, {"modules": {"text_decoder": models}}):
        with pytest.raises(CheckpointError, match=r"as MODEL\+ADAPTER"):
            plan({"merge_method": "linear", "parameters": {"weight": 1}, **more})


def test_documents_of_adapters_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {f"{Q}.weight": torch.ones(12, 8)})
    models = f"merge_method: passthrough\nmodels: [{{model: {model}}}]"
    with pytest.raises(ConfigError, match="`adapter` goes with a single document"):
        plan(f"name: first\nadapter: {{}}\n{models}\n---\nmerge_method: passthrough\nmodels: [{{model: first}}]\n")


def test_other_bases_and_modules_are_a_warning(tmp_path: Path) -> None:
    names = ["org/base-7b", "other/base-7b-bnb-4bit", "org/base-8b", "/data/base"]
    models = [
        write_adapter(tmp_path / str(k), draw_factors(UP if k == 3 else Q, 12, 8), base_model_name_or_path=name)
        for k, name in enumerate(names)
    ]
    config = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": model} for model in models]}
    other, module = plan(config).warnings
    assert f"{models[2]} was trained on 'org/base-8b', and {models[0]} on 'org/base-7b'" in other
    assert f"{models[3]} has no module in common with the other adapters: it changes {UP}, and they" in module


def test_rows_that_updates_are_added_to_are_equal(tmp_path: Path) -> None:
    tensors = {"embed.lora_embedding_A": torch.ones(2, 11), "embed.lora_embedding_B": torch.ones(6, 2)}
    models = [
        write_adapter(tmp_path / str(k), {**tensors, "embed.base_layer.weight": torch.full((11, 6), float(k))})
        for k in range(2)
    ]
    with pytest.raises(TensorMismatchError, match=r"embed\.base_layer\.weight, which updates are added to, differs"):
        merge_adapters(tmp_path, *models, parameters={"weight": 0.5})
