"""Translates token ids in config.json and generation_config.json from one vocabulary to another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from raymerge.pipeline.checkpoint.model_config import Json, list_sections, text_part

_OF_LAYERS = re.compile(r"(?:^|\.)embed_tokens_per_layer\.weight$")
_ROWS_OF_LAYERS = "vocab_size_per_layer_input"
_FIELD = re.compile(r"(?:.*_)?token_(?:ids?|index)")


def set_vocab_size(config: Json, num_rows: int, names: Iterable[str] = ()) -> None:
    """Set `vocab_size` to the rows of the embedding wherever the config states it: at the top and for the text part.

    Args:
        config: changed in place.
        num_rows: of the embedding.
        names: of tensors with as many rows; Gemma 3n states the rows of its embeddings of layers, too.
    """
    if any(_OF_LAYERS.search(name) for name in names):
        for section in list_sections(config):
            if _ROWS_OF_LAYERS in section:
                section[_ROWS_OF_LAYERS] = num_rows
    part = text_part(config)
    before = part.get("vocab_size", config.get("vocab_size"))
    for section in list_sections(config):
        if "vocab_size" in section and section["vocab_size"] == before:
            section["vocab_size"] = num_rows
    if "vocab_size" not in part and "vocab_size" not in config:
        part["vocab_size"] = num_rows


def translate_ids(config: Json, giver: Json, tokens: Mapping[int, str], vocab: Mapping[str, int]) -> list[str]:
    """Replace the numbers of tokens by those of the same tokens in another vocabulary.

    Args:
        config: changed in place, its sections included.
        giver: the same file of the model that gives the vocabulary, whose numbers go before; empty where there is none.
        tokens: by their numbers in the vocabulary that the config speaks of.
        vocab: the other one.

    Returns:
        Fields whose tokens the other vocabulary does not have, such as `pad_token_id (0, '<pad>')`; they become null.
    """
    lost = []
    for section, of_giver in _pair(config, giver):
        for name, value in section.items():
            if not _FIELD.fullmatch(name) or value is None:
                continue
            if of_giver.get(name) is not None:
                section[name] = of_giver[name]
                continue
            numbers = value if isinstance(value, list) else [value]
            found = [vocab.get(tokens.get(number, "")) for number in numbers if type(number) is int and number >= 0]
            kept = [number for number in found if number is not None]
            if len(kept) < len(numbers):
                lost.append(f"{name} ({value}{_quote(tokens, value)})")
            section[name] = kept if isinstance(value, list) else (kept[0] if kept else None)
    return lost


def _quote(tokens: Mapping[int, str], value: object) -> str:
    return f", {tokens[value]!r}" if isinstance(value, int) and value in tokens else ""


def _pair(config: Any, giver: Any) -> Iterator[tuple[Json, Json]]:
    """Yield the sections of a config, each with the other config's section of the same place."""
    if isinstance(config, dict):
        giver = giver if isinstance(giver, dict) else {}
        yield config, giver
        for name, value in list(config.items()):
            yield from _pair(value, giver.get(name))
