from __future__ import annotations

import copy
import json

import pytest
from transformers import Gemma3Config

from raymerge.pipeline.checkpoint.model_config import (
    Json,
    compare_configs,
    count_layers,
    dump_config,
    set_dtype,
    set_tied,
    text_part,
    ties_embeddings,
)
from raymerge.pipeline.checkpoint.reference import ModelRef

QWEN_INSTRUCT: Json = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
DEEPSEEK_DISTILL: Json = QWEN_INSTRUCT | {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}


def compare(*configs: Json) -> list[str]:
    return compare_configs([(ModelRef(f"m{k}"), config) for k, config in enumerate(configs)])


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, None),
        ({"num_hidden_layers": 32}, 32),
        ({"n_layer": 12}, 12),
        ({"num_layers": 12, "num_decoder_layers": 6}, 6),
        ({"num_hidden_layers": 32, "encoder_layers": 32, "decoder_layers": 4}, 4),
        ({"n_layers": 6}, 6),
        ({"num_layers": 24}, 24),
        ({"num_hidden_layers": None, "num_layers": 28}, 28),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": "32"}, None),
        ({"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 28}}, 28),
        ({"num_hidden_layers": 9, "text_config": {"vocab_size": 5}}, 9),
        ({"text_config": None, "num_hidden_layers": 9}, 9),
        ({"llm_config": {"num_hidden_layers": 24}}, 24),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 28}, "audio_config": {}}}, 28),
    ],
)
def test_count_of_layers(config: Json, count: int | None) -> None:
    assert count_layers(config) == count


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, None),
        ({"text_config": {"num_hidden_layers": 1, "tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"num_hidden_layers": 1, "tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"num_hidden_layers": 1}}, False),
    ],
)
def test_tie_as_stated(config: Json, tied: bool | None) -> None:
    assert ties_embeddings(config) is tied


def test_the_tie_is_stated_at_the_top_and_where_it_was() -> None:
    config: Json = {"text_config": {"num_hidden_layers": 1, "tie_word_embeddings": True}}
    set_tied(config, False)
    assert config == {
        "tie_word_embeddings": False,
        "text_config": {"num_hidden_layers": 1, "tie_word_embeddings": False},
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        (
            {"torch_dtype": "bfloat16", "vision_config": {"dtype": "float16"}, "text_config": {"a": 1}},
            {"torch_dtype": "float32", "vision_config": {"dtype": "float32"}, "text_config": {"a": 1}},
        ),
        (
            {"dtype": "bfloat16", "thinker_config": {"text_config": {"dtype": "bfloat16"}}, "parts": [{"dtype": None}]},
            {
                "dtype": "float32",
                "thinker_config": {"text_config": {"dtype": "float32"}},
                "parts": [{"dtype": None}],
            },
        ),
    ],
)
def test_the_dtype_is_stated_under_the_keys_in_use(config: Json, expected: Json) -> None:
    set_dtype(config, "float32")
    assert config == expected


def test_the_pair_of_the_readme_differs_in_rope_theta_alone() -> None:
    warnings = compare(QWEN_INSTRUCT, DEEPSEEK_DISTILL)
    assert len(warnings) == 1
    assert all(part in warnings[0] for part in ("rope_theta", "m0: 1000000.0", "m1: 10000", "gets m0's"))


def test_a_sliding_window_that_is_switched_on_counts() -> None:
    on = {"use_sliding_window": True}
    assert len(compare(QWEN_INSTRUCT | on, QWEN_INSTRUCT | on | {"sliding_window": 4096})) == 1
    assert len(compare(QWEN_INSTRUCT | on, QWEN_INSTRUCT)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ({}, {"rope_theta": 10000.0, "rope_scaling": None}),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
        ),
        ({"hidden_size": 64, "num_attention_heads": 4}, {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}),
        ({"num_attention_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ({}, {"layer_types": ["full_attention", "full_attention"]}),
        ({"rms_norm_eps": 1e-6}, {"text_config": {"num_hidden_layers": 2, "rms_norm_eps": 1e-6}}),
        ({"sliding_window": None}, {}),
    ],
)
def test_two_ways_to_say_the_same(one: Json, other: Json) -> None:
    assert compare(one, other) == []
    assert compare(other, one) == []


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, ("rms_norm_eps", "1e-05", "1e-06")),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, ("hidden_act", "silu", "gelu")),
        ({"num_attention_heads": 8}, {"num_attention_heads": 16}, ("num_attention_heads", "8", "16")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {}, ("rope_scaling", "linear", "not given")),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, {"rope_scaling": {"type": "yarn", "factor": 4}}, ("yarn",)),
        ({"layer_types": ["full_attention"]}, {"layer_types": ["sliding_attention"]}, ("layer_types",)),
        ({"model_type": "qwen2"}, {"model_type": "qwen3"}, ("model_type", "qwen2", "qwen3")),
        ({"rope_scaling": "odd"}, {"rope_scaling": 3}, ("rope_scaling", "odd")),
    ],
)
def test_differences_that_change_the_meaning(one: Json, other: Json, shown: tuple[str, ...]) -> None:
    warnings = compare(one, other)
    assert any(all(part in warning for part in shown) for warning in warnings)


def test_layer_types_follow_the_layers_of_a_stack() -> None:
    configs = [(ModelRef(name), {"layer_types": [name], "hidden_act": name}) for name in "ab"]
    act, types = compare_configs(configs, is_stack=True)
    assert act.endswith("the output gets a's")
    assert "layer_types differs" in types
    assert types.endswith("each layer of the output keeps that of the model it comes from, the first in its slice")
    (types,) = compare_configs([(ModelRef("c"), {}), *configs], is_stack=True)[1:]
    assert types.endswith("the output gets c's"), "a list that the donor lacks is not made up"


def test_fields_that_a_config_leaves_to_its_architecture_take_one_line() -> None:
    gemma: Json = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    saved = Gemma3Config(**copy.deepcopy(gemma)).to_dict()
    for configs, model in (((gemma, saved), "m0"), ((saved, gemma), "m1"), ((saved, saved, gemma), "m2")):
        (line,) = compare(*configs)
        assert line.startswith(f"config.json: {model} leaves out what others state")
        assert all(part in line for part in ("rope_theta 1000000.0", "num_attention_heads 8", "rms_norm_eps 1e-06"))
    assert compare({}, {"rope_theta": 1e6}) != []
    changed = {**saved, "text_config": {**saved["text_config"], "rms_norm_eps": 1e-5}}
    assert any("rms_norm_eps differs" in line for line in compare(gemma, saved, changed))


def test_the_third_model_is_compared_too() -> None:
    same = {"rope_theta": 1e6}
    (warning,) = compare(same, same, {"rope_theta": 5e5})
    assert "m2: 500000.0" in warning


def test_what_is_written_can_be_read_again() -> None:
    config = {"a": "ü", "b": [1, None, 1e-5], "c": {"d": True}}
    text = dump_config(config)
    assert "ü" in text
    assert json.loads(text) == config
    assert text_part(config) == config
