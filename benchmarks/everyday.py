"""Processor time of merges with adapters, with unions of vocabularies and of several documents."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from merges import Bench
from processes import Usage, median
from report import Row
from speed import FAMILY
from variations import adapter_paths, vocabulary_paths

NUM_MANY = 100


def measure_adapters(bench: Bench) -> list[Row]:
    """Compare an adapter of rank 64, and a hundred of rank 16, with a copy of their base."""
    (base,) = bench.make_family(FAMILY, 0)
    _make(bench, "adapters", 1, 64)
    _make(bench, "adapters", NUM_MANY, 16)
    one = adapter_paths(bench.checkpoints, FAMILY, 1, 64)
    many = adapter_paths(bench.checkpoints, FAMILY, NUM_MANY, 16)
    copy = _write(bench, "copy", _merge("passthrough", [str(base)]))
    return [
        _compare(
            bench,
            "an adapter of rank 64 on 0.5 B : copying it",
            1.5,
            [_write(bench, "adapter", _merge("passthrough", [f"{base}+{path}" for path in one]))],
            [copy],
        ),
        _compare(
            bench,
            f"{NUM_MANY} adapters of rank 16 on 0.5 B, linear : copying it",
            4,
            [_write(bench, "adapters", _merge("linear", [f"{base}+{path}" for path in many]))],
            [copy],
        ),
    ]


def measure_union(bench: Bench) -> list[Row]:
    """Compare a union of shuffled vocabularies with a merge by row numbers."""
    rows = []
    for count in (2, 3):
        _make(bench, "vocabularies", count)
        models = list(map(str, vocabulary_paths(bench.checkpoints, FAMILY, count)))
        plain = _merge("linear", models)
        union = _write(bench, f"union{count}", {**plain, "tokenizer_source": "union"})
        name = f"linear with a union of {count} shuffled vocabularies : without"
        rows.append(_compare(bench, name, 1.2, [union], [_write(bench, f"plain{count}", plain)]))
    return rows


def measure_documents(bench: Bench) -> list[Row]:
    """Compare three documents that use each other with three merges."""
    base, *tunes = map(str, bench.make_family(FAMILY, 3))
    between = [str(bench.workdir / f"document{number}") for number in range(2)]
    steps = [
        _merge("slerp", [base, tunes[0]], base_model=base, parameters={"t": 0.4}),
        _merge("linear", ["first", tunes[1]]),
        _merge("slerp", ["second", tunes[2]], base_model="second", parameters={"t": 0.3}),
    ]
    names = ["first", "second", "third"]
    documents = [{"name": name, **step} for name, step in zip(names, steps, strict=True)]
    fused = bench.workdir / "documents.yml"
    fused.write_text("---\n".join(json.dumps(document) + "\n" for document in documents))
    apart = []
    for number, step in enumerate(steps):
        text = json.dumps(step)
        for name, path in zip(names, between, strict=False):
            text = text.replace(json.dumps(name), json.dumps(path))
        config = bench.workdir / f"step{number}.yml"
        config.write_text(text)
        apart.append(config)
    return [_compare(bench, "three documents : three merges", 0.5, [fused], apart, between)]


def _compare(
    bench: Bench,
    name: str,
    at_most: float,
    configs: Sequence[Path],
    others: Sequence[Path],
    between: Sequence[str] = (),
) -> Row:
    """Return the processor time of merges against that of others, taken in turn, whole processes."""
    runs: dict[str, list[Usage]] = {"raymerge": [], "other": []}
    for _ in range(bench.repeats):
        for who, all_of in (("raymerge", configs), ("other", others)):
            usages = []
            for number, config in enumerate(all_of):
                usages.append(bench.run_raymerge(config))
                if number < len(between) and len(all_of) > 1:
                    bench.clear(Path(between[number]))
                    bench.raymerge_out.rename(between[number])
            runs[who].append(sum(usages[1:], usages[0]))
        for path in between:
            bench.clear(Path(path))
    bench.clear(bench.raymerge_out)
    own, other = (median(runs[who], attrgetter("cpu")) for who in ("raymerge", "other"))
    return Row(
        name,
        f"at most {at_most} : 1",
        f"{own / other:.2f} : 1",
        own <= at_most * other,
        f"{own:.2f} and {other:.2f} s CPU, whole processes; medians of {bench.repeats}",
        {who: [usage.to_json() for usage in usages] for who, usages in runs.items()},
    )


def _merge(method: str, models: Sequence[str], **more: Any) -> dict[str, Any]:
    parameters = {"parameters": {"weight": 1}} if method == "linear" else {}
    entries = [{"model": model} for model in models]
    return {"merge_method": method, "models": entries, "dtype": "bfloat16", **parameters, **more}


def _write(bench: Bench, name: str, config: dict[str, Any]) -> Path:
    path = bench.workdir / f"everyday-{name}.yml"
    path.write_text(json.dumps(config))
    return path


def _make(bench: Bench, what: str, count: int, rank: int = 16) -> None:
    """Make what is missing, in a process of its own, as this one has to stay small."""
    script = Path(__file__).with_name("variations.py")
    command: list[str | Path] = [sys.executable, script, bench.checkpoints, what, FAMILY, str(count), str(rank)]
    subprocess.run(command, check=True)
