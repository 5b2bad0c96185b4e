"""What people see of a merge, here or elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raymerge.pipeline.cli.display.merge import Display, format_progress
from raymerge.pipeline.plan.results import MergeReport
from raymerge.pipeline.progress.codec import read_event
from raymerge.pipeline.progress.events import Progressed, Retried
from raymerge.pipeline.progress.report import format_report
from tests.checkpoints import write_config, write_family
from tests.commands import Cli, run_in_terminal, strip_controls
from tests.pipeline.progress.samples import EVENTS, REPORT, SHARD

COLOURS = {"NO_COLOR": None, "FORCE_COLOR": None}
"""What the environment says of them: nothing."""


def test_progress_on_one_line() -> None:
    step = Progressed(12, 40, 10**9, 3 * 10**9, 3 * 10**8, 10**9, 4.2e8, 1.4e8, 83.0, 0)
    assert format_progress(step) == "12/40 shards, 0:01:23 left, read 420 MB/s, write 140 MB/s, 300 MB of 1 GB"
    stuck = replace(step, read_per_second=0.0, written_per_second=0.0, seconds_left=None, num_retries=3)
    assert format_progress(stuck) == "12/40 shards, 3 retried, read 0 B/s, write 0 B/s, 300 MB of 1 GB"
    of_one = replace(step, num_finished=0, num_shards=1, seconds_left=0.0)
    assert format_progress(of_one) == "0/1 shard, 0.0 s left, read 420 MB/s, write 140 MB/s, 300 MB of 1 GB"
    finished = replace(of_one, num_finished=1, written_nbytes=10**9)
    assert format_progress(finished) == "1/1 shard, read 420 MB/s, write 140 MB/s, 1 GB of 1 GB"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (73, "12/40 shards, 0:01:23 left, read 420 MB/s, write 140 MB/s, 300 MB of 1 GB"),
        (72, "12/40 shards, 0:01:23 left, read 420 MB/s, write 140 MB/s"),
        (40, "12/40 shards, 0:01:23 left"),
        (5, "12/40 shards"),
    ],
)
def test_progress_that_does_not_fit_is_shortened_by_whole_figures(width: int, shown: str) -> None:
    step = Progressed(12, 40, 10**9, 3 * 10**9, 3 * 10**8, 10**9, 4.2e8, 1.4e8, 83.0, 0)
    assert format_progress(step, width) == shown


@pytest.mark.parametrize(
    ("shard_size", "columns"),
    [("5kB", 120), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("1GB", 120), ("5kB", 40)))],
)
def test_the_last_frame_is_the_finished_one(tmp_path: Path, shard_size: str, columns: int) -> None:
    family = write_family(tmp_path / "in", 2, dtype=torch.bfloat16)
    content = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in family]}
    config = write_config(tmp_path / "merge.yml", content)
    sent = run_in_terminal("merge", config, tmp_path / "out", "--shard-size", shard_size, columns=columns, env=COLOURS)
    shown = [part for part in sent.split("\x1b[2K") if "━" in part][-1]
    assert "\x1b[32m" + "━" * 16 + "\x1b[0m" in shown, "all of the bar in one colour"
    last = strip_controls(shown).splitlines()[0]
    num_shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert last.startswith("━" * 16 + f" {num_shards}/{num_shards} shard")
    assert "left" not in last
    assert len(last.rstrip()) <= columns
    if columns == 120:
        assert re.search(r"(\S+ [kM]?B) of \1$", last.rstrip())


@pytest.mark.parametrize(("verbose", "told"), [(False, [1, 2, 4, 9, 16]), (True, [1, 2, 3, 4, 9, 10, 16])])
def test_what_goes_wrong_often_is_not_told_as_often(
    verbose: bool, told: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(verbose=verbose, quiet=False) as display:
        for count in (1, 1, 1, 1, 5, 1, 6):
            display.show(Retried("s3://bucket: GET: 503", count))
        display.show(Retried("ray: shard: its worker died", 1))
    times = ["" if n == 1 else f" ({n} times by now)" for n in told]
    assert capsys.readouterr().err.splitlines() == [
        *(f"retried: s3://bucket: GET: 503{text}" for text in times),
        "retried: ray: shard: its worker died",
    ]


def test_lines_that_are_no_events_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["(raylet) :warning: [bold]something[/bold] " + "x" * 300, "", '{"event": "later"}']
    with Display(verbose=False, quiet=False) as display:
        for line in lines:
            display.show_line(line)
    assert capsys.readouterr().err.splitlines() == lines


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(verbose=True, quiet=True) as display:
        for event in EVENTS.values():
            display.show(event)
        display.show_line("something else")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "warning: norm.weight: the output has NaN or infinite values",
        "Error: models: nothing is given",
    ]


def test_a_shard_is_told_with_its_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(verbose=True, quiet=False) as display:
        display.show(SHARD)
    assert capsys.readouterr().err == f"{SHARD.file}: 120 B in 2.0 s on 10.0.0.5, 210 B/s\n"


def test_a_merge_elsewhere_looks_as_it_does_here(tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    family = write_family(tmp_path / "in", 2, dtype=torch.bfloat16)
    content = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1, "wieght": 1}} for model in family],
    }
    config = write_config(tmp_path / "merge.yml", content)
    here = cli("merge", config, tmp_path / "here")
    log = cli("merge", config, tmp_path / "there", "--log-json").out.splitlines()
    capsys.readouterr()
    with Display(verbose=False, quiet=False) as display:
        for line in log:
            display.show_line(line)
    there = capsys.readouterr()
    assert there.err == here.err
    report = read_event(log[-1])
    assert isinstance(report, MergeReport)
    assert there.out == format_report(report) + "\n"
    assert here.out.partition(":")[2].splitlines()[0] == there.out.partition(":")[2].splitlines()[0]


def test_not_finite_is_told_before_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(verbose=False, quiet=False) as display:
        display.show(REPORT)
    shown = capsys.readouterr()
    assert "norm.weight" in shown.err
    assert shown.out == format_report(REPORT) + "\n"
