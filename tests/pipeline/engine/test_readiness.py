from __future__ import annotations

import importlib

import pytest
import torch

from raymerge.ops.loops.compiler import Loop
from raymerge.ops.registry import Op
from raymerge.ops.stored import LOOP_DTYPES
from raymerge.pipeline.engine.readiness import LOOPS, list_loops
from tests.ops.samples import CASES, Change, make_kernel, make_sources


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops as they are on a machine that has never merged anything."""
    for name in LOOPS:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, Loop):
                monkeypatch.setattr(value, "_entry", None)


@pytest.mark.parametrize(("op", "change"), CASES)
def test_what_is_to_be_compiled_is_found_by_running_it(op: Op, change: Change, nothing_compiled: None) -> None:
    kernel, num_sources = make_kernel(op, change), len(make_sources(op, 2, dtype=torch.float32))
    assert bool(list_loops([(kernel, num_sources)])) == (kernel.loop_dtypes == LOOP_DTYPES)
