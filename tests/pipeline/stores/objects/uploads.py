"""Uploads of several parts."""

from __future__ import annotations

import pytest

from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from raymerge.pipeline.stores.seam import Storage, Writer
from tests.pipeline.stores.storage_contract import MIB, make_bytes
from tests.servers.s3 import Keys

PARTS = make_bytes(18 * MIB)
"""Three parts."""


def use(monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)


def finish(writer: Writer, data: bytes) -> StoredFile:
    try:
        for start in range(0, len(data), 4 * MIB):
            writer.write(data[start : start + 4 * MIB])
    except BaseException:
        writer.abort()
        raise
    return writer.commit()


def write_parts(storage: Storage, url: str, data: bytes = PARTS) -> None:
    finish(storage.open_writer(url, len(data)), data)


def drained(storage: ObjectStorage) -> dict[str, int]:
    """Return the faults that were got over, without the store's name."""
    return {name.partition(": ")[2]: count for name, count in storage.faults.drain()}
