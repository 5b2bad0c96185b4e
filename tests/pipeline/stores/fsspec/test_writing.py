"""Writes by s3fs, and by file systems of the plain kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores import retry
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.fsspec.files import slow, write_parts
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_ranges
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import S3Server


@pytest.mark.parametrize("num_written", [0, 3 * MIB, 17 * MIB, 20 * MIB])
def test_abort_leaves_no_upload(s3: S3fsStorage, s3_server: S3Server, bucket: str, num_written: int) -> None:
    writer = s3.open_writer(f"s3://{bucket}/a", 20 * MIB)
    writer.write(bytes(num_written))
    assert s3_server.uploads_of(bucket) == (["a"] if num_written > 8 * MIB else [])
    writer.abort()
    del writer
    assert s3_server.uploads_of(bucket) == []
    assert s3_server.keys_of(bucket) == []


_PUT = ("PutObject",)
_PARTS = ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")


@pytest.mark.parametrize(
    ("fault", "operations"),
    [
        *(slow(fault, _PUT) for fault in (Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET)),
        *(slow(fault, _PARTS) for fault in (Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET)),
        *((Fault.LOST_RESPONSE, operations) for operations in (_PUT, _PARTS)),
        *(slow(Fault.FLIPPED_BYTE, operations) for operations in (_PUT, ("UploadPart",))),
    ],
)
@pytest.mark.parametrize("exclusive", [False, True])
def test_faults_of_writes(
    through: S3fsStorage,
    proxy: FaultProxy,
    s3_server: S3Server,
    bucket: str,
    fault: Fault,
    operations: tuple[str, ...],
    exclusive: bool,
) -> None:
    data = make_bytes(MIB if operations == _PUT else 10 * MIB)
    for operation in operations:
        proxy.script([fault], only=is_operation(operation))
    write_parts(through, f"s3://{bucket}/a", data, exclusive=exclusive)
    assert sum(proxy.injected.values()) == len(operations)
    assert s3_server.client().get_object(Bucket=bucket, Key="a")["Body"].read() == data
    if fault is not Fault.LOST_RESPONSE:  # of a create: nobody knows the upload's name
        assert s3_server.uploads_of(bucket) == []


@pytest.mark.slow
def test_faults_of_all_kinds(through: S3fsStorage, proxy: FaultProxy, s3_server: S3Server, bucket: str) -> None:
    url = f"s3://{bucket}/a"
    proxy.stall_s = 0.2
    proxy.faults = dict.fromkeys(Fault, 0.02)
    for seed in range(8):
        data = make_bytes(20 * MIB, seed)
        write_parts(through, url, data)
        file = through.stat(url)
        ranges = [ByteRange(file, start, start + 100_000) for start in range(0, 20 * MIB - 100_000, 700_000)]
        assert read_ranges(through, ranges) == [data[item.start : item.stop] for item in ranges]
        assert list(through.list(f"s3://{bucket}")) == ["a"]
    assert len(proxy.injected) > 5
    assert s3_server.client().get_object(Bucket=bucket, Key="a")["Body"].read() == data


def test_an_error_in_mid_file_leaves_nothing(
    through: S3fsStorage, proxy: FaultProxy, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.3)
    writer = through.open_writer(f"s3://{bucket}/a", 20 * MIB)
    writer.write(bytes(9 * MIB))
    proxy.script([Fault.SLOW_DOWN] * 9, only=is_operation("UploadPart"))
    with pytest.raises(OutputError, match=rf"upload_part of s3://{bucket}/a: gave up after \d+ attempts"):
        writer.write(bytes(9 * MIB))
    assert s3_server.uploads_of(bucket) == []
    writer.abort()
    assert s3_server.keys_of(bucket) == []


def test_a_large_exclusive_file_replaces_nothing(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    s3.write(f"s3://{bucket}/a", b"first")
    with pytest.raises(FileExistsError):
        write_parts(s3, f"s3://{bucket}/a", bytes(9 * MIB), exclusive=True)
    assert s3.read(f"s3://{bucket}/a", 10) == b"first"
    assert s3_server.uploads_of(bucket) == []


def test_an_answer_that_was_lost_does_not_hide_another_writer(
    through: S3fsStorage, proxy: FaultProxy, bucket: str
) -> None:
    through.write(f"s3://{bucket}/a", b"theirs")
    proxy.script([Fault.RESET], only=is_operation("PutObject"))
    with pytest.raises(FileExistsError):
        through.write(f"s3://{bucket}/a", b"ours", exclusive=True)
    assert through.read(f"s3://{bucket}/a", 10) == b"theirs"


def test_the_unfinished_file_is_where_it_is_told_to_be(tmp_path: Path) -> None:
    storage = FsspecStorage("plain", FaultLog())
    root = f"plain://{tmp_path}"
    writers = [storage.open_writer(f"{root}/a", 4, f"{root}/.journal/a.partial") for _ in range(2)]
    names = list(storage.list(root))
    assert len(names) == 2
    assert all(name.startswith(".journal/a.") and name.endswith(".partial") for name in names)
    writers[1].write(b"12")
    writers[0].write(b"1234")
    writers[0].commit()
    assert storage.read(f"{root}/a", 4) == b"1234", "a slower worker has its own unfinished file"
    writers[1].abort()
    assert list(storage.list(root)) == ["a"]
    writer = storage.open_writer(f"{root}/a", 4)
    assert list(storage.list(root)) == [".a.partial", "a"]
    writer.abort()
    assert list(storage.list(root)) == ["a"]


def test_a_file_that_the_store_cuts_short(tmp_path: Path) -> None:
    storage = FsspecStorage("plain", FaultLog())
    writer = storage.open_writer(f"plain://{tmp_path}/a", 4)
    writer.write(b"1234")
    os.truncate(tmp_path / ".a.partial", 0)
    (tmp_path / ".a.partial").unlink()
    (tmp_path / ".a.partial").write_bytes(b"12")
    with pytest.raises(OutputError, match="4 bytes were written, the store has 2"):
        writer.commit()
    assert list(tmp_path.iterdir()) == []
