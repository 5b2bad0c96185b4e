"""Models whose tensors have the donor's names but for how these begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from raymerge.pipeline.errors import CheckpointError, TensorMismatchError
from tests.pipeline.plan.layouts import Layout, by_name, expand_layouts, linear, llama, passthrough, source_names

BASE = llama()


def renamed(change: Callable[[str], str], base: Layout = BASE) -> Layout:
    return Layout({change(name): shape for name, shape in base.shapes.items()}, base.config)


def ties(*models: str, base: str) -> dict[str, Any]:
    return linear(*models) | {"merge_method": "ties", "base_model": base}


def nest(name: str) -> str:
    return name.replace("model.", "model.language_model.")


@pytest.mark.parametrize(
    ("change", "old"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"thinker.{name}", "thinker."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (nest, "model.language_model."),
        (lambda name: name.replace("model.", "transformer."), "transformer."),
    ],
)
def test_names_that_begin_in_another_way_are_matched(change: Callable[[str], str], old: str) -> None:
    for config in (linear("a", "b"), passthrough(("a", 0, 1), ("b", 1, 2))):
        recipe = expand_layouts(config, {"a": BASE, "b": renamed(change)})
        assert set(by_name(recipe)) == set(BASE.shapes)
        (warning,) = recipe.warnings
        assert f"b: its names begin with {old!r}" in warning
        assert ("b", change("model.layers.1.self_attn.q_proj.weight")) in source_names(
            by_name(recipe)["model.layers.1.self_attn.q_proj.weight"]
        )


def test_the_donors_names_are_those_of_the_output() -> None:
    recipe = expand_layouts(linear("a", "b"), {"a": renamed(nest), "b": BASE})
    assert set(by_name(recipe)) == set(map(nest, BASE.shapes))


def test_a_tied_model_under_other_names() -> None:
    tied = llama(head=False, tie_word_embeddings=True)
    recipe = expand_layouts(linear("a", "b"), {"a": BASE, "b": renamed(nest, tied)})
    assert source_names(by_name(recipe)["lm_head.weight"]) == [
        ("a", "lm_head.weight"),
        ("b", "model.language_model.embed_tokens.weight"),
    ]


def test_rules_for_what_is_left_out_hold_under_other_names() -> None:
    tied = llama(tie_word_embeddings=True)
    tied = replace(tied, shapes={**tied.shapes, "model.layers.1.self_attn.rotary_emb.inv_freq": (2,)})
    models = {"a": tied, "b": renamed(lambda name: f"_orig_mod.{name}", tied)}
    for config in (linear("a", "b"), passthrough(("a", 0, 1), ("b", 1, 2)), passthrough(("b", 0, 1), ("a", 1, 2))):
        lines = expand_layouts(config, models).dropped
        rules = {line.removeprefix("a: ").replace("_orig_mod.", "") for line in lines if line.startswith("a: ")}
        own = expand_layouts(config, {"a": tied, "b": tied}).dropped
        assert [line.replace("_orig_mod.", "") for line in lines] == list(own)
        assert rules


TOWER = {"model.visual.patch.weight": (4, 4), "model.visual.blocks.0.qkv.weight": (4, 4)}
SENSES = {"vision_config": {"depth": 1}, "num_hidden_layers": 2}
MULTIMODAL = Layout({**renamed(nest).shapes, **TOWER}, SENSES)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (MULTIMODAL, BASE),
        (MULTIMODAL, llama(head=False, tie_word_embeddings=True)),
        (MULTIMODAL, renamed(lambda name: name.removeprefix("model."), llama(head=False))),
        (Layout({**renamed(lambda name: f"language_model.{name}").shapes, **TOWER}, SENSES), BASE),
        (Layout({**BASE.shapes, "visual.patch.weight": (4, 4)}, SENSES), BASE),
    ],
)
def test_a_language_model_and_the_one_in_a_multimodal_model(whole: Layout, part: Layout) -> None:
    extra = {name for name in whole.shapes if "visual" in name}
    for method in (linear("whole", "part"), ties("part", base="whole")):
        recipe = expand_layouts(method, {"whole": whole, "part": part})
        merges = by_name(recipe)
        assert set(merges) == set(whole.shapes)
        assert {name for name, merge in merges.items() if len(merge.sources) == 1} == extra
        assert {source_names(merges[name])[0] for name in extra} == {("whole", name) for name in extra}
        assert any("part: a language model like the one in whole" in warning for warning in recipe.warnings)
        assert recipe.dropped == ()
    for method in (linear("part", "whole"), ties("whole", base="part")):
        recipe = expand_layouts(method, {"whole": whole, "part": part})
        assert set(by_name(recipe)) - {"lm_head.weight"} == set(part.shapes) - {"lm_head.weight"}
        assert all(len(merge.sources) == 2 for merge in recipe.merges)
        assert any("add `copy_rest_from: whole`" in warning for warning in recipe.warnings)
        (line,) = recipe.dropped
        assert line.startswith(f"whole: {len(extra)} tensor")
        assert line.endswith("the output is a language model like part")


def test_two_multimodal_models_and_a_language_model() -> None:
    recipe = expand_layouts(linear("a", "b", "part"), {"a": MULTIMODAL, "b": MULTIMODAL, "part": BASE})
    assert {len(merge.sources) for name, merge in by_name(recipe).items() if name in TOWER} == {2}


@pytest.mark.parametrize(
    "whole",
    [
        Layout(MULTIMODAL.shapes, BASE.config),
        Layout({**MULTIMODAL.shapes, "model.language_model.extra.weight": (4, 4)}, SENSES),
        Layout(dict(list(MULTIMODAL.shapes.items())[1:]), SENSES),
    ],
    ids=["no other senses", "more in the language model", "less in the language model"],
)
def test_what_is_not_the_same_language_model_is_refused(whole: Layout) -> None:
    for config in (linear("whole", "part"), linear("part", "whole")):
        with pytest.raises(
            TensorMismatchError, match=r"'model\.' .*'model\.language_model\.'|'model\.language_model\.'.*'model\.'"
        ):
            expand_layouts(config, {"whole": whole, "part": BASE})


def test_a_multimodal_model_that_lacks_a_tensor_of_its_tower_is_no_language_model() -> None:
    less = Layout({name: shape for name, shape in MULTIMODAL.shapes.items() if name != list(TOWER)[-1]}, SENSES)
    assert len(less.shapes) == len(MULTIMODAL.shapes) - 1
    for config in (linear("whole", "less"), linear("less", "whole")):
        with pytest.raises(TensorMismatchError, match="but not in less"):
            expand_layouts(config, {"whole": MULTIMODAL, "less": less})


def test_layers_of_a_multimodal_model_and_of_a_language_model_make_no_stack() -> None:
    with pytest.raises(TensorMismatchError, match=r"layers are called model.language_model.layers.\* in a"):
        expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), {"a": MULTIMODAL, "b": BASE})


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            ["experts.0.gate_proj.weight", "experts.0.up_proj.weight"],
            ["experts.gate_up_proj"],
            r"a stores experts one by one \(model.layers.0.mlp.experts.0.gate_proj.weight\), b together"
            r" \(model.layers.0.mlp.experts.gate_up_proj\); to give both the same names, load each with",
        ),
        (["experts.gate_up_proj"], ["experts.0.w1.weight"], "b stores experts one by one .*, a together"),
        (["qkv_proj.weight"], ["q_proj.weight", "k_proj.weight"], "b stores query, key and value one by one"),
        (["gate_proj.weight", "up_proj.weight"], ["gate_up_proj.weight"], "a stores gate and up projections one by"),
        (
            ["norms.weight"],
            ["norm.weight"],
            "What a calls model.layers.0.mlp.norms.weight, b calls model.layers.0.mlp.norm",
        ),
    ],
)
def test_other_names_are_explained(one: list[str], other: list[str], message: str) -> None:
    layouts = {
        ref: Layout(
            {**BASE.shapes, **{f"model.layers.{k}.mlp.{name}": (4, 4) for k in range(2) for name in names}}, BASE.config
        )
        for ref, names in (("a", one), ("b", other))
    }
    for b in (layouts["b"], renamed(nest, layouts["b"])):
        with pytest.raises(TensorMismatchError, match=message):
            expand_layouts(linear("a", "b"), {"a": layouts["a"], "b": b})


@pytest.mark.parametrize(
    "other",
    [
        renamed(lambda name: name.replace("q_proj", "query")),
        Layout({**renamed(nest).shapes, "model.visual.patch.weight": (4, 4)}, BASE.config),
        Layout(dict(list(renamed(nest).shapes.items())[1:]), BASE.config),
    ],
)
def test_other_differences_are_no_matter_of_names(other: Layout) -> None:
    with pytest.raises(TensorMismatchError):
        expand_layouts(linear("a", "b"), {"a": BASE, "b": other})


def test_packed_numbers_under_other_names_are_refused() -> None:
    packed = renamed(lambda name: f"_orig_mod.{name}")
    packed = replace(packed, dtypes={name: "F8_E4M3" for name in packed.shapes if "proj" in name})
    for more in ({}, {"integers": "donor"}):
        with pytest.raises(CheckpointError, match=r"^b: quantised"):
            expand_layouts(linear("a", "b", **more), {"a": BASE, "b": packed})
