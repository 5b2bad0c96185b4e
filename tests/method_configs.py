"""One merge of a family by each kind of kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = ("linear", "slerp", "model_stock", "ties", "dare_ties")


def make_config(method: str, family: Sequence[Path]) -> dict[str, Any]:
    """Return a merge of a base and two fine-tunes, or of one for slerp."""
    if method == "slerp":
        models: list[dict[str, Any]] = [{"model": str(model)} for model in family[:2]]
        parameters: dict[str, Any] = {"t": [0.2, 0.8]}
    else:
        models = [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(family[1:], (0.7, 0.4), strict=True)
        ]
        parameters = {} if method == "linear" else {"density": 0.4}
    if method == "model_stock":
        models, parameters = [{"model": str(model)} for model in family[1:3]], {}
    base = {} if method == "linear" else {"base_model": str(family[0])}
    return {"merge_method": method, **base, "models": models, "parameters": parameters}
