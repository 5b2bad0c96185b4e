"""Errors, warnings and hints on terminals and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from raymerge.pipeline.cli.console import paint, printable, say_hint
from tests.checkpoints import write_config, write_family
from tests.commands import Cli, run_in_terminal, strip_controls

RED, YELLOW, DIM, PLAIN = "\x1b[1;31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("text", "painted"),
    [
        ("Error: no such file", f"{RED}Error:{PLAIN} no such file"),
        ("warning: odd", f"{YELLOW}warning:{PLAIN} odd"),
        ("waiting: Error: is not at the beginning", "waiting: Error: is not at the beginning"),
        (
            "Error: a.yml:1: x\n    1 | x: 2\na.yml:12: warning: y\n   12 | y",
            f"{RED}Error:{PLAIN} a.yml:1: x\n{DIM}    1 | x: 2{PLAIN}\na.yml:12: {YELLOW}warning:{PLAIN} y\n"
            f"{DIM}   12 | y{PLAIN}",
        ),
    ],
)
def test_labels_are_in_colour_and_lines_of_files_dim(text: str, painted: str) -> None:
    assert paint(text, Terminal()) == painted
    assert paint(text, io.StringIO()) == text


@pytest.mark.parametrize(
    ("wishes", "is_terminal", "has_colour"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": ""}, False, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
    ],
)
def test_whether_there_is_colour(
    wishes: dict[str, str], is_terminal: bool, has_colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if is_terminal else io.StringIO()
    assert ("\x1b" in paint("Error: x", stream)) is has_colour


def test_hints_are_dim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    say_hint("run it again")
    assert capsys.readouterr().err == "run it again\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    say_hint("run it again")
    assert capsys.readouterr().err == f"{DIM}run it again{PLAIN}\n"


def test_nothing_that_a_terminal_would_obey_gets_through() -> None:
    assert printable("a\x1b[2Jb\u202ec\td\ne") == "a\\u001b[2Jb\\u202ec\td\ne"
    assert paint("Error: \x1b[2J", Terminal()) == f"{RED}Error:{PLAIN} \\u001b[2J"


def test_commands_say_errors_and_warnings_in_colour(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    family = write_family(tmp_path / "in", 2, dtype=torch.bfloat16)
    content = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in family]}
    doubtful = write_config(tmp_path / "doubtful.yml", {**content, "bogus": 1})
    wrong = write_config(tmp_path / "wrong.yml", {**content, "dtype": "b16"})
    wishes = {"NO_COLOR": None, "FORCE_COLOR": None}
    sent = run_in_terminal("merge", doubtful, tmp_path / "out", columns=200, env=wishes)
    assert f"{YELLOW}warning:{PLAIN} doubtful.yml:" in sent
    assert "unknown key" in strip_controls(sent)
    sent = run_in_terminal("plan", wrong, columns=200, env=wishes)
    line = wrong.read_text().splitlines().index("dtype: b16") + 1
    assert f"{RED}Error:{PLAIN} {wrong}:{line}: dtype: 'b16'" in sent
    assert f"{DIM}{line:5} | dtype: b16{PLAIN}" in sent
    assert "\x1b" not in cli("plan", wrong).err
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli("plan", wrong).err.startswith(RED)
