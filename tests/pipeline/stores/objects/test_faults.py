"""Object stores that fail now and then, or are down."""

from __future__ import annotations

import itertools
import time

import pytest

from raymerge.pipeline.errors import CorruptedError, FetchError, OutputError
from raymerge.pipeline.stores import remote, retry
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.objects.uploads import PARTS, drained, finish, write_parts
from tests.pipeline.stores.storage_contract import MIB, read_all
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import S3Server

READ_FAULTS = {
    Fault.SLOW_DOWN: "503 SlowDown",
    Fault.SERVER_ERROR: "500 InternalError",
    Fault.TOO_MANY: "429 TooManyRequests",
    Fault.RESET: "connection broken",
    Fault.STALL: "timeout",
    Fault.RESET_IN_BODY: "connection broken",
    Fault.STALL_IN_BODY: "timeout",
    Fault.SHORT_BODY: "short body",
}


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("objects.bucket", "web.client", "web.connection"):
        monkeypatch.setattr(f"raymerge.pipeline.stores.{module}.REQUEST_SECONDS", 0.5)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("fault", READ_FAULTS, ids=lambda fault: fault.value)
def test_reads_get_over_faults(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE_NBYTES", MIB // 2)
    data = PARTS[: 3 * MIB]
    storage.write(f"s3://{bucket}/a", data)
    proxy.stall_s = 2
    proxy.script([fault, None, fault, None, None, fault], only=is_operation("GetObject"))
    assert read_all(storage, storage.stat(f"s3://{bucket}/a")) == data
    assert proxy.injected == {fault: 3}
    assert drained(storage) == {f"GET: {READ_FAULTS[fault]}": 3}


def test_a_body_that_breaks_is_gone_on_with_where_it_broke(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy
) -> None:
    storage.write(f"s3://{bucket}/a", PARTS[: 6 * MIB])
    proxy.clear()
    proxy.script([Fault.SHORT_BODY] * 2, only=is_operation("GetObject"))
    assert read_all(storage, storage.stat(f"s3://{bucket}/a")) == PARTS[: 6 * MIB]
    starts = [
        int(request.headers["range"].removeprefix("bytes=").partition("-")[0])
        for request in proxy.requests
        if request.operation == "GetObject"
    ]
    assert len(starts) == 3
    assert starts[0] == 0
    assert starts[1] > MIB
    assert starts[2] > starts[1]
    assert {request.headers["if-match"] for request in proxy.requests if request.operation == "GetObject"}


def test_where_signed_urls_are_refused_obstore_reads(storage: ObjectStorage, bucket: str, proxy: FaultProxy) -> None:
    storage.write(f"s3://{bucket}/a", PARTS[:1000])
    file = storage.stat(f"s3://{bucket}/a")
    assert read_all(storage, file) == PARTS[:1000]
    proxy.faults = {Fault.EXPIRED: 1.0}
    assert read_all(storage, file) == PARTS[:1000]
    assert read_all(storage, file) == PARTS[:1000]
    assert proxy.injected == {Fault.EXPIRED: 1}, "asked for once, and not again"
    assert drained(storage) == {}


@pytest.mark.parametrize("operation", ["HeadObject", "ListObjects"])
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.RESET])
def test_looking_gets_over_faults(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy, fault: Fault, operation: str
) -> None:
    storage.write(f"s3://{bucket}/a", b"1")
    proxy.script([fault] * 2, only=is_operation(operation))
    assert storage.list(f"s3://{bucket}") == {"a": storage.stat(f"s3://{bucket}/a")} == storage.list(f"s3://{bucket}")
    assert proxy.injected == {fault: 2}
    assert sum(drained(storage).values()) == 2


MULTIPART = ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
WRITE_FAULTS = [
    *itertools.product((Fault.SLOW_DOWN, Fault.RESET), (*MULTIPART, "HeadObject")),
    *itertools.product((Fault.LOST_RESPONSE,), MULTIPART),
]
SLOW_WRITE_FAULTS = itertools.product((Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.STALL), (*MULTIPART, "HeadObject"))


@pytest.mark.parametrize(
    ("fault", "operation"),
    [*WRITE_FAULTS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_WRITE_FAULTS)],
)
def test_uploads_get_over_faults(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, proxy: FaultProxy, fault: Fault, operation: str
) -> None:
    proxy.stall_s = 0.2
    proxy.script([fault], only=is_operation(operation))
    data = PARTS[: 8 * MIB + 5]
    write_parts(storage, f"s3://{bucket}/a", data)
    assert proxy.injected == {fault: 1}
    assert s3_server.uploads_of(bucket) == []
    assert read_all(storage, storage.stat(f"s3://{bucket}/a")) == data


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(
    "fault", [Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.RESET, Fault.LOST_RESPONSE, Fault.FLIPPED_BYTE]
)
def test_small_writes_get_over_faults(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy, fault: Fault, exclusive: bool
) -> None:
    proxy.script([fault] * 2, only=is_operation("PutObject"))
    url = f"s3://{bucket}/a"
    assert storage.write(url, PARTS[:1000], exclusive=exclusive) == storage.stat(url)
    assert storage.read(url, 1000) == PARTS[:1000]
    assert sum(proxy.injected.values()) == sum(drained(storage).values()) >= 1
    storage.delete(url)


def test_the_same_bytes_of_another_run_are_not_taken_for_ours(storage: ObjectStorage, bucket: str) -> None:
    storage.write(f"s3://{bucket}/a", b"1", exclusive=True)
    with pytest.raises(FileExistsError):
        storage.write(f"s3://{bucket}/a", b"1", exclusive=True)


def test_a_byte_that_changes_on_the_way_is_noticed(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, proxy: FaultProxy
) -> None:
    proxy.script([Fault.FLIPPED_BYTE], only=is_operation("UploadPart"))
    with pytest.raises(CorruptedError, match=rf"s3://{bucket}/a: PUT failed: 400 BadDigest"):
        write_parts(storage, f"s3://{bucket}/a")
    assert s3_server.uploads_of(bucket) == s3_server.keys_of(bucket) == []
    write_parts(storage, f"s3://{bucket}/a")
    assert read_all(storage, storage.stat(f"s3://{bucket}/a")) == PARTS


def test_an_object_that_is_not_what_was_written_is_deleted(
    storage: ObjectStorage, bucket: str, s3_server: S3Server
) -> None:
    writer = storage.open_writer(f"s3://{bucket}/a", len(PARTS))
    writer.write(PARTS)
    writer._checksum ^= 1  # type: ignore[attr-defined]  # as if memory had changed between hashing and sending
    with pytest.raises(CorruptedError, match=r"18,874,368 bytes with CRC64NVME [0-9a-f]{16} were written; the store"):
        writer.commit()
    assert s3_server.keys_of(bucket) == []


@pytest.mark.slow
def test_all_faults_at_once(storage: ObjectStorage, bucket: str, s3_server: S3Server, proxy: FaultProxy) -> None:
    proxy.stall_s = 0.3
    proxy.faults = dict.fromkeys(set(Fault) - {Fault.EXPIRED, Fault.FLIPPED_BYTE}, 0.05)
    for number in range(5):
        url = f"s3://{bucket}/{number}"
        write_parts(storage, url)
        assert read_all(storage, storage.stat(url)) == PARTS
        storage.delete(url)
    assert len(proxy.injected) >= 5
    proxy.clear()
    assert s3_server.uploads_of(bucket) == s3_server.keys_of(bucket) == []


# a store that is down


def test_a_store_that_is_down_is_named(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 1.0)
    url = f"s3://{bucket}/a"
    storage.write(url, PARTS[:1000])
    file = storage.stat(url)
    writer = storage.open_writer(url, len(PARTS))
    writer.write(PARTS[: 10 * MIB])
    proxy.down = True
    for attempt in (
        lambda: storage.stat(url),
        lambda: storage.list(url),
        lambda: read_all(storage, file),
        lambda: storage.write(url, b"1"),
        lambda: storage.delete(url),
        lambda: ObjectStorage("s3", FaultLog(), BufferPool()).lock(f"{url}.lock").__enter__(),
    ):
        with pytest.raises((FetchError, OutputError), match=rf"s3://{bucket}: .* gave up after \d+ attempts in \d+ s"):
            attempt()
    start = time.monotonic()
    with pytest.raises(OutputError, match=rf"{url}: upload failed after \d+ attempts: broken connection"):
        finish(writer, PARTS[10 * MIB :])
    assert time.monotonic() - start < 30  # not the 40 seconds of patience that it has by default
    proxy.down = False
    assert storage.read(url, 1000) == PARTS[:1000]


@pytest.mark.slow
def test_a_store_that_is_down_is_given_up_within_a_minute(
    storage: ObjectStorage, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 40.0)
    url = f"s3://{bucket}/a"
    with storage.lock(f"s3://{bucket}/lock"):
        writer = storage.open_writer(url, len(PARTS))
        writer.write(PARTS[: 10 * MIB])
        proxy.down = True
        start = time.monotonic()
        with pytest.raises(OutputError, match=rf"{url}: upload failed after \d+ attempts: broken connection"):
            finish(writer, PARTS[10 * MIB :])
    assert 15 < time.monotonic() - start < 90
