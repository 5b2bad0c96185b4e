"""Merges on Ray of which a worker is stopped in the middle of a shard: the same bytes, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import Retried, merge, verify
from raymerge.cluster.runner import Progress, Report
from raymerge.pipeline.engine.shard import run_shard
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import ShardTask
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import read_files, write_family
from tests.cluster.ray.work import wait_until_gone
from tests.servers.s3 import S3Server
from tests.stored_models import download, make_config, without_own
from tests.watchers import Keep

pytestmark = pytest.mark.slow

SHARD_SIZE = "12MB"
"""More than one part of a multipart upload."""

STOP_NBYTES = 9_000_000
"""Written of the shard whose worker is stopped: a part is on its way."""


def stop_once(stores: Stores, task: ShardTask, report: Report, *, mark: Path, **more: Any) -> ShardResult:
    """Stop the worker of one shard, once, in the middle."""
    written_nbytes = 0

    def tell(progress: Progress) -> None:
        nonlocal written_nbytes
        report(progress)
        written_nbytes += progress.written_nbytes
        if written_nbytes >= STOP_NBYTES and not mark.exists():
            mark.write_text(str(os.getpid()))
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)

    return run_shard(stores, task, tell, **more)


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_a_worker_that_is_stopped(
    scheme: str, bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = write_family(tmp_path, 2, num_layers=6, dtype=torch.bfloat16, num_shards=2, hidden=512, vocab=2000)
    config = make_config([str(path) for path in family])
    merge(config, tmp_path / "undisturbed", shard_size=SHARD_SIZE)
    mark, keep = tmp_path / "stopped", Keep()
    monkeypatch.setattr("raymerge.cluster.pace._LEAST_SECONDS", 1.0)
    monkeypatch.setattr("raymerge.pipeline.execution.run_shard", partial(stop_once, mark=mark))
    out = str(tmp_path / "out") if scheme == "file" else f"s3://{bucket}/out"
    report = merge(config, out, shard_size=SHARD_SIZE, ray=True, workers=2, on_event=keep)
    assert report.num_shards >= 3
    assert [(event.reason.partition(" (on ")[0], event.count) for event in keep.list(Retried)] == [
        ("ray: shard: it was slow", 1)
    ]
    assert without_own(download(out)) == without_own(read_files(tmp_path / "undisturbed"))
    verify(out)
    wait_until_gone(int(mark.read_text()))
    assert s3_server.uploads_of(bucket) == []
    assert not [name for name in download(out) if ".partial" in name or ".raymerge/" in name]
