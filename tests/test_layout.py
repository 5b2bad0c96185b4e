"""What tests share is in modules of its own: a test module is imported by none."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent
IMPORT = re.compile(r"\b(?:from|import) +(tests\.[\w.]*\btest_\w+)")


def test_no_test_module_is_imported() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.parent.rglob("*.py")
        if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT.parent).parts)
        for name in IMPORT.findall(path.read_text())
        if name.rpartition(".")[2] != path.stem  # a test may start itself in another process
    ]
    assert found == []
