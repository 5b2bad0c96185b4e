"""Models that a pattern matches, such as the checkpoints of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from raymerge.pipeline.checkpoint.files import CONFIG
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_WILDCARDS = re.compile(r"\*|\?|\[[^\]/]+\]")


class FoundModel(NamedTuple):
    """A model that a pattern matches."""

    path: str
    """As a config names it."""
    step: int | None
    """The number in what the wildcards stand for; None where there is none."""


def find_models(stores: Stores, pattern: str) -> list[FoundModel]:
    """Return the directories with a config.json that match a pattern, in the order of their steps or names.

    Args:
        stores: that have them.
        pattern: path or URL with `*`, `?` or `[...]`, none of which matches a slash.

    Raises:
        CheckpointError: it is no pattern, or one for all files of a machine.
        FetchError: the store refuses or is down.
    """
    given, pattern = pattern, pattern.rstrip("/")
    first = _WILDCARDS.search(pattern)
    if first is None:
        parent, _, rest = pattern.rpartition("/")
    else:
        parent, _, rest = pattern[: first.start()].rpartition("/")
        rest += pattern[first.start() :]
    if not rest or (given.startswith("/") and not parent):
        raise CheckpointError(f"{given}: this would look through all files there are; begin with a directory")
    if "**" in rest:
        raise CheckpointError(f"{given}: `**` has no meaning here; `*` is for anything but a slash, so write `*/*`")
    try:
        matches = re.compile(_translate(f"{rest}/{CONFIG}"))
    except re.error as error:
        raise CheckpointError(f"{given}: no pattern: {error}; write a range such as [0-9]") from error
    found = []
    for name in _list_configs(stores, parent or ".", rest):
        if match := matches.fullmatch(name):
            numbers = re.findall(r"\d+", " ".join(match.groups()))
            directory = name.removesuffix(f"/{CONFIG}")
            path = f"{parent}/{directory}" if parent else f"./{directory}"
            found.append(FoundModel(path, int(numbers[0]) if numbers else None))
    has_steps = all(model.step is not None for model in found)
    return sorted(found, key=lambda model: ([model.step] if has_steps else [], natural_key(model.path)))


def _list_configs(stores: Stores, parent: str, rest: str) -> Iterable[str]:
    """Return files that may match, by their names below a directory."""
    if scheme_of(parent) == "file":  # without a look at what else a training run leaves there; links are followed
        root = local_path(parent)
        return [file.relative_to(root).as_posix() for file in root.glob(f"{rest}/{CONFIG}")]
    return stores.at(parent).list(parent)


def _translate(pattern: str) -> str:
    """Return a regular expression with a group for each wildcard.

    >>> _translate("step_*/hf?")
    'step_([^/]*)/hf([^/])'
    """
    parts = []
    start = 0
    for wildcard in _WILDCARDS.finditer(pattern):
        text = wildcard[0]
        parts.append(re.escape(pattern[start : wildcard.start()]))
        chars = re.sub(r"^!", "^", re.sub(r"([\\^])", r"\\\1", text[1:-1]))
        parts.append({"*": "([^/]*)", "?": "([^/])"}.get(text, f"([{chars}])"))
        start = wildcard.end()
    return "".join([*parts, re.escape(pattern[start:])])
