"""Servers as fixtures; the top conftest makes them known to every test."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.servers.s3 import S3Server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server for all tests of this process."""
    from tests.servers.s3 import S3Server  # its botocore takes a while, and few tests need it

    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket, in an environment that leads S3 clients to the server as its admin."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.create_bucket(f"bucket-{next(_numbers)}")
    yield bucket
    with contextlib.suppress(s3_server.client().exceptions.NoSuchBucket):
        s3_server.client().delete_bucket(Bucket=bucket)  # SeaweedFS throws the objects away with it
