from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.pipeline.checkpoint.checkpoint import resolve_model
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.table import list_tensors, read_table
from raymerge.pipeline.checkpoint.views.tying import find_embedding, find_head, has_own_head, is_tied, name_head
from raymerge.pipeline.plan.recipe import Recipe
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from tests.checkpoints import write_checkpoint
from tests.pipeline.plan.layouts import (
    Layout,
    bare,
    by_name,
    expand_layouts,
    linear,
    llama,
    parameters_of,
    passthrough,
    source_names,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = llama(head=False, tie_word_embeddings=True)
TIED_STORED = llama(head=True, tie_word_embeddings=True)
SILENT_TIED = llama(head=False)
SILENT_UNTIED = llama(head=True)
UNTIED = llama(head=True, tie_word_embeddings=False)
OWN_HEAD = replace(TIED_STORED, has_own_head=True)
NESTED = {"text_config": {"num_hidden_layers": 2, "tie_word_embeddings": True}}


def merge(*layouts: Layout, **config: Any) -> Recipe:
    models = dict(zip("abcd", layouts, strict=False))
    return expand_layouts(linear(*models, **config), models)


def head_sources(recipe: Recipe) -> list[tuple[str, str]] | None:
    merges = by_name(recipe)
    return source_names(merges[HEAD]) if HEAD in merges else None


@pytest.mark.parametrize(
    ("names", "head", "embedding"),
    [
        ([EMBEDDING, HEAD], HEAD, EMBEDDING),
        (["transformer.wte.weight", "transformer.h.0.w"], None, "transformer.wte.weight"),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], "embed_out.weight", "gpt_neox.embed_in.weight"),
        (
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
            "cls.predictions.decoder.weight",
            "bert.embeddings.word_embeddings.weight",
        ),
        (["a.embed_tokens.weight", "b.embed_tokens.weight"], None, None),
        (["model.layers.3.embed_tokens.weight", "model.layers.3.lm_head.weight"], None, None),
        ([], None, None),
    ],
)
def test_head_and_embedding_are_known_by_name(names: list[str], head: str | None, embedding: str | None) -> None:
    assert (find_head(names), find_embedding(names)) == (head, embedding)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        (EMBEDDING, HEAD),
        ("transformer.wte.weight", HEAD),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("model.language_model.embed_tokens.weight", HEAD),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_a_head_that_nobody_has_stored_gets_the_name_that_loaders_expect(embedding: str, head: str) -> None:
    assert name_head(embedding) == head


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (TIED, True),
        (TIED_STORED, True),
        (SILENT_TIED, True),
        (SILENT_UNTIED, False),
        (UNTIED, False),
        (llama(head=False, tie_word_embeddings=False), False),
        (bare(["encoder.weight"], tie_word_embeddings=True), False),
        (llama(head=False, architectures=["LlamaForSequenceClassification"], tie_word_embeddings=True), False),
        (llama(head=False, architectures=["Qwen2ForRewardModel"], tie_word_embeddings=True), False),
        (llama(head=False, architectures=["BertModel"]), False),
        (llama(head=False, architectures=["GPT2LMHeadModel"], tie_word_embeddings=True), True),
        (llama(head=False, architectures=None, tie_word_embeddings=True), True),
    ],
)
def test_is_tied(layout: Layout, tied: bool) -> None:
    assert is_tied(dict(layout.config), layout.shapes) is tied


@pytest.mark.parametrize("layout", [TIED, TIED_STORED, SILENT_TIED])
def test_all_tied_gives_no_head_and_keeps_the_flag(layout: Layout) -> None:
    recipe = merge(layout, layout, TIED)
    assert head_sources(recipe) is None
    assert recipe.config.get("tie_word_embeddings") is layout.config.get("tie_word_embeddings")
    assert recipe.warnings == ()


def test_a_stored_head_of_the_embeddings_values_is_left_out_with_a_word() -> None:
    recipe = merge(TIED_STORED, TIED)
    assert len(recipe.dropped) == 1
    assert recipe.dropped[0].startswith(f"a: 1 tensor ({HEAD})")
    assert "whose values it has" in recipe.dropped[0]


@pytest.mark.parametrize("other", [TIED, TIED_STORED, UNTIED, OWN_HEAD])
def test_a_stored_head_of_other_values_is_the_head_whatever_the_config_says(other: Layout) -> None:
    for recipe, model in ((merge(OWN_HEAD, other), "a"), (merge(other, OWN_HEAD), "b")):
        assert (model, HEAD) in (head_sources(recipe) or [])
        assert recipe.config["tie_word_embeddings"] is False
        warnings = [text for text in recipe.warnings if f"{HEAD} is stored with other values" in text]
        assert [text.partition(":")[0] for text in warnings] == (["a", "b"] if other is OWN_HEAD else [model])


@pytest.mark.parametrize(
    ("first", "last", "head"),
    [(OWN_HEAD, TIED, ("b", EMBEDDING)), (TIED, OWN_HEAD, ("b", HEAD)), (OWN_HEAD, UNTIED, ("b", HEAD))],
)
def test_a_stack_takes_the_head_of_its_last_model_by_what_is_stored(
    first: Layout, last: Layout, head: tuple[str, str]
) -> None:
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), {"a": first, "b": last})
    assert head_sources(recipe) == [head]
    assert recipe.config["tie_word_embeddings"] is False


def test_a_model_that_says_untied_and_has_no_head_is_warned_of() -> None:
    silent, warned = merge(TIED, TIED), merge(*2 * [llama(head=False, tie_word_embeddings=False)])
    assert not silent.warnings
    assert "loaders make one of random numbers" in warned.warnings[0]
    assert head_sources(warned) is None


@pytest.mark.parametrize(
    ("config", "dtype", "changed", "has_own"),
    [
        ({"tie_word_embeddings": True}, None, None, False),
        ({"tie_word_embeddings": True}, None, 0, True),
        ({"tie_word_embeddings": True}, None, -1, True),
        ({"tie_word_embeddings": True}, torch.float32, None, True),
        ({"tie_word_embeddings": False}, None, 0, False),
        ({}, None, 0, False),
        (NESTED, None, 0, True),
        (NESTED, None, None, False),
        ({**NESTED, "tie_word_embeddings": False}, None, -1, True),
    ],
)
def test_a_head_is_compared_with_the_embedding_byte_by_byte(
    config: dict[str, Any], dtype: torch.dtype | None, changed: int | None, has_own: bool, tmp_path: Path
) -> None:
    embedding = torch.rand(300, 257).to(torch.bfloat16)
    head = embedding.clone()
    if changed is not None:
        head.view(torch.int16).flatten()[changed] ^= 1
    path = write_checkpoint(tmp_path / "m", {EMBEDDING: embedding, HEAD: head.to(dtype or head.dtype)}, config)
    with open_stores(StoreSettings()) as stores:
        checkpoint = resolve_model(stores, ModelRef(str(path)))
        tensors = {t.name: t for t in list_tensors(read_table(stores, {"m": checkpoint.weight_files}))["m"]}
        assert has_own_head(stores, checkpoint.config, tensors) is has_own


@pytest.mark.parametrize("donor", [TIED, SILENT_TIED, TIED_STORED])
@pytest.mark.parametrize("other", [UNTIED, SILENT_UNTIED])
def test_a_tied_donor_and_an_untied_model_give_a_head_of_its_own(donor: Layout, other: Layout) -> None:
    recipe = merge(donor, other)
    assert head_sources(recipe) == [("a", EMBEDDING), ("b", HEAD)]
    assert recipe.config["tie_word_embeddings"] is False
    assert any("tie_word_embeddings: false" in warning for warning in recipe.warnings)


@pytest.mark.parametrize("donor", [UNTIED, SILENT_UNTIED])
@pytest.mark.parametrize("other", [TIED, SILENT_TIED, TIED_STORED])
def test_an_untied_donor_and_a_tied_model_keep_the_donors_flag(donor: Layout, other: Layout) -> None:
    recipe = merge(donor, other)
    assert head_sources(recipe) == [("a", HEAD), ("b", EMBEDDING)]
    assert recipe.config.get("tie_word_embeddings") is donor.config.get("tie_word_embeddings")
    assert recipe.warnings == ()


def test_a_nested_flag_is_cleared_too() -> None:
    text = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    donor = Layout(TIED.shapes, {"text_config": text, "tie_word_embeddings": True})
    recipe = merge(donor, Layout(UNTIED.shapes, {"text_config": text | {"tie_word_embeddings": False}}))
    assert recipe.config["tie_word_embeddings"] is False
    assert recipe.config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("top", [True, False])
def test_a_flag_that_contradicts_itself_is_settled_by_the_missing_head(top: bool) -> None:
    text = {"num_hidden_layers": 2, "tie_word_embeddings": not top}
    recipe = merge(*2 * [Layout(TIED.shapes, {"text_config": text, "tie_word_embeddings": top})])
    assert head_sources(recipe) is None
    assert recipe.config["tie_word_embeddings"] is recipe.config["text_config"]["tie_word_embeddings"] is True


def test_filters_on_the_head_see_its_name_where_an_embedding_stands_in() -> None:
    weight = [{"filter": "lm_head", "value": 3.0}, {"value": 1.0}]
    recipe = merge(TIED, UNTIED, parameters={"weight": weight})
    assert parameters_of(by_name(recipe)[HEAD])["weight"] == (3.0, 3.0)
    assert parameters_of(by_name(recipe)[EMBEDDING])["weight"] == (1.0, 1.0)


@pytest.mark.parametrize("tied", [True, False, None])
def test_classifiers_keep_their_config(tied: bool | None) -> None:
    config = {"architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 2}
    stated = {} if tied is None else {"tie_word_embeddings": tied}
    layout = Layout({**llama(2, head=False).shapes, "score.weight": (2, 4)}, config | stated)
    models = {"a": layout, "b": layout}
    for merge_config in (linear("a", "b"), passthrough(("a", 0, 1), ("b", 1, 2))):
        recipe = expand_layouts(merge_config, models)
        assert HEAD not in by_name(recipe)
        assert "score.weight" in by_name(recipe)
        assert recipe.config.get("tie_word_embeddings") is tied
        assert recipe.warnings == ()


def test_a_stack_of_one_tied_model_stays_tied() -> None:
    recipe = expand_layouts(passthrough(("a", 0, 2), ("a", 1, 2)), {"a": TIED})
    assert head_sources(recipe) is None
    assert recipe.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("layout", [TIED, TIED_STORED, SILENT_TIED])
def test_a_stack_that_ends_with_another_tied_model_gets_that_ones_head(layout: Layout) -> None:
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), {"a": layout, "b": layout})
    assert head_sources(recipe) == [("b", EMBEDDING)]
    assert source_names(by_name(recipe)[EMBEDDING]) == [("a", EMBEDDING)]
    assert recipe.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("first", "last", "head"),
    [(UNTIED, TIED, EMBEDDING), (TIED, UNTIED, HEAD), (UNTIED, UNTIED, HEAD), (UNTIED, TIED_STORED, EMBEDDING)],
)
def test_a_stack_takes_the_head_of_its_last_model(first: Layout, last: Layout, head: str) -> None:
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), {"a": first, "b": last})
    assert head_sources(recipe) == [("b", head)]
    assert recipe.config["tie_word_embeddings"] is False


def test_a_stack_of_a_tied_model_under_an_untied_donor_says_that_it_is_tied() -> None:
    config = passthrough(("a", 0, 1), ("b", 0, 1), ("a", 1, 2), base_model="b")
    recipe = expand_layouts(config, {"a": TIED, "b": UNTIED})
    assert head_sources(recipe) is None
    assert recipe.config["tie_word_embeddings"] is True


def test_a_stack_of_gpt_neox_names_its_head_embed_out() -> None:
    names = ["gpt_neox.embed_in.weight", *(f"gpt_neox.layers.{k}.w" for k in range(2)), "gpt_neox.final_norm.weight"]
    layout = bare(names, num_hidden_layers=2, tie_word_embeddings=True)
    recipe = expand_layouts(passthrough(("a", 0, 1), ("b", 1, 2)), {"a": layout, "b": layout})
    assert source_names(by_name(recipe)["embed_out.weight"]) == [("b", "gpt_neox.embed_in.weight")]
