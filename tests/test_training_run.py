"""Checkpoints of one training run, merged by a schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.config.sections.training_run import make_weights
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.plan.report import format_plan
from tests.checkpoints import read_files, read_tensors, write_checkpoint
from tests.commands import run_command
from tests.servers.s3 import S3Server


def write_run(directory: Path, num_models: int) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(300, 500, generator=generator)
    models = []
    for k in range(num_models):
        weights = weights + 0.1 * torch.randn(300, 500, generator=generator)
        models.append(write_checkpoint(directory / f"step-{100 * k}", {"w": weights}, {"model_type": "test"}))
    return models


def test_the_weighted_sum_of_the_latest(tmp_path: Path) -> None:
    models = write_run(tmp_path / "run", 12)
    config = {
        "merge_method": "linear",
        "models": {"glob": f"{tmp_path}/run/step-*", "last": 5, "schedule": "minus-sqrt"},
    }
    merge(config, tmp_path / "out")
    weights = make_weights("minus-sqrt", 5)
    sources = [read_tensors(model)["w"].double() for model in models[-5:]]
    expected = sum(weight * x for weight, x in zip(weights, sources, strict=True))
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(read_tensors(tmp_path / "out")["w"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_that_has_come_since_makes_it_another_merge(tmp_path: Path) -> None:
    newest = write_run(tmp_path / "run", 4)[-1].rename(tmp_path / "newest")
    latest = {"merge_method": "linear", "models": {"glob": f"{tmp_path}/run/step-*", "last": 2}}
    fixed = {"merge_method": "linear", "models": {"glob": f"{tmp_path}/run/step-*", "steps": [100, 200]}}
    assert plan(latest).fingerprint == plan(fixed).fingerprint
    merge(latest, tmp_path / "out")
    newest.rename(tmp_path / "run" / "step-300")
    merge(fixed, tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(latest, tmp_path / "out")


def test_from_a_bucket(tmp_path: Path, s3_server: S3Server, bucket: str) -> None:
    for model in write_run(tmp_path / "run", 3):
        for name, content in read_files(model).items():
            s3_server.client().put_object(Bucket=bucket, Key=f"run/{model.name}/{name}", Body=content)
    texts = []
    for place, out in ((f"s3://{bucket}/run", "from-bucket"), (f"{tmp_path}/run", "from-disk")):
        (tmp_path / "merge.yml").write_text(f"merge_method: linear\nmodels: {{glob: '{place}/step-*', last: 2}}\n")
        done = run_command("merge", tmp_path / "merge.yml", tmp_path / out)
        assert done.code == 0, done.err
        texts.append(read_files(tmp_path / out)["model.safetensors"])
    assert texts[0] == texts[1]


def test_the_plan_says_what_a_pattern_has_chosen(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 12)
    run = {"glob": f"{tmp_path}/run/step-*", "last": 2, "schedule": "linear"}
    text = format_plan(plan({"merge_method": "linear", "models": run}))
    assert f"  chosen   {tmp_path}/run/step-1000 0.3333, {tmp_path}/run/step-1100 0.6667" in text
    listed = [{"model": f"{tmp_path}/run/step-0", "parameters": {"weight": 1}}]
    assert "chosen" not in format_plan(plan({"merge_method": "linear", "models": listed}))
