"""The files of an output's tokenizer: those of the model that gives it, with the tokens that it gets besides."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from raymerge.pipeline.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG, is_side_file, is_tokenizer
from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import SPECIAL_TOKENS, read_object
from raymerge.pipeline.checkpoint.tokenizer.union import OutTokenizer
from raymerge.pipeline.redact import redact_json
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

_ADDED = "added_tokens.json"
_MAX_NBYTES = 64 * 2**20
_BESIDE = re.compile(r"(?:special_tokens_map|added_tokens)\.json|merges\.txt|chat_template\.|additional_chat_")
"""Files of a tokenizer besides those that `is_tokenizer` tells."""


def is_of_tokenizer(name: str) -> bool:
    """Tell whether a file belongs to a model's tokenizer, its templates included.

    >>> is_of_tokenizer("merges.txt"), is_of_tokenizer("chat_template.jinja"), is_of_tokenizer("preprocessor.json")
    (True, True, False)
    """
    return is_side_file(name) and (is_tokenizer(name) or _BESIDE.match(name) is not None)


def rewrite_files(
    stores: Stores, tokens: OutTokenizer, files: Mapping[str, StoredFile]
) -> tuple[dict[str, str], list[str]]:
    """Return the files of a tokenizer that are others than its model's, and those that no longer fit.

    Args:
        stores: that have the model.
        tokens: of the output.
        files: of the model that gives the tokenizer, by relative name.

    Returns:
        The text of each that changes, and the names of those that the output gets no more.

    Raises:
        CheckpointError: one of them is malformed.
        FetchError: the store refuses or is down.
    """
    written: dict[str, str] = {}
    for name in files:
        if is_of_tokenizer(name) and name.endswith(".json") and name != TOKENIZER and files[name].nbytes <= _MAX_NBYTES:
            text = _read(stores, files[name])
            safe = redact_json(text)
            if name in (TOKENIZER_CONFIG, _ADDED) and tokens.is_changed:
                content = read_object(files[name].url, safe)
                update = _update_config if name == TOKENIZER_CONFIG else _update_added
                safe = json.dumps(update(content, tokens), indent=2, ensure_ascii=False) + "\n"
            if safe != text:
                written[name] = safe
    if tokens.is_changed:
        written[TOKENIZER] = tokens.dump()
    return written, _find_stale(tokens, files)


def _find_stale(tokens: OutTokenizer, files: Collection[str]) -> list[str]:
    """Return files that list tokens which the output does not have."""
    if not tokens.stripped:
        return []
    kept = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, _ADDED)
    return [name for name in files if (is_tokenizer(name) or name == "merges.txt") and name not in kept]


def _update_config(config: Json, tokens: OutTokenizer) -> Json:
    """Return a tokenizer_config.json that lists the new tokens, where it lists added ones."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries = {
            number: entry
            for number, entry in decoder.items()
            if not isinstance(entry, dict) or entry.get("content") not in tokens.stripped
        }
        for entry in tokens.added.values():
            entries[str(entry["id"])] = {name: value for name, value in entry.items() if name != "id"}
        config["added_tokens_decoder"] = entries
    return config


def _update_added(numbers: Json, tokens: OutTokenizer) -> Json:
    kept = {token: number for token, number in numbers.items() if token not in tokens.stripped}
    return kept | {token: entry["id"] for token, entry in tokens.added.items()}


def _read(stores: Stores, file: StoredFile) -> str:
    return bytes(stores.at(file.url).read(file.url, _MAX_NBYTES)).decode(errors="replace")
