"""The process that has models in memory, while it has nothing to tell."""

from __future__ import annotations

import pytest

from raymerge.pipeline.evaluation.generation.engine import Engine, EngineError


def test_a_process_that_tells_nothing_is_waited_for_and_given_up() -> None:
    engine = Engine("transformers", timeout=0.6)  # importing it takes longer
    checks: list[None] = []
    with pytest.raises(EngineError, match=r"told nothing for 0\.6 s \(--timeout\)"):
        list(engine.ask({"kind": "loss"}, lambda: checks.append(None)))
    assert checks
    assert engine._process is None
