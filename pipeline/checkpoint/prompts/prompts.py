"""Splits prompts into tokens with a model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import SPECIAL_TOKENS, TokenizerReader, read_object
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 64 * 2**20


def encode_prompts(
    reader: TokenizerReader, stores: Stores, checkpoint: Checkpoint, prompts: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of each prompt, after the token with which the model's texts begin, if there is one.

    Args:
        reader: reads the tokenizer.
        stores: that have the model.
        checkpoint: the model.
        prompts: texts.

    Raises:
        CheckpointError: the model has no tokenizer that can be read, or a prompt has no tokens.
        FetchError: a file could not be read.
    """
    read = reader.read(checkpoint.model, checkpoint.files)
    if read is None:
        raise CheckpointError(
            f"{checkpoint.model}: no {TOKENIZER}, and routers are made of prompts as this model's tokenizer cuts them"
            " up; put one there, or choose `gate_mode: random`"
        )
    from tokenizers import Tokenizer

    begin = _find_begin(stores, checkpoint)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(read.content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = [tokenizer.encode(begin + prompt, add_special_tokens=False).ids for prompt in prompts]
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{read.url}: the tokenizers library cannot use it: {error}") from error
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise CheckpointError(f"{checkpoint.model}: its tokenizer makes no tokens of {json.dumps(prompt)}")
    return found


def _find_begin(stores: Stores, checkpoint: Checkpoint) -> str:
    """Return the text of the token with which texts begin; empty where the model has none."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if name in checkpoint.files:
            url = checkpoint.files[name].url
            settings = read_object(url, stores.at(url).read(url, _MAX_NBYTES))
            if "bos_token" in settings:
                token = settings["bos_token"]
                token = token.get("content") if isinstance(token, dict) else token
                return token if isinstance(token, str) else ""
    return ""
