from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.checkpoint.names import LayerName, Layers, find_layers, layer_position, natural_key, split_name


def find(*names: str, count: int | None = None) -> Layers:
    return find_layers([(name, 100) for name in names], count)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.input_layernorm.weight", ("model.layers.", 0, "input_layernorm.weight")),
        ("model.layers.12.mlp.experts.3.up_proj.weight", ("model.layers.", 12, "mlp.experts.3.up_proj.weight")),
        ("transformer.h.7.attn.c_attn.weight", ("transformer.h.", 7, "attn.c_attn.weight")),
        ("bert.encoder.layer.11.output.dense.bias", ("bert.encoder.layer.", 11, "output.dense.bias")),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", ("encoder.block.", 3, "layer.0.SelfAttention.q.weight")),
        ("0.auto_model.weight", ("", 0, "auto_model.weight")),
        ("модель.layers.5.вес", ("модель.layers.", 5, "вес")),
        ("model.embed_tokens.weight", None),
        ("mlp1.weight", None),
        ("conv.3", None),
        ("layers.00.weight", None),
        ("layers.٣.weight", None),
        ("layers.²", None),
        (f"layers.{'9' * 5000}.weight", None),
        ("", None),
    ],
)
def test_split_at_the_first_number(name: str, expected: tuple[str, int, str] | None) -> None:
    assert split_name(name) == (LayerName(*expected) if expected else None)


@given(st.text("ab.0123456789é²٣", max_size=30))
def test_a_split_name_can_be_put_together_again(name: str) -> None:
    split = split_name(name)
    if split is not None:
        assert f"{split.stack}{split.layer}.{split.rest}" == name


def test_natural_order_counts_numbers() -> None:
    ordered = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.experts.9.w",
        "model.layers.0.mlp.experts.10.w",
        "model.layers.2.w",
        "model.layers.10.w",
        "model.layers.100.w",
        "model.norm.weight",
    ]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_key) == ordered


@given(st.lists(st.text("ab.0123é²٣", max_size=8), unique=True))
def test_natural_order_is_one_order_for_any_names(names: list[str]) -> None:
    assert len({natural_key(name) for name in names}) == len(names)
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_natural_order_of_numbers_too_long_to_convert() -> None:
    assert sorted([f"a.{'9' * 5000}", "a.8"], key=natural_key)[0] == "a.8"


def test_config_says_which_stack_is_the_main_one() -> None:
    tower = [f"vision_tower.blocks.{k}.w" for k in range(3) for _ in range(50)]
    text = [f"language_model.model.layers.{k}.w" for k in range(4)]
    layers = find(*tower, *text, count=4)
    assert (layers.main, layers.num_layers) == ("language_model.model.layers.", 4)
    assert layers.stacks == {"vision_tower.blocks.": 3, "language_model.model.layers.": 4}


def test_a_tower_is_not_the_main_stack_whatever_its_size() -> None:
    tower = [f"model.visual.blocks.{k}.w" for k in range(6) for _ in range(50)]
    text = [f"model.language_model.layers.{k}.w" for k in range(4)]
    assert find(*tower, *text, count=4).main == "model.language_model.layers."
    assert find(*tower, *text[:2], count=4).main == "model.visual.blocks.", "where no other reaches the count"


def test_the_stack_of_a_decoder_is_the_main_one() -> None:
    decoder = [f"decoder.block.{k}.w" for k in range(4)]
    for name in ("encoder.block", "qformer.encoder.layer", "model.projector.layers"):
        assert find(*[f"{name}.{k}.w" for k in range(5) for _ in range(50)], *decoder, count=4).main == "decoder.block."
    assert find(*[f"bert.encoder.layer.{k}.w" for k in range(4)], count=4).main == "bert.encoder.layer."


def test_without_a_count_the_largest_stack_is_the_main_one() -> None:
    layers = find_layers([("a.0.w", 10), ("a.1.w", 10), ("b.0.w", 500)], None)
    assert (layers.main, layers.num_layers) == ("b.", 1)


def test_a_count_that_no_stack_reaches_leaves_the_largest() -> None:
    layers = find("h.0.w", "h.1.w", count=12)
    assert (layers.main, layers.num_layers) == ("h.", 2)


@pytest.mark.parametrize("count", [None, 0])
def test_no_stack_at_all(count: int | None) -> None:
    layers = find("embed.weight", "norm.weight", count=count)
    assert (layers.main, layers.num_layers, dict(layers.stacks)) == ("", 0, {})
    assert layers.position("norm.weight") == 0


def test_numbers_with_gaps_are_no_stack() -> None:
    layers = find("projector.0.weight", "projector.2.weight", "h.0.w", "h.1.w")
    assert dict(layers.stacks) == {"h.": 2}
    assert layers.position("projector.2.weight") == 0


def test_layers_past_the_counted_ones_lie_at_the_end() -> None:
    layers = find(*[f"model.layers.{k}.w" for k in range(6)], count=5)
    assert layers.num_layers == 5
    assert [layers.position(f"model.layers.{k}.w") for k in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_every_stack_has_a_gradient_of_its_own() -> None:
    layers = find(*[f"v.{k}.w" for k in range(3)], *[f"t.{k}.w" for k in range(5)], count=5)
    assert [layers.position(name) for name in ("v.1.w", "t.1.w", "v.2.w", "norm.w")] == [0.5, 0.25, 1, 0]


@given(st.integers(2, 200))
def test_positions_rise_evenly_from_0_to_1(num_layers: int) -> None:
    positions = [layer_position(k, num_layers) for k in range(num_layers)]
    assert positions == [k / (num_layers - 1) for k in range(num_layers)]
    assert (positions[0], positions[-1]) == (0, 1)


def test_gpt2_and_bert_names() -> None:
    gpt2 = find("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.1.ln_1.weight", "ln_f.weight", count=2)
    bert = find("embeddings.word_embeddings.weight", "encoder.layer.0.w", "pooler.dense.weight", count=1)
    assert (gpt2.main, gpt2.num_layers, bert.main, bert.num_layers) == ("h.", 2, "encoder.layer.", 1)
    assert [bert.position(name) for name in ("encoder.layer.0.w", "pooler.dense.weight")] == [1, 0]
