from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from raymerge import plan
from raymerge.pipeline.checkpoint import header
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.memory import projection as memory
from raymerge.pipeline.planner import pause_collector
from tests.checkpoints import llama_config, write_llama, write_sparse


def test_the_collector_is_back_afterwards() -> None:
    with pause_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), pause_collector():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pause_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def make_config(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}


def test_a_header_of_more_tensors_than_memory_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_sparse(tmp_path / "m", {f"model.layers.{k}.w": (1,) for k in range(15_000)}, llama_config())
    monkeypatch.setattr(header, "parse_header", pytest.fail)
    message = (
        r"model\.safetensors: 15,000 tensors, whose plan takes 37MiB, and 32MiB are allowed; give --memory 37MiB or"
    )
    with pytest.raises(MemoryLimitError, match=message):
        plan(make_config(model), memory="32MiB")


def test_inputs_of_more_tensors_together_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [write_llama(tmp_path / name, num_shards=3) for name in "ab"]  # 7 of 21 tensors in each file
    monkeypatch.setattr(memory, "NOTABLE_NBYTES", 0)
    monkeypatch.setattr(memory, "_OUTPUT_NBYTES", 4 * 2**20)
    plan(make_config(*models), memory="100MiB")
    with pytest.raises(MemoryLimitError, match=r"together: 42 tensors, whose plan takes 85MiB, and 64MiB are allowed"):
        plan(make_config(*models), memory="64MiB")
