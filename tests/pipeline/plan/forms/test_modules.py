"""Merges module by module, planned on names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.plan.forms.modules import settle_modules
from raymerge.pipeline.plan.recipe import Recipe, open_model
from tests.pipeline.plan.layouts import Layout, by_name, expand_layouts, llama, parameter, source_names, stored_tensors

TOWER: dict[str, tuple[int, ...]] = {"vision_tower.patch_embed.weight": (4, 4)}
TOWER |= {f"vision_tower.blocks.{k}.attn.qkv.weight": (4, 4) for k in range(3)} | {"vision_tower.norm.weight": (4,)}
PROJECTOR = {"multi_modal_projector.linear.weight": (4, 4), "multi_modal_projector.linear.bias": (4,)}
TEXT = llama(3)
SECTIONS: dict[str, Any] = {
    "text_config": {"num_hidden_layers": 3},
    "vision_config": {"depth": 3, "hidden_act": "silu"},
}
VL = Layout(
    {**{f"language_model.{name}": shape for name, shape in TEXT.shapes.items()}, **TOWER, **PROJECTOR}, SECTIONS
)
MODELS = {"vl": VL, "vl2": VL, "text": TEXT, "text2": TEXT}


def models(*names: str, **weights: float) -> dict[str, Any]:
    given = {name: {"weight": weight} for name, weight in weights.items()}
    return {"models": [{"model": name, "parameters": given.get(name, {})} for name in (*names, *weights)]}


def slices(*parts: tuple[str, int, int]) -> dict[str, Any]:
    return {"slices": [{"sources": [{"model": model, "layer_range": [a, b]}]} for model, a, b in parts]}


def linear(**modules: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "parameters": {"weight": 1.0}, "modules": modules}


def givers(recipe: Recipe, word: str) -> set[tuple[str, ...]]:
    """Return the models of each tensor whose name has a word in it."""
    return {tuple(source.model for source in merge.sources) for merge in recipe.merges if word in merge.name}


def settle(config: dict[str, Any]) -> MergeConfig:
    loaded = load_config(config)
    opened = {}
    for ref in loaded.referenced_models:
        layout = MODELS[str(ref)]
        checkpoint = Checkpoint(ref, "", dict(layout.config), (), {})
        opened[ref] = open_model(checkpoint, stored_tensors(str(ref), layout))
    return settle_modules(loaded, opened)


def test_each_module_has_models_of_its_own() -> None:
    recipe = expand_layouts(linear(text_decoder=models("vl", "vl2"), vision_tower=models("vl2")), MODELS)
    assert set(by_name(recipe)) == set(VL.shapes)
    assert givers(recipe, "language_model") == {("vl", "vl2")}
    assert givers(recipe, "vision_tower") == {("vl2",)}
    assert givers(recipe, "projector") == {("vl",)}
    assert recipe.notes == (
        "language_model (text_decoder): linear of vl, vl2",
        "vision_tower: linear of vl2",
        "not named in the config, so copied from vl: multi_modal_projector.linear (2 tensors)",
    )
    assert recipe.dropped == (
        "vl: 5 tensors (vision_tower.patch_embed.weight, ...): vision_tower is made of vl2",
        "vl2: 2 tensors (multi_modal_projector.linear.weight, ...): the config does not name its module, which is"
        " copied from vl",
    )


def test_gradients_run_over_a_modules_own_layers() -> None:
    config = linear(text_decoder=models("vl"), vision_tower=models("vl", "vl2"))
    config |= {"parameters": {"weight": [0.0, 1.0], "normalize": False}}
    merges = by_name(expand_layouts(config, MODELS))
    for stack in ("vision_tower.blocks.{}.attn.qkv.weight", "language_model.model.layers.{}.mlp.up_proj.weight"):
        assert [parameter(merges[stack.format(k)], "weight")[0] for k in range(3)] == [0.0, 0.5, 1.0]


def test_slices_of_two_modules() -> None:
    config = {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": slices(("vl", 0, 2), ("text", 1, 3)),
            "vision_tower": slices(("vl2", 0, 1), ("vl", 2, 3)),
        },
    }
    recipe = expand_layouts(config, MODELS)
    assert recipe.config["text_config"]["num_hidden_layers"] == 4
    assert recipe.config["vision_config"]["depth"] == 2
    merges = by_name(recipe)
    assert [source_names(merges[f"vision_tower.{rest}"]) for rest in ("blocks.1.attn.qkv.weight", "norm.weight")] == [
        [("vl", "vision_tower.blocks.2.attn.qkv.weight")],
        [("vl", "vision_tower.norm.weight")],
    ]
    assert givers(recipe, "patch_embed") == {("vl2",)}
    assert source_names(merges["language_model.model.layers.3.mlp.up_proj.weight"]) == [
        ("text", "model.layers.2.mlp.up_proj.weight")
    ]
    assert givers(recipe, "lm_head") == {("text",)}


TASKS: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "text", "parameters": {"weight": 1.0}}


@pytest.mark.parametrize(
    "config",
    [
        {**TASKS, **models("vl", "text2"), "copy_rest_from": "vl"},
        {**TASKS, "modules": {"text_decoder": models("vl", "text2")}, "copy_rest_from": "vl"},
        {**TASKS, "modules": {"text_decoder": models("vl", "text2"), "vision_tower": models("vl")}},
    ],
)
def test_fine_tunes_of_a_language_model_in_a_multimodal_one(config: dict[str, Any]) -> None:
    recipe = expand_layouts(config, MODELS)
    assert set(by_name(recipe)) == set(VL.shapes)
    assert givers(recipe, "language_model") == {("text", "vl", "text2")}
    assert givers(recipe, "vision_tower") == givers(recipe, "projector") == {("vl",)}
    assert recipe.config["vision_config"] == SECTIONS["vision_config"]
    assert recipe.dropped == ()


def test_the_rest_comes_from_a_model_that_is_not_merged() -> None:
    config = {"merge_method": "linear", **models(text=1.0, text2=3.0), "copy_rest_from": "vl"}
    recipe = expand_layouts(config, MODELS)
    assert set(by_name(recipe)) == set(VL.shapes)
    assert givers(recipe, "language_model") == {("text", "text2")}
    assert givers(recipe, "vision_tower") == {("vl",)}
    assert any("copied from vl: 7 tensors" in note for note in recipe.notes)
    (line,) = recipe.dropped
    assert line.endswith("the merged models have these")
    stack = expand_layouts(
        {"merge_method": "passthrough", **slices(("text", 0, 2), ("text2", 2, 3)), "copy_rest_from": "vl"}, MODELS
    )
    assert givers(stack, "layers.2.") == {("text2",)}
    assert givers(stack, "vision_tower") == {("vl",)}


def test_layers_that_fine_tunes_have_lost() -> None:
    whole = llama(2, past=1)
    found = {"whole": whole, "a": llama(2), "b": llama(2)}
    config = {"merge_method": "linear", **models("a", "b", whole=1.0), "parameters": {"weight": 1}}
    with pytest.raises(TensorMismatchError, match=r"layers.2.* is in whole, but not in a"):
        expand_layouts(config, found)
    recipe = expand_layouts({**config, "copy_rest_from": "whole"}, found)
    assert set(by_name(recipe)) == set(whole.shapes)
    assert givers(recipe, "layers.2.") == {("whole",)}
    assert givers(recipe, "layers.1.") == {("a", "b", "whole")}


def test_two_multimodal_models_and_a_base_without_a_tower() -> None:
    config = {**TASKS, **models("vl", "vl2"), "copy_rest_from": "vl2"}
    recipe = expand_layouts(config, MODELS)
    assert givers(recipe, "vision_tower") == {("vl2",)}, "there is nothing to take the difference from"
    assert givers(recipe, "language_model") == {("text", "vl", "vl2")}
    config = {"merge_method": "linear", "parameters": {"weight": 1}, **models("vl", "vl2"), "copy_rest_from": "vl2"}
    assert givers(expand_layouts(config, MODELS), "vision_tower") == {("vl", "vl2")}


def test_tensors_that_the_config_json_has_no_place_for() -> None:
    more = Layout({**TEXT.shapes, "model.extra.weight": (2, 2)}, TEXT.config)
    config = {"merge_method": "linear", "parameters": {"weight": 1}, **models("more"), "copy_rest_from": "text"}
    with pytest.raises(TensorMismatchError, match=r"model\.extra\.weight is in more, but not in text"):
        expand_layouts(config, {**MODELS, "more": more})


@pytest.mark.parametrize(
    ("giver_is_tied", "others_are_tied"), [(False, True), (True, False), (True, True), (False, False)]
)
def test_whether_there_is_a_head_follows_the_merged_models(giver_is_tied: bool, others_are_tied: bool) -> None:
    def layout(*, is_tied: bool) -> Layout:
        return llama(2, head=not is_tied, tie_word_embeddings=is_tied)

    found = {"giver": layout(is_tied=giver_is_tied), "a": layout(is_tied=others_are_tied)}
    config = {"merge_method": "linear", "parameters": {"weight": 1}, **models("a"), "copy_rest_from": "giver"}
    recipe = expand_layouts(config, found)
    assert ("lm_head.weight" in by_name(recipe)) is not others_are_tied
    assert recipe.config["tie_word_embeddings"] is others_are_tied
    assert givers(recipe, "") == {("a",)}


def test_models_whose_modules_are_called_otherwise() -> None:
    def rename(name: str) -> str:
        return name.replace("language_model.model.", "model.language_model.").replace("vision_tower.", "model.visual.")

    other = Layout({rename(name): shape for name, shape in VL.shapes.items()}, SECTIONS)
    config = linear(text_decoder=models("vl", "other"), vision_tower=models("other"))
    recipe = expand_layouts(config, {**MODELS, "other": other})
    assert set(by_name(recipe)) == set(VL.shapes)
    assert givers(recipe, "vision_tower") == {("other",)}
    assert any("'model.visual.' for 'vision_tower.'" in warning for warning in recipe.warnings)


def test_one_module_of_models_without_modules_is_the_whole() -> None:
    config = linear(llm=models("text", "text2"))
    assert set(by_name(expand_layouts(config, MODELS))) == set(TEXT.shapes)
    assert settle(config).notes == ("modules.llm: text has no modules, so llm stands for the whole model",)


def test_a_language_model_is_no_vision_tower() -> None:
    with pytest.raises(ConfigError, match=r"modules\.vision_tower: text has no module of this name; it is one module"):
        settle(linear(vision_tower=models("text", "text2")))


def test_the_first_model_with_all_modules_gives_the_rest() -> None:
    named = {"text_decoder": models("text2"), "vision_tower": models("vl2")}
    config = settle({**TASKS, "modules": named})
    assert str(config.copy_rest_from) == "vl2"
    assert config.notes == (
        "text has no vision_tower, so vl2, the first model that has, gives config.json, tokenizer and whatever is not"
        " merged; `copy_rest_from` names another one",
    )
    given = settle({**TASKS, "modules": named, "copy_rest_from": "vl"})
    assert (str(given.copy_rest_from), given.notes) == ("vl", ())
    assert settle({**TASKS, "modules": {"audio": models("vl2"), "text_decoder": models("vl")}}).copy_rest_from is None


def test_a_field_that_differs_in_a_module() -> None:
    other = Layout(VL.shapes, {**SECTIONS, "vision_config": {"depth": 3, "hidden_act": "gelu"}})
    config = linear(text_decoder=models("vl"), vision_tower=models("vl", "other"))
    warnings = expand_layouts(config, {**MODELS, "other": other}).warnings
    assert any(w.startswith("vision_tower: config.json: hidden_act differs") for w in warnings)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"vision_towr": models("vl")}, "merge.yml:5: modules.vision_towr: vl has no module of this name; it has"
         r" language_model \(text_decoder\), vision_tower, multi_modal_projector; did you mean 'vision_tower'\?"),
        ({"audio_tower": models("vl")}, "audio_tower: vl has no module of this name"),
        ({"vision_tower": models("vl", "text")}, r"modules.vision_tower: text has no tensors of this module"),
        ({"text_decoder": slices(("vl", 0, 9))}, r"merge.yml:5: modules.text_decoder: slices\[0\]\.sources\[0\]\."
         r"layer_range: \[0, 9\] reaches past vl, which has 3 layers"),
        ({"vision_tower": models("vl"), "visual": models("vl2")}, "modules.visual: stands for vision_tower in vl, and"),
        ({"multi_modal_projector": slices(("vl", 0, 1))}, "config.json of vl counts no layers of this module"),
        ({"text_decoder": models("vl", "deep")}, "modules.text_decoder: vl has 3 layers and deep has 4; name the"),
        ({"text_decoder": slices(("vl", 0, 1), ("wide", 0, 1))}, "text_decoder: hidden_size is 4 in vl and 6 in wide"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_with_the_module_and_its_line(
    modules: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "merge.yml"
    content = {"merge_method": "linear", "parameters": {"weight": 1}}
    path.write_text(yaml.safe_dump(content) + yaml.safe_dump({"modules": modules}, sort_keys=False))
    assert load_config(path).modules
    wide = Layout({name: tuple(6 if n == 4 else n for n in shape) for name, shape in TEXT.shapes.items()}, TEXT.config)
    with pytest.raises((ConfigError, TensorMismatchError), match=message):
        expand_layouts(path, {**MODELS, "deep": llama(4), "wide": wide})


def test_a_base_without_the_module() -> None:
    config = {**TASKS, "copy_rest_from": "vl", "modules": {"vision_tower": models("vl", "vl2")}}
    with pytest.raises(
        ConfigError, match=r"base_model text has no tensors of this module .*, and task_arithmetic merges it"
    ):
        expand_layouts(config, MODELS)
    recipe = expand_layouts({**config, "modules": {"vision_tower": models("vl2")}}, MODELS)
    assert givers(recipe, "vision_tower") == {("vl2",)}


def test_vision_layers_that_are_taken_out_of_the_tower() -> None:
    section = {"depth": 3, "deepstack_visual_indexes": [0, 2], "fullatt_block_indexes": [1]}
    deep = Layout(VL.shapes, {**SECTIONS, "vision_config": section, "vision_feature_layer": 1})
    config = {"merge_method": "passthrough", "modules": {"vision_tower": slices(("deep", 0, 1), ("deep", 2, 3))}}
    recipe = expand_layouts(config, {"deep": deep})
    assert recipe.config["vision_config"] == {
        "depth": 2, "deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": []
    }  # fmt: skip
    assert any("vision_feature_layer = 1 chooses a layer of the vision tower" in w for w in recipe.warnings)
    config["modules"] = {"vision_tower": slices(("deep", 0, 2))}
    with pytest.raises(ConfigError, match=r"deepstack_visual_indexes of config.json is \[0, 2\], .* the slices keep 1"):
        expand_layouts(config, {"deep": deep})
