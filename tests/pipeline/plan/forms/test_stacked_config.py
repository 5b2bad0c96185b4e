from __future__ import annotations

import copy
from typing import Any

import pytest

from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.plan.forms.stacked_config import set_no_prediction_layers, stack_layers


def stack(config: Json, *parts: tuple[Json, int, int]) -> tuple[Json, list[str]]:
    return stack_layers(config, [(origin, layer) for origin, start, stop in parts for layer in range(start, stop)])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
        (
            {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 2}},
            {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}},
        ),
    ],
)
def test_no_prediction_layers_where_they_are_counted(config: Json, expected: Json) -> None:
    set_no_prediction_layers(config)
    assert config == expected


def test_stacking_does_not_change_what_it_is_given() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    before = copy.deepcopy(config)
    stack(config, (config, 0, 2), (config, 0, 1))
    assert config == before


def test_lists_with_an_entry_for_each_layer_follow_the_layers() -> None:
    a = {"num_hidden_layers": 3, "layer_types": ["a0", "a1", "a2"], "no_rope_layers": [1, 1, 0], "other": [7, 8, 9]}
    b = {"num_hidden_layers": 4, "layer_types": ["b0", "b1", "b2", "b3"]}
    result, warnings = stack(a, (a, 0, 2), (b, 1, 4))
    assert result["num_hidden_layers"] == 5
    assert result["layer_types"] == ["a0", "a1", "b1", "b2", "b3"]
    assert result["no_rope_layers"] == [1, 1, 1, 0, 0], "b says nothing of it, so the donor's entries hold"
    assert result["other"] == [7, 8, 9]
    assert warnings == []


def test_lists_of_layer_numbers_are_renumbered() -> None:
    a = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "moe_layers": []}
    b = {"num_hidden_layers": 4, "mlp_only_layers": [1], "moe_layers": [2]}
    result, _ = stack(a, (a, 0, 4), (b, 1, 3), (a, 3, 4))
    assert result["mlp_only_layers"] == [0, 3, 4, 6]
    assert result["moe_layers"] == [5]


@pytest.mark.parametrize("value", [None, 5, "all"])
def test_lists_that_are_none_in_another_model(value: Any) -> None:
    a = {"num_hidden_layers": 2, "mlp_only_layers": [0], "layer_types": ["x", "y"]}
    b = {"num_hidden_layers": 2, "mlp_only_layers": value, "layer_types": value}
    result, _ = stack(a, (a, 0, 2), (b, 0, 2))
    assert (result["mlp_only_layers"], result["layer_types"]) == ([0], ["x", "y", "x", "y"])


def test_per_layer_fields_whose_names_do_not_say_so() -> None:
    config = {"num_hidden_layers": 2, "intermediate_size": [10, 20], "compress_ratios": [1, 4]}
    result, _ = stack(config, (config, 1, 2), (config, 0, 2))
    assert (result["intermediate_size"], result["compress_ratios"]) == ([20, 10, 20], [4, 1, 4])


@pytest.mark.parametrize(("window", "expected"), [(28, 32), (21, 21), (70, 70)])
def test_max_window_layers_follows_only_if_it_meant_all_layers(window: int, expected: int) -> None:
    config = {"num_hidden_layers": 28, "sliding_window": 131072, "max_window_layers": window}
    result, _ = stack(config, (config, 0, 16), (config, 12, 28))
    assert (result["num_hidden_layers"], result["max_window_layers"]) == (32, expected)


def test_counts_that_are_stated_more_than_once() -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["x", "y"]}
    config = {"num_hidden_layers": 2, "n_layer": 2, "num_layers": 7, "text_config": text}
    result, _ = stack(config, (config, 0, 2), (config, 1, 2))
    assert result == {
        "num_hidden_layers": 3,
        "n_layer": 3,
        "num_layers": 7,
        "text_config": {"num_hidden_layers": 3, "layer_types": ["x", "y", "y"]},
    }


def test_nested_and_flat_models_in_one_stack() -> None:
    a = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a0", "a1"]}, "vision_config": {"num_layers": 2}}
    b = {"num_hidden_layers": 2, "layer_types": ["b0", "b1"]}
    result, _ = stack(a, (a, 0, 1), (b, 1, 2), (b, 0, 1))
    assert result["text_config"] == {"num_hidden_layers": 3, "layer_types": ["a0", "b1", "b0"]}
    assert result["vision_config"] == {"num_layers": 2}


@pytest.mark.parametrize(
    ("ranges", "num_warnings"),
    [(((0, 4),), 0), (((0, 2), (1, 4)), 1), (((2, 4), (0, 2)), 1), (((0, 3),), 1)],
)
@pytest.mark.parametrize(
    "field",
    [
        {"decoder_sparse_step": 2},
        {"global_attn_every_n_layers": 3},
        {"attn_layer_period": 4},
        {"layer_group_size": 2},
        {"interleave_moe_layer_step": 2},
        {"sliding_window_pattern": "LG"},
        {"num_memory_layers": 1},
    ],
)
def test_fields_that_count_on_the_order_of_layers(
    field: Json, ranges: tuple[tuple[int, int], ...], num_warnings: int
) -> None:
    config = {"num_hidden_layers": 4, **field}
    result, warnings = stack(config, *((config, start, stop) for start, stop in ranges))
    assert len(warnings) == num_warnings
    ((name, value),) = field.items()
    assert result[name] == value
    assert all(f"{name} = {value}" in warning for warning in warnings)


@pytest.mark.parametrize(
    "field",
    [
        {"decoder_sparse_step": 1},
        {"decoder_sparse_step": 0},
        {"moe_layer_freq": 1},
        {"first_k_dense_replace": 0},
        {"layer_norm_eps": 1e-5},
        {"vision_feature_layer": -2},
        {"num_nextn_predict_layers": 1},
        {"mtp_num_hidden_layers": 1},
        {"use_layer_group": True},
        {"num_key_value_heads": 2},
    ],
)
def test_fields_that_say_the_same_of_every_layer(field: Json) -> None:
    config = {"num_hidden_layers": 4, **field}
    result, warnings = stack(config, (config, 0, 2), (config, 1, 4))
    assert (result, warnings) == ({"num_hidden_layers": 5, **field}, [])


@pytest.mark.parametrize(
    ("ranges", "count"),
    [
        (((0, 4),), 2),
        (((0, 2), (1, 4)), 3),
        (((2, 4), (0, 2)), None),
        (((0, 1), (3, 4)), 1),
        (((0, 2), (0, 2)), 4),
        (((2, 4),), 0),
    ],
)
def test_the_first_layers_are_counted_anew(ranges: tuple[tuple[int, int], ...], count: int | None) -> None:
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 2}
    result, warnings = stack(config, *((config, start, stop) for start, stop in ranges))
    assert result["first_k_dense_replace"] == (2 if count is None else count)
    assert len(warnings) == (count is None)


def test_the_last_layers_are_counted_anew() -> None:
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    assert stack(config, (config, 0, 2), (config, 3, 4)) == ({"num_hidden_layers": 3, "num_kv_shared_layers": 1}, [])
    result, warnings = stack(config, (config, 2, 4), (config, 0, 2))
    assert (result["num_kv_shared_layers"], len(warnings)) == (2, 1)


@pytest.mark.parametrize("base", [0, 1])
def test_lists_that_share_out_the_layers_are_renumbered(base: int) -> None:
    section = {"full": [3 + base], "linear": [base, 1 + base, 2 + base], "head_dim": 8, "sizes": [9, 9]}
    config = {"num_hidden_layers": 4, "linear_attn_config": section}
    result, warnings = stack(config, (config, 0, 1), (config, 3, 4), (config, 2, 4))
    expected = {**section, "full": [1 + base, 3 + base], "linear": [base, 2 + base]}
    assert (result["linear_attn_config"], warnings) == (expected, [])


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ({"full_attention_interval": 2}, "linear_attention"),
        ({"sliding_window_pattern": 2}, "sliding_attention"),
        ({"model_type": "gemma2"}, "sliding_attention"),
    ],
)
def test_an_interval_becomes_a_type_for_each_layer(field: Json, other: str) -> None:
    config = {"num_hidden_layers": 4, **field}
    assert stack(config, (config, 0, 4)) == (config, [])
    result, warnings = stack(config, (config, 0, 2), (config, 1, 4))
    types = [other, "full_attention", "full_attention", other, "full_attention"]
    assert (result, warnings) == ({**config, "num_hidden_layers": 5, "layer_types": types}, [])


@pytest.mark.parametrize(
    ("field", "better"),
    [
        ({"no_rope_layer_interval": 4}, {"no_rope_layers": [1, 1, 1, 0]}),
        ({"global_attn_every_n_layers": 2}, {"layer_types": ["s", "f", "s", "f"]}),
        ({"_sliding_window_pattern": 2}, {"layer_types": ["s", "f", "s", "f"]}),
    ],
)
def test_a_field_that_a_list_supersedes_is_no_warning(field: Json, better: Json) -> None:
    config = {"num_hidden_layers": 4, **field, **better}
    ((name, listed),) = better.items()
    result, warnings = stack(config, (config, 0, 2), (config, 3, 4))
    assert (result[name], warnings) == ([*listed[:2], listed[3]], [])


def test_a_section_with_an_entry_for_some_layers() -> None:
    config = {"num_hidden_layers": 4, "per_layer_config": {"3": {"head_dim": 16}, "0": {"head_dim": 8}}}
    result, _ = stack(config, (config, 0, 1), (config, 3, 4), (config, 2, 4))
    assert result["per_layer_config"] == {"0": {"head_dim": 8}, "1": {"head_dim": 16}, "3": {"head_dim": 16}}


def test_a_pattern_of_letters_follows_the_layers() -> None:
    config = {"num_hidden_layers": 4, "hybrid_override_pattern": "M-M*"}
    result, warnings = stack(config, (config, 0, 2), (config, 3, 4))
    assert (result["hybrid_override_pattern"], warnings) == ("M-*", [])


def test_a_config_without_a_count_is_left_alone() -> None:
    result, warnings = stack({"a": 1}, ({"a": 1}, 0, 3))
    assert result == {"a": 1}
    assert len(warnings) == 1
    assert "3 layers" in warnings[0]


@pytest.mark.parametrize("other", [None, "1", [1], True])
def test_counts_of_another_kind_in_another_model(other: Any) -> None:
    config = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    result, _ = stack(config, ({**config, "first_k_dense_replace": other}, 0, 2), (config, 1, 2))
    assert result["first_k_dense_replace"] == 1


@pytest.mark.parametrize("count", [0, -1, 10**30])
def test_counts_of_layers_that_cannot_be(count: int) -> None:
    config = {"num_hidden_layers": count, "layer_types": []}
    result, (warning,) = stack(config, (config, 0, 2))
    assert result == config
    assert "no layer count" in warning


def test_a_decoder_is_counted_by_itself() -> None:
    for config in ({"num_layers": 4, "num_decoder_layers": 4}, {"encoder_layers": 4, "decoder_layers": 4}):
        stacked, warnings = stack_layers(config, [(config, layer) for layer in (0, 1, 2, 2, 3)])
        assert list(stacked.values()) == [4, 5]
        assert warnings == []
