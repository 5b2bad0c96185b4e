"""The contract of storages, kept by those behind fsspec."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.fsspec.files import NUMBERS
from tests.pipeline.stores.storage_contract import StorageContract


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> FsspecStorage:
        return FsspecStorage("memory", FaultLog())

    @pytest.fixture
    def root(self) -> str:
        return f"memory://test-{next(NUMBERS)}/root dir"


class TestPlain(StorageContract):
    @pytest.fixture
    def storage(self) -> FsspecStorage:
        return FsspecStorage("plain", FaultLog())

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return f"plain://{tmp_path}/root dir"


@pytest.mark.slow  # the contract holds for s3fs as for the other libraries behind fsspec
class TestS3fs(StorageContract):
    @pytest.fixture
    def storage(self, bucket: str, shared_s3: S3fsStorage) -> S3fsStorage:
        return shared_s3

    @pytest.fixture
    def root(self, bucket: str) -> str:
        return f"s3://{bucket}/root dir"
