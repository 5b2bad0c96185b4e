"""The report of a merge: added up, and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.report import format_plan
from raymerge.pipeline.plan.results import HostReport, MergeReport, ShardResult
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.progress.events import Planned, SweepDone
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_memory, format_nbytes, format_seconds, format_speed

_SHOWN = 8
"""Machines that a report lists: the slowest."""


def make_report(
    plan: MergePlan,
    out: str,
    results: Sequence[ShardResult] = (),
    *,
    seconds: float,
    work_seconds: float = 0.0,
    num_per_process: int = 1,
    faults: tuple[tuple[str, int], ...],
    nonfinite: tuple[str, ...],
    limits: tuple[str, ...] = (),
    was_complete: bool = False,
) -> MergeReport:
    """Add up what a merge did.

    Args:
        plan: what was to be done.
        out: where.
        results: of the shards that this run made.
        seconds: since it began.
        work_seconds: in which shards were made.
        num_per_process: shards in work at once in one process.
        faults: what was got over besides what the results tell.
        nonfinite: tensors of the output.
        limits: what stores lack.
        was_complete: whether there was nothing to do.
    """
    num_at_once = min(num_per_process, len(results))
    measured = max((result.peak_measured_mem for result in results), default=0)
    projected = num_at_once * max(task.projected_mem for task in plan.tasks)
    return MergeReport(
        out=out,
        manifest=f"{out}/{MANIFEST}",
        num_tensors=len(plan.weight_map),
        num_shards=len(plan.tasks),
        num_resumed=len(plan.tasks) - len(results),
        was_complete=was_complete,
        read_nbytes=sum(result.read_nbytes for result in results),
        written_nbytes=sum(result.nbytes for result in results),
        seconds=seconds,
        work_seconds=work_seconds,
        slowest=max(results, key=lambda result: result.seconds, default=None),
        hosts=_add_up_hosts(results),
        peak_rss=max((result.peak_rss for result in results), default=0),
        peak_measured_mem=measured,
        projected_mem=projected,
        over_nbytes=max(0, measured - projected),
        faults=_add_up([faults, *(result.faults for result in results)]),
        warnings=plan.warnings,
        nonfinite=nonfinite,
        limits=limits,
    )


def format_planned(event: Planned, *, verbose: bool) -> str:
    """Return a plan as text; with `verbose` a line for each shard, where the plan itself is at hand."""
    return format_plan(event.plan, verbose=True) if verbose and event.plan is not None else event.text


def format_report(report: MergeReport) -> str:
    """Return a report as text."""
    if report.was_complete:
        return redact(f"{report.out} was complete already: {_contents(report)}\n  manifest  {report.manifest}")
    resumed = f", {report.num_resumed} of them made by an earlier run" if report.num_resumed else ""
    nbytes = report.read_nbytes + report.written_nbytes
    lines = [
        f"{report.out}: {_contents(report)}{resumed}",
        f"  time      {format_seconds(report.seconds)}, read {format_nbytes(report.read_nbytes)}, "
        f"wrote {format_nbytes(report.written_nbytes)}, together {format_speed(nbytes, report.seconds)}",
    ]
    if (slowest := report.slowest) is not None:
        if report.num_shards - report.num_resumed > 1:
            lines.append(f"  slowest   {slowest.file}: {format_seconds(slowest.seconds)} on {slowest.host}")
        lines.append(
            f"  memory    {format_memory(report.peak_measured_mem)} of {format_memory(report.projected_mem)} planned "
            f"for tensors and scratch (largest worker); {format_memory(report.peak_rss)} with interpreter and code"
        )
    if report.over_nbytes:
        lines.append(
            f"  warning   a worker took {format_memory(report.peak_measured_mem)}, and"
            f" {format_memory(report.projected_mem)} were planned; where memory is short, lower --memory or --workers"
        )
    lines += _list_hosts(report)
    if report.faults:
        lines.append(f"  retries   {sum(count for _, count in report.faults)}")
    lines += [f"    {count} x {what}" for what, count in report.faults]
    lines += [f"  limit     {limit}" for limit in report.limits]
    lines.append(f"  manifest  {report.manifest}")
    return redact("\n".join(lines))


def format_briefly(report: MergeReport) -> str:
    """Return a report of one model of a sweep on one line."""
    resumed = f", {report.num_resumed} of them made by an earlier run" if report.num_resumed else ""
    how = " was complete already" if report.was_complete else f": {_contents(report)}{resumed}"
    return redact(f"{report.out}{how}")


def format_swept(event: SweepDone) -> str:
    """Return the end of a sweep as text."""
    done = f"{event.num_complete} of {counted(event.num_points, 'point')} complete, {event.num_made} made now"
    if event.num_complete + event.num_made == 0:
        done = f"{counted(event.num_points, 'point')} planned, no models made"
    lines = [f"{event.out}: {done}, in {format_seconds(event.seconds)}", f"  record    {event.record}"]
    lines += [f"  together  {event.collection}"] if event.collection else []
    return redact("\n".join(lines))


def _list_hosts(report: MergeReport) -> Iterator[str]:
    if len(report.hosts) < 2:
        return
    hosts = sorted(report.hosts, key=lambda host: host.read_nbytes + host.written_nbytes)
    more = f", the slowest {_SHOWN}" if len(hosts) > _SHOWN else ""
    yield f"  machines  {len(hosts)}{more}:"
    for host in hosts[:_SHOWN]:
        speed = format_speed(host.read_nbytes + host.written_nbytes, report.work_seconds)
        yield f"    {host.host}: {counted(host.num_shards, 'shard')}, {speed}"


def _contents(report: MergeReport) -> str:
    return f"{counted(report.num_tensors, 'tensor')} in {counted(report.num_shards, 'shard')}"


def _add_up_hosts(results: Iterable[ShardResult]) -> tuple[HostReport, ...]:
    by_host: dict[str, list[ShardResult]] = {}
    for result in results:
        by_host.setdefault(result.host, []).append(result)
    return tuple(
        HostReport(host, len(own), sum(result.read_nbytes for result in own), sum(result.nbytes for result in own))
        for host, own in sorted(by_host.items())
    )


def _add_up(counts: Iterable[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for pairs in counts:
        total.update(dict(pairs))
    return tuple(sorted(total.items()))
