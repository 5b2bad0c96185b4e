"""`merge --log-json`: every line of stdout is an event, and the last one says how it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.cli.interrupt import MESSAGE
from raymerge.pipeline.cli.json_log import open_json_log
from raymerge.pipeline.plan.results import MergeReport
from raymerge.pipeline.progress.codec import read_event
from raymerge.pipeline.progress.events import Progressed
from tests.checkpoints import read_files, write_checkpoint, write_config, write_family
from tests.commands import PATIENCE_SECONDS, Cli, run_command, start_command


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("in")
    family = write_family(directory, 2, num_layers=40, dtype=torch.bfloat16)
    models = [{"model": str(model), "parameters": {"wieght": 1, "weight": 0.5}} for model in family[1:]]
    content = {"merge_method": "task_arithmetic", "base_model": str(family[0]), "models": models}
    return write_config(directory / "merge.yml", content)


def parse(out: str) -> list[dict[str, Any]]:
    """Return every line of a log; each is an event that can be read back."""
    lines = out.splitlines()
    assert all(read_event(line) is not None for line in lines)
    return [json.loads(line) for line in lines]


def test_a_merge_and_another_of_the_same(config: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("merge", config, tmp_path / "out", "--log-json", "--workers", "2", "--shard-size", "100kB")
    assert (done.code, done.err) == (0, "")
    events = parse(done.out)
    the_plan = plan(config, shard_size="100kB")
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["planned", "warning", "warning", "resumed", *["shard"] * len(the_plan.tasks), "done"]
    assert events[0]["fingerprint"] == the_plan.fingerprint
    assert [event["text"] for event in events if event["event"] == "warning"] == list(the_plan.warnings)
    assert {event["file"] for event in events if event["event"] == "shard"} == {task.file for task in the_plan.tasks}
    report = events[-1]
    assert report["out"] == str(tmp_path / "out")
    assert json.loads(Path(report["manifest"]).read_text())["fingerprint"] == the_plan.fingerprint
    assert report["written_nbytes"] == events[0]["write_nbytes"] == sum(task.nbytes for task in the_plan.tasks)
    assert report["read_nbytes"] == events[0]["read_nbytes"]
    assert 0 < report["work_seconds"] < report["seconds"]
    assert [host["num_shards"] for host in report["hosts"]] == [len(the_plan.tasks)]
    merge(config, tmp_path / "quiet" / "out", shard_size="100kB")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "quiet" / "out")
    again = cli("merge", config, tmp_path / "out", "--log-json", "--shard-size", "100kB")
    assert [event["event"] for event in parse(again.out)] == ["planned", "warning", "warning", "done"]
    assert parse(again.out)[-1]["was_complete"]


@pytest.mark.slow
def test_memory_is_compared_with_the_plan(tmp_path: Path) -> None:
    """In a process of its own, as a merge is: what is measured is what was planned, but for some pages."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{k}": torch.rand(2**23, generator=generator).to(torch.bfloat16) for k in range(2)}
    paths = [write_checkpoint(tmp_path / name, tensors, {}) for name in "ab"]
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in paths]
    config = write_config(tmp_path / "merge.yml", {"merge_method": "linear", "models": models})
    for workers in ("1", "2"):
        out = tmp_path / workers
        done = run_command("merge", config, out, "--log-json", "--workers", workers, "--shard-size", "16MiB")
        report = read_event(done.out.splitlines()[-1])
        assert isinstance(report, MergeReport), done
        assert report.projected_mem > 2**24
        assert report.projected_mem // 2 < report.peak_measured_mem < report.projected_mem + 8 * 2**20
        assert report.peak_measured_mem + 30 * 2**20 < report.peak_rss, "interpreter and code"


@pytest.mark.parametrize("what", ["config", "output"])
def test_a_merge_that_fails(what: str, config: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("text")
    arguments = (tmp_path / "absent.yml" if what == "config" else config, out)
    plain = cli("merge", *arguments, "-q")
    outcome = cli("merge", *arguments, "--log-json")
    assert (outcome.code, outcome.err) == (2, "")
    last = parse(outcome.out)[-1]
    assert last.pop("time")
    kind = "ConfigError" if what == "config" else "OutputError"
    message = plain.err.removeprefix("Error: ").removesuffix("\n")
    assert last == {"event": "error", "type": kind, "message": message, "exit_code": 2}


def test_an_error_shows_no_credential(tmp_path: Path, cli: Cli) -> None:
    models = [{"model": "s3://AKID:a/hidden@bucket/model", "parameters": {"weight": 1}}]
    config = write_config(tmp_path / "merge.yml", {"merge_method": "linear", "models": models})
    outcome = cli("merge", config, tmp_path / "out", "--log-json")
    assert outcome.code == 2
    assert parse(outcome.out)[-1]["event"] == "error"
    assert "credentials do not belong in a URL" in outcome.out
    assert "hidden" not in outcome.out + outcome.err


def test_a_bug(config: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("not there")

    monkeypatch.setattr("raymerge.pipeline.driver.check_apart", fail)
    outcome = cli("merge", config, tmp_path / "out", "--log-json")
    assert (outcome.code, outcome.err) == (1, "")
    last = parse(outcome.out)[-1]
    assert (last["type"], last["exit_code"]) == ("LookupError", 1)
    assert last["message"].startswith("Traceback ")


def test_ctrl_c(config: Path, tmp_path: Path) -> None:
    """Also where nobody reads: the log is larger than what a pipe holds, so that the merge waits for us."""
    process = start_command("merge", config, tmp_path / "out", "--log-json", "--shard-size", "1", "--workers", "2")
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(5)]
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (130, "")
    events = parse("".join(first) + rest)
    last = events[-1]
    assert (last["event"], last["type"], last["message"], last["exit_code"]) == (
        "error",
        "KeyboardInterrupt",
        MESSAGE,
        130,
    )
    assert sum(event["event"] == "shard" for event in events) < len(plan(config, shard_size=1).tasks)
    assert not (tmp_path / "out" / "config.json").exists()


def test_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """The first step, then one every two seconds, and the last."""
    step = Progressed(0, 2, 1, 10, 1, 10, 1.0, 1.0, None, 0)
    with open_json_log(verbose=False) as log:
        for number in (0, 0, 1, 1, 2):
            log.show(replace(step, num_finished=number))
    assert [event["num_finished"] for event in parse(capsys.readouterr().out)] == [0, 2]


STUCK = """
import time
from raymerge.pipeline.cli.interrupt import watch_for_interrupts
from raymerge.pipeline.cli.json_log import open_json_log

watch_for_interrupts()
with open_json_log(verbose=False):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying up", flush=True)
        time.sleep(60)
"""


def test_a_second_ctrl_c() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for wanted in (b"ready", b"tidying up"):
            assert process.stdout.readline().strip() == wanted
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (130, b"")
    assert [(event["event"], event["message"]) for event in parse(out.decode())] == [("error", MESSAGE)]


@pytest.mark.slow
def test_a_reader_that_leaves(config: Path, tmp_path: Path) -> None:
    with start_command("merge", config, tmp_path / "out", "--log-json", "--shard-size", "100kB") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=PATIENCE_SECONDS) == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "out" / "raymerge_manifest.json").exists()


def test_a_plan_is_not_logged(config: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", config, tmp_path / "out", "--log-json", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "`raymerge plan --json`" in outcome.err
