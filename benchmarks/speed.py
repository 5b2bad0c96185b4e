"""How long a merge takes: against mergekit on the same YAML, and against moving the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from merges import LINEAR, Bench, Merge, weights
from processes import Usage, median
from report import Row, gib

FAMILY = "qwen2-0.5b"
MIN_COLD = 0.9
"""Speed on a cold page cache, of that of the floor."""


@dataclass
class Runs:
    """Every measurement of one merge, taken in turn."""

    raymerge: list[Usage] = field(default_factory=list)
    raymerge_tiny: list[Usage] = field(default_factory=list)
    mergekit: list[Usage] = field(default_factory=list)
    mergekit_tiny: list[Usage] = field(default_factory=list)
    floor: list[Usage] = field(default_factory=list)
    synced_floor: list[Usage] = field(default_factory=list)

    def to_json(self) -> dict[str, list[dict[str, float]]]:
        """Return the measurements by who ran."""
        return {who: [usage.to_json() for usage in usages] for who, usages in vars(self).items()}


def measure_speed(bench: Bench, merge: Merge, at_least: float, floor_at_most: float | None) -> list[Row]:
    """Return the rows of one merge: raymerge against mergekit, and against the floor."""
    runs = take_turns(bench, merge)
    name = f"{merge.method} ({merge.num_tunes} + base)" if merge.has_base else f"{merge.method} ({merge.num_tunes})"
    if merge.method == "slerp":
        name = "slerp (2)"
    return [*_rows_against_mergekit(name, runs, at_least), _row_against_floor(name, runs, floor_at_most)]


def take_turns(bench: Bench, merge: Merge) -> Runs:
    """Measure everyone in turn, so that a busy machine is busy for all."""
    config, tiny = bench.write_config(merge, FAMILY), bench.write_config(merge, "tiny")
    inputs = merge.inputs(bench.checkpoints, FAMILY)
    runs = Runs()
    for turn in range(bench.repeats):
        bench.warm(inputs)
        runs.raymerge.append(bench.run_raymerge(config))
        bench.clear(bench.raymerge_out)
        bench.warm(inputs)
        floor, synced_floor = bench.run_floor(inputs)
        runs.floor.append(floor)
        runs.synced_floor.append(synced_floor)
        if bench.mergekit and turn < bench.peer_repeats:
            bench.warm(inputs)
            runs.mergekit.append(bench.run_mergekit(config))
            bench.clear(bench.mergekit_out)
            bench.warm([])
            runs.mergekit_tiny.append(bench.run_mergekit(tiny))
        bench.warm([])
        runs.raymerge_tiny.append(bench.run_raymerge(tiny))
    return runs


def measure_cold(bench: Bench) -> list[Row]:
    """Return the speed of a merge whose inputs are on the disk alone, against reading and writing the same bytes."""
    config, tiny = bench.write_config(LINEAR, FAMILY), bench.write_config(LINEAR, "tiny")
    inputs = LINEAR.inputs(bench.checkpoints, FAMILY)
    runs = Runs()
    for _ in range(bench.repeats):
        bench.cool(inputs)
        runs.raymerge.append(bench.run_raymerge(config))
        bench.clear(bench.raymerge_out)
        bench.cool(inputs)
        for kept, usage in zip((runs.floor, runs.synced_floor), bench.run_floor(inputs), strict=True):
            kept.append(usage)
        bench.warm([])
        runs.raymerge_tiny.append(bench.run_raymerge(tiny))
    nbytes = sum(file.stat().st_size for file in weights(inputs))
    disk_nbytes = min(usage.disk_nbytes for usage in runs.floor)
    whole, start_up, floor, synced = (
        _medians(usages)[0] for usages in (runs.raymerge, runs.raymerge_tiny, runs.floor, runs.synced_floor)
    )
    return [
        Row(
            "cold page cache, speed of raymerge : cat + cp, linear (3)",
            f"at least {MIN_COLD:.0%}",
            f"{floor / whole:.0%}",
            floor / whole >= MIN_COLD and disk_nbytes >= MIN_COLD * nbytes,
            f"{whole:.2f} s whole process, {start_up:.2f} s of it start-up; cat + cp {floor:.2f} s, with fsync"
            f" {synced:.2f} s; {disk_nbytes:,} of {nbytes:,} bytes came from the disk; medians of {bench.repeats}",
            runs.to_json(),
        )
    ]


def _rows_against_mergekit(name: str, runs: Runs, at_least: float) -> list[Row]:
    ours, our_cpu = _medians(runs.raymerge)
    row = f"whole-process wall, raymerge : mergekit, {name}"
    asked = f"at most 1 : {at_least:g}"
    how = f"raymerge {ours:.2f} s wall, {our_cpu:.2f} s CPU, {gib(_peak(runs.raymerge))} peak (of {len(runs.raymerge)})"
    if not runs.mergekit:
        return [Row(row, asked, "no mergekit given", None, how, runs.to_json())]
    theirs, their_cpu = _medians(runs.mergekit)
    how += f"; mergekit {theirs:.2f} s, {their_cpu:.2f} s, {gib(_peak(runs.mergekit))} (of {len(runs.mergekit)})"
    how += f"; CPU 1 : {their_cpu / our_cpu:.1f}"
    return [Row(row, asked, f"1 : {theirs / ours:.1f}", theirs / ours >= at_least, how, runs.to_json())]


def _row_against_floor(name: str, runs: Runs, at_most: float | None) -> Row:
    whole, whole_cpu = _medians(runs.raymerge)
    start_up, start_up_cpu = _medians(runs.raymerge_tiny)
    floor, floor_cpu = _medians(runs.floor)
    how = (
        f"raymerge {whole:.2f} - {start_up:.2f} = {whole - start_up:.2f} s ({whole_cpu - start_up_cpu:.2f} s CPU); "
        f"cat + cp {floor:.2f} s ({floor_cpu:.2f} s CPU), with fsync {_medians(runs.synced_floor)[0]:.2f} s; "
        f"medians of {len(runs.raymerge)}"
    )
    if runs.mergekit:
        theirs = _medians(runs.mergekit)[0] - _medians(runs.mergekit_tiny)[0]
        how += f"; mergekit likewise {theirs:.2f} s = {theirs / floor:.1f} : 1"
    ratio = (whole - start_up) / floor
    asked = f"at most {at_most:g} : 1" if at_most else "not asked"
    is_met = ratio <= at_most if at_most else None
    return Row(f"without start-up, raymerge : floor, {name}", asked, f"{ratio:.2f} : 1", is_met, how)


def _medians(usages: list[Usage]) -> tuple[float, float]:
    return median(usages, lambda usage: usage.wall), median(usages, lambda usage: usage.cpu)


def _peak(usages: list[Usage]) -> float:
    return median(usages, lambda usage: usage.peak_rss)
