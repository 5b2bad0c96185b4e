"""Whether the output's bytes are the same however the merge was run."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from merges import DARE_LINEAR, DARE_TIES, LINEAR, PASSTHROUGH, SLERP, TASK_ARITHMETIC, TIES, Bench
from report import Row

MERGES = (LINEAR, SLERP, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, replace(PASSTHROUGH, shared={"scale": 0.7}))
RUNS = (
    ("1", "256MiB", "0"),
    ("2", "4GiB", "1"),
    ("4", "256MiB", "2"),
    ("2", "256MiB", "3"),
    ("4", "4GiB", "0"),
    ("1", "4GiB", "1"),
)
"""Workers, memory and hash seed: each number of workers with each memory, and the hash seeds 0 to 3 among them."""


def measure_sameness(bench: Bench) -> list[Row]:
    """Return one row: which methods gave other bytes."""
    digests: dict[str, list[str]] = {}
    for merge in MERGES:
        config = bench.write_config(merge, "qwen2-0.5b")
        digests[merge.method] = []
        for workers, memory, hash_seed in RUNS:
            options = ("--workers", workers, "--memory", memory)
            bench.run_raymerge(config, *options, env={"PYTHONHASHSEED": hash_seed})
            digests[merge.method].append(hash_weights(bench.raymerge_out))
        bench.clear(bench.raymerge_out)
    differing = [method for method, found in digests.items() if len(set(found)) > 1]
    return [
        Row(
            "output bytes for --workers 1, 2, 4; --memory 256MiB, 4GiB; PYTHONHASHSEED 0 to 3",
            "identical",
            f"different: {', '.join(differing)}" if differing else "identical",
            not differing,
            f"sha256 of the shards and the index, {len(RUNS)} runs of each of: {', '.join(digests)}",
            {"runs": RUNS, "digests": digests},
        )
    ]


def hash_weights(directory: Path) -> str:
    """Return one sha256 over the names and contents of the shards and the index."""
    digest = hashlib.sha256()
    files = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    if not files:
        raise FileNotFoundError(f"no weights in {directory}")
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
