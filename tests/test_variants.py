"""Several outputs of one plan: the bytes of as many merges, from one reading of the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.ops.registry import Base, load_ops
from raymerge.pipeline.driver import merge, merge_variants
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.progress.events import Progressed
from tests.checkpoints import read_files, read_tensors, write_family
from tests.ops.samples import list_changes, num_sample_models, sample_parameters
from tests.statistics import write_statistics
from tests.watchers import Keep, list_recorded, stop_after

VALUES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": weight} for weight in ([0.1, 0.9], 0.5, [1, 0.2])],
    "slerp": [{"t": t} for t in (0.2, 0.5, [0, 1])],
    "ties": [{"density": density, "weight": weight} for density, weight in ((0.3, 1), (0.3, 0.4), (1, 0.4))],
    "dare_ties": [{"density": density, "weight": 0.5, "rescale": True} for density in (0.3, 0.3, 0.8)],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, num_layers=3, dtype=torch.bfloat16, vocab=9000, hidden=80)


def make_config(method: str, family: tuple[Path, ...], parameters: dict[str, Any]) -> dict[str, Any]:
    models = family[:2] if method == "slerp" else family[1:]
    base = {} if method == "linear" else {"base_model": str(family[0])}
    listed = [{"model": str(model)} for model in models]
    return {"merge_method": method, **base, "models": listed, "parameters": parameters}


@pytest.fixture(scope="module", params=VALUES)
def alone(
    request: pytest.FixtureRequest, family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Any], dict[str, bytes]]]:
    """The configs of a method, and the files of each when it is merged alone."""
    made = []
    for number, parameters in enumerate(VALUES[request.param]):
        config = make_config(request.param, family, parameters)
        out = tmp_path_factory.mktemp("alone") / f"variant{number}"
        merge(config, out, seed=7, shard_size="500kB")
        made.append((config, read_files(out)))
    return made


@pytest.mark.parametrize(("memory", "workers"), [("4GiB", 1), ("4GiB", 2), ("48MiB", 1)])
def test_each_output_is_what_its_own_merge_gives(
    alone: list[tuple[dict[str, Any], dict[str, bytes]]], memory: str, workers: int, tmp_path: Path
) -> None:
    configs = [config for config, _ in alone]
    outs = [tmp_path / f"variant{k}" for k in range(len(configs))]
    watch = Keep()
    reports = merge_variants(configs, outs, memory=memory, workers=workers, seed=7, shard_size="500kB", on_event=watch)
    assert [report.out for report in reports] == [str(out) for out in outs]
    for report, out in zip(reports, outs, strict=True):
        assert report.written_nbytes == sum(shard.stat().st_size for shard in out.glob("*.safetensors"))
    planned = sum(task.read_nbytes + task.reread_nbytes for task in watch.plan.tasks)
    assert sum(result.read_nbytes for result in watch.list(ShardResult)) == planned
    stored = sum(source.nbytes for task in watch.plan.tasks for m in task.merges for source in m.sources)
    assert sum(task.read_nbytes for task in watch.plan.tasks) == stored, "once for all outputs"
    assert [read_files(out) for out in outs] == [files for _, files in alone]


def test_an_interrupted_run_of_several_outputs_is_finished(family: tuple[Path, ...], tmp_path: Path) -> None:
    configs = [make_config("ties", family, parameters) for parameters in VALUES["ties"]]
    outs = [tmp_path / f"variant{k}" for k in range(3)]
    with pytest.raises(KeyboardInterrupt):
        merge_variants(configs, outs, workers=1, shard_size="500kB", on_event=stop_after(2, KeyboardInterrupt()))
    assert not any((out / "config.json").exists() for out in outs)
    made = [len(list_recorded(out)) for out in outs]
    assert min(made) >= 2
    reports = merge_variants(configs, outs, shard_size="500kB")
    assert [report.num_resumed for report in reports] == made
    for config, out in zip(configs, outs, strict=True):
        merge(config, tmp_path / "alone" / out.name, shard_size="500kB")
        assert read_files(out) == read_files(tmp_path / "alone" / out.name)


def test_an_output_that_is_complete_is_left_alone(family: tuple[Path, ...], tmp_path: Path) -> None:
    configs = [make_config("slerp", family, parameters) for parameters in VALUES["slerp"]]
    outs = [tmp_path / f"variant{k}" for k in range(3)]
    merge(configs[1], outs[1])
    before = {path: path.stat().st_mtime_ns for path in outs[1].iterdir()}
    reports = merge_variants(configs, outs)
    assert [report.was_complete for report in reports] == [False, True, False]
    assert before == {path: path.stat().st_mtime_ns for path in outs[1].iterdir()}


def test_variants_differ_in_parameters_only(family: tuple[Path, ...], tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    one = make_config("linear", family, {"weight": 1})
    with pytest.raises(ConfigError, match="different models"):
        merge_variants([one, {**one, "models": [one["models"][0]]}], outs)
    with pytest.raises(TensorMismatchError, match="may differ in parameters"):
        merge_variants([one, {**one, "out_dtype": "float16"}], outs)
    assert not any(out.exists() for out in outs)


QUICK = {"arcee_fusion", "assembly_of_experts", "emr", "linear", "model_stock", "nuslerp", "ram", "sce", "ties", "tsv"}
"""Of each kind of kernel one; the slow tests sweep the other methods."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in load_ops()]
)
def test_a_sweep_of_every_method_gives_what_single_merges_give(name: str, tmp_path: Path) -> None:
    """By torch, which is given float64: variants share decoded sources and scratch."""
    op = load_ops()[name]
    family = write_family(tmp_path, num_sample_models(op), num_layers=1, dtype=torch.float64, hidden=16, vocab=40)
    models = [{"model": str(model), **write_statistics(op, model)} for model in family[1:]]
    base = {"base_model": str(family[0])} if op.base is Base.REQUIRED else {}
    configs = []
    for change in list_changes(op):
        values = sample_parameters(op, change)
        listed = [
            {**model, "parameters": {p.name: values[p.name][k] for p in op.parameters if p.per_model}}
            for k, model in enumerate(models)
        ]
        shared = {p.name: values[p.name] for p in op.parameters if not p.per_model}
        configs.append({"merge_method": name, **base, "models": listed, "parameters": shared})
    outs = [tmp_path / f"variant{k}" for k in range(len(configs))]
    merge_variants(configs, outs, workers=1)
    for k, (config, out) in enumerate(zip(configs, outs, strict=True)):
        merge(config, tmp_path / f"alone{k}", workers=1)
        expected = read_tensors(tmp_path / f"alone{k}")
        assert all(torch.equal(x, expected[tensor]) for tensor, x in read_tensors(out).items()), config["parameters"]


def test_shards_that_some_outputs_have_are_not_made_again(family: tuple[Path, ...], tmp_path: Path) -> None:
    configs = [make_config("ties", family, parameters) for parameters in VALUES["ties"]]
    outs = [tmp_path / f"variant{k}" for k in range(3)]
    for these, shards in (([0, 1], 2), ([1, 2], 1)):
        some = [configs[k] for k in these], [outs[k] for k in these]
        with pytest.raises(KeyboardInterrupt):
            merge_variants(*some, workers=1, shard_size="500kB", on_event=stop_after(shards, KeyboardInterrupt()))
    recorded = [list_recorded(out) for out in outs]
    made = list(map(len, recorded))
    assert [min(number, least) for number, least in zip(made, (2, 2, 1), strict=True)] == [2, 2, 1]
    before = {path: path.stat().st_mtime_ns for files in recorded for path in files}
    watch = Keep()
    reports = merge_variants(configs, outs, workers=1, shard_size="500kB", on_event=watch)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [report.num_resumed for report in reports] == made
    assert max(made) < len(watch.plan.tasks)
    written = sum(result.nbytes for result in watch.list(ShardResult))
    assert written == sum(report.written_nbytes for report in reports)
    progress = watch.list(Progressed)[-1]
    assert progress.written_nbytes == progress.to_write_nbytes == sum(task.nbytes for task in watch.plan.tasks)
    assert progress.num_finished == progress.num_shards
    for config, out in zip(configs, outs, strict=True):
        merge(config, tmp_path / "alone" / out.name, shard_size="500kB")
        assert read_files(out) == read_files(tmp_path / "alone" / out.name)
