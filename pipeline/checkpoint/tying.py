"""Output heads that share their matrix with the embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from raymerge.pipeline.checkpoint.model_config import Json, ties_embeddings
from raymerge.pipeline.checkpoint.names import split_name

_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)
_HEADLESS = re.compile(r"(Classification|QuestionAnswering|(?<!Head)(?<!Heads)Model)$")
"""Architectures that have no output head, whatever config.json says of tying it."""


def find_head(names: Iterable[str]) -> str | None:
    """Return the name of a checkpoint's output head, if it is among its tensors."""
    return next(filter(is_head, names), None)


def is_head(name: str) -> bool:
    """Tell by its name whether a tensor is an output head."""
    return name.endswith(_HEADS) and split_name(name) is None


def find_embedding(names: Iterable[str]) -> str | None:
    """Return the name of a checkpoint's token embedding, if it can be told by its name."""
    found = [name for name in names if name.endswith(_EMBEDDINGS) and split_name(name) is None]
    return found[0] if len(found) == 1 else None


def name_head(embedding: str) -> str:
    """Return the name of the head for a checkpoint whose head was its embedding.

    >>> name_head("model.embed_tokens.weight"), name_head("gpt_neox.embed_in.weight")
    ('lm_head.weight', 'embed_out.weight')
    """
    if embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    return "language_model.lm_head.weight" if embedding.startswith("language_model.") else "lm_head.weight"


def is_tied(config: Json, names: Collection[str]) -> bool:
    """Return whether a checkpoint's head is its embedding.

    config.json decides, for loaders ignore a stored head if it says so. Where it is silent, its default depends on the
    architecture, but a checkpoint that needs a head of its own has one stored.
    """
    stated = ties_embeddings(config)
    architectures = config.get("architectures")
    known = architectures if isinstance(architectures, list) else []
    if find_embedding(names) is None or any(_HEADLESS.search(str(name)) for name in known):
        return False
    return find_head(names) is None if stated is None else stated
