"""Scales of the products of factors, by adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import re2

from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.patterns import compile_pattern

T = TypeVar("T")


def find_scale(adapter: Adapter, module: str, rank: int) -> float:
    """Return what the product of a module's factors is multiplied with.

    Args:
        adapter: it belongs to.
        module: as the adapter calls it.
        rank: of the factors.

    Raises:
        CheckpointError: adapter_config.json says another rank, or a pattern there is none.
    """
    if adapter.scales is not None:
        return adapter.scales.get(module, 1.0)
    config = adapter.config
    module = module.rpartition("/")[2]  # patterns know nothing of a pipeline's components
    expected = _find_pattern(config.rank_pattern, module, adapter) or config.rank
    if expected != rank:
        raise CheckpointError(
            f"{adapter.url}: {module} has factors of rank {rank}, and adapter_config.json says {expected} (r,"
            " rank_pattern); config and tensors are not of one adapter"
        )
    alpha = _find_pattern(config.alpha_pattern, module, adapter)
    return config.scale(rank, config.alpha if alpha is None else alpha)


@cache
def _compile(key: str, url: str) -> re2.Pattern:
    """Return a pattern for names that end with a key, in time that is linear in the name's length.

    Raises:
        CheckpointError: it is no regular expression, or one that looks around.
    """
    try:
        return compile_pattern(rf"(?:.*\.)?(?:{key})")
    except ValueError as error:
        raise CheckpointError(f"{url}: {key!r:.200} is no pattern that is supported: {error}") from error


def _find_pattern(pattern: Mapping[str, T], module: str, adapter: Adapter) -> T | None:
    """Return the value of the first pattern that a module's name ends with, as in peft."""
    return next((value for key, value in pattern.items() if _compile(key, adapter.url).fullmatch(module)), None)
