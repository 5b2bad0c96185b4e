"""Clients of S3 servers that know nothing of raymerge."""

from __future__ import annotations

from collections.abc import Callable

import botocore.exceptions
import pytest
from obstore.store import S3Store

from tests.servers.s3 import Keys, Store

PART_NBYTES = 5 << 20
"""S3's smallest."""


def open_store(server: Store, bucket: str, keys: Keys | None = None, *, endpoint: str | None = None) -> S3Store:
    """Return obstore's store for a bucket."""
    keys = keys or server.admin
    return S3Store(
        bucket,
        endpoint=endpoint or server.endpoint,
        region=server.region,
        access_key_id=keys.access_key_id,
        secret_access_key=keys.secret_access_key,
        client_options={"allow_http": True},
    )


def failure_of(call: Callable[[], object]) -> tuple[int, str]:
    """Return the status and the error code with which botocore's call fails."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call()
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]
