"""Models of several modules, made with transformers: merged module by module, loaded, and run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from raymerge import merge
from tests.checkpoints import Tensors, read_tensors, write_checkpoint
from tests.modular_models import IMAGE, TEXT, make_gemma, make_llava, make_qwen, make_t5, make_whisper, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run_on_image(model: Any) -> Any:
    """Return what a model makes of an image of four patches and some words."""
    torch.manual_seed(5)
    tokens = torch.tensor([[1, 3, *[IMAGE] * 4, 5, 7]])
    pixels = torch.randn(1, 3, 8, 8)
    types: dict[str, Any] = {"token_type_ids": (tokens == IMAGE).long()} if model.config.model_type == "gemma3" else {}
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels, **types).logits


def run_qwen(model: Any) -> Any:
    torch.manual_seed(5)
    tokens = torch.tensor([[1, 37, *[IMAGE] * 4, 38, 7]])
    grid = torch.tensor([[1, 4, 4]])
    types = (tokens == IMAGE).int()
    with torch.no_grad():
        return model(
            input_ids=tokens, pixel_values=torch.randn(16, 96), image_grid_thw=grid, mm_token_type_ids=types
        ).logits


def run_t5(model: Any) -> Any:
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits


def run_whisper(model: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(input_features=torch.randn(1, 8, 40), decoder_input_ids=torch.tensor([[1, 4, 5]])).logits


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    run: Callable[[Any], Any]
    merged: tuple[str, str]
    """A module, and a pattern of its tensors' names."""
    stacked: tuple[str, str, str]
    """Another module, what its layers are called, and a pattern of what comes after them."""
    count: tuple[str, ...]
    """Where config.json counts these layers."""
    text: Callable[[], Any] | None = None
    """Makes a model that is the language model alone."""
    prefix: str = ""
    """What the names of its tensors begin with in the whole."""


LANGUAGE_MODEL = ("text_decoder", r"language_model\.")
CLIP = ("vision_tower", "vision_tower.encoder.layers.", r"vision_tower\.post_layernorm")
CLIP_COUNT = ("vision_config", "num_hidden_layers")
FAMILIES = {
    "qwen2.5-vl": Family(
        make_qwen,
        run_qwen,
        ("text_decoder", r"model\.|lm_head"),
        ("vision_tower", "visual.blocks.", "nothing"),
        ("vision_config", "depth"),
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"})),
    ),
    "t5": Family(
        make_t5,
        run_t5,
        ("encoder", r"encoder\."),
        ("decoder", "decoder.block.", r"decoder\.final"),
        ("num_decoder_layers",),
    ),
    "gemma 3": Family(
        make_gemma,
        run_on_image,
        LANGUAGE_MODEL,
        CLIP,
        CLIP_COUNT,
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT, sliding_window=8)),
        "language_model.",
    ),
    "llava": Family(
        make_llava,
        run_on_image,
        LANGUAGE_MODEL,
        CLIP,
        CLIP_COUNT,
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
        "language_model.",
    ),
    "whisper": Family(
        make_whisper,
        run_whisper,
        ("decoder", r"model\.decoder\."),
        ("encoder", "model.encoder.layers.", r"model\.encoder\.layer_norm"),
        ("encoder_layers",),
    ),
}


def list_families(lean: str, *, with_text: bool = False) -> list[Any]:
    """Return families to try, of which one is always tried."""
    names = [name for name, family in FAMILIES.items() if family.text or not with_text]
    return [pytest.param(name, marks=[] if name == lean else [pytest.mark.slow]) for name in names]


def check(family: Family, out: Path, expected: Tensors) -> None:
    """Make sure that a merged model has these tensors, loads without a complaint, and computes what they do."""
    found = read_tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    by_hand = write_checkpoint(
        out.parent / f"{out.name} by hand", expected, json.loads((out / "config.json").read_text())
    )
    kind = type(family.make())
    loaded, said = kind.from_pretrained(out, output_loading_info=True)
    assert [name for name, what in said.items() if what] == []
    logits = family.run(loaded.eval())
    assert logits.isfinite().all()
    assert torch.allclose(logits, family.run(kind.from_pretrained(by_hand).eval()), atol=1e-4)


def entries(*models: str) -> dict[str, Any]:
    return {"models": [{"model": model} for model in models]}


@pytest.mark.parametrize("name", list_families("t5"))
def test_one_module_merged_one_stacked_and_the_rest_copied(name: str, tmp_path: Path) -> None:
    """The second module gets layers 0 and 1 of one model, and 1 and 2 of the other."""
    family = FAMILIES[name]
    paths = [save(family.make, tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    (merged, pattern), (stacked, stack, after) = family.merged, family.stacked
    sources = [{"model": path, "layer_range": part} for path, part in zip(paths, ([0, 2], [1, 3]), strict=True)]
    modules = {
        merged: {"parameters": {"weight": {"filter": "norm", "value": 3.0}}, **entries(*paths)},
        stacked: {"slices": [{"sources": [source]} for source in sources]},
    }
    modules[merged]["models"][1]["parameters"] = {"weight": 1.0}
    merge({"merge_method": "linear", "parameters": {"weight": 1.0}, "modules": modules}, tmp_path / "out", workers=1)
    first, second = (read_tensors(Path(path)) for path in paths)
    expected: Tensors = {}
    for key, x in first.items():
        if re.match(pattern, key):
            weight = 3.0 if "norm" in key else 1.0
            expected[key] = (weight * x + second[key]) / (weight + 1)
        elif not key.startswith(stack):
            expected[key] = second[key] if re.match(after, key) else x
    for k, (tensors, layer) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2)]):
        start = f"{stack}{layer}."
        expected |= {f"{stack}{k}.{key[len(start) :]}": x for key, x in tensors.items() if key.startswith(start)}
    check(family, tmp_path / "out", expected)
    section = json.loads((tmp_path / "out" / "config.json").read_text())
    for word in family.count:
        section = section[word]
    assert section == 4


@pytest.mark.parametrize("name", list_families("qwen2.5-vl", with_text=True))
def test_what_a_fine_tune_has_learnt_put_into_a_multimodal_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert family.text is not None
    whole = save(family.make, tmp_path / "whole", 1)
    base, tuned = (save(family.text, tmp_path / f"text{seed}", seed) for seed in (2, 3))
    tasks = {"merge_method": "task_arithmetic", "base_model": base, "copy_rest_from": whole}
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in ((whole, 1.0), (tuned, 0.5))]
    merge({**tasks, "models": models}, tmp_path / "out", workers=1)
    x, y, z = (read_tensors(Path(path)) for path in (whole, base, tuned))
    expected = dict(x)
    for key in y:
        inside = family.prefix + key
        expected[inside] = x[inside] + 0.5 * (z[key] - y[key])
    check(family, tmp_path / "out", expected)
    merge({**tasks, "modules": {"text_decoder": {"models": models}}}, tmp_path / "modules", workers=1)
    again = read_tensors(tmp_path / "modules")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in read_tensors(tmp_path / "out").items())
    layers = [{"sources": [{"model": model, "layer_range": [k, k + 2]}]} for k, model in enumerate((base, tuned))]
    merge({"merge_method": "passthrough", "slices": layers, "copy_rest_from": whole}, tmp_path / "stack", workers=1)
    stack = {key: tensor for key, tensor in x.items() if not key.startswith(family.prefix or ("model.", "lm_head"))}
    for key, tensor in y.items():
        is_after = "lm_head" in key or key == "model.norm.weight"
        stack |= {} if ".layers." in key else {family.prefix + key: z[key] if is_after else tensor}
    for k, (tensors, layer) in enumerate([(y, 0), (y, 1), (z, 1), (z, 2)]):
        start, new = f"model.layers.{layer}.", f"{family.prefix}model.layers.{k}."
        stack |= {new + key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
    if name == "gemma 3":  # its embedding is the head, and two models do not share one
        stack["language_model.lm_head.weight"] = z["model.embed_tokens.weight"]
    check(family, tmp_path / "stack", stack)
