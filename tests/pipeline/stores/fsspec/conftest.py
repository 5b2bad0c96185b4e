"""s3fs as most tests use it, by itself and through a proxy with faults; and a file system of the plain kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fsspec import register_implementation

from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.fsspec.files import PlainFileSystem
from tests.servers.faults import FaultProxy
from tests.servers.s3 import S3Server

register_implementation("plain", PlainFileSystem, clobber=True)


@pytest.fixture(scope="module")
def shared_s3() -> Iterator[S3fsStorage]:
    """One for many tests, as it takes a while to connect; it does so in the first test that reads or writes."""
    storage = S3fsStorage(FaultLog())
    yield storage
    storage.close()


@pytest.fixture
def s3(bucket: str, shared_s3: S3fsStorage) -> S3fsStorage:
    return shared_s3


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3fsStorage]:
    """A storage whose requests all go through the fault proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    storage = S3fsStorage(FaultLog())
    yield storage
    storage.close()
