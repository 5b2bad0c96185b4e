"""Whole merges while requests fail: they finish, and with the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raymerge import merge, verify
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import write_family
from tests.servers.faults import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.stored_models import download, make_config, merge_locally, upload, without_own

pytestmark = pytest.mark.slow

NUM_MERGES = int(os.environ.get("FAULT_MERGES", "2"))
"""With each kind of fault."""

SHARD_SIZE = "12MB"
"""More than one part of a multipart upload."""

ON_S3 = [fault for fault in Fault if fault is not Fault.EXPIRED]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(
        tmp_path_factory.mktemp("family"), 2, num_layers=6, dtype=torch.bfloat16, num_shards=2, hidden=512, vocab=2000
    )


@pytest.fixture(scope="module")
def expected(family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return merge_locally(family, tmp_path_factory.mktemp("expected") / "merged", shard_size=SHARD_SIZE)


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint, seed=1, stall_s=2.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("fault", [*ON_S3, None], ids=lambda fault: fault.name.lower() if fault else "all")
def test_merges_finish(
    fault: Fault | None,
    family: tuple[Path, ...],
    expected: dict[str, bytes],
    bucket: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    stores: Stores,
) -> None:
    models = [upload(s3_server, bucket, f"models/{path.name}", path) for path in family]
    probabilities: dict[Fault, float] = (
        {fault: 0.05} if fault else dict[Fault, float](dict.fromkeys(ON_S3, 0.05 / len(ON_S3)))
    )
    num_injected = 0
    for number in range(NUM_MERGES):
        out = f"s3://{bucket}/merged{number}"
        proxy.faults = probabilities
        report = merge(make_config(models), out, shard_size=SHARD_SIZE)
        num_injected += sum(proxy.injected.values())
        print(fault, number, f"{report.seconds:.1f} s", dict(proxy.injected), report.faults)
        proxy.clear()
        assert without_own(download(out)) == expected
        verify(out)
        assert s3_server.uploads_of(bucket) == []
        for name in stores.at(out).list(out):
            stores.at(out).delete(f"{out}/{name}")
    assert num_injected >= 1
