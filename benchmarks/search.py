"""Hypervolume that samplers reach on the pair of docs/demo/spectrum.py, beside random search with as many trials."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merges import Bench
from report import Row

BUDGET = 40
SEEDS = range(5)
SAMPLERS = ("tpe", "nsga2", "random")
"""The last one is what the others are compared with."""
PARENTS = ("answering", "thinking")
RECIPE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": name} for name in PARENTS],
    "parameters": {"normalize": False, "density": 1},
    "search": {
        "parameters": {
            "merge_method": ["task_arithmetic", "ties", "dare_linear"],
            "density": {"min": 0.2, "max": 1.0},
            "weight[0]": {"min": 0.0, "max": 1.0},
            "weight[1][self_attn]": {"min": 0.0, "max": 1.0},
            "weight[1][mlp]": {"min": 0.0, "max": 1.0},
            "weight[1][*]": {"min": 0.0, "max": 1.0},
        }
    },
}
"""The method, the density, and how much of each parent: of the thinking one by kind of layer."""
_EVALUATING = ("--samples", "1", "--batch-size", "300")
_PREPARE = """
import json, sys
from pathlib import Path
from reasoners import BASE, FINE_TUNES, draw_problems, train_model
from training import train_family
directory = Path(sys.argv[1])
if not (directory / "thinking" / "model.safetensors").exists():
    train_family(BASE, FINE_TUNES, train_model, directory)
seen = {problem.text: problem for problem in draw_problems(150, 99)}
further = {problem.text: problem for problem in draw_problems(500, 199) if problem.text not in seen}
for name, problems in (("seen", seen), ("further", further)):
    items = [{"prompt": problem.text, "answer": problem.answer} for problem in problems.values()]
    task = {"extract": "number", "check": "exact", "max_new_tokens": 100, "temperature": 0.6}
    (directory / f"{name}.yml").write_text(json.dumps({"items": items, **task}))
"""
Figures = tuple[float, float]
"""Accuracy and tokens."""


def measure_search(bench: Bench) -> list[Row]:
    """Return how much of the rectangle between the parents each sampler's models dominate, in the median over seeds.

    The searches see the problems that the demo judges its models by; the figures are those of the models that a search
    has found on further problems, which it has not seen.
    """
    directory = bench.workdir / "search"
    _prepare(directory)
    corner = _measure_parents(bench, directory)
    found = {sampler: [_measure(bench, directory, sampler, seed, corner) for seed in SEEDS] for sampler in SAMPLERS}
    medians = {
        sampler: {name: statistics.median(run[name] for run in runs) for name in ("seen", "further")}
        for sampler, runs in found.items()
    }
    *samplers, baseline = SAMPLERS
    rows = []
    for sampler in samplers:
        mine, its = medians[sampler], medians[baseline]
        wins = sum(
            one["further"] > other["further"] for one, other in zip(found[sampler], found[baseline], strict=True)
        )
        rows.append(
            Row(
                f"hypervolume after {BUDGET} trials, {sampler} : {baseline}",
                "more",
                f"{mine['further']:.3f} : {its['further']:.3f}",
                mine["further"] > its["further"],
                f"on further problems, medians of {len(SEEDS)} seeds, more in {wins};"
                f" {_list(found[sampler])} : {_list(found[baseline])};"
                f" on the problems that were searched with {mine['seen']:.3f} : {its['seen']:.3f}",
                {sampler: found[sampler], baseline: found[baseline]},
            )
        )
    return rows


def measure_hypervolume(models: Sequence[Figures], corner: Figures) -> float:
    """Return the share of the rectangle with this worst corner, up to accuracy 1 and no tokens, that models dominate.

    >>> measure_hypervolume([(0.75, 5.0), (1.0, 8.0), (0.5, 9.0)], (0.5, 10.0))
    0.35
    """
    accuracy, tokens = corner
    area, reached = 0.0, accuracy
    for its_accuracy, its_tokens in sorted(models, key=lambda model: (model[1], -model[0])):
        if its_tokens < tokens and its_accuracy > reached:
            area += (its_accuracy - reached) * (tokens - its_tokens)
            reached = its_accuracy
    return round(area / ((1 - accuracy) * tokens), 6)


def _prepare(directory: Path) -> None:
    """Train the models if they are not there, in minutes, and write the recipe and the tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    demo = Path(__file__).resolve().parent.parent / "docs" / "demo"
    subprocess.run(
        [sys.executable, "-c", _PREPARE, directory], check=True, env=_make_environment() | {"PYTHONPATH": str(demo)}
    )
    (directory / "recipe.yml").write_text(json.dumps(RECIPE))


def _measure_parents(bench: Bench, directory: Path) -> Figures:
    """Return the corner of the rectangle between the parents: the lower accuracy, and the larger number of tokens."""
    found = _run(bench, directory, "eval", *PARENTS, "--out", "parents", "--task", "further.yml", *_EVALUATING)
    parents = list(_read(found).values())
    return min(accuracy for accuracy, _ in parents), max(tokens for _, tokens in parents)


def _measure(bench: Bench, directory: Path, sampler: str, seed: int, corner: Figures) -> dict[str, Any]:
    """Search, or find what an earlier run has found, and evaluate the best."""
    out = f"{sampler}-{seed}"
    options = ("--sampler", sampler, "--sampler-seed", str(seed), "--budget", str(BUDGET))
    report = _run(bench, directory, "search", "recipe.yml", out, "--task", "seen.yml", *options, *_EVALUATING)
    names = [point["name"] for point in report["best"]]
    only = [word for name in names for word in ("--only", name)]
    further = _read(_run(bench, directory, "eval", out, "--task", "further.yml", *only, *_EVALUATING))
    seen = dict(zip(names, report["values"], strict=True))
    return {
        "seed": seed,
        "further": measure_hypervolume(list(further.values()), corner),
        "seen": measure_hypervolume(list(seen.values()), corner),
        "models": {name: {"seen": seen[name], "further": further[name]} for name in names},
    }


def _read(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Figures]:
    return {each["model"]: (each["accuracy"]["mean"], each["tokens"]["mean"]) for each in evaluations}


def _run(bench: Bench, directory: Path, *arguments: str) -> Any:
    command: list[str | Path] = [bench.raymerge, *arguments, "--json"]
    print(f"  {' '.join(arguments[:3])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=directory, env=_make_environment())
    return json.loads(done.stdout)


def _make_environment() -> dict[str, str]:
    """Return one with a thread for each process: the models are too small for more."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _list(runs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{run['further']:.3f}" for run in runs)
