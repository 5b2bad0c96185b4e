"""The report at the end, and what it adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymerge import merge, plan
from raymerge.pipeline.plan.results import HostReport, MergeReport, ShardResult
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.progress.report import format_report, make_report
from raymerge.pipeline.sizes import format_memory
from tests.checkpoints import write_llama
from tests.pipeline.progress.samples import REPORT, SHARD

GB = 10**9


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = str(write_llama(tmp_path_factory.mktemp("in") / "model"))
    return {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 1}}]}


@pytest.fixture(scope="module")
def the_plan(config: dict[str, Any]) -> MergePlan:
    return plan(config, shard_size=1)


def make_results() -> list[ShardResult]:
    one = replace(SHARD, file="a", seconds=7.0, read_nbytes=3 * GB, nbytes=GB)
    other = replace(SHARD, file="b", seconds=75.0, peak_rss=2**30, faults=(*SHARD.faults, ("hub: PUT: 500", 1)))
    return [one, other, replace(one, file="c", host="10.0.0.6", peak_measured_mem=2**20, faults=())]


def report_of(the_plan: MergePlan, results: list[ShardResult], num_per_process: int = 1) -> MergeReport:
    return make_report(
        the_plan,
        "s3://bucket/merged",
        results,
        seconds=20.0,
        work_seconds=10.0,
        num_per_process=num_per_process,
        faults=(("ray: shard: its worker died", 1), SHARD.faults[0]),
        nonfinite=(),
        limits=("s3://bucket: this store refuses checksums",),
    )


def test_what_is_added_up(the_plan: MergePlan) -> None:
    results = make_results()
    report = report_of(the_plan, results)
    assert (report.read_nbytes, report.written_nbytes) == (6 * GB + 300, 2 * GB + 120)
    assert report.num_resumed == len(the_plan.tasks) - 3
    assert report.slowest == results[1]
    assert report.hosts == (
        HostReport("10.0.0.5", 2, 3 * GB + 300, GB + 120),
        HostReport("10.0.0.6", 1, 3 * GB, GB),
    )
    assert (report.peak_rss, report.peak_measured_mem) == (2**30, 2**28)
    assert report.faults == (
        ("hub: PUT: 500", 1),
        ("ray: shard: its worker died", 1),
        ("s3://bucket: GET: 503 SlowDown", 6),
    )


def test_threads_share_the_memory_of_their_process(the_plan: MergePlan) -> None:
    largest = max(task.projected_mem for task in the_plan.tasks)
    assert report_of(the_plan, make_results()).projected_mem == largest
    assert report_of(the_plan, make_results(), num_per_process=2).projected_mem == 2 * largest
    assert report_of(the_plan, make_results()[:1], num_per_process=8).projected_mem == largest


@pytest.mark.parametrize(("is_inside", "num_per_process"), [(True, 2), (False, 1)])
def test_what_shares_a_process(
    is_inside: bool, num_per_process: int, config: dict[str, Any], the_plan: MergePlan, tmp_path: Path
) -> None:
    """Only threads reach what this process alone has."""
    out = f"memory:/{tmp_path}/out" if is_inside else tmp_path / "out"
    largest = max(task.projected_mem for task in plan(config, shard_size=1, out=str(out)).tasks)
    assert merge(config, out, shard_size=1, workers=2).projected_mem == num_per_process * largest


def test_a_worker_that_goes_over_its_plan_is_told(the_plan: MergePlan) -> None:
    planned = max(task.projected_mem for task in the_plan.tasks)
    kept, over = (report_of(the_plan, [replace(SHARD, peak_measured_mem=planned + more)]) for more in (0, 7 * 2**20))
    assert (kept.over_nbytes, over.over_nbytes) == (0, 7 * 2**20)
    assert "warning" not in format_report(kept)
    (line,) = (line for line in format_report(over).splitlines() if "warning" in line)
    assert f"took {format_memory(planned + 7 * 2**20)}, and {format_memory(planned)} were planned" in line
    assert line.endswith("lower --memory or --workers")


def test_a_report_for_people(the_plan: MergePlan) -> None:
    report = replace(
        report_of(the_plan, make_results()), num_resumed=4, num_shards=7, projected_mem=2**28 + 1, over_nbytes=0
    )
    assert format_report(report).splitlines() == [
        f"s3://bucket/merged: {len(the_plan.weight_map)} tensors in 7 shards, 4 of them made by an earlier run",
        "  time      20 s, read 6 GB, wrote 2 GB, together 400 MB/s",
        "  slowest   b: 0:01:15 on 10.0.0.5",
        "  memory    256MiB of 257MiB planned for tensors and scratch (largest worker);"
        " 1024MiB with interpreter and code",
        "  machines  2:",
        "    10.0.0.6: 1 shard, 400 MB/s",
        "    10.0.0.5: 2 shards, 400 MB/s",
        "  retries   8",
        "    1 x hub: PUT: 500",
        "    1 x ray: shard: its worker died",
        "    6 x s3://bucket: GET: 503 SlowDown",
        "  limit     s3://bucket: this store refuses checksums",
        "  manifest  s3://bucket/merged/raymerge_manifest.json",
    ]


def test_a_report_on_nothing_unusual() -> None:
    calm = replace(REPORT, faults=(), hosts=REPORT.hosts[:1])
    lines = format_report(calm).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["time", "slowest", "memory", "manifest"]
    of_one = replace(calm, num_shards=1)
    assert [line.split()[0] for line in format_report(of_one).splitlines()[1:]] == ["time", "memory", "manifest"]


def test_a_report_on_a_merge_that_was_complete() -> None:
    assert format_report(replace(REPORT, was_complete=True)).splitlines() == [
        "s3://bucket/merged was complete already: 3 tensors in 2 shards",
        "  manifest  s3://bucket/merged/raymerge_manifest.json",
    ]


def test_the_slowest_of_many_machines() -> None:
    hosts = tuple(HostReport(f"10.0.0.{k}", 1, k * 10**9, 0) for k in range(1, 101))
    lines = format_report(replace(REPORT, hosts=hosts)).splitlines()
    start = lines.index("  machines  100, the slowest 8:")
    assert lines[start + 1] == "    10.0.0.1: 1 shard, 400 MB/s"
    assert sum(line.startswith("    10.") for line in lines) == 8


def test_no_credential_is_shown() -> None:
    assert "hidden" not in format_report(replace(REPORT, manifest="https://me:hidden@host/manifest.json"))
