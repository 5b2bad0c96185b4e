"""How much memory a merge takes, whatever the number of models and the size of a tensor."""

from __future__ import annotations

from dataclasses import replace

from merges import SLERP, TIES, Bench
from processes import Usage, median
from report import Row, gib

GIB = 2**30


def measure_many_models(bench: Bench) -> list[Row]:
    """Return the peaks of ties with 8 fine-tunes and with 3."""
    runs: dict[int, list[Usage]] = {}
    for num_tunes in (8, 3):
        merge = replace(TIES, weights=(1.0,) * num_tunes, densities=(0.5,) * num_tunes)
        config = bench.write_config(merge, "qwen2-0.5b")
        runs[num_tunes] = [
            bench.run_raymerge(config, "--memory", "1GiB", is_sampled=True) for _ in range(bench.repeats)
        ]
        bench.clear(bench.raymerge_out)
    many, few = _peak(runs[8]), _peak(runs[3])
    data = {f"{number} fine-tunes": [usage.to_json() for usage in usages] for number, usages in runs.items()}
    return [
        Row(
            "peak RSS, ties with 8 fine-tunes, --memory 1GiB",
            "at most 1.3 GiB",
            gib(many),
            many <= 1.3 * GIB,
            _describe(runs[8]),
            data,
        ),
        Row(
            "the same with 3 fine-tunes",
            "within 5%",
            f"{gib(few)}, {few / many - 1:+.1%}",
            abs(few / many - 1) <= 0.05,
            _describe(runs[3]),
        ),
    ]


def measure_big_tensor(bench: Bench) -> list[Row]:
    """Return the peak of a slerp of one 4 GiB tensor."""
    config = bench.write_config(SLERP, "big-tensor")
    usages = [bench.run_raymerge(config, "--memory", "512MiB", is_sampled=True) for _ in range(min(bench.repeats, 3))]
    bench.clear(bench.raymerge_out)
    return [
        Row(
            "peak RSS, slerp of one 4 GiB tensor, --memory 512MiB",
            "at most 1.1 GiB",
            gib(_peak(usages)),
            _peak(usages) <= 1.1 * GIB,
            _describe(usages),
            {"raymerge": [usage.to_json() for usage in usages]},
        )
    ]


def _peak(usages: list[Usage]) -> float:
    """The largest, not the median: a limit is a limit; all processes together where there are several."""
    return max(max(usage.peak_rss, usage.tree_pss) for usage in usages)


def _describe(usages: list[Usage]) -> str:
    sampled = max(usage.tree_pss for usage in usages)
    wall = median(usages, lambda usage: usage.wall)
    return f"largest ru_maxrss of {len(usages)}; sampled PSS of the process tree {gib(sampled)}; {wall:.1f} s wall"
