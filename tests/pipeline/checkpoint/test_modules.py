"""Modules of checkpoints, told by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raymerge.pipeline.checkpoint.modules import Module, Modules, common_prefix, find_modules
from raymerge.pipeline.checkpoint.names import find_layers

LLAMA = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight")
SIGLIP = ("embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight", "post_layernorm.weight")
QWEN_TOWER = (
    "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "merger.ln_q.weight",
    "merger.mlp.0.weight", "merger.mlp.2.weight",
)  # fmt: skip


def under(prefix: str, names: Iterable[str]) -> list[str]:
    return [prefix + name for name in names]


LAYOUTS = {
    "llama": [*under("model.", LLAMA), "lm_head.weight"],
    "bare llama": list(LLAMA),
    "qwen2.5-vl": [*under("model.", LLAMA), *under("visual.", QWEN_TOWER), "lm_head.weight"],
    "qwen3-vl": [
        *under("model.language_model.", LLAMA),
        *under("model.visual.", [*QWEN_TOWER, "deepstack_merger_list.0.norm.weight"]),
        "lm_head.weight",
    ],
    "gemma 3": [
        *under("language_model.model.", LLAMA),
        *under("vision_tower.vision_model.", SIGLIP),
        "multi_modal_projector.mm_input_projection_weight",
    ],
    "llava 1.5, original": [
        *under("model.", LLAMA),
        *under("model.vision_tower.vision_tower.vision_model.", SIGLIP),
        *under("model.mm_projector.", ("0.weight", "2.weight")),
        "lm_head.weight",
    ],
    "idefics 3": [
        *under("model.text_model.", LLAMA),
        *under("model.vision_model.", SIGLIP),
        "model.connector.modality_projection.proj.weight",
        "lm_head.weight",
    ],
    "internvl": [
        *under("language_model.model.", LLAMA),
        "language_model.lm_head.weight",
        *under("vision_model.", SIGLIP),
        *under("mlp1.", ("0.weight", "1.weight", "3.weight")),
    ],
    "clip": [
        *under("text_model.", ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight")),
        "text_model.final_layer_norm.weight",
        *under("vision_model.", SIGLIP),
        *("visual_projection.weight", "text_projection.weight", "logit_scale"),
    ],
    "t5": [
        *("encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        *("decoder.embed_tokens.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"),
        *("decoder.block.1.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        *("shared.weight", "lm_head.weight"),
    ],
    "whisper": [
        *("model.encoder.conv1.weight", "model.encoder.layers.0.fc1.weight", "model.encoder.layer_norm.weight"),
        *("model.decoder.embed_tokens.weight", "model.decoder.layers.0.fc1.weight", "proj_out.weight"),
    ],
    "qwen2.5-omni": [
        *under("thinker.model.", LLAMA),
        *("thinker.lm_head.weight", "thinker.audio_tower.layers.0.fc1.weight", "talker.codec_head.weight"),
        *under("thinker.visual.", QWEN_TOWER),
        *under("talker.model.", LLAMA[:2]),
    ],
    "xlm": under("transformer.", ("attentions.0.q_lin.weight", "ffns.0.lin1.weight", "embeddings.weight")),
    "no layers": ["linear.weight", "other.bias"],
}


def find(layout: str) -> Modules:
    names = LAYOUTS[layout]
    num_layers = 2 if any(name.endswith(LLAMA[2]) for name in names) else 1
    return find_modules(names, find_layers([(name, 1) for name in names], num_layers))


def held(modules: Modules, name: str) -> list[str]:
    module = modules.choose(name)
    assert module is not None, name
    return [each for each in modules.names if module.match(each)]


@pytest.mark.parametrize(
    ("layout", "described"),
    [
        ("llama", " (text_decoder)"),
        ("bare llama", " (text_decoder)"),
        ("qwen2.5-vl", "model (text_decoder), visual (vision_tower), visual.merger (multi_modal_projector)"),
        (
            "qwen3-vl",
            "model.language_model (text_decoder), model.visual (vision_tower), model.visual.merger"
            " (multi_modal_projector)",
        ),
        ("gemma 3", "language_model (text_decoder), vision_tower, multi_modal_projector"),
        (
            "llava 1.5, original",
            "model (text_decoder), model.vision_tower, model.mm_projector (multi_modal_projector)",
        ),
        (
            "idefics 3",
            "model.text_model (text_decoder), model.vision_model (vision_tower), model.connector"
            " (multi_modal_projector)",
        ),
        ("internvl", "language_model (text_decoder), vision_model (vision_tower), mlp1"),
        ("t5", "decoder, encoder, shared"),
        ("whisper", "model.decoder, model.encoder"),
        ("xlm", " (text_decoder)"),
        ("no layers", " (text_decoder)"),
    ],
)
def test_what_there_is(layout: str, described: str) -> None:
    assert find(layout).describe() == described


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_tensor_lies_in_one_module(layout: str) -> None:
    modules = find(layout)
    for name in modules.names:
        assert [each.path for each in modules.found if each.match(name)] != []
        assert sum(1 for each in modules.found if each.match(name)) == 1, name
    for each in modules.found:
        assert each.path == "" or held(modules, each.path), "a module is called by its path"


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        ("qwen2.5-vl", "vision_tower", under("visual.", QWEN_TOWER[:3])),
        ("qwen2.5-vl", "visual", under("visual.", QWEN_TOWER)),
        ("qwen2.5-vl", "multi_modal_projector", under("visual.", QWEN_TOWER[3:])),
        ("qwen2.5-vl", "visual.merger", under("visual.", QWEN_TOWER[3:])),
        ("qwen2.5-vl", "merger", under("visual.", QWEN_TOWER[3:])),
        ("qwen2.5-vl", "text_decoder", [*under("model.", LLAMA), "lm_head.weight"]),
        ("qwen2.5-vl", "model", [*under("model.", LLAMA), "lm_head.weight"]),
        ("qwen2.5-vl", "model.layers", under("model.", LLAMA[1:3])),
        (
            "qwen3-vl",
            "multi_modal_projector",
            under("model.visual.", [*QWEN_TOWER[3:], "deepstack_merger_list.0.norm.weight"]),
        ),
        ("gemma 3", "vision_model", under("vision_tower.vision_model.", SIGLIP)),
        ("llava 1.5, original", "language_model", [*under("model.", LLAMA), "lm_head.weight"]),
        ("internvl", "language_model", [*under("language_model.model.", LLAMA), "language_model.lm_head.weight"]),
        ("clip", "text_decoder", LAYOUTS["clip"][:3]),
        ("t5", "shared", [LAYOUTS["t5"][0], LAYOUTS["t5"][2], "shared.weight", "lm_head.weight"]),
        ("t5", "encoder", [LAYOUTS["t5"][1], LAYOUTS["t5"][5]]),
        ("whisper", "decoder", LAYOUTS["whisper"][3:]),
        ("qwen2.5-omni", "text_decoder", [*under("thinker.model.", LLAMA), "thinker.lm_head.weight"]),
        ("qwen2.5-omni", "audio_tower", ["thinker.audio_tower.layers.0.fc1.weight"]),
        ("llama", "text_decoder", LAYOUTS["llama"]),
    ],
)
def test_names_that_modules_are_called_by(layout: str, name: str, expected: list[str]) -> None:
    assert held(find(layout), name) == expected


@pytest.mark.parametrize(
    ("layout", "name"),
    [("qwen2.5-vl", "encoder"), ("gemma 3", "mlp1"), ("clip", "layers"), ("t5", ""), ("qwen2.5-vl", "lm_head.weight")],
)
def test_names_of_none_or_of_several(layout: str, name: str) -> None:
    assert find(layout).choose(name) is None


def test_heads_that_only_other_models_have() -> None:
    module = find("gemma 3").choose("text_decoder")
    assert module is not None
    assert module.match("language_model.lm_head.weight")
    assert module.match("lm_head.weight")
    assert not module.match("lm_head_extra.weight")


WORDS = st.lists(
    st.sampled_from(["model", "visual", "encoder", "decoder", "shared", "layers", "0", "1", "lm_head", "w"])
)


@settings(max_examples=40)
@example({"encoder", "shared", "lm_head.model.0.model", "lm_head.visual"})
@example({"model", "model.model.model.0.model", "model.visual"})
@example({"encoder.encoder.model", "model.encoder.model"})
@given(st.sets(WORDS.filter(bool).map(".".join), min_size=1, max_size=12))
def test_whatever_the_names_are(names: set[str]) -> None:
    ordered = sorted(names)
    modules = find_modules(ordered, find_layers([(name, 1) for name in ordered], None))
    for name in ordered:
        assert sum(1 for each in modules.found if each.match(name)) == 1
    assert all(name.startswith(common_prefix(ordered)) for name in ordered)


def test_the_innermost_module_matches_best() -> None:
    name = "visual.merger.mlp.0.weight"
    assert Module("visual.merger", "", ("visual.merger",)).match(name) > Module("visual", "", ("visual",)).match(name)


def test_names_of_thousands_of_words_are_one_module() -> None:
    names = [f"{'a.' * 3000}{rest}" for rest in ("layers.0.w", "layers.1.w", "visual.w")]
    assert find_modules(names, find_layers([(name, 1) for name in names], None)).is_one
