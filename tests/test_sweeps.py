"""Sweeps from and to stores, on Ray, of every form of merge, and killed."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

import raymerge
from raymerge import MergeOptions, Planned, verify
from raymerge.ops.registry import load_ops
from raymerge.pipeline.config.schema.schema import make_schema
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.spectrum.points import make_points
from raymerge.pipeline.spectrum.record import RECORD, TABLE, Spectrum, locate_point, read_spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import read_files, write_config, write_family
from tests.commands import run_command
from tests.documents import ROOT
from tests.holding import start_held
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.stored_models import without_own
from tests.watchers import Keep

SLERP = ["t=0.2:0.8:0.3"]
NAMES = ["t-0.2", "t-0.5", "t-0.8"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, num_layers=12, dtype=torch.bfloat16)


def make_config(models: tuple[Path | str, ...], method: str = "slerp", **more: Any) -> dict[str, Any]:
    listed = models[:2] if method == "slerp" else models[1:]
    return {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in listed],
        **more,
    }


def read_record(directory: str) -> Spectrum:
    with open_stores() as stores:
        return read_spectrum(stores, directory)


def check_alone(directory: Path, scratch: Path, **options: Any) -> int:
    """Compare all files of each model with what its own config gives; return how many there are."""
    points = read_record(str(directory)).points
    for point in points:
        raymerge.merge(point.config, scratch / point.name, MergeOptions(seed=point.seed, **options))
        made = Path(locate_point(str(directory), point))
        assert read_files(made) == read_files(scratch / point.name), point.name
    return len(points)


def test_from_and_to_a_bucket(family: tuple[Path, ...], tmp_path: Path, s3_server: S3Server, bucket: str) -> None:
    for model in family[:2]:
        for name, content in read_files(model).items():
            s3_server.client().put_object(Bucket=bucket, Key=f"{model.name}/{name}", Body=content)
    urls = tuple(f"s3://{bucket}/{model.name}" for model in family[:2])
    out = f"s3://{bucket}/spectrum"
    raymerge.sweep(make_config(urls), out, SLERP, workers=1)
    raymerge.sweep(make_config(urls), out, ["t=0.9"], workers=1)
    keys = s3_server.keys_of(bucket)
    assert {f"spectrum/{RECORD}", f"spectrum/{TABLE}", "spectrum/t-0.9/config.json"} <= set(keys)
    assert not [key for key in keys if ".raymerge" in key]
    assert [(point.name, point.state) for point in read_record(out).points] == [
        (name, "complete") for name in [*NAMES, "t-0.9"]
    ]
    raymerge.merge(make_config(family, parameters={"t": 0.5}), tmp_path / "alone")
    body = s3_server.client().get_object(Bucket=bucket, Key="spectrum/t-0.5/model.safetensors")["Body"].read()
    assert body == (tmp_path / "alone" / "model.safetensors").read_bytes()


@pytest.fixture
def hub(family: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for model in family[:2]:
            hub.create_repo(f"org/{model.name}")
            hub.upload(f"org/{model.name}", dict(read_files(model)))
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def test_to_repositories_of_the_hub(family: tuple[Path, ...], hub: HubServer, tmp_path: Path) -> None:
    config = make_config(("org/base", "org/tuned1"))
    report = raymerge.sweep(config, "hf://me/spectrum", ["t=0.2,0.5"], workers=1)
    assert [point.url for point in report.spectrum.points] == ["hf://me/spectrum-t-0.2", "hf://me/spectrum-t-0.5"]
    assert read_record("hf://me/spectrum") == report.spectrum
    raymerge.merge({**config, "parameters": {"t": 0.5}}, tmp_path / "alone")
    published = hub.read_files("me/spectrum-t-0.5", "main")
    expected = without_own(read_files(tmp_path / "alone"))
    assert {name: published[name] for name in expected} == expected
    (slug,) = hub.collections
    assert (hub.collections[slug].title, hub.collections[slug].private) == ("spectrum", True)
    watch = Keep()
    again = raymerge.sweep(config, "hf://me/spectrum", ["t=0.5,0.8"], workers=1, on_event=watch)
    assert list(hub.collections) == [slug]
    assert hub.collections[slug].items == [f"me/spectrum-t-{t}" for t in ("0.2", "0.5", "0.8")]
    assert watch.list(raymerge.SweepDone)[0].collection == f"{hub.url}/collections/{slug}"
    assert [each.was_complete for each in again.reports] == [True, False]
    assert [point.state for point in read_record("hf://me/spectrum").points] == ["complete"] * 3


@pytest.mark.slow
def test_a_spectrum_of_the_hub_is_evaluated_and_drawn(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text('print(\'{"accuracy": 0.5, "tokens": 3}\')')
    raymerge.sweep(make_config(("org/base", "org/tuned1")), "hf://me/s", ["t=0.2,0.5"], workers=1)
    found = raymerge.evaluate("hf://me/s", f"command:{sys.executable} judge.py {{model}}")
    names = ["t-0.2", "t-0.5", "base", "tuned1"]
    assert [(each.model, each.state) for each in found] == [(name, "complete") for name in names]
    assert sorted(path.name for path in Path("evaluations").glob("[!.]*")) == sorted(names)
    with pytest.raises(ConfigError, match=r"curve.html cannot be written to hf://me/s; name another directory"):
        raymerge.curve("hf://me/s")
    drawn = raymerge.curve("hf://me/s", out="drawn")
    assert sorted(drawn.views[0].scores) == sorted(names)
    assert Path("drawn/curve.html").exists()


def test_a_token_that_may_make_no_collections_makes_the_models(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_token("hf_models", user="me", can_write=["me/s", "me/s-t-0.2"])
    monkeypatch.setenv("HF_TOKEN", "hf_models")
    watch = Keep()
    raymerge.sweep(make_config(("org/base", "org/tuned1")), "hf://me/s", ["t=0.2"], workers=1, on_event=watch)
    assert "not in a collection: " in watch.list(raymerge.Warned)[-1].text
    assert watch.list(raymerge.SweepDone)[0].num_complete == 1
    assert not hub.collections


@pytest.mark.slow
def test_on_ray(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(family, "ties", parameters={"weight": 1}))
    sets = ("--set", "density=0.3,0.6", "--set", "merge_method=ties,dare_ties")
    done = run_command("sweep", config, tmp_path / "s", *sets, "--ray", "--workers", "2", "--shard-size", "20kB")
    assert done.code == 0, done.err
    assert check_alone(tmp_path / "s", tmp_path / "alone", shard_size="20kB") == 4


def write_forms(family: tuple[Path, ...], tmp_path: Path) -> Mapping[str, tuple[object, list[str]]]:
    """Return a config of each form of merge, and what is swept in it."""
    base, tuned, other = map(str, family)
    ranges = [0, 6], [6, 12]
    sources = [[{"model": model, "layer_range": span} for model in (base, tuned)] for span in ranges]
    slices = [{"sources": sources[0]}, {"sources": sources[1], "parameters": {"t": 0.7}}]
    adapter = write_adapter(tmp_path / "adapter", draw_factors("model.layers.3.mlp.up_proj", 32, 16))
    documents = f"""
name: first
merge_method: linear
models: [{{model: {tuned}}}, {{model: {other}}}]
parameters: {{weight: 0.5}}
---
merge_method: slerp
base_model: {base}
models: [{{model: {base}}}, {{model: first}}]
parameters: {{t: 0.5}}
"""
    return {
        "slices": (
            {"merge_method": "slerp", "base_model": base, "slices": slices, "parameters": {"t": 0.1}},
            ["slices[1].parameters.t=0.3,0.6", "parameters.t[mlp]=[0,1],0.5"],
        ),
        "layers": (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": base, "layer_range": [0, 12]}]}]},
            ["slices[0].sources[0].layer_range=[0,6],[2,12]"],
        ),
        "adapter": (
            {"merge_method": "linear", "models": [{"model": base}, {"model": f"{base}+{adapter}"}]}
            | {"parameters": {"weight": 1}},
            ["weight[1]=0.5:2:0.5"],
        ),
        "documents": (documents, ["t=0.2,0.8"]),
        "methods": (
            make_config(family, "ties", parameters={"weight": 0.5, "density": 0.5}),
            ["merge_method=ties,dare_ties,task_arithmetic", "dtype=bfloat16,float16"],
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["slices", "layers", "adapter", "documents", "methods"])
def test_whatever_merges_can_be_swept(form: str, family: tuple[Path, ...], tmp_path: Path) -> None:
    config, sets = write_forms(family, tmp_path)[form]
    raymerge.sweep(config, tmp_path / "s", sets, workers=1)  # type: ignore[arg-type]
    assert check_alone(tmp_path / "s", tmp_path / "alone", workers=1) >= 2


def test_little_memory_makes_batches(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config(family, "ties", parameters={"weight": 1})
    watch = Keep()
    raymerge.sweep(config, tmp_path / "s", ["density=0.1:0.6:0.1"], workers=1, memory="40MiB", on_event=watch)
    (planned,) = watch.list(raymerge.SweepPlanned)
    batches = watch.list(Planned)
    assert planned.num_batches == len(batches) > 1
    assert planned.read_nbytes == sum(batch.read_nbytes for batch in batches)
    for batch in batches:
        assert batch.plan is not None
        assert max(task.projected_mem for task in batch.plan.tasks) <= 40 * 2**20
    assert f"the inputs {len(batches)} times" in planned.text
    assert check_alone(tmp_path / "s", tmp_path / "alone") == 6


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/sweeps/*.yml")), ids=lambda file: file.stem)
def test_sweeps_that_are_shipped(file: Path) -> None:
    points = make_points(file, (), 0, strict=True).points
    assert [point.name for point in points[-3:]] == ["weight0-0.1_weight1-0.9", "late", "middle"]
    assert not find_problems(file)


def find_problems(file: Path) -> list[str]:
    validator = jsonschema.Draft202012Validator(make_schema(load_ops().values()))
    return [error.message for error in validator.iter_errors(yaml.safe_load(file.read_text()))]


@pytest.mark.slow
def test_kill_at_ten_moments(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = write_config(tmp_path / "merge.yml", make_config(family, "ties", parameters={"weight": 1}))
    out = tmp_path / "s"
    arguments = ("sweep", config, out, "--set", "density=0.1:0.6:0.1", "--shard-size", "8kB", "--memory", "40MiB")
    dice = random.Random(3)
    made: dict[Path, int] = {}
    for target in range(10):
        process = start_held(tmp_path / f"hold-{target}", target * 5 + 4 - len(made), *arguments, "--workers", "1")
        while process.poll() is None and sum(1 for _ in out.glob("density-*/*.safetensors")) < target * 5:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        finished = {path: path.stat().st_mtime_ns for path in out.glob("density-*/*.safetensors")}
        again = [path for path, when in made.items() if finished.get(path) != when]
        assert len(again) <= 6, "those in flight were committed, and not recorded yet"
        made = finished
    raymerge.sweep(config, out, ["density=0.1:0.6:0.1"], shard_size="8kB", memory="40MiB", workers=1)
    for point in read_record(str(out)).points:
        verify(out / point.url)
    assert check_alone(out, tmp_path / "alone", shard_size="8kB") == 6
