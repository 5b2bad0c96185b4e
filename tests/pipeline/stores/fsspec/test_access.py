"""Stores that refuse access."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores.fsspec.errors import classify_error
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.fsspec.files import write_parts
from tests.pipeline.stores.storage_contract import MIB
from tests.servers.s3 import Keys, S3Server


def check_refusals(storage: FsspecFiles, url: str, message: str, secret: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: storage.stat(f"{url}/a"),
        lambda: storage.list(url),
        lambda: storage.write(f"{url}/b", b"1"),
        lambda: write_parts(storage, f"{url}/b", bytes(9 * MIB)),
        lambda: storage.delete(f"{url}/a"),
        lambda: storage.lock(f"{url}/lock").__enter__(),
    ]
    for action in actions:
        with pytest.raises((FetchError, OutputError), match=message) as caught:
            action()
        assert secret not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (Keys("AKADMIN0000000000001", "not-the-secret"), r"asked with the AWS credentials found by `env`"),
        (Keys("AKNOBODY000000000001", "any-secret"), r"asked with the AWS credentials found by `env`"),
        (S3Server.stranger, r"asked with the AWS credentials found by `env`: use others, or have access granted"),
    ],
)
def test_refused(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, keys: Keys, message: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    storage = S3fsStorage(FaultLog())
    start = time.monotonic()
    check_refusals(storage, f"s3://{bucket}", rf"^s3://{bucket}.*{message}", keys.secret_access_key)
    assert time.monotonic() - start < 30  # not the 40 seconds for which they would try again
    storage.close()


def test_without_credentials(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3_server.client().put_object(Bucket=s3_server.public_bucket, Key="a", Body=b"1234")
    storage = S3fsStorage(FaultLog())
    assert storage.read(f"s3://{s3_server.public_bucket}/a", 10) == b"1234"
    check_refusals(storage, f"s3://{bucket}", "asked without AWS credentials, as none were found", "secret")
    s3_server.client().delete_object(Bucket=s3_server.public_bucket, Key="a")
    storage.close()


def test_no_such_bucket(s3: S3fsStorage) -> None:
    message = "s3://nowhere/?.*: there is no bucket `nowhere`; create it, or check its name"
    for action in (
        lambda: s3.stat("s3://nowhere/a"),
        lambda: s3.list("s3://nowhere/dir"),
        lambda: s3.write("s3://nowhere/a", b"1"),
        lambda: s3.lock("s3://nowhere/lock").__enter__(),
    ):
        with pytest.raises((FetchError, OutputError), match=message):
            action()


def test_what_may_pass() -> None:
    for error, what in (
        (ConnectionResetError(), "connection reset"),
        (TimeoutError(), "timeout"),
        (EOFError(), "connection reset"),
        (PermissionError(), None),
        (FileNotFoundError(), None),
        (ValueError(), None),
    ):
        fault = classify_error(error)
        assert (fault.what if fault else None) == what
