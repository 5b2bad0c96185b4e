"""Prompts as a model's tokenizer cuts them up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.weights import read_json
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

_TOKENIZER = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_MAX_NBYTES = 64 * 2**20


def encode_prompts(stores: Stores, checkpoint: Checkpoint, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, after the token with which the model's texts begin, if there is one.

    Raises:
        CheckpointError: the model has no tokenizer that can be read, or a prompt has no tokens.
        FetchError: a file could not be read.
    """
    if _TOKENIZER not in checkpoint.files:
        raise CheckpointError(
            f"{checkpoint.model}: no {_TOKENIZER}, and routers are made of prompts as this model's tokenizer cuts them"
            " up; load the tokenizer with transformers and save it by save_pretrained, or choose `gate_mode: random`"
        )
    from tokenizers import Tokenizer

    file = checkpoint.files[_TOKENIZER]
    content = stores.at(file.url).read(file.url, _MAX_NBYTES)
    begin = _find_begin(stores, checkpoint)
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = [tokenizer.encode(begin + prompt, add_special_tokens=False).ids for prompt in prompts]
    except Exception as error:  # the library knows no others
        raise CheckpointError(f"{file.url}: the tokenizers library cannot use it: {error}") from error
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise CheckpointError(f"{checkpoint.model}: its tokenizer makes no tokens of {json.dumps(prompt)}")
    return found


def _find_begin(stores: Stores, checkpoint: Checkpoint) -> str:
    """Return the text of the token with which texts begin; empty where the model has none."""
    for name in _SETTINGS:
        if name in checkpoint.files:
            settings: dict[str, Any] = read_json(stores.at(checkpoint.url), checkpoint.files[name].url, _MAX_NBYTES)
            if "bos_token" in settings:
                token = settings["bos_token"]
                token = token.get("content") if isinstance(token, dict) else token
                return token if isinstance(token, str) else ""
    return ""
