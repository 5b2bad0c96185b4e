"""Files of chat templates: those that loaders read, and those that give an output another template."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import TOKENIZER_CONFIG
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

TEMPLATE = "chat_template.jinja"
"""File that transformers reads first."""
PROCESSOR_TEMPLATE = "chat_template.json"
OTHERS = "additional_chat_templates/"
_KEY = "chat_template"
_DEFAULT = "default"
_MAX_NBYTES = 64 * 2**20
_SURROGATES = re.compile("[\ud800-\udfff]")


def read_template(stores: Stores, checkpoint: Checkpoint) -> str | None:
    """Return a model's chat template, as transformers finds it; None where it has none.

    Raises:
        CheckpointError: a file of its is no JSON.
        FetchError: the store refuses or is down.
    """
    if TEMPLATE in checkpoint.files:
        return _read(stores, checkpoint, TEMPLATE)
    for name in (TOKENIZER_CONFIG, PROCESSOR_TEMPLATE):
        if name in checkpoint.files:
            found = find_template(_read(stores, checkpoint, name), checkpoint.files[name].url)
            if found is not None:
                return found
    return None


def find_template(text: str, url: str) -> str | None:
    """Return the template in a tokenizer's config, of several the default one.

    Args:
        text: of the config.
        url: of the config, for messages.

    Raises:
        CheckpointError: it is no JSON, or the template no text.
    """
    written = _parse(text, url).get(_KEY)
    if isinstance(written, list):
        written = {item.get("name"): item.get("template") for item in written if isinstance(item, dict)}
    if isinstance(written, dict):
        written = written.get(_DEFAULT)
    if not isinstance(written, str):
        return None
    if _SURROGATES.search(written):
        raise CheckpointError(f"{url}: {_KEY} is not text: half of a pair of surrogates; correct it there")
    return written


def remove_template(text: str, url: str) -> str:
    """Return a tokenizer's config without a template of its own; unchanged where it has none."""
    content = _parse(text, url)
    if _KEY not in content:
        return text
    del content[_KEY]
    written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return _SURROGATES.sub(lambda half: f"\\u{ord(half[0]):04x}", written)  # can only be written as it was


def find_tokens(text: str, url: str) -> dict[str, str]:
    """Return the special tokens that a tokenizer's config names, by their names there."""
    tokens = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": ""}
    for name, written in _parse(text, url).items():
        token = written.get("content") if isinstance(written, dict) else written
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return tokens


def choose_template(templates: Sequence[str | None]) -> int | None:
    """Return the position of the first model with the template that most models have; None where none has one.

    >>> choose_template(["a", None, "b", " b "]), choose_template([None, "a", "b"]), choose_template([None])
    (2, 1, None)
    """
    stripped = [template and template.strip() for template in templates]
    common = Counter(filter(None, stripped)).most_common(1)
    return stripped.index(common[0][0]) if common else None


def _read(stores: Stores, checkpoint: Checkpoint, name: str) -> str:
    url = checkpoint.files[name].url
    return stores.at(url).read(url, _MAX_NBYTES).decode(errors="replace")


def _parse(text: str, url: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{url}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{url}: a JSON object is needed, such as {{}}")
    return content
