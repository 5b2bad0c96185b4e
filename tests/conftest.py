"""What every test may use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raymerge.pipeline.cli import main
from tests.commands import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, through its entry point."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["raymerge", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, out, err)

    return run
