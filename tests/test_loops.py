"""Merges by compiled loops: without torch, with the bytes that torch gives, and by torch where loops cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.ops.kernel import Kernel, Site
from raymerge.ops.loops import delta_loops, rule_loops, sum_loops
from raymerge.ops.loops.compiler import Loop
from raymerge.pipeline.engine import readiness
from raymerge.pipeline.progress.events import Warned
from tests.checkpoints import add_noise, read_model, write_checkpoint
from tests.method_configs import METHODS, make_config
from tests.pipeline.plan.layouts import make_merge
from tests.watchers import Keep

RUN = """
import sys
from raymerge import merge
merge(sys.argv[1], sys.argv[2], workers=1, seed=3, on_event=lambda event: "Warned" in repr(event) and print(event))
print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three models with tensors of several blocks and of one, of all dtypes, some of them with infinity."""
    directory = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(0)
    base = {
        "a": torch.randn(400_001, generator=generator).bfloat16(),
        "b": torch.randn(300_000, generator=generator).half(),
        "c": torch.randn(140_000, generator=generator),
        "d": torch.arange(1000),
    }
    base["a"][5:9] = torch.inf
    models = [base, *(add_noise(base, seed=k) | {"d": base["d"]} for k in (1, 2))]
    return tuple(write_checkpoint(directory / f"m{k}", tensors, {}) for k, tensors in enumerate(models))


def run(config: Path, out: Path, **variables: str) -> str:
    """Merge in a process of its own; return its warnings, and whether torch was imported."""
    command = [sys.executable, "-c", RUN, str(config), str(out)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_config(path: Path, config: dict[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_loops_are_known_without_being_loaded(
    family: tuple[Path, ...], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(make_config(method, family)).tasks[0].merges
    kernels = [(merge.variants[0].kernel, len(merge.sources)) for merge in planned]
    known = [loop for module in (delta_loops, rule_loops, sum_loops) for loop in vars(module).values()]
    for loop in (each for each in known if isinstance(each, Loop)):
        monkeypatch.setattr(loop, "_entry", None)
        monkeypatch.setattr(loop, "_engine", None)
    monkeypatch.setattr(readiness, "_TRIED", {})
    traced = set(readiness.list_loops(kernels))
    readiness.prepare(planned)
    assert traced == {loop for loop in known if isinstance(loop, Loop) and loop._entry}


@pytest.mark.parametrize("method", METHODS)
def test_torch_gives_the_same_bytes(
    family: tuple[Path, ...], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(method, family)
    merge(config, tmp_path / "loops", workers=1, seed=3)

    def fail(kernels: Sequence[Kernel], site: Site) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(readiness, "_try_kernels", fail)
    monkeypatch.setattr(readiness, "_TRIED", {})
    told = Keep()
    merge(config, tmp_path / "torch", workers=1, seed=3, on_event=told)
    assert read_model(tmp_path / "torch") == read_model(tmp_path / "loops")
    (warning,) = [event.text for event in told.list(Warned) if "torch" in event.text]
    assert "torch merges" in warning
    assert "RuntimeError: no compiler" in warning


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_needs_no_torch(family: tuple[Path, ...], tmp_path: Path, method: str) -> None:
    config = write_config(tmp_path / "config.yml", make_config(method, family))
    assert run(config, tmp_path / "out") == "False"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_processors_give_the_same_bytes(family: tuple[Path, ...], tmp_path: Path, method: str) -> None:
    config = write_config(tmp_path / "config.yml", make_config(method, family))
    run(config, tmp_path / "native")
    for name, variables in {
        "baseline": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
        "seeded": {"PYTHONHASHSEED": "77"},
    }.items():
        assert run(config, tmp_path / name, **variables) == "False"
        assert read_model(tmp_path / name) == read_model(tmp_path / "native")


@pytest.mark.slow
def test_workers_wait_for_loops_that_are_compiled_ahead(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yml", make_config("ties", family))
    run(config, tmp_path / "later")
    count = (
        "import sys; from raymerge import merge; merge(sys.argv[1], sys.argv[2], seed=3); print('numba' in sys.modules)"
    )
    command = [sys.executable, "-c", count, str(config), str(tmp_path / "first")]
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout == "False\n"
    assert read_model(tmp_path / "first") == read_model(tmp_path / "later")
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache" / "raymerge" / "loops").iterdir()} == {
        "combine_deltas", "count_equal", "count_high", "count_low",
    }  # fmt: skip


@pytest.mark.slow
def test_says_why_it_is_slower_without_a_compiler(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yml", make_config("ties", family))
    run(config, tmp_path / "loops")
    hidden = tmp_path / "hidden"
    (hidden / "llvmlite").mkdir(parents=True)
    (hidden / "llvmlite" / "__init__.py").write_text("raise ImportError('no llvmlite here')")
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = run(config, tmp_path / "torch", PYTHONPATH=path)
    assert "no llvmlite here" in said
    assert said.endswith("True")
    assert read_model(tmp_path / "torch") == read_model(tmp_path / "loops")


def test_all_loops_of_ties_are_loaded_before_a_shard_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = {name: item for name, item in vars(delta_loops).items() if isinstance(item, Loop)}
    for loop in loops.values():
        monkeypatch.setattr(loop, "_entry", None)
        monkeypatch.setattr(loop, "_engine", None)
    monkeypatch.setattr(readiness, "_TRIED", {})
    one, other = (
        make_merge(
            num_elements=9,
            op="ties",
            parameters={"weight": (1.0,), "density": (density,), "rescale": True},
            dtypes=("BF16", "BF16"),
        )
        for density in (0.5, 0.3)
    )
    assert not readiness.prepare([one])
    assert [name for name, loop in loops.items() if loop._entry is None] == ["count_bins"]
    assert not readiness.prepare([replace(one, variants=one.variants + other.variants)])
    assert not [name for name, loop in loops.items() if loop._entry is None]
