"""What a merge tells becomes events that add up."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raymerge import Event, MergeReport, merge, plan
from raymerge.cluster.runner import Progress
from raymerge.pipeline.progress import narrator
from raymerge.pipeline.progress.events import Planned, Progressed, Resumed, Retried, Warned
from raymerge.pipeline.progress.narrator import Narrator, _Speed
from tests.checkpoints import write_llama
from tests.watchers import Keep, stop_after


@pytest.fixture(autouse=True)
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrator, "INTERVAL_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    models = [str(write_llama(tmp_path / f"m{k}", k, num_shards=2)) for k in range(2)]
    parameters = {"weight": 1, "wieght": 1}
    return {"merge_method": "linear", "models": [{"model": model} for model in models], "parameters": parameters}


def test_the_story_of_a_merge_that_is_resumed(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the driver broke"):
        merge(config, tmp_path / "out", shard_size=1, workers=1, on_event=stop_after(5))
    keep = Keep()
    report = merge(config, tmp_path / "out", shard_size=1, workers=1, on_event=keep)
    planned, warned, resumed, *rest = keep.events
    assert isinstance(planned, Planned)
    assert (planned.method, planned.num_shards) == ("linear", report.num_shards)
    assert planned.models == tuple(str(tmp_path / f"m{k}") for k in range(2))
    assert isinstance(warned, Warned)
    assert "wieght" in warned.text
    assert report.num_resumed >= 5
    kept = planned.write_nbytes - report.written_nbytes
    assert resumed == Resumed(report.num_resumed, kept)
    assert rest[-1] == report
    steps = [event for event in rest if isinstance(event, Progressed)]
    assert steps[0].num_finished == report.num_resumed
    last = steps[-1]
    assert last.written_nbytes == last.to_write_nbytes == planned.write_nbytes
    assert last.read_nbytes == last.to_read_nbytes == report.read_nbytes < planned.read_nbytes
    assert last.num_finished == report.num_shards
    assert last.seconds_left == 0
    assert steps[0].seconds_left is not None


def test_events_carry_the_plan_and_end_with_the_report(config: dict[str, Any], tmp_path: Path) -> None:
    threads = set()

    def tell(event: Event) -> None:
        threads.add(threading.current_thread())
        keep(event)

    keep = Keep()
    report = merge(config, tmp_path / "out", on_event=tell)
    assert threads == {threading.current_thread()}
    assert keep.plan == plan(config, out=tmp_path / "out")
    assert keep.events[-1] == report
    again = Keep()
    complete = merge(config, tmp_path / "out", on_event=again)
    assert [type(event) for event in again.events] == [Planned, Warned, MergeReport]
    assert again.events[-1] == complete
    assert complete.was_complete


def test_the_time_that_is_left_is_not_guessed_from_a_header(config: dict[str, Any]) -> None:
    keep = Keep()
    recorder = Narrator(keep)
    recorder.planned(plan(config))
    recorder.resumed([])
    time.sleep(0.01)
    recorder.progressed(Progress(0, 1))
    recorder.progressed(Progress(1000, 0))
    first, second = keep.events[-2:]
    assert isinstance(first, Progressed)
    assert isinstance(second, Progressed)
    assert first.seconds_left is None
    assert second.seconds_left is not None
    left = second.to_read_nbytes + second.to_write_nbytes - 1001
    assert second.seconds_left == pytest.approx(left / (second.read_per_second + second.written_per_second))


def test_what_is_lost_and_retried_is_counted() -> None:
    keep = Keep()
    recorder = Narrator(keep)
    recorder.resumed([])
    recorder.progressed(Progress(100, 50))
    recorder.retried("ray: shard: its worker died", 1)
    recorder.retried("s3://bucket: GET: 503", 3)
    recorder.progressed(Progress(-100, -50))
    last = keep.events[-1]
    assert isinstance(last, Progressed)
    assert (last.read_nbytes, last.written_nbytes, last.num_retries) == (0, 0, 4)
    assert (last.read_per_second, last.seconds_left) == (0, None)
    assert keep.events[2:4] == [Retried("ray: shard: its worker died", 1), Retried("s3://bucket: GET: 503", 3)]


def test_speed_is_that_of_the_last_half_minute() -> None:
    speed = _Speed()
    speed.measure(Progress(0, 0), 100.0)
    assert speed.measure(Progress(1000, 500), 110.0) == (100.0, 50.0)
    for second in range(111, 200):
        speed.measure(Progress(1000, 500), float(second))
    read, written = speed.measure(Progress(1300, 800), 200.0)
    assert (read, written) == (10.0, 10.0)
    assert speed.measure(Progress(0, 0), 201.0) == (0.0, 0.0), "less than before: a worker was lost"
