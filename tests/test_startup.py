"""Nothing heavy is imported before it is needed: the help and the planner's parts come up at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_family

HEAVY = {"torch", "ray", "pyarrow", "transformers", "numpy"}
OF_THE_COMMAND_LINE = {"typer", "rich", "pydantic", "yaml"}


def run_and_list_imports(*arguments: str) -> tuple[str, set[str]]:
    """Run Python with these arguments; return what it prints and the top-level packages that it imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.stdout, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_imports_are_seen() -> None:
    assert "numpy" in run_and_list_imports("-c", "import numpy")[1]


def test_help_imports_nothing_heavy() -> None:
    printed, imported = run_and_list_imports("-m", "raymerge", "--help")
    assert "merge" in printed
    assert not imported & HEAVY


def test_version_imports_neither_rich_nor_pydantic() -> None:
    printed, imported = run_and_list_imports("-m", "raymerge", "--version")
    assert "raymerge" in printed
    assert "typer" in imported
    assert not imported & (HEAVY | {"rich", "pydantic"})


def test_the_package_itself_imports_next_to_nothing() -> None:
    printed, imported = run_and_list_imports("-c", "import raymerge; print(*dir(raymerge))")
    assert {"merge", "plan", "verify", "inspect"} <= set(printed.split())
    assert not imported & (HEAVY | OF_THE_COMMAND_LINE)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from raymerge import merge, plan, verify, inspect", id="api"),
        pytest.param("from raymerge.ops.registry import load_ops; print(*load_ops())", id="ops"),
        pytest.param("import raymerge.pipeline.plan.types, raymerge.cluster.runner", id="seams"),
    ],
)
def test_importing_the_package_leaves_torch_out(code: str) -> None:
    assert not run_and_list_imports("-c", code)[1] & {"torch", "ray", "transformers"}


@pytest.mark.parametrize("call", ["merge(config, out)", "sweep(config, out, {'weight[0]': [0.1, 0.2]})"])
def test_plain_merges_and_sweeps_import_neither_torch_nor_pandas(tmp_path: Path, call: str) -> None:
    """Many functions of Arrow import pandas if it is installed."""
    models = [{"model": str(path)} for path in write_family(tmp_path, 1)]
    (tmp_path / "pandas").mkdir()
    (tmp_path / "pandas" / "__init__.py").write_text("__version__ = '3.0.0'")
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from raymerge import merge, sweep;"
        f" config, out = json.loads(sys.argv[2]), sys.argv[3]; {call}"
    )
    _, imported = run_and_list_imports("-c", code, str(tmp_path), json.dumps(config), str(tmp_path / "out"))
    assert "pyarrow" in imported
    assert not imported & {"torch", "ray", "pandas", "transformers"}
