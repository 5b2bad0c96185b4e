"""Tiny models of several modules, made with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

TEXT: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
TOWER: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"image_size": 8, "patch_size": 4},
}
SIDES: dict[str, Any] = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 3, "attention_heads": 4, "ffn_dim": 24}.items()
}
IMAGE = 35
"""The token that stands for a patch of an image."""


def make_qwen() -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1]}
    text: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"}
    vision: dict[str, Any] = {
        **{"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 16},
        **{"patch_size": 4, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 16},
    }
    tokens: dict[str, Any] = {
        "image_token_id": IMAGE,
        "video_token_id": 36,
        "vision_start_token_id": 37,
        "vision_end_token_id": 38,
    }
    config = tf.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **tokens)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def make_gemma() -> Any:
    text: dict[str, Any] = {**TEXT, "sliding_window": 8}
    tower: dict[str, Any] = {**TOWER, "vision_use_head": False}
    tokens: dict[str, Any] = {
        "image_token_index": IMAGE,
        "boi_token_index": 36,
        "eoi_token_index": 37,
        "mm_tokens_per_image": 4,
    }
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=tower, **tokens))


def make_llava() -> Any:
    tower = tf.CLIPVisionConfig(**TOWER, projection_dim=16)
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tower, image_token_index=IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def make_t5(**more: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, num_layers=3, num_decoder_layers=3, **more))


def make_whisper() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "d_model": 16,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 16,
    }
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **SIDES, **tokens))


def save(make: Callable[[], Any], directory: Path, seed: int) -> str:
    """Write a model of random numbers; return its directory."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    return str(directory)
