"""Merges through views, forms and ops that a test defines, as the product would if they were its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.recipe import open_model


def passthrough(model: str) -> dict[str, Any]:
    """Return a merge that writes what a view shows."""
    return {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float32"}


def look_through(monkeypatch: pytest.MonkeyPatch, look: Callable[[View], View]) -> None:
    """Have every model looked at through a view."""

    def open_through(*arguments: Any, **keywords: Any) -> Model:
        model = open_model(*arguments, **keywords)
        return replace(model, view=look(model.view))

    monkeypatch.setattr("raymerge.pipeline.plan.stored_inputs.open_model", open_through)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
