"""LoRA adapters as peft saves them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> str:
    """Write an adapter; return its directory as configs name it.

    Args:
        directory: is made.
        tensors: by name, without `base_model.model.`.
        config: fields of adapter_config.json besides those that it needs.
    """
    directory.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    stored = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(directory)


def draw_factors(module: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return normally distributed factors for a module with a weight of rows x columns."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }
