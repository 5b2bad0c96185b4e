"""Stacks of layers that are not alike, and what their config.json makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pipeline.plan.layouts import Layout, expand_layouts, llama, passthrough

ODD = "the layers are not all alike"


def hybrid(kinds: str, **config: Any) -> Layout:
    """Return a model with a layer for each letter; those of one letter have the same tensors."""
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    for k, kind in enumerate(kinds):
        shapes[f"model.layers.{k}.{kind}.weight"] = (4, 4)
    return Layout(shapes, {"num_hidden_layers": len(kinds), "tie_word_embeddings": False, **config})


def warn(layout: Layout, *ranges: tuple[int, int]) -> list[str]:
    config = passthrough(*(("a", start, stop) for start, stop in ranges))
    return [text for text in expand_layouts(config, {"a": layout}).warnings if "ties layers" not in text]


@pytest.mark.parametrize("config", [{}, {"layer_types": ["x"] * 4}])
@pytest.mark.parametrize("ranges", [((0, 2), (1, 4)), ((0, 1), (3, 4))])
def test_layers_that_are_all_alike_may_be_stacked(config: dict[str, Any], ranges: tuple[tuple[int, int], ...]) -> None:
    assert warn(hybrid("aaaa", **config), *ranges) == []


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["a", "b", "a", "b"]},
        {"mlp_only_layers": [1, 3]},
        {"linear_attn_config": {"full": [2, 4], "kda": [1, 3]}},
        {"hybrid_override_pattern": "abab"},
        {"full_attention_interval": 2},
    ],
)
@pytest.mark.parametrize("ranges", [((0, 2), (1, 4)), ((1, 2), (3, 4)), ((0, 4), (0, 4))])
def test_layers_of_two_kinds_may_be_stacked_where_a_list_says_which(
    config: dict[str, Any], ranges: tuple[tuple[int, int], ...]
) -> None:
    assert warn(hybrid("abab", **config), *ranges) == []


@pytest.mark.parametrize("config", [{}, {"attn_layer_period": 2}, {"layer_types": ["x"] * 4}])
@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        (((0, 4),), []),
        (((0, 2), (1, 4)), ["layer 2 (layer 1 of a)", "layer 3 (layer 2 of a)", "layer 4 (layer 3 of a)"]),
        (((1, 4),), ["layer 0 (layer 1 of a)", "layer 1 (layer 2 of a)", "layer 2 (layer 3 of a)"]),
        (((0, 3),), []),
    ],
)
def test_layers_of_two_kinds_that_no_list_tells_apart(
    config: dict[str, Any], ranges: tuple[tuple[int, int], ...], named: list[str]
) -> None:
    warnings = warn(hybrid("abab", **config), *ranges)
    assert len(warnings) == bool(named)
    assert all(ODD in warning for warning in warnings)
    assert all(name in warnings[0] for name in named)


def test_first_layers_of_another_kind() -> None:
    layout = hybrid("abbb", first_k_dense_replace=1)
    assert warn(layout, (0, 2), (1, 4)) == []
    assert warn(layout, (0, 1), (2, 4)) == []
    (warning,) = warn(layout, (0, 2), (0, 4))
    assert "layer 2 (layer 0 of a)" in warning


def test_layers_of_another_model_that_have_other_tensors() -> None:
    models = {"a": hybrid("aaaa"), "b": hybrid("bbbb")}
    recipe = expand_layouts(passthrough(("a", 0, 2), ("b", 2, 4)), models)
    (warning,) = (text for text in recipe.warnings if ODD in text)
    assert "layer 2 (layer 2 of b), layer 3 (layer 3 of b)" in warning


def test_tensors_outside_with_a_part_for_each_layer() -> None:
    plain = llama(4, vocab_size=8, hidden_size=4, hidden_size_per_layer_input=5)
    layout = Layout({**plain.shapes, "model.per_layer_projection.weight": (20, 4)}, plain.config)
    assert warn(layout, (0, 4)) == []
    assert warn(plain, (0, 2), (1, 4)) == []
    (warning,) = warn(layout, (0, 2), (1, 4))
    assert "model.per_layer_projection.weight is [20, 4]: 20 is a multiple of the 4 layers" in warning


def test_rows_of_tensors_beside_the_layers() -> None:
    shapes = {f"transformer.{row}.{k}.weight": (4, 4) for k in range(3) for row in ("attentions", "ffns")}
    layout = Layout({"transformer.embeddings.weight": (8, 4), **shapes}, {"num_hidden_layers": 3})
    assert warn(layout, (0, 3)) == []
    (warning,) = warn(layout, (0, 3), (1, 3))
    assert "transformer.attentions.* has a number for each of the 3 layers under transformer.ffns.*" in warning


def test_a_first_layer_of_its_own_and_a_deeper_stack() -> None:
    assert warn(hybrid("abbb"), (0, 4), (1, 4)) == []
    assert len(warn(hybrid("abbb"), (0, 4), (0, 4))) == 1
