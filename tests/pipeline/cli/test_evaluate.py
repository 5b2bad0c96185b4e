"""The `eval` command, with commands that evaluate in place of models in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.commands import Cli
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

SCRIPT = """
import pathlib, sys
name = pathlib.Path(sys.argv[1]).name
if name == "bad":
    sys.exit("no such layer")
print('{"accuracy": 0.75, "tokens": 1234.4, "thinking": 0.5, "cut_off": 0, "num_items": 40}')
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("good", "bad", "other")):
        write_tokenized(tmp_path / name, seed, byte_level(TEXTS[0]))
    (tmp_path / "score.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = f"{sys.executable} -S -E score.py {{model}}"


def test_a_table_and_an_exit_code(place: Path, cli: Cli) -> None:
    outcome = cli("eval", "good", "bad", "other", "--command", COMMAND)
    assert outcome.code == 2
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["model", "task", "accuracy", "%", "tokens", "p95", "thinking", "cut", "off"]
    assert lines[1] == ["good", "score", "75.0", "1,234", "1,234", "50%", "0%"]
    assert lines[2] == ["bad", "score", "failed"]
    assert lines[3][:3] == ["other", "score", "75.0"]
    assert "1 of 3 evaluations failed" in outcome.err
    assert "bad, score: the command ended with exit code 1: no such layer" in outcome.err
    assert "the end of its stderr" not in outcome.err, "one line is told of once"
    (place / "score.py").write_text(SCRIPT.replace('"bad"', '"none"'))
    assert cli("eval", "good", "bad", "other", "--command", COMMAND, "-q").code == 0


@pytest.mark.slow
def test_the_next_step_is_told_and_can_be_copied(place: Path, cli: Cli) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "good"}, {"model": "other"}], "parameters": {"weight": 1}}
    Path("merge.yml").write_text(json.dumps(recipe))
    swept = cli("sweep", "merge.yml", "s", "--set", "weight[1]=0.5,1")
    assert "next: `raymerge eval s --task TASK` compares" in swept.err, swept.err
    evaluated = cli("eval", "s", "--command", COMMAND, "--out", "found")
    assert "next: `raymerge curve s --evaluations found` draws" in evaluated.err
    drawn = cli("curve", "s", "--evaluations", "found", "--save-yaml", "best.yml")
    assert "written: best.yml; `raymerge merge best.yml OUT` makes the model" in drawn.err
    assert "next:" not in cli("eval", "good", "other", "--command", COMMAND).err
    assert cli("eval", "s", "--command", COMMAND, "--out", "found", "-q").err == ""


def test_a_command_that_has_nothing_to_tell_is_seen_to_run(
    place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.pipeline.evaluation.units._TELL_SECONDS", 0.0)
    (place / "score.py").write_text(f"import time\ntime.sleep(0.3)\n{SCRIPT}")
    outcome = cli("eval", "good", "--command", COMMAND, "--log-json")
    told = [json.loads(line) for line in outcome.out.splitlines()]
    assert any(each.get("num_finished") == 0 for each in told), outcome.out


def test_what_a_command_prints_shows_no_credentials(place: Path, cli: Cli) -> None:
    (place / "score.py").write_text("import sys; sys.exit('no way to https://me:pw-of-mine@host/a')")
    outcome = cli("eval", "good", "--command", COMMAND)
    assert outcome.err.count("https://***@host/a") == 2, "while it runs, and at the end"
    assert "pw-of-mine" not in outcome.err
    assert not [path for path in (place / "evaluations").rglob("*.json") if b"pw-of-mine" in path.read_bytes()]


def test_only_what_failed_is_done_again(place: Path, cli: Cli) -> None:
    cli("eval", "good", "bad", "--command", COMMAND)
    outcome = cli("eval", "good", "bad", "--command", COMMAND, "--log-json")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert [event["event"] for event in events] == ["begun", "evaluated", "evaluated", "error"]
    assert [event["is_cached"] for event in events[1:3]] == [True, False]
    assert events[3]["exit_code"] == 2


def test_equal_models_are_counted_where_they_are_done(place: Path, cli: Cli) -> None:
    for name in ("good", "equal"):
        write_tokenized(place / name, 0, byte_level(TEXTS[0]))
    outcome = cli("eval", "good", "equal", "other", "--command", COMMAND)
    lines = [line for line in outcome.err.splitlines() if line.startswith("[")]
    assert [line.split()[:2] for line in lines] == [["[1/3]", "good"], ["[2/3]", "equal"], ["[3/3]", "other"]]
    assert lines[1].endswith("the same model was evaluated before")


def test_json_is_the_evaluations(place: Path, cli: Cli) -> None:
    outcome = cli("eval", "good", "--command", COMMAND, "--json")
    assert outcome.err == ""
    [found] = json.loads(outcome.out)
    assert (found["model"], found["accuracy"]["mean"], found["num_items"]) == ("good", 0.75, 40)
    [path] = Path("evaluations/good").glob("*.json")
    assert json.loads(path.read_text()) == found


def test_mistakes_are_told_before_anything_runs(place: Path, cli: Cli) -> None:
    for arguments, problem in [
        (["good"], "no task is given"),
        (["good", "nonesuch", "--command", COMMAND], "no such directory"),
        (["good", "--command", COMMAND, "--log-json", "--json"], "leave --json and -q out"),
        (["good", "--task", "score.py"], "a task is a .yml file"),
    ]:
        outcome = cli("eval", *arguments)
        assert outcome.code == 2
        assert problem in outcome.err
    assert not Path("evaluations").exists()
