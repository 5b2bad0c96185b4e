from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.errors import CheckpointError, ConfigError, TensorMismatchError
from raymerge.pipeline.plan.recipe import Recipe
from raymerge.pipeline.plan.sources.resolve import COPY
from tests.pipeline.plan.layouts import (
    Layout,
    bare,
    by_name,
    expand_layouts,
    linear,
    llama,
    parameter,
    passthrough,
    source_names,
)

NAMES = st.one_of(
    st.sampled_from(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "visual.proj.weight", "x"]),
    st.builds(
        "{}.{}.{}".format,
        st.sampled_from(["model.layers", "mtp.layers", "visual.blocks", "model", "é"]),
        st.integers(0, 4),
        st.sampled_from(["w", "experts.0.w", "rotary_emb.inv_freq", "norm.weight"]),
    ),
)


def deepseek(num_layers: int = 3, num_dense: int = 1, num_experts: int = 4) -> Layout:
    """Layers without experts, layers with, and one more for multi-token prediction."""
    names = ["model.embed_tokens.weight"]
    for k in range(num_layers + 1):
        prefix = f"model.layers.{k}."
        names += [f"{prefix}self_attn.kv_a_proj_with_mqa.weight", f"{prefix}input_layernorm.weight"]
        parts = ("gate_proj", "up_proj", "down_proj")
        if k < num_dense:
            names += [f"{prefix}mlp.{part}.weight" for part in parts]
        else:
            names += [f"{prefix}mlp.gate.weight", f"{prefix}mlp.gate.e_score_correction_bias"]
            names += [f"{prefix}mlp.experts.{e}.{part}.weight" for e in range(num_experts) for part in parts]
            names += [f"{prefix}mlp.shared_experts.{part}.weight" for part in parts]
    names += [f"model.layers.{num_layers}.{name}" for name in ("eh_proj.weight", "shared_head.head.weight")]
    names += ["model.norm.weight", "lm_head.weight"]
    return bare(names, num_hidden_layers=num_layers, first_k_dense_replace=num_dense, num_nextn_predict_layers=1)


def check_accounts(recipe: Recipe, models: dict[str, Layout]) -> None:
    """Every input tensor is a source of the output or in a group of dropped ones, and none is in both."""
    used = {source for merge in recipe.merges for source in source_names(merge)}
    for model, layout in models.items():
        counts = [re.match(rf"{model}: (\d+) tensors? ", line) for line in recipe.dropped]
        num_dropped = sum(int(count[1]) for count in counts if count)
        assert len([name for name in layout.shapes if (model, name) in used]) + num_dropped == len(layout.shapes)


def test_whole_models_are_merged_name_by_name_in_natural_order() -> None:
    recipe = expand_layouts(linear("a", "b"), {"a": llama(11), "b": llama(11)})
    assert [merge.name for merge in recipe.merges][:4] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert [merge.name for merge in recipe.merges][-2:] == [
        "model.layers.10.self_attn.q_proj.weight",
        "model.norm.weight",
    ]
    assert all(source_names(merge) == [("a", merge.name), ("b", merge.name)] for merge in recipe.merges)
    assert recipe.dropped == ()


def test_the_order_of_the_models_is_the_configs() -> None:
    recipe = expand_layouts(linear("b", "a", base_model="a"), {"a": llama(), "b": llama()})
    assert [source.model for source in recipe.merges[0].sources] == ["b", "a"]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_a_gradient_runs_over_the_layers_and_starts_anywhere_else(num_layers: int) -> None:
    config = linear("a", "b", parameters={"weight": [2.0, 4.0]})
    merges = by_name(expand_layouts(config, {"a": llama(num_layers), "b": llama(num_layers)}))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert parameter(merges[name], "weight") == (2.0, 2.0)
    found = [parameter(merges[f"model.layers.{k}.self_attn.q_proj.weight"], "weight")[0] for k in range(num_layers)]
    assert found == ([4.0] if num_layers == 1 else [2 + 2 * k / (num_layers - 1) for k in range(num_layers)])


def test_other_stacks_have_gradients_of_their_own() -> None:
    names = [*(f"visual.blocks.{k}.w" for k in range(3)), *(f"model.layers.{k}.w" for k in range(5)), "visual.merger.w"]
    layout = bare(names, text_config={"num_hidden_layers": 5})
    merges = by_name(expand_layouts(linear("a", "b", parameters={"weight": [1.0, 2.0]}), {"a": layout, "b": layout}))
    positions = {name: parameter(merge, "weight")[0] - 1 for name, merge in merges.items()}
    assert positions["visual.blocks.1.w"] == 0.5
    assert positions["model.layers.1.w"] == 0.25
    assert positions["visual.merger.w"] == 0


def test_filters_and_precedence() -> None:
    config: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 5.0}]}},
            {"model": "b", "parameters": {"weight": 7.0}},
        ],
        "parameters": {"weight": [{"filter": "norm", "value": 2.0}, {"value": 1.0}], "normalize": False},
    }
    merges = by_name(expand_layouts(config, {"a": llama(), "b": llama()}))
    assert parameter(merges["model.layers.0.mlp.up_proj.weight"], "weight") == (5.0, 7.0)
    assert parameter(merges["model.layers.0.self_attn.q_proj.weight"], "weight") == (1.0, 7.0)
    assert parameter(merges["model.norm.weight"], "weight") == (2.0, 7.0)
    assert parameter(merges["model.norm.weight"], "normalize") is False


def test_a_base_that_is_not_listed_is_merged_last_by_ops_without_a_base() -> None:
    recipe = expand_layouts(linear("b", "c", base_model="a"), {name: llama() for name in "abc"})
    assert [source.model for source in recipe.merges[0].sources] == ["b", "c", "a"]


def test_a_required_base_comes_first_wherever_it_is_listed() -> None:
    models = {name: llama() for name in "abc"}
    for listed in ("bc", "bac", "cab"):
        config = linear(*listed, merge_method="task_arithmetic", base_model="a")
        merge = expand_layouts(config, models).merges[0]
        assert [source.model for source in merge.sources] == ["a", *listed.replace("a", "")]
        assert parameter(merge, "weight") == (1.0, 1.0)


def test_a_tensor_that_is_missing_is_named_with_the_models() -> None:
    without = Layout({n: s for n, s in llama().shapes.items() if n != "model.norm.weight"}, llama().config)
    models = {"a": llama(), "b": llama(), "c": without}
    with pytest.raises(TensorMismatchError, match=r"model\.norm.weight is in a, b, but not in c"):
        expand_layouts(linear("a", "b", "c"), models)
    with pytest.raises(TensorMismatchError, match=r"model\.norm.weight is in a, b, but not in c"):
        expand_layouts(linear("c", "a", "b"), models)


def test_many_missing_tensors_are_counted() -> None:
    few = Layout({n: s for n, s in llama(8).shapes.items() if "mlp" not in n}, llama(8).config)
    with pytest.raises(TensorMismatchError) as caught:
        expand_layouts(linear("a", "b"), {"a": few, "b": llama(8)})
    assert str(caught.value).count("is in b, but not in a") == 5
    assert "\n  and 3 more\n" in str(caught.value)


def test_shapes_and_dtypes_that_do_not_fit() -> None:
    wide = Layout({**llama().shapes, "model.norm.weight": (5,)}, llama().config)
    with pytest.raises(TensorMismatchError, match=r"model.norm.weight is \[4\] in a and \[5\] in b"):
        expand_layouts(linear("a", "b"), {"a": llama(), "b": wide})
    whole = Layout(llama().shapes, llama().config, dtypes={"model.norm.weight": "I64"})
    with pytest.raises(TensorMismatchError, match=r"model\.norm.weight is BF16 in a and I64 in b"):
        expand_layouts(linear("a", "b"), {"a": llama(), "b": whole})


def test_models_of_other_architectures_are_told_by_these() -> None:
    first, second = llama(model_type="llama"), llama(model_type="qwen2")
    biased = Layout({**second.shapes, "model.layers.0.bias": (4,)}, second.config)
    said = r"a is llama, b is qwen2 \(model_type in config\.json\): merge models of one architecture"
    with pytest.raises(TensorMismatchError, match=rf"but not in a\n{said}"):
        expand_layouts(linear("a", "b"), {"a": first, "b": biased})
    with pytest.raises(TensorMismatchError, match=rf"a has 2 layers and b has 3; {said}"):
        expand_layouts(linear("a", "b"), {"a": first, "b": llama(3, model_type="qwen2")})


def test_models_of_different_depth_are_told_to_use_slices() -> None:
    with pytest.raises(TensorMismatchError, match=r"a has 2 layers and b has 3.*`slices`"):
        expand_layouts(linear("a", "b"), {"a": llama(2), "b": llama(3)})


def test_a_checkpoint_without_tensors() -> None:
    with pytest.raises(CheckpointError, match="b: the checkpoint holds no tensors"):
        expand_layouts(linear("a", "b"), {"a": llama(), "b": Layout({})})
    with pytest.raises(CheckpointError, match="no tensor is left"):
        expand_layouts(linear("a"), {"a": bare(["rotary_emb.inv_freq"])})


def test_buffers_are_dropped_by_a_rule_also_where_one_model_lacks_them() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    recipe = expand_layouts(
        linear("a", "b"), {"a": Layout({**llama().shapes, name: (2,)}, llama().config), "b": llama()}
    )
    assert name not in by_name(recipe)
    assert recipe.dropped == (f"a: 1 tensor ({name}): a buffer that models compute when they are loaded",)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.attn.masked_bias", ()),
        ("h.0.attn.bias", (1, 1, 8, 8)),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8)),
        ("embeddings.position_ids", (1, 8)),
    ],
)
@pytest.mark.parametrize("models", ["ab", "ba"])
def test_other_buffers_are_dropped_where_one_model_lacks_them(name: str, shape: tuple[int, ...], models: str) -> None:
    layout = Layout({**llama().shapes, name: shape}, llama().config)
    recipe = expand_layouts(linear(*models), {"a": layout, "b": llama()})
    assert name not in by_name(recipe)
    rule = "a buffer that models compute when they are loaded, and that not all inputs have"
    assert recipe.dropped == (f"a: 1 tensor ({name}): {rule}",)
    assert name in by_name(expand_layouts(linear("a", "b"), {"a": layout, "b": layout}))


@pytest.mark.parametrize(("name", "shape"), [("h.0.attn.bias", (8,)), ("h.0.attn.c_attn.bias", (1, 1, 8, 8))])
def test_weights_that_are_called_like_buffers_are_not_dropped(name: str, shape: tuple[int, ...]) -> None:
    layout = Layout({**llama().shapes, name: shape}, llama().config)
    with pytest.raises(TensorMismatchError, match=f"{name} is in a, but not in b"):
        expand_layouts(linear("a", "b"), {"a": layout, "b": llama()})


def test_a_checkpoint_with_fewer_layers_than_its_config_states() -> None:
    cut = Layout(llama(3).shapes, {**llama(3).config, "num_hidden_layers": 28})
    recipe = expand_layouts(linear("a", "b"), {"a": llama(3), "b": cut})
    assert recipe.warnings == ("b: config.json states 28 layers, and the checkpoint has 3; is it complete?",)


@pytest.mark.parametrize(
    ("stated", "said"), [("lots", '"lots", no whole number,'), (True, "true, no whole"), (7, "7, and")]
)
def test_a_vocab_size_that_no_loader_takes(stated: object, said: str) -> None:
    odd = Layout(llama().shapes, {**llama().config, "vocab_size": stated})
    (warning,) = expand_layouts(linear("a", "b"), {"a": odd, "b": odd}).warnings[:1]
    assert f"a: config.json states vocab_size {said}" in warning


def test_weights_of_both_signs_are_warned_of_once() -> None:
    def warnings(method: str, weights: list[float], **parameters: object) -> tuple[str, ...]:
        config = {
            "merge_method": method,
            "base_model": "base",
            "models": [{"model": m, "parameters": {"weight": weight}} for m, weight in zip("ab", weights, strict=True)],
            "parameters": parameters,
        }
        return expand_layouts(config, {name: llama() for name in ("base", "a", "b")}).warnings

    assert warnings("ties", [1.0, -0.999]) == (
        "7 tensors (lm_head.weight, ...): normalize is true, and weights have both signs ((1.0, -0.999)); where they "
        "nearly cancel, values get huge: set normalize: false",
    )
    assert len(warnings("task_arithmetic", [1.0, -0.999], normalize=True)) == 1
    assert warnings("task_arithmetic", [1.0, -0.999]) == ()
    assert warnings("ties", [-1.0, -0.5]) == warnings("ties", [1.0, 0.0]) == ()
    assert warnings("ties", [1.0, -0.999], normalize=False) == ()


def test_deepseek_layout_loses_nothing() -> None:
    layout = deepseek()
    models = {"a": layout, "b": layout}
    recipe = expand_layouts(linear("a", "b"), models)
    assert set(by_name(recipe)) == set(layout.shapes)
    assert recipe.dropped == ()
    weights = {n: parameter(m, "weight")[0] for n, m in by_name(
        expand_layouts(linear("a", "b", parameters={"weight": [1.0, 3.0]}), models)).items()}  # fmt: skip
    assert weights["model.layers.1.mlp.experts.3.up_proj.weight"] == 2.0
    assert weights["model.layers.3.eh_proj.weight"] == 3.0, "past the counted layers: the end of the gradient"


def test_deepseek_layers_in_slices_are_whole() -> None:
    models = {"a": deepseek(), "b": deepseek()}
    recipe = expand_layouts(passthrough(("a", 0, 3), ("b", 1, 3)), models)
    merges = by_name(recipe)
    assert source_names(merges["model.layers.4.mlp.experts.3.down_proj.weight"]) == [
        ("b", "model.layers.2.mlp.experts.3.down_proj.weight")
    ]
    assert sum("layers past the model's own" in line for line in recipe.dropped) == 2
    assert (recipe.config["first_k_dense_replace"], recipe.warnings) == (1, ())
    check_accounts(recipe, models)


def test_integers_are_copied() -> None:
    layout = Layout(
        {**llama().shapes, "embeddings.position_ids": (1, 8)}, llama().config, dtypes={"embeddings.position_ids": "I64"}
    )
    merge = by_name(expand_layouts(linear("a", "b", dtype="float16"), {"a": layout, "b": layout}))[
        "embeddings.position_ids"
    ]
    assert (merge.op, merge.out_dtype, len(merge.sources)) == (COPY, "I64", 2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "BF16"), ({"dtype": "float16"}, "F16"), ({"dtype": "float16", "out_dtype": "float32"}, "F32")],
)
def test_the_dtype_of_the_output_is_in_its_config(given: dict[str, str], expected: str) -> None:
    recipe = expand_layouts(linear("a", "b", **given), {"a": llama(torch_dtype="float64"), "b": llama()})
    assert {merge.out_dtype for merge in recipe.merges} == {expected}
    assert recipe.config["torch_dtype"] == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[expected]


def test_the_configs_dtype_is_that_of_most_bytes() -> None:
    layout = Layout(llama().shapes, llama().config, dtypes={"model.norm.weight": "F32"})
    assert expand_layouts(linear("a", "b"), {"a": layout, "b": layout}).config["torch_dtype"] == "bfloat16"


@given(st.lists(NAMES, unique=True, min_size=1, max_size=25), st.integers(0, 3), st.data())
def test_every_input_tensor_is_accounted_for(names: list[str], num_layers: int, data: st.DataObject) -> None:
    tied = data.draw(st.sampled_from([None, True, False]))
    layout = bare(names, num_hidden_layers=num_layers, **({} if tied is None else {"tie_word_embeddings": tied}))
    models = {"a": layout, "b": layout}
    config = linear("a", "b")
    if num_layers and any(name.startswith("model.layers.") for name in names) and data.draw(st.booleans()):
        start = data.draw(st.integers(0, num_layers - 1))
        config = passthrough(("a", 0, num_layers), ("b", start, num_layers))
    try:
        recipe = expand_layouts(config, models)
    except (CheckpointError, ConfigError):
        return  # a range past the layers, or nothing left
    check_accounts(recipe, models)
    assert len({merge.name for merge in recipe.merges}) == len(recipe.merges)


def test_float32_among_shorter_tensors_is_rounded_or_kept() -> None:
    decay, other = "model.layers.0.mamba.A_log", "model.layers.0.mamba.other"
    layout = Layout({**llama().shapes, decay: (4,), other: (4,)}, llama().config, dtypes={decay: "F32", other: "F32"})

    def dtypes(**more: Any) -> tuple[str, str]:
        merges = by_name(expand_layouts(linear("a", "b", **more), {"a": layout, "b": layout}))
        return merges[decay].out_dtype, merges[other].out_dtype

    assert dtypes() == ("F32", "F32")
    assert dtypes(dtype="bfloat16") == ("BF16", "BF16")
    assert dtypes(dtype="bfloat16", keep_float32=True) == ("F32", "BF16")
    assert dtypes(dtype="bfloat16", keep_float32=["*.mamba.*"]) == ("F32", "F32")


def test_the_flag_stays_where_the_embedding_is_not_known() -> None:
    """T5 scales by it, and checkpoints of it may have the head beside `shared.weight`."""
    layout = bare(["shared.weight", "lm_head.weight", "decoder.block.0.w"], num_layers=1, tie_word_embeddings=True)
    recipe = expand_layouts(linear("a", "b"), {"a": layout, "b": layout})
    assert recipe.config["tie_word_embeddings"] is True
    assert "lm_head.weight" in by_name(recipe)
