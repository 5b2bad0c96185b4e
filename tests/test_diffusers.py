"""Pipelines that diffusers saved, merged, loaded by diffusers again, and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from raymerge import merge, plan, verify

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CLIP: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 8,
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
UNET: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 8,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "slerp": {"parameters": {"t": 0.4}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.6}},
    "dare_linear": {"parameters": {"weight": 0.5, "density": 0.6}},
}


def make_tokenizer(directory: Path) -> CLIPTokenizer:
    """Return a CLIP tokenizer of ten letters."""
    letters = [chr(number) for number in range(ord("a"), ord("a") + 10)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=16)


def make_stable_diffusion(directory: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        tokenizer=make_tokenizer(directory),
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_stable_diffusion_xl(directory: Path) -> Any:
    unet = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "cross_attention_dim": 16}
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
        tokenizer=make_tokenizer(directory),
        tokenizer_2=make_tokenizer(directory),
        unet=diffusers.UNet2DConditionModel(**{**UNET, **unet, "projection_class_embeddings_input_dim": 8 + 6 * 2}),
        scheduler=diffusers.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
    )


def make_stable_diffusion_3(directory: Path) -> Any:
    """Return one without its third text encoder, T5, which it may lack."""
    return diffusers.StableDiffusion3Pipeline(
        vae=diffusers.AutoencoderKL(**VAE, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
        text_encoder_3=None,
        tokenizer=make_tokenizer(directory),
        tokenizer_2=make_tokenizer(directory),
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            out_channels=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def load(directory: Path) -> Any:
    """Load a pipeline; one without T5 has to be told so, as diffusers leaves it out of model_index.json."""
    has_t5 = "StableDiffusion3" not in (directory / "model_index.json").read_text()
    without: dict[str, Any] = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.DiffusionPipeline.from_pretrained(directory, **without)


def list_networks(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def write_pair(make: Callable[[Path], Any], directory: Path, **more: Any) -> tuple[Any, Any]:
    """Save a pipeline, and one fine-tuned from it; return both."""
    base, tuned = make(directory / "tokenizer"), make(directory / "tokenizer")
    for name, network in list_networks(tuned).items():
        state = list_networks(base)[name].state_dict()
        noisy = {key: x + torch.randn_like(x) * 0.02 if x.is_floating_point() else x for key, x in state.items()}
        network.load_state_dict(noisy)
    base.save_pretrained(directory / "base", **more)
    tuned.save_pretrained(directory / "tuned", **more)
    return base, tuned


def draw(pipeline: Any) -> Any:
    """Return an image that a pipeline makes in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipeline("a b", generator=torch.Generator().manual_seed(0), **arguments).images


def make_config(directory: Path, method: str) -> dict[str, Any]:
    base = {} if method == "linear" else {"base_model": str(directory / "base")}
    listed = ["base", "tuned"] if method == "linear" else ["tuned"]
    return {
        "merge_method": method,
        "models": [{"model": str(directory / name)} for name in listed],
        **METHODS[method],
        **base,
    }


@pytest.mark.parametrize("make", [make_stable_diffusion, make_stable_diffusion_xl, make_stable_diffusion_3])
def test_whole_pipelines(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Four methods; the mean is that of the state dicts in float64, and it draws what diffusers draws with that."""
    base, tuned = write_pair(make, tmp_path)
    for method in METHODS:
        merge(make_config(tmp_path, method), tmp_path / method, shard_size=30_000 if method == "linear" else None)
        merged = load(tmp_path / method)
        assert type(merged) is type(base)
        assert verify(tmp_path / method).num_tensors > 100
        image = draw(merged)
        assert np.isfinite(image).all()
    assert list((tmp_path / "linear").glob("*/diffusion_pytorch_model.safetensors.index.json"))
    merged = load(tmp_path / "linear")
    for name, network in list_networks(base).items():
        first, second = network.state_dict(), list_networks(tuned)[name].state_dict()
        mean = {key: ((x.double() + second[key].double()) / 2).to(x.dtype) for key, x in first.items()}
        found = list_networks(merged)[name].state_dict()
        assert found.keys() == mean.keys()
        for key, x in mean.items():
            torch.testing.assert_close(found[key], x, rtol=1e-6, atol=1e-7)
        network.load_state_dict(mean)
    np.testing.assert_allclose(draw(merged), draw(base), atol=1e-4)


def test_half_precision_in_many_files(tmp_path: Path) -> None:
    """Pipelines of which only the fp16 variant is there, in shards, as many on the Hub are."""
    write_pair(make_stable_diffusion, tmp_path / "whole")
    for name in ("base", "tuned"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole" / name, torch_dtype=torch.float16)
        pipeline.save_pretrained(tmp_path / name, variant="fp16", max_shard_size="20KB")
    planned = plan(make_config(tmp_path, "slerp"))
    assert sum("only the variant fp16" in warning for warning in planned.warnings) == 6
    merge(make_config(tmp_path, "slerp"), tmp_path / "out")
    merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert merged.unet.state_dict().keys() == pipeline.unet.state_dict().keys()
    assert np.isfinite(draw(merged)).all()


def test_a_transformer_by_itself(tmp_path: Path) -> None:
    """A network that is no pipeline: Flux's, by four methods."""
    sizes: dict[str, Any] = {
        **{"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8},
        **{"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)},
    }
    kind: Any = diffusers.FluxTransformer2DModel
    for name in ("base", "tuned"):
        kind(**sizes).save_pretrained(tmp_path / name)
    for method in METHODS:
        merge(make_config(tmp_path, method), tmp_path / method)
    merged, base, tuned = (kind.from_pretrained(tmp_path / name) for name in ("linear", "base", "tuned"))
    mean = {key: (x.double() + tuned.state_dict()[key].double()) / 2 for key, x in base.state_dict().items()}
    for key, x in merged.state_dict().items():
        torch.testing.assert_close(x, mean[key].float(), rtol=1e-6, atol=1e-7)


def test_an_adapter_that_diffusers_saved(tmp_path: Path) -> None:
    """What diffusers makes of it by `fuse_lora` is what a merge makes of `pipeline+adapter`."""
    base, _ = write_pair(make_stable_diffusion, tmp_path)
    parts = {"unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    layers, configs = {}, {}
    for name, modules in parts.items():
        network = getattr(base, name)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=modules, init_lora_weights=False)
        adapted = peft.get_peft_model(network, config)
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(adapted)
        configs[f"{name}_lora_adapter_metadata"] = config.to_dict()
    plain = {
        key: {name.removeprefix("base_model.model."): x for name, x in layer.items()} for key, layer in layers.items()
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **plain, **configs)
    model = f"{tmp_path / 'base'}+{tmp_path / 'lora'}"
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    merged, fused = load(tmp_path / "out"), load(tmp_path / "base")
    fused.load_lora_weights(tmp_path / "lora")
    fused.fuse_lora(components=list(parts))
    fused.unload_lora_weights()
    for name, network in list_networks(fused).items():
        found = list_networks(merged)[name].state_dict()
        for key, x in network.state_dict().items():
            torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-5)
    effects = plan({"merge_method": "passthrough", "models": [{"model": model}]}).adapters[0].effects
    assert [effect.partition(" changes ")[2].split()[0] for effect in effects] == ["4", "24"]
