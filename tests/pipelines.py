"""Small diffusion pipelines in the layout of diffusers, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import Tensors

STEM = "diffusion_pytorch_model"
KINDS: dict[str, list[str]] = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_pipeline(directory: Path, seed: int = 0, *without: str, **more: list[str]) -> Path:
    """Write a pipeline whose networks have a few tensors each.

    Args:
        directory: of the pipeline.
        seed: of the weights.
        without: components that it has not.
        more: components that it has besides, with library and class.
    """
    kinds = {name: kind for name, kind in {**KINDS, **more}.items() if name not in without}
    absent = {name: [None, None] for name in without}
    _write_json(directory / "model_index.json", {"_class_name": "StableDiffusionPipeline", **kinds, **absent})
    generator = torch.Generator().manual_seed(seed)
    for name, (library, kind) in kinds.items():
        if name == "scheduler":
            config: dict[str, Any] = {"_class_name": kind, "prediction_type": "epsilon"}
            _write_json(directory / name / "scheduler_config.json", config)
        elif name == "tokenizer":
            _write_json(directory / name / "vocab.json", {"a": 0})
        elif library == "diffusers":
            tensors = {f"blocks.{k}.conv.weight": torch.randn(4, 2, 3, 3, generator=generator) for k in range(3)}
            tensors["conv_in.bias"] = torch.randn(4, generator=generator)
            write_network(directory / name, tensors, {"_class_name": kind, "sample_size": 8}, STEM)
        else:
            tensors = {"embed_tokens.weight": torch.randn(8, 4, generator=generator)}
            tensors |= {f"layers.{k}.fc.weight": torch.randn(4, 4, generator=generator) for k in range(2)}
            write_network(directory / name, tensors, {"model_type": "clip_text_model", "architectures": [kind]})
    return directory


def write_network(
    directory: Path, tensors: Tensors, config: Mapping[str, Any], stem: str = "model", num_shards: int = 1
) -> None:
    """Write one network, in one file or in several with an index."""
    _write_json(directory / "config.json", config)
    if num_shards == 1:
        save_file(tensors, directory / f"{stem}.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"{stem}-{k % num_shards + 1:05d}-of-{num_shards:05d}.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    _write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": files})


def read_pipeline(directory: Path) -> dict[str, Tensors]:
    """Return the tensors of each network."""
    found: dict[str, Tensors] = {}
    for file in directory.glob("*/*.safetensors"):
        found.setdefault(file.parent.name, {}).update(load_file(file))
    return found


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
