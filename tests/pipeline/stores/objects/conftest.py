"""A storage in an S3 server, and a proxy before it that injects faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymerge.pipeline.stores import retry
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.servers.faults import FaultProxy
from tests.servers.s3 import S3Server


@pytest.fixture
def storage() -> Iterator[ObjectStorage]:
    storage = ObjectStorage("s3", FaultLog(), BufferPool())
    yield storage
    storage.close()


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that all requests of the storage go through; the store counts as down after 3 seconds."""
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 3.0)
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy
