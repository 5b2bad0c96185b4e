"""Tasks of Inspect that an earlier run has not finished."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

TASK = """
import pathlib
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import solver

@solver
def fail():
    async def solve(state, generate):
        if pathlib.Path("bad").exists():
            raise ValueError("no way")
        return state
    return solve

@task
def letters():
    return Task(dataset=[Sample(id="a", input="a", target="b")], solver=[fail()], scorer=match())
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(find_spec("inspect_ai") is None, reason="it is an extra of many packages")
def test_a_log_that_inspect_cannot_go_on_with_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raymerge.pipeline.evaluation.generation.inspect_worker import _evaluate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").touch()
    (tmp_path / "first.py").write_text(TASK)
    (tmp_path / "logs").mkdir()
    with pytest.raises(RuntimeError, match="no way"):
        _evaluate(str(tmp_path / "first.py"), str(tmp_path / "logs"), model="mockllm/model")
    (tmp_path / "first.py").rename(tmp_path / "other.py")
    with pytest.raises(RuntimeError, match="no way"):
        _evaluate(str(tmp_path / "other.py"), str(tmp_path / "logs"), model="mockllm/model")
    (tmp_path / "bad").unlink()
    log = _evaluate(str(tmp_path / "other.py"), str(tmp_path / "logs"), model="mockllm/model")
    assert (log.status, len(log.samples or ())) == ("success", 1)
    assert _evaluate(str(tmp_path / "other.py"), str(tmp_path / "logs"), model="mockllm/model").status == "success"
