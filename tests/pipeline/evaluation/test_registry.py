from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation import evaluators
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.registry import load_evaluators, prepare_tasks

ROOT = Path(__file__).parents[3]


def test_each_file_is_a_kind_of_task_with_a_test_and_a_row_in_the_docs() -> None:
    rows = set(re.findall(r"^\| `([a-z-]+:|FILE)", (ROOT / "docs/spectrum.md").read_text(), re.MULTILINE))
    assert rows == {prefix or "FILE" for prefix in load_evaluators()}
    names = {path.stem for path in Path(evaluators.__file__).parent.glob("*.py")} - {"__init__"}
    assert len(names) == len(load_evaluators())
    assert names <= {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("evaluators/test_*.py")}


def test_a_prefix_that_is_misspelt() -> None:
    with pytest.raises(ConfigError, match=r"did you mean loss:a.txt\? A task is a .yml or .jsonl file, or"):
        prepare_tasks(["los:a.txt"], EvaluateOptions())
