"""Merges through views, forms and ops that a test defines, as the product would if they were its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.checkpoint.views import View
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.recipe import open_model
from tests.checkpoints import Tensors, read_files, read_tensors, write_checkpoint


def write_model(directory: Path, tensors: Tensors) -> str:
    """Write a model of these tensors."""
    return str(write_checkpoint(directory, tensors, {"model_type": "test"}))


def passthrough(model: str) -> dict[str, Any]:
    """Return a merge that writes what a view shows."""
    return {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float32"}


def look_through(monkeypatch: pytest.MonkeyPatch, look: Callable[[View], View]) -> None:
    """Have every model looked at through a view."""

    def open_through(*arguments: Any, **keywords: Any) -> Model:
        model = open_model(*arguments, **keywords)
        return replace(model, view=look(model.view))

    monkeypatch.setattr("raymerge.pipeline.planner.open_model", open_through)


def merge_in_every_way(config: dict[str, Any], directory: Path, ops: str | None = None) -> Tensors:
    """Merge with plenty of memory, with the least that the plan allows, and by two workers; all must write the same."""
    with pytest.raises(MemoryLimitError) as caught:
        plan(config, memory=1, ops=ops)
    found = re.search(r"--memory (\S+)", str(caught.value))
    assert found
    merge(config, directory / "plenty", memory="4GiB", workers=1, ops=ops)
    merge(config, directory / "least", memory=found[1], workers=1, ops=ops)
    merge(config, directory / "workers", workers=2, shard_size=1, ops=ops)
    files = [read_files(directory / name)["model.safetensors"] for name in ("plenty", "least")]
    assert files[0] == files[1]
    merged, by_workers = read_tensors(directory / "plenty"), read_tensors(directory / "workers")
    assert merged.keys() == by_workers.keys()
    assert all(torch.equal(merged[name], x) for name, x in by_workers.items())
    return merged


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
