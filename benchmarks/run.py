"""Measure raymerge, mergekit and the floor, and print the table of figures.

`python benchmarks/run.py --help` lists the options; README.md beside this file says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accuracy import measure_accuracy
from cluster_faults import measure_faults, measure_straggler
from cluster_overhead import measure_overhead, measure_per_shard, measure_scheduling
from cluster_scaling import measure_scaling
from everyday import measure_adapters, measure_documents, measure_union
from gpu import measure_gpu
from memory import measure_big_tensor, measure_many_models
from merges import DARE_TIES, LINEAR, SLERP, TASK_ARITHMETIC, TIES, Bench
from methods import measure_methods, measure_methods_memory, measure_training_run
from mixture import measure_mixture
from phases import measure_phases
from planning import measure_headers, measure_large_plans
from plot import to_svg
from processes import CommandFailedError
from proportions import measure_small_tensors, measure_twenty_models
from reads import measure_bytes_read
from report import Row, describe_machine, to_markdown, write_json
from sameness import measure_sameness
from search import measure_search
from speed import measure_cold, measure_speed
from startup import measure_help, measure_plan
from store_limits import measure_bytes_served, measure_disk, measure_hub, measure_requests, measure_store_memory
from stores import measure_seam, measure_transfer
from sweep import measure_sweep

ROOT = Path(__file__).resolve().parent.parent

BENCHMARKS: dict[str, Callable[[Bench], list[Row]]] = {
    "linear": partial(measure_speed, merge=LINEAR, at_least=6, floor_at_most=1.3),
    "task_arithmetic": partial(measure_speed, merge=TASK_ARITHMETIC, at_least=6, floor_at_most=1.3),
    "slerp": partial(measure_speed, merge=SLERP, at_least=8, floor_at_most=1.5),
    "ties": partial(measure_speed, merge=TIES, at_least=30, floor_at_most=2.5),
    "dare_ties": partial(measure_speed, merge=DARE_TIES, at_least=15, floor_at_most=2.5),
    "phases": measure_phases,
    "cold": measure_cold,
    "bytes-read": measure_bytes_read,
    "twenty-models": measure_twenty_models,
    "small-tensors": measure_small_tensors,
    "many-models": measure_many_models,
    "methods": measure_methods,
    "methods-memory": measure_methods_memory,
    "training-run": measure_training_run,
    "mixture": measure_mixture,
    "adapters": measure_adapters,
    "union": measure_union,
    "documents": measure_documents,
    "sweep": measure_sweep,
    "search": measure_search,
    "big-tensor": measure_big_tensor,
    "gpu": measure_gpu,
    "accuracy": measure_accuracy,
    "sameness": measure_sameness,
    "help": measure_help,
    "plan": measure_plan,
    "large-plans": measure_large_plans,
    "headers": measure_headers,
    "stores-speed": measure_transfer,
    "stores-seam": measure_seam,
    "stores-bytes": measure_bytes_served,
    "stores-requests": measure_requests,
    "stores-memory": measure_store_memory,
    "stores-disk": measure_disk,
    "stores-hub": measure_hub,
    "cluster-faults": measure_faults,
    "cluster-straggler": measure_straggler,
    "cluster-scaling": measure_scaling,
    "cluster-overhead": measure_overhead,
    "cluster-shards": measure_per_shard,
    "cluster-scheduling": measure_scheduling,
}
"""In the order of the table."""


def main() -> int:
    """Run the chosen benchmarks; return 1 if a figure was missed or could not be taken."""
    arguments = parse_arguments()
    bench = Bench(
        workdir=arguments.workdir.resolve(),
        raymerge=arguments.raymerge,
        mergekit=arguments.mergekit if arguments.mergekit.exists() else None,
        repeats=arguments.repeats,
        peer_repeats=arguments.peer_repeats or arguments.repeats,
    )
    bench.checkpoints.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in arguments.only or BENCHMARKS:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            new = BENCHMARKS[name](bench)
        except CommandFailedError as error:
            print(error, file=sys.stderr)
            new = [Row(name, "", "failed", False, str(error).splitlines()[-1])]
        except Exception as error:
            traceback.print_exc()
            new = [Row(name, "", "failed", False, repr(error))]
        rows += new
        write_json(bench.workdir / "results.json", name, new)
    results = json.loads((bench.workdir / "results.json").read_text())
    (bench.workdir / "results.svg").write_text(to_svg(results))
    print("; ".join(describe_machine().values()), end="\n\n")
    print(to_markdown(rows))
    return int(any(row.is_met is False for row in rows))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command (default %(default)s)")
    parser.add_argument("--peer-repeats", type=int, help="runs of mergekit, if fewer")
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=ROOT / ".venv-mergekit/bin/mergekit-yaml",
        help="mergekit-yaml of an environment of its own; without it, only raymerge and the floor are measured",
    )
    parser.add_argument("--raymerge", type=Path, default=Path(sys.executable).with_name("raymerge"))
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks", help="needs 30 GB")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
