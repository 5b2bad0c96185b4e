"""The files of a model's directory, told by their names: weights, what goes along with them, and what does not."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST
from raymerge.pipeline.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"
"""Lists the components of a diffusers pipeline, each in a directory of its own."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|gguf|onnx|onnx[._]data(_\d+)?|h5|msgpack|ckpt|ot|tflite|pkl|npz|npy|distcp|mlmodel|mar"
    r"|nemo)$"
)
_REWRITTEN = {CONFIG, PIPELINE, "README.md", "mergekit_config.yml", MANIFEST, FIGURES}
_SIDE = re.compile(
    r"""
    (?!(?:adapter|peft|lora|ds|deepspeed|accelerate|train(?:ing|er)?|wandb)_)(?:[\w.-]+_)?config\.json
    | (?:config_sentence_transformers|configuration|modules|preprocessor|processor)\.json
    | (?:tokenizer|tekken|special_tokens_map|added_tokens|normalizer|chat_template)\.json
    | (?:byte_maps|emoji|word_pronunciation|word_shape)\.json
    | (?:[\w.-]+[_-])?vocab(?:[_-]\w+)?\.(?:json|txt) | (?:[\w.-]+[_-])?merges\.txt | bpe\.codes | dict\.txt
    | [\w.-]+\.(?:model(?:\.v\d+)?|tokenizer|tiktoken|spm|bpe|vocab|jinja) | additional_chat_templates/[\w.-]+\.jinja
    | (?:configuration|modell?ing|tokenization|feature_extraction|(?:image_|video_|audio_)?processing)_\w+\.py
    | (?i:(?:[\w .-]*[ _.-])?(?:licen[sc]e|notice|copying|use[_-]policy|terms[_-]of[_-]use)
      (?:[ _-][\w -]*)?(?:\.(?:txt|md|pdf|rst|html))?)
    """,
    re.VERBOSE,
)
"""Files of a model besides its weights, at the top of its directory: configs, tokenizer, templates, code, licence."""

_MAIN_WEIGHTS = re.compile(r"(?:model|(?:diffusion_)?pytorch_model)[\w.-]*\.(?:safetensors|bin)")
_TOKENIZER = re.compile(r"tokenizer|tekken|(?:[\w.-]+[_-])?vocab[._-]|.*\.(?:model|tokenizer|tiktoken|spm)$")
_SECRET = re.compile(
    r"""
    (?:id_(?:rsa|dsa|ecdsa|ed25519)|authorized_keys|known_hosts|_?netrc|env|token)(?:\.\w+)?
    | .*\.(?:pem|key|p12|pfx|jks|keystore|kdbx|ppk|env)
    | (?:.*[_.-])?(?:secrets?|credentials?|passw(?:or)?ds?|api[_-]?keys?|access[_-]?keys?|private[_-]?keys?
      |service[_-]?accounts?|(?:hf|hub|auth|access|api|wandb|github|refresh)[_-]?tokens?)(?:[_.-].*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_side_file(name: str) -> bool:
    """Tell whether a file is one that models have besides their weights.

    >>> [is_side_file(name) for name in ("tokenizer.model", "LICENSE.txt", "train.py", "logs/config.json")]
    [True, True, False, False]
    """
    return _SIDE.fullmatch(name) is not None and not is_secret(name) and name not in _REWRITTEN


def is_tokenizer(name: str) -> bool:
    """Tell whether a file is part of a tokenizer."""
    return _TOKENIZER.match(name) is not None


def is_rewritten(name: str) -> bool:
    """Tell whether a file describes a model and its files, so that an output gets one of its own.

    >>> is_rewritten("README.md"), is_rewritten("pytorch_model.bin.index.json")
    (True, True)
    """
    is_index = name.endswith(".index.json") and is_weights(name.removesuffix(".index.json"))
    return name in _REWRITTEN or (is_index and "/" not in name)


def is_of_model(name: str) -> bool:
    """Tell whether a file is one that models are made of, weights included, and never somebody's other work.

    >>> [is_of_model(name) for name in ("model-00001-of-00002.safetensors", "optimizer.pt", "train.py", "README.md")]
    [True, False, False, True]
    """
    return _MAIN_WEIGHTS.fullmatch(name) is not None or is_side_file(name) or is_rewritten(name)


def is_of_component(name: str) -> bool:
    """Tell whether a file is one that a component of a diffusers pipeline is made of, weights included.

    >>> is_of_component("unet/config.json"), is_of_component("unet/x/config.json"), is_of_component("config.json")
    (True, False, False)
    """
    component, _, own = name.rpartition("/")
    return bool(component) and "/" not in component and (is_weights(own) or is_side_file(own) or is_rewritten(own))


def is_secret(name: str) -> bool:
    """Tell whether a file looks like a key or a password, by its name.

    >>> is_secret("id_rsa"), is_secret("deploy/server.pem"), is_secret("special_tokens_map.json")
    (True, True, False)
    """
    return _SECRET.fullmatch(PurePosixPath(name).name) is not None


def is_hidden(name: str) -> bool:
    """Tell whether a file is none of a model's: it, or a directory that it is in, is hidden."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def is_adapter(name: str) -> bool:
    """Tell whether a file holds a LoRA adapter's tensors, as peft or diffusers calls it."""
    return name.startswith(("adapter_model.", "pytorch_lora_weights."))


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, in whatever format."""
    return _WEIGHTS.search(name) is not None


def index_of(stem: str) -> str:
    """Return the name of the index of files of weights that are called so, before the number of a shard.

    >>> index_of("model") == INDEX
    True
    """
    return f"{stem}.safetensors.index.json"


def check_name(name: str, url: str) -> None:
    """Refuse a name that leaves its directory, or that cannot be written as it is to every store."""
    parts = name.split("/")
    if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or ":" in parts[0]:
        raise CheckpointError(f"{url}: file name {name!r:.200} leaves the model's directory or is not plain; rename it")
    if not name.isprintable():
        raise CheckpointError(f"{url}: file name {name!a:.200} has control characters or is not UTF-8; rename it")
