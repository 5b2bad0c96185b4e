"""Locks in stores behind fsspec."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage, S3Leases
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.retry import FaultLog


def hold_as_another(root: str, storage: FsspecFiles) -> None:
    holder = {"pid": 1, "host": "elsewhere", "boot": "", "since": "2026-01-01", "token": "t", "renewals": 3}
    storage.write(f"{root}/lock", json.dumps(holder).encode())


def test_a_lock_held_elsewhere(s3: S3fsStorage, bucket: str, tmp_path: Path) -> None:
    for storage, root in ((s3, f"s3://{bucket}"), (FsspecStorage("plain", FaultLog()), f"plain://{tmp_path}")):
        hold_as_another(root, storage)
        with pytest.raises(OutputError, match="pid 1, since 2026-01-01, on host elsewhere"):
            storage.lock(f"{root}/lock").__enter__()
        assert list(storage.list(root)) == ["lock"]


def test_a_lock_that_was_not_renewed(tmp_path: Path) -> None:
    storage = FsspecStorage("plain", FaultLog())
    hold_as_another(f"plain://{tmp_path}", storage)
    os.utime(tmp_path / "lock", (time.time() - 60, time.time() - 60))
    with storage.lock(f"plain://{tmp_path}/lock") as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_replaced_only_as_it_was_read(s3: S3fsStorage, bucket: str) -> None:
    url = f"s3://{bucket}/lock"
    leases = S3Leases(s3)
    first = leases.create(url, b"1")
    assert first is not None
    assert leases.create(url, b"2") is None
    second = leases.replace(url, b"3", first)
    assert second is not None
    assert leases.replace(url, b"4", first) is None
    found = leases.read_with_age(url)
    assert found is not None
    assert found[:2] == (b"3", second)
    assert -1 <= found[2] < 30
    leases.delete_if(url, second)
    assert leases.read_with_age(url) is None
    assert leases.replace(url, b"5", second) is None
