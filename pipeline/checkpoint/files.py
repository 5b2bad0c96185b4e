"""The files of a model's directory, told by their names: weights, what goes along with them, and what does not."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST
from raymerge.pipeline.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|gguf|onnx|onnx[._]data(_\d+)?|h5|msgpack|ckpt|ot|tflite|pkl|npz|npy|distcp|mlmodel|mar"
    r"|nemo)$"
)
_REWRITTEN = {CONFIG, "README.md", "mergekit_config.yml", MANIFEST, FIGURES}
_OF_TRAINING = re.compile(r"(checkpoint-[^/]*|runs)/|(.*/)?adapter_config\.json$")
"""Files that a trainer leaves beside the model, and that say nothing about it."""


def is_hidden(name: str) -> bool:
    """Tell whether a file is none of a model's: it, or a directory that it is in, is hidden."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, in whatever format."""
    return _WEIGHTS.search(name) is not None


def is_side_file(name: str) -> bool:
    """Tell whether a file goes along with a model's weights."""
    is_index = name.endswith(".index.json") and is_weights(name.removesuffix(".index.json"))
    is_partial = name.endswith((".lock", ".incomplete"))
    is_left = is_index or is_partial or name in _REWRITTEN or _OF_TRAINING.match(name) is not None
    return not (is_weights(name) or is_left)


def check_name(name: str, url: str) -> None:
    """Refuse a name that leaves its directory, or that cannot be written as it is to every store."""
    parts = name.split("/")
    if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or ":" in parts[0]:
        raise CheckpointError(f"{url}: file name {name!r:.200} leaves the model's directory or is not plain; rename it")
    if not name.isprintable():
        raise CheckpointError(f"{url}: file name {name!a:.200} has control characters or is not UTF-8; rename it")
