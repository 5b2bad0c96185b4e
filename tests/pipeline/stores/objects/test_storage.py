"""Names, changes while reading, uploads that killed runs leave, and the lock."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores import remote
from raymerge.pipeline.stores.lease import Holder
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from tests.pipeline.stores.objects.uploads import PARTS, write_parts
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import S3Server

# names


def test_a_bucket_is_a_directory(storage: ObjectStorage, bucket: str) -> None:
    assert storage.absolute(f"s3a://{bucket}/") == storage.absolute(f"s3://{bucket}") == f"s3://{bucket}"
    storage.write(f"s3://{bucket}/a/b", b"12")
    assert list(storage.list(f"s3://{bucket}")) == ["a/b"]
    with pytest.raises(FileNotFoundError):
        storage.stat(f"s3://{bucket}")


def test_a_marker_of_a_directory_is_no_file(storage: ObjectStorage, bucket: str, s3_server: S3Server) -> None:
    for key in ("dir/", "dir/sub/"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"")
    storage.write(f"s3://{bucket}/dir/empty", b"")
    assert list(storage.list(f"s3://{bucket}/dir")) == ["empty"]
    assert list(storage.list(f"s3://{bucket}")) == ["dir/empty"]
    with pytest.raises(FileNotFoundError):
        storage.stat(f"s3://{bucket}/dir")


@pytest.mark.parametrize("name", ["a//b", "/a", "a\nb", "a\x7f"])
def test_a_name_that_obstore_cannot_use(storage: ObjectStorage, bucket: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"rename the object, or try --storage fsspec"):
        storage.stat(f"s3://{bucket}/{name}")
    with pytest.raises(ConfigError, match=r"rename the object"):
        storage.write(f"s3://{bucket}/{name}", b"")


# changes while reading


def test_replaced_while_it_is_read(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_NBYTES", MIB)
    url = f"s3://{bucket}/a"
    storage.write(url, make_bytes(4 * MIB))
    file = storage.stat(url)
    with storage.open_range(file, 0, MIB) as body:
        assert body.readinto(memoryview(bytearray(MIB))) > 0
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=make_bytes(4 * MIB, 1))
    with pytest.raises(FetchError, match=rf"{url}: changed since the plan was made.*found 4,194,304 bytes, etag"):
        read_all(storage, file)


def test_a_store_that_ignores_conditions_cannot_hide_a_change(storage: ObjectStorage, bucket: str) -> None:
    url = f"s3://{bucket}/a"
    storage.write(url, b"12345678")
    file = replace(storage.stat(url), etag="")  # no If-Match is sent then
    with pytest.raises(FetchError, match="changed since the plan was made"):
        read_all(storage, file)


# uploads of killed runs


def test_uploads_of_a_killed_run_are_swept_and_no_others(
    storage: ObjectStorage, bucket: str, s3_server: S3Server
) -> None:
    program = f"""
        import os
        from raymerge.pipeline.stores.buffers import BufferPool
        from raymerge.pipeline.stores.objects.storage import ObjectStorage
        from raymerge.pipeline.stores.retry import FaultLog
        writer = ObjectStorage("s3", FaultLog(), BufferPool()).open_writer("s3://{bucket}/out/a", 40 * 2**20)
        writer.write(bytes(20 * 2**20))
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60)
    for key in ("out/ab", "out/a/b", "out/A", "other"):
        s3_server.client().create_multipart_upload(Bucket=bucket, Key=key)
    assert sorted(s3_server.uploads_of(bucket)) == ["other", "out/A", "out/a", "out/a/b", "out/ab"]
    write_parts(storage, f"s3://{bucket}/out/a")
    assert sorted(s3_server.uploads_of(bucket)) == ["other", "out/A", "out/a/b", "out/ab"]


def test_an_abort_leaves_no_upload(storage: ObjectStorage, bucket: str, s3_server: S3Server) -> None:
    writer = storage.open_writer(f"s3://{bucket}/a", len(PARTS))
    writer.write(PARTS[: 10 * MIB])
    assert s3_server.uploads_of(bucket) == ["a"]
    writer.abort()
    assert s3_server.uploads_of(bucket) == s3_server.keys_of(bucket) == []


def test_an_exclusive_file_is_small(storage: ObjectStorage, bucket: str) -> None:
    with pytest.raises(ValueError, match="so that they replace nothing"):
        storage.open_writer(f"s3://{bucket}/a", 2**30, exclusive=True)


# the lock


def test_the_lock_of_a_killed_run_of_this_machine_is_free(
    storage: ObjectStorage, bucket: str, s3_server: S3Server
) -> None:
    url = f"s3://{bucket}/out/lock"
    program = f"""
        import os
        from raymerge.pipeline.stores.buffers import BufferPool
        from raymerge.pipeline.stores.objects.storage import ObjectStorage
        from raymerge.pipeline.stores.retry import FaultLog
        context = ObjectStorage("s3", FaultLog(), BufferPool()).lock("{url}")
        context.__enter__()
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60)
    assert s3_server.keys_of(bucket) == ["out/lock"]
    with storage.lock(url) as lock:
        lock.check()
    assert s3_server.keys_of(bucket) == []


def test_the_lock_of_another_machine_ages_by_the_clock_of_the_store(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/lock"
    holder = Holder(12, "elsewhere", "boot", "2026-01-02 03:04:05+00:00", "token")
    before = time.monotonic()
    s3_server.client().put_object(Bucket=bucket, Key="lock", Body=holder.encode())
    time.sleep(2)
    with pytest.raises(OutputError, match=r"pid 12, since 2026-01-02.*on host elsewhere.*try again in \d+ s") as caught:
        storage.lock(url).__enter__()
    seconds_left = int(re.findall(r"try again in (\d+) s", str(caught.value))[0])
    assert 30 - (time.monotonic() - before) - 1.5 <= seconds_left <= 29
    assert s3_server.keys_of(bucket) == ["lock"]
    monkeypatch.setattr("raymerge.pipeline.stores.lease.TTL_SECONDS", 2)
    monkeypatch.setattr("raymerge.pipeline.stores.lease._MARGIN_SECONDS", 0)
    with storage.lock(url):
        assert b"elsewhere" not in s3_server.client().get_object(Bucket=bucket, Key="lock")["Body"].read()
    assert s3_server.keys_of(bucket) == []


@pytest.mark.parametrize("fault", [Fault.LOST_RESPONSE, Fault.SLOW_DOWN, Fault.RESET])
def test_the_lock_gets_over_faults(
    storage: ObjectStorage,
    bucket: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raymerge.pipeline.stores.lease.RENEWAL_SECONDS", 0.05)
    proxy.script([fault] * 4, only=is_operation("PutObject"))
    with storage.lock(f"s3://{bucket}/lock") as lock:
        give_up = time.monotonic() + 60
        while proxy.operations["PutObject"] < 8 and time.monotonic() < give_up:
            time.sleep(0.05)
        lock.check()
    assert proxy.injected == {fault: 4}
    assert s3_server.keys_of(bucket) == []
