from __future__ import annotations

from typing import Any

import pytest

from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from tests.pipeline.plan.layouts import (
    Layout,
    bare,
    by_name,
    expand_layouts,
    llama,
    parameter,
    passthrough,
    source_names,
)

Q = "model.layers.{}.self_attn.q_proj.weight"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, stop], **({"parameters": parameters} if parameters else {})}


def sliced(*slices: dict[str, Any] | list[dict[str, Any]], method: str = "linear", **more: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "slices": [part if isinstance(part, dict) else {"sources": part} for part in slices],
        **more,
    }


def test_a_frankenmerge_of_two_times_24_layers() -> None:
    a, b = (llama(36, max_window_layers=36, layer_types=[f"{m}{k}" for k in range(36)]) for m in "ab")
    recipe = expand_layouts(passthrough(("a", 0, 24), ("b", 12, 36), dtype="bfloat16"), {"a": a, "b": b})
    merges = by_name(recipe)
    assert len(merges) == 3 + 48 * 2
    for k in range(48):
        expected = ("a", Q.format(k)) if k < 24 else ("b", Q.format(k - 12))
        assert source_names(merges[Q.format(k)]) == [expected]
        assert source_names(merges[Q.format(k).replace("self_attn.q_proj", "mlp.up_proj")])[0][0] == expected[0]
    assert [source_names(merges[name])[0][0] for name in (EMBEDDING, NORM, HEAD)] == ["a", "b", "b"]
    assert recipe.config["num_hidden_layers"] == recipe.config["max_window_layers"] == 48
    assert recipe.config["layer_types"] == [f"a{k}" for k in range(24)] + [f"b{k}" for k in range(12, 36)]
    outside = "embeddings come from the first slice's models, final norm and head from the last slice's"
    assert set(recipe.dropped) == {
        f"a: 2 tensors (model.norm.weight, ...): {outside}",
        "a: 24 tensors (model.layers.24.mlp.up_proj.weight, ...): layers in no slice",
        f"b: 1 tensor (model.embed_tokens.weight): {outside}",
        "b: 24 tensors (model.layers.0.mlp.up_proj.weight, ...): layers in no slice",
    }


def test_slices_of_no_layers_give_what_stands_around_the_layers() -> None:
    models = {name: llama(4) for name in "abc"}
    recipe = expand_layouts(passthrough(("b", 0, 0), ("a", 0, 4), ("c", 4, 4)), models)
    merges = by_name(recipe)
    assert [source_names(merges[name])[0][0] for name in (EMBEDDING, NORM, HEAD)] == ["b", "c", "c"]
    assert {source_names(merge)[0][0] for name, merge in merges.items() if "layers" in name} == {"a"}
    assert recipe.config["num_hidden_layers"] == 4


def test_lists_of_layer_numbers_follow() -> None:
    a, b = llama(4, mlp_only_layers=[0, 3]), llama(4, mlp_only_layers=[1])
    recipe = expand_layouts(passthrough(("a", 0, 4), ("b", 1, 3)), {"a": a, "b": b})
    assert (recipe.config["num_hidden_layers"], recipe.config["mlp_only_layers"]) == (6, [0, 3, 4])


def test_natural_order_of_the_stack() -> None:
    recipe = expand_layouts(passthrough(("a", 0, 6), ("a", 0, 6)), {"a": llama(6)})
    layers = [int(merge.name.split(".")[2]) for merge in recipe.merges if "layers" in merge.name]
    assert layers == sorted(layers) == [k for k in range(12) for _ in range(2)]


def test_gradients_begin_anew_in_every_slice() -> None:
    part = [source("a", 0, 3), source("b", 0, 3)]
    config = sliced(part, [source("a", 2, 3), source("b", 2, 3)], part, parameters={"weight": [1.0, 2.0]})
    merges = by_name(expand_layouts(config, {"a": llama(3), "b": llama(3)}))
    found = [parameter(merges[Q.format(k)], "weight")[0] for k in range(7)]
    assert found == [1, 1.5, 2, 2, 1, 1.5, 2], "a slice of one layer lies at the end"
    assert [parameter(merges[name], "weight")[0] for name in (EMBEDDING, NORM, HEAD)] == [1, 1, 1]


def test_filters_see_input_layers_for_one_model_and_output_layers_for_all() -> None:
    weight = [{"filter": "layers.2.", "value": 5.0}, {"value": 1.0}]
    config = sliced(
        [source("a", 0, 2), source("b", 2, 4)],
        [source("a", 2, 4), source("b", 0, 2)],
        parameters={"weight": weight, "normalize": [{"filter": "layers.3.", "value": False}, {"value": True}]},
    )
    merges = by_name(expand_layouts(config, {"a": llama(4), "b": llama(4)}))
    assert [parameter(merges[Q.format(k)], "weight") for k in range(4)] == [(1, 5), (1, 1), (5, 1), (1, 1)]
    assert [parameter(merges[Q.format(k)], "normalize") for k in range(4)] == [True, True, True, False]


def test_precedence_source_then_slice_then_top() -> None:
    config = sliced(
        {
            "sources": [source("a", 0, 1, weight=[{"filter": "mlp", "value": 9.0}]), source("b", 0, 1)],
            "parameters": {"weight": [{"filter": "self_attn", "value": 5.0}], "normalize": False},
        },
        [source("a", 1, 2), source("b", 1, 2)],
        parameters={"weight": 2.0, "normalize": True},
    )
    merges = by_name(expand_layouts(config, {"a": llama(2), "b": llama(2)}))
    mlp = Q.format(0).replace("self_attn.q_proj", "mlp.up_proj")
    assert parameter(merges[mlp], "weight") == (9, 2)
    assert parameter(merges[Q.format(0)], "weight") == (5, 5)
    assert parameter(merges[Q.format(1)], "weight") == (2, 2)
    shared = {name: parameter(merge, "normalize") for name, merge in merges.items()}
    assert (shared[Q.format(0)], shared[Q.format(1)]) == (False, True)
    assert (shared[EMBEDDING], shared[NORM], shared[HEAD]) == (False, True, True), "first slice's, then last slice's"


def test_one_model_twice_in_a_slice_takes_the_first_value_for_both() -> None:
    config = sliced([source("a", 0, 2, weight=3.0), source("a", 2, 4, weight=7.0)])
    recipe = expand_layouts(config, {"a": llama(4)})
    merges = by_name(recipe)
    assert source_names(merges[Q.format(1)]) == [("a", Q.format(1)), ("a", Q.format(3))]
    assert parameter(merges[Q.format(1)], "weight") == (3, 3)
    assert source_names(merges[EMBEDDING]) == [("a", EMBEDDING)] * 2
    assert recipe.config["num_hidden_layers"] == 2
    assert recipe.warnings == (
        "slices[0]: a is listed more than once, with different parameters; "
        "the first one's hold for all, as in mergekit",
    )


def test_one_model_twice_in_a_slice_with_the_same_parameters() -> None:
    config = sliced([source("a", 0, 2, weight=3.0), source("a", 2, 4, weight=3.0)])
    assert expand_layouts(config, {"a": llama(4)}).warnings == ()


@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_last_slice_with_different_numbers_of_models(reverse: bool) -> None:
    parts = [[source("a", 0, 1)], [source("a", 1, 2), source("b", 1, 2)]]
    config = sliced(*(parts[::-1] if reverse else parts), parameters={"weight": 1.0})
    merges = by_name(expand_layouts(config, {"a": llama(2), "b": llama(2)}))
    models = {name: [model for model, _ in source_names(merges[name])] for name in (EMBEDDING, NORM, HEAD)}
    one, both = ["a"], ["a", "b"]
    assert models[EMBEDDING] == (both if reverse else one)
    assert models[NORM] == models[HEAD] == (one if reverse else both)


def test_a_slice_may_have_a_base_of_its_own() -> None:
    config = sliced(
        {"sources": [source("a", 0, 1), source("b", 0, 1)], "base_model": "b"},
        [source("a", 1, 2), source("b", 1, 2)],
        method="slerp",
        base_model="a",
        parameters={"t": 0.5},
    )
    merges = by_name(expand_layouts(config, {"a": llama(2), "b": llama(2)}))
    order = {name: "".join(model for model, _ in source_names(merge)) for name, merge in merges.items()}
    assert (order[Q.format(0)], order[EMBEDDING]) == ("ba", "ba")
    assert (order[Q.format(1)], order[NORM], order[HEAD]) == ("ab", "ab", "ab")


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (passthrough(("a", 0, 5)), r"slices\[0\].sources\[0\].layer_range: \[0, 5\]"),
        (passthrough(("a", 0, 4), ("b", 3, 5)), r"slices\[1\].sources\[0\].layer_range: \[3, 5\]"),
        (
            sliced([source("a", 0, 2), source("b", 3, 5)], parameters={"weight": 1}),
            r"slices\[0\].sources\[1\].layer_range: \[3, 5\]",
        ),
    ],
)
def test_a_range_past_the_end(config: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where + ".*which has 4 layers"):
        expand_layouts(config, {"a": llama(4), "b": llama(4)})


def test_layers_past_the_counted_ones_are_not_in_reach_of_slices() -> None:
    with pytest.raises(ConfigError, match="which has 4 layers"):
        expand_layouts(passthrough(("a", 0, 5)), {"a": llama(4, past=1)})


def test_layers_of_different_kinds_do_not_merge() -> None:
    layout = bare(["model.layers.0.dense.w", "model.layers.1.experts.0.w", "model.norm.weight"], num_hidden_layers=2)
    config = sliced([source("a", 0, 1), source("b", 1, 2)], parameters={"weight": 1})
    with pytest.raises(TensorMismatchError) as caught:
        expand_layouts(config, {"a": layout, "b": layout})
    assert "model.layers.1.dense.w is in a, but not in b" in str(caught.value)
    assert "model.layers.0.experts.0.w is in b, but not in a" in str(caught.value)


def test_models_that_name_their_layers_differently() -> None:
    a = bare(["model.layers.0.w", "model.layers.1.w", "model.norm.weight"], num_hidden_layers=2)
    names = [name.replace("model.", "model.language_model.") for name in a.shapes]
    b = bare([*names, "model.visual.patch.weight"], num_hidden_layers=2)
    with pytest.raises(
        TensorMismatchError, match=r"layers are called model.layers.\* in a and model.language_model.layers.\* in b"
    ):
        expand_layouts(passthrough(("a", 0, 2), ("b", 1, 2)), {"a": a, "b": b})


def resized(layout: Layout, vocab: int, hidden: int, **config: Any) -> Layout:
    """Return a layout with an embedding and a head of another size."""
    shapes = {**layout.shapes, EMBEDDING: (vocab, hidden), HEAD: (vocab, hidden)}
    return Layout(shapes, {**layout.config, **config})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (llama(4, hidden_size=5), "hidden_size is 4 in a and 5 in b"),
        (llama(4, vocab_size=9), "vocab_size is 8 in a and 9 in b"),
        (resized(llama(4), 8, 5), "hidden_size is 4 in a and 5 in b"),
        (resized(llama(4), 9, 4), "vocab_size is 8 in a and 9 in b"),
        (llama(4, intermediate_size=7), "intermediate_size is 6 in a and 7 in b"),
        (llama(4, text_config={"num_hidden_layers": 4, "hidden_size": 5}), "hidden_size is 4 in a and 5 in b"),
    ],
)
@pytest.mark.parametrize("is_stated", [False, True])
def test_models_of_different_sizes_do_not_stack(other: Layout, message: str, is_stated: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 4, "vocab_size": 8} if is_stated else {}
    models = {"a": llama(4, intermediate_size=6, **sizes), "b": other}
    with pytest.raises(TensorMismatchError, match=message):
        expand_layouts(passthrough(("a", 0, 4), ("b", 2, 4)), models)


def test_layers_in_the_middle_may_come_from_a_model_with_another_vocabulary() -> None:
    models = {"a": llama(4, vocab_size=8), "b": resized(llama(4), 9, 4, vocab_size=9)}
    recipe = expand_layouts(passthrough(("a", 0, 2), ("b", 1, 3), ("a", 2, 4)), models)
    assert by_name(recipe)[EMBEDDING].shape == by_name(recipe)[HEAD].shape == (8, 4)


def test_sizes_that_differ_from_layer_to_layer_are_not_compared() -> None:
    models = {m: llama(2, intermediate_size=sizes) for m, sizes in (("a", [6, 7]), ("b", [8, 9]))}
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), models)
    assert recipe.config["intermediate_size"] == [6, 9]


@pytest.mark.parametrize("parts", [(("a", 0, 4),), (("a", 0, 4), ("a", 2, 4))])
def test_layers_for_prediction_that_slices_leave_out_are_not_counted_any_more(
    parts: tuple[tuple[str, int, int], ...],
) -> None:
    recipe = expand_layouts(passthrough(*parts), {"a": llama(4, past=1, num_nextn_predict_layers=1)})
    assert recipe.config["num_nextn_predict_layers"] == 0
    assert recipe.warnings == ()
    recipe = expand_layouts(passthrough(*parts), {"a": llama(4, num_nextn_predict_layers=1)})
    assert recipe.config["num_nextn_predict_layers"] == 1, "they are elsewhere, and stay"


def test_types_of_layers_follow_the_layers() -> None:
    models = {m: llama(2, layer_types=[f"{m}0", f"{m}1"]) for m in "ab"}
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), models)
    assert recipe.config["layer_types"] == ["a0", "b1"]
    assert "each layer of the output keeps that of the model it comes from" in recipe.warnings[0]


def test_vision_towers_come_from_the_first_slice() -> None:
    names = [
        "visual.blocks.0.w", "visual.blocks.1.w", "visual.merger.w", "multi_modal_projector.w",
        *(f"model.layers.{k}.w" for k in range(3)), "model.embed_tokens.weight", "model.norm.weight", "lm_head.bias",
    ]  # fmt: skip
    layout = bare(names, text_config={"num_hidden_layers": 3}, tie_word_embeddings=False)
    recipe = expand_layouts(passthrough(("a", 0, 3), ("b", 0, 3)), {"a": layout, "b": layout})
    models = {merge.name: merge.sources[0].model for merge in recipe.merges}
    assert len(models) == 4 + 6 + 3
    assert [models[name] for name in names[:4]] == ["a"] * 4
    assert (models["model.embed_tokens.weight"], models["model.norm.weight"], models["lm_head.bias"]) == ("a", "b", "b")
    assert recipe.config["text_config"]["num_hidden_layers"] == 6


def test_a_model_without_layers_cannot_be_sliced() -> None:
    with pytest.raises(ConfigError, match="reaches past a, which has 0 layers"):
        expand_layouts(passthrough(("a", 0, 1)), {"a": bare(["w"])})


def test_a_config_without_a_layer_count_is_warned_about() -> None:
    layout = Layout(llama(2).shapes, {"architectures": ["X"]})
    recipe = expand_layouts(passthrough(("a", 0, 2), ("a", 0, 1)), {"a": layout})
    assert any("no layer count" in warning and "3 layers" in warning for warning in recipe.warnings)
