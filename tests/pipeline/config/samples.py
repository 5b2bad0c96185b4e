"""A config of models, one with a base and one of slices, to change in tests."""

from __future__ import annotations

import copy
from typing import Any

from raymerge.pipeline.checkpoint.reference import ModelRef

A, B, C = ModelRef("org/a"), ModelRef("org/b"), ModelRef("org/c")
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "org/a", "parameters": {"weight": 1}}, {"model": "org/b", "parameters": {"weight": 3}}],
}
TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/a",
    "models": [{"model": "org/b", "parameters": {"weight": 1}}, {"model": "org/c", "parameters": {"weight": 1}}],
}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "org/a",
    "slices": [
        {"sources": [{"model": "org/a", "layer_range": [0, 8]}, {"model": "org/b", "layer_range": [0, 8]}]},
        {"sources": [{"model": "org/c", "layer_range": [2, 6]}, {"model": "org/a", "layer_range": [8, 12]}]},
    ],
    "parameters": {"t": 0.5},
}
FORMS = {"linear": LINEAR, "ties": TIES, "slerp": SLERP}
MISSING = object()


def changed(form: str, *changes: tuple[str, object]) -> dict[str, Any]:
    """Return one of the configs above with the values at some paths (`models.1.parameters.weight`) changed."""
    config: Any = copy.deepcopy(FORMS[form])
    for path, value in changes:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        place = config
        for key in parents:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        if value is MISSING:
            del place[last]
        elif isinstance(last, int) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return config  # type: ignore[no-any-return]
