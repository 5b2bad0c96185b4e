"""Small checkpoints of real layouts, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

HIDDEN, VOCAB = 16, 32


def llama_config(num_layers: int = 2, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes


def llama_tensors(
    seed: int = 0, num_layers: int = 2, dtype: torch.dtype = torch.float32, *, head: bool = True
) -> Tensors:
    """Return a tiny Llama's weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN)}
    for k in range(num_layers):
        prefix = f"model.layers.{k}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = draw(HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = draw(2 * HIDDEN, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = draw(HIDDEN, 2 * HIDDEN)
        tensors[f"{prefix}input_layernorm.weight"] = draw(HIDDEN) + 1
        tensors[f"{prefix}post_attention_layernorm.weight"] = draw(HIDDEN) + 1
    tensors["model.norm.weight"] = draw(HIDDEN) + 1
    if head:
        tensors["lm_head.weight"] = draw(VOCAB, HIDDEN)
    return tensors


def write_checkpoint(
    directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], num_shards: int = 1
) -> Path:
    """Write a checkpoint: one file, or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if num_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for k in range(num_shards):
        file = f"model-{k + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[k::num_shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_llama(
    directory: Path,
    seed: int = 0,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    *,
    head: bool = True,
    **config: Any,
) -> Path:
    """Write a tiny Llama."""
    return write_checkpoint(
        directory,
        llama_tensors(seed, num_layers, dtype, head=head),
        llama_config(num_layers, **config),
        num_shards,
    )


def read_tensors(directory: Path) -> Tensors:
    """Return every tensor of a checkpoint, read with the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory, by relative name."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}
