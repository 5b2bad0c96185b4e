"""How long a mixture of experts takes: against copying its output's bytes."""

from __future__ import annotations

import yaml
from checkpoints import link_family
from merges import LINEAR, Bench, weights
from processes import Usage, median
from report import Row
from speed import FAMILY

NUM_EXPERTS = 4
MAX_RATIO = 1.5


def measure_mixture(bench: Bench) -> list[Row]:
    """Return the time of a Qwen2-MoE of four fine-tunes and a shared expert, less start-up, against `cp` and fsync."""
    bench.make_family(FAMILY, 3)
    base, *experts = link_family(bench.checkpoints, FAMILY, NUM_EXPERTS)
    config = bench.workdir / f"mixture-{FAMILY}.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(base),
                "gate_mode": "random",
                "experts": [{"source_model": str(expert)} for expert in experts],
                "shared_experts": [{"source_model": str(base), "residual_scale": 0.1}],
            }
        )
    )
    tiny = bench.write_config(LINEAR, "tiny")
    runs: dict[str, list[Usage]] = {"raymerge": [], "start-up": [], "copy": []}
    for _ in range(bench.repeats):
        bench.warm([base, *experts])
        runs["raymerge"].append(bench.run_raymerge(config))
        bench.warm([bench.raymerge_out])
        runs["copy"].append(bench.run_copy([bench.raymerge_out]))
        nbytes = sum(file.stat().st_size for file in weights([bench.raymerge_out]))
        runs["start-up"].append(bench.run_raymerge(tiny))
    bench.clear(bench.raymerge_out)
    whole, start_up, copy_wall = (median(usages, lambda usage: usage.wall) for usages in runs.values())
    whole_cpu, start_up_cpu, copy_cpu = (median(usages, lambda usage: usage.cpu) for usages in runs.values())
    wall, cpu = whole - start_up, whole_cpu - start_up_cpu
    return [
        Row(
            f"mixture of {NUM_EXPERTS} experts of 0.5 B : copying its bytes",
            f"at most {MAX_RATIO} : 1",
            f"{wall / copy_wall:.2f} : 1",
            wall <= MAX_RATIO * copy_wall,
            f"raymerge {whole:.2f} - {start_up:.2f} s wall, {whole_cpu:.2f} - {start_up_cpu:.2f} s CPU; cp and fsync"
            f" {copy_wall:.2f} s, {copy_cpu:.2f} s CPU (CPU {cpu / copy_cpu:.1f} : 1: a copy has no checksum);"
            f" {nbytes / 1e9:.1f} GB; medians of {bench.repeats}",
            {who: [usage.to_json() for usage in usages] for who, usages in runs.items()},
        )
    ]
