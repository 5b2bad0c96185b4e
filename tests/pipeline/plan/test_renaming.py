"""Models whose tensors have the donor's names but for how these begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from raymerge.pipeline.errors import CheckpointError, TensorMismatchError
from tests.pipeline.plan.layouts import Layout, by_name, expand_layouts, linear, llama, passthrough, source_names

BASE = llama()


def renamed(change: Callable[[str], str], base: Layout = BASE) -> Layout:
    return Layout({change(name): shape for name, shape in base.shapes.items()}, base.config)


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
