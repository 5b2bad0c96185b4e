"""Models with adapters: every tensor of an adapter changes something, or is an error that names both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import RaymergeError, plan
from raymerge.pipeline.checkpoint.adapters.modules import find_renaming
from raymerge.pipeline.errors import CheckpointError, TensorMismatchError
from raymerge.testing import merge_in_every_way, write_model
from tests.adapters import draw_factors, write_adapter

Tensors = Mapping[str, torch.Tensor]
Q = "model.layers.0.q_proj"
torch.manual_seed(1)
BASE = {
    "model.embed_tokens.weight": torch.randn(11, 6),
    f"{Q}.weight": torch.randn(8, 6),
    f"{Q}.bias": torch.randn(8),
    "model.layers.0.experts.down": torch.randn(3, 5, 4),
    "model.layers.0.experts.square": torch.randn(3, 4, 4),
    "lm_head.weight": torch.randn(11, 6),
}
FACTORS = draw_factors(Q, 8, 6)


def look(directory: Path, tensors: Tensors, base: Tensors = BASE, **config: Any) -> dict[str, Any]:
    """Return the merge that applies an adapter to a model."""
    model = write_model(directory / "base", dict(base))
    adapter = write_adapter(directory / "adapter", tensors, **config)
    return {"merge_method": "passthrough", "models": [{"model": f"{model}+{adapter}"}]}


def test_the_plan_says_what_adapters_change(tmp_path: Path) -> None:
    config = look(tmp_path, {**FACTORS, f"{Q}.base_layer.bias": torch.ones(8)})
    (adapter,) = plan(config).adapters
    (effect,) = adapter.effects
    assert effect.endswith("adapter changes 1 of 6 tensors, rank 2, and replaces 1")


def test_patterns_choose_rank_and_alpha(tmp_path: Path) -> None:
    other = draw_factors("model.layers.1.q_proj", 8, 6, rank=3)
    base = {f"{Q}.weight": torch.zeros(8, 6), "model.layers.1.q_proj.weight": torch.zeros(8, 6)}
    patterns = {"rank_pattern": {r"layers\.1\..*": 3}, "alpha_pattern": {"layers.1.q_proj": 12, "q_proj": 1}}
    config = look(tmp_path, {**FACTORS, **other}, base, **patterns)
    merged = merge_in_every_way(config, tmp_path / "out")
    for module, factors, scale in ((Q, FACTORS, 0.5), ("model.layers.1.q_proj", other, 4)):
        expected = scale * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{module}.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        ({f"{Q}.lora_A.weight": torch.ones(2, 6)}, {}, CheckpointError, r"q_proj has .*lora_A\.weight, and no lora_B"),
        (
            {"lm_head.weight": torch.ones(11, 6), "lm_head.modules_to_save.weight": torch.ones(11, 6)},
            {},
            CheckpointError,
            r"lm_head\.modules_to_save\.weight and .*lm_head\.weight are of one tensor",
        ),
        (draw_factors(Q, 8, 7), {}, TensorMismatchError, r"lora_A\.weight \[2, 7\] .*q_proj\.weight \[8, 6\]"),
        (draw_factors(Q, 8, 6, rank=3), {}, CheckpointError, r"factors of rank 3, and adapter_config\.json says 2"),
        (draw_factors("other.layers.0.k_proj", 8, 6), {}, TensorMismatchError, r"k_proj; the adapter .*'org/base'"),
        ({**FACTORS, "norm.weight": torch.ones(6)}, {}, TensorMismatchError, "1 module of the adapter .* norm"),
        ({**FACTORS, f"{Q}.bias": torch.ones(3)}, {}, TensorMismatchError, r"\[3\] do not fit .*bias \[8\]"),
        ({**FACTORS, f"{Q}.lora_X.weight": torch.ones(3)}, {}, CheckpointError, r"lora_X\.weight has no known meaning"),
        (FACTORS, {"use_dora": True}, CheckpointError, "no lora_magnitude_vector, and use_dora is true"),
        (FACTORS, {"rank_pattern": {"(": 2}}, CheckpointError, "no pattern that is supported"),
        ({k: v.to(torch.int8) for k, v in FACTORS.items()}, {}, CheckpointError, "is I8; floating-point"),
        (
            draw_factors("model.layers.0.experts", 4, 4, rank=6),
            {"target_parameters": ["experts.square"]},
            TensorMismatchError,
            r"\[6, 4\] .*experts\.square \[3, 4, 4\]",
        ),
        (draw_factors("model.layers.0.experts", 5, 4, rank=6), {}, TensorMismatchError, "experts"),
    ],
)
def test_what_does_not_fit(
    tensors: Tensors, config: dict[str, Any], error: type[RaymergeError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        plan(look(tmp_path, tensors, **config))


def test_experts(tmp_path: Path) -> None:
    factors = draw_factors("model.layers.0.experts", 5, 4, rank=6)
    config = look(tmp_path, factors, target_parameters=["experts.down"])
    merged = merge_in_every_way(config, tmp_path / "out")
    a, b = (factors[f"model.layers.0.experts.lora_{name}.weight"] for name in "AB")
    update = 2 * torch.einsum("ore,eri->eoi", b.view(5, 2, 3).double(), a.view(3, 2, 4).double())
    expected = (BASE["model.layers.0.experts.down"] + update).float()
    torch.testing.assert_close(merged["model.layers.0.experts.down"], expected, rtol=1e-6, atol=2e-6)


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    larger = torch.randn(13, 6)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    config = look(tmp_path, {**FACTORS, **{name: larger.clone() for name in names}})
    assert '"vocab_size": 13' in plan(config).outputs[0].read("config.json")
    merged = merge_in_every_way(config, tmp_path / "out")
    assert all(torch.equal(merged[name], larger) for name in names)


def test_a_dtype_stays_that_of_the_model(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in BASE.items()}
    config = look(tmp_path, {**FACTORS, f"{Q}.bias": torch.randn(8)}, base)
    assert {merge.out_dtype for task in plan(config).tasks for merge in task.merges} == {"BF16"}


@pytest.mark.parametrize(
    ("wanted", "known", "expected"),
    [
        (["a.0.q"], {"a.0.q"}, {}),
        (["model.layers.0.q"], {"model.language_model.layers.0.q"}, {"model.": "model.language_model."}),
        (["layers.0.q", "layers.1.q"], {"model.layers.0.q", "model.layers.1.q"}, {"": "model."}),
        (["layers.0.q", "layers.1.q"], {"model.layers.0.q"}, None),
        (["layers.0.q", "layers.1.q"], {"model.layers.0.q", "model.layers.2.q"}, None),
        (["q"], {"a.q", "b.q"}, None),
        (
            ["model.language_model.layers.0.q", "model.language_model.layers.1.q", "model.visual.blocks.0.qkv"],
            {"model.layers.0.q", "model.layers.1.q", "visual.blocks.0.qkv", "visual.blocks.0.q"},
            {"model.language_model.": "model.", "model.": ""},
        ),
        (
            ["model.language_model.layers.0.q", "model.language_model.embed"],
            {"language_model.model.layers.0.q", "language_model.model.embed", "vision_tower.layers.0.q"},
            {"model.language_model.": "language_model.model."},
        ),
        (["model.vision_tower.layers.0.q"], {"model.layers.0.q"}, None),
        (["transformer.h.0.qkv"], {"model.layers.0.q", "visual.blocks.0.qkv"}, None),
        ([f"a{k}.q{k}" for k in range(16)], {f"b{k}.q{k}" for k in range(16)}, {f"a{k}.": f"b{k}." for k in range(16)}),
        ([f"a{k}.q{k}" for k in range(17)], {f"b{k}.q{k}" for k in range(17)}, None),
    ],
)
def test_names_may_begin_in_another_way(wanted: list[str], known: set[str], expected: dict[str, str] | None) -> None:
    assert find_renaming(wanted, known) == expected
