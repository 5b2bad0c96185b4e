"""Small checkpoints of real layouts, written with the safetensors library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

HIDDEN, VOCAB = 16, 32

INDEX = "model.safetensors.index.json"
MANIFEST = "raymerge_manifest.json"
FIGURES = "raymerge_figures.parquet"


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
    seed: int = 0,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    head: bool = True,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
) -> Tensors:
    """Return a tiny Llama's weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(vocab, hidden)}
    for k in range(num_layers):
        prefix = f"model.layers.{k}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = draw(hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = draw(2 * hidden, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = draw(hidden, 2 * hidden)
        tensors[f"{prefix}input_layernorm.weight"] = draw(hidden) + 1
        tensors[f"{prefix}post_attention_layernorm.weight"] = draw(hidden) + 1
    tensors["model.norm.weight"] = draw(hidden) + 1
    if head:
        tensors["lm_head.weight"] = draw(vocab, hidden)
    return tensors


def add_noise(tensors: Mapping[str, torch.Tensor], seed: int, size: float = 0.02) -> Tensors:
    """Return a fine-tune of a model: every weight moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (x.float() + size * torch.randn(x.shape, generator=generator)).to(x.dtype) for name, x in tensors.items()
    }


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
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
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


def write_family(
    directory: Path,
    num_fine_tunes: int = 2,
    *,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
) -> tuple[Path, ...]:
    """Write a tiny Llama and fine-tunes of it; the base comes first."""
    base = llama_tensors(0, num_layers, dtype, vocab=vocab, hidden=hidden)
    config = llama_config(
        num_layers,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        torch_dtype=str(dtype).removeprefix("torch."),
    )
    models = {"base": base} | {f"tuned{k}": add_noise(base, seed=k) for k in range(1, num_fine_tunes + 1)}
    return tuple(write_checkpoint(directory / name, tensors, config, num_shards) for name, tensors in models.items())


def write_sparse(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], num_shards: int = 1
) -> Path:
    """Write a bfloat16 checkpoint of any size that takes up no room on disk: headers, and holes for the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for k in range(num_shards):
        file = "model.safetensors" if num_shards == 1 else f"model-{k + 1:05d}-of-{num_shards:05d}.safetensors"
        header: dict[str, Any] = {}
        nbytes = 0
        for name, shape in list(shapes.items())[k::num_shards]:
            stop = nbytes + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [nbytes, stop]}
            weight_map[name] = file
            nbytes = stop
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            output.truncate(8 + len(text) + nbytes)
    if num_shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a merge config."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def read_tensors(directory: Path) -> Tensors:
    """Return every tensor of a checkpoint, read with the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def read_model(directory: Path) -> dict[str, bytes | dict[str, Any]]:
    """Return what is the same on every processor: all files but the figures, whose last digits depend on it."""
    files: dict[str, Any] = dict(read_files(directory))
    del files[FIGURES]
    manifest = json.loads(files[MANIFEST])
    del manifest["figures"], manifest["files"][FIGURES]
    return files | {MANIFEST: manifest}


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory, by relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
