"""Reads by s3fs, and by fsspec from a server for the web."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores import retry
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.fsspec import loop as fsspec_loop
from raymerge.pipeline.stores.fsspec import s3 as fsspec_s3
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.fsspec.files import slow, write_parts
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.static import NginxServer


def test_each_request_names_range_and_etag(through: S3fsStorage, proxy: FaultProxy, bucket: str) -> None:
    data = make_bytes(20 * MIB)
    write_parts(through, f"s3://{bucket}/a", data)
    file = through.stat(f"s3://{bucket}/a")
    proxy.clear()
    ranges = [ByteRange(file, start, start + 1000) for start in range(0, MIB, 1000)]
    assert read_ranges(through, ranges) == [data[item.start : item.stop] for item in ranges]
    assert read_all(through, file) == data
    assert [request.operation for request in proxy.requests] == ["GetObject"] * 5
    assert {request.headers["if-match"] for request in proxy.requests} == {f'"{file.etag}"'}
    assert {request.headers["range"] for request in proxy.requests[1:]} == {
        "bytes=0-5242879",
        "bytes=5242880-10485759",
        "bytes=10485760-15728639",
        "bytes=15728640-20971519",
    }


@pytest.mark.parametrize("data", [b"12345678", b"1234"])
def test_replaced_between_two_requests(s3: S3fsStorage, bucket: str, data: bytes) -> None:
    s3.write(f"s3://{bucket}/a", b"abcdefgh")
    file = s3.stat(f"s3://{bucket}/a")
    with s3.open_range(file, 0, 4) as body:
        assert body.readinto(memoryview(found := bytearray(5))) == 4
        assert found[:4] == b"abcd"
    now = s3.write(file.url, data)
    message = (
        f"{file.url}: changed since the plan was made: expected 8 bytes, etag {file.etag};"
        f" found {len(data)} bytes, etag {now.etag}. Run again when nobody writes to it"
    )
    with pytest.raises(FetchError, match=f"^{message}$"), s3.open_range(file, 4, 8):
        pass


@pytest.mark.parametrize(
    "fault",
    [
        *(slow(fault) for fault in (Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET)),
        *(slow(fault) for fault in (Fault.SHORT_BODY, Fault.STALL, Fault.STALL_IN_BODY)),
        Fault.RESET_IN_BODY,
    ],
)
def test_faults_of_reads(
    through: S3fsStorage, proxy: FaultProxy, bucket: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault in (Fault.STALL, Fault.STALL_IN_BODY):
        monkeypatch.setattr(fsspec_s3, "REQUEST_SECONDS", 0.7)
        monkeypatch.setattr(fsspec_loop, "REQUEST_SECONDS", 0.7)
        proxy.stall_s = 60
    data = make_bytes(9 * MIB)
    write_parts(through, f"s3://{bucket}/a", data)
    file = through.stat(f"s3://{bucket}/a")
    proxy.clear()
    through.faults.drain()
    proxy.script([fault, fault], only=is_operation("GetObject"))
    assert read_all(through, file) == data
    assert proxy.injected == {fault: 2}
    if fault is not Fault.RESET:  # aiohttp tries again by itself where a connection has been used before
        assert sum(count for _, count in through.faults.drain()) >= 2


def test_a_broken_body_is_taken_up_where_it_broke(through: S3fsStorage, proxy: FaultProxy, bucket: str) -> None:
    data = make_bytes(6 * MIB)
    through.write(f"s3://{bucket}/a", data)
    file = through.stat(f"s3://{bucket}/a")
    proxy.clear()
    proxy.script([Fault.SHORT_BODY], only=is_operation("GetObject"))
    assert read_all(through, file) == data
    starts = [int(re.findall(r"\d+", request.headers["range"])[0]) for request in proxy.requests]
    assert len(starts) == 2
    assert MIB <= starts[1] <= 3 * MIB  # aiohttp throws away what it had received and not handed on


def test_a_store_that_is_down(
    through: S3fsStorage, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.3)
    through.write(f"s3://{bucket}/a", b"1234")
    file = through.stat(f"s3://{bucket}/a")
    writer = through.open_writer(f"s3://{bucket}/b", 20 * MIB)
    proxy.down = True
    start = time.monotonic()
    what = rf"^s3://{bucket}: {{}} of s3://{bucket}/{{}}: gave up after \d+ attempts in \d+ s: "
    with pytest.raises(FetchError, match=what.format("HEAD", "a")):
        through.stat(file.url)
    with pytest.raises(FetchError, match=rf"^s3://{bucket}: GET of s3://{bucket}/a, bytes 0 to 4: gave up after \d+"):
        read_all(through, file)
    with pytest.raises(OutputError, match=what.format("create_multipart_upload", "b")):
        writer.write(bytes(20 * MIB))
    with pytest.raises(OutputError, match=what.format("PUT", "c")):
        through.write(f"s3://{bucket}/c", b"")
    with pytest.raises(OutputError, match=what.format("DELETE", "a")):
        through.delete(file.url)
    assert time.monotonic() - start < 35  # not the 40 seconds of patience that each has by default
    proxy.down = False
    assert list(through.list(f"s3://{bucket}")) == ["a"]


def test_a_server_for_the_web(tmp_path: Path) -> None:
    data = make_bytes(5 * MIB + 1)
    path = tmp_path / "dir" / "a"
    path.parent.mkdir()
    path.write_bytes(data)
    with NginxServer(tmp_path) as server:
        storage = FsspecStorage("http", FaultLog())
        file = storage.stat(f"{server.endpoint}/dir/a")
        assert file.nbytes == len(data)
        assert read_ranges(storage, [ByteRange(file, 1000, 5 * MIB)]) == [data[1000 : 5 * MIB]]
        path.write_bytes(data[::-1] + b"1")
        with pytest.raises(FetchError, match="changed"):
            read_all(storage, file)
        with pytest.raises(FileNotFoundError):
            storage.stat(f"{server.endpoint}/dir/b")
        with pytest.raises(OutputError, match="fsspec cannot do this with http://"):
            storage.write(f"{server.endpoint}/dir/c", b"1")
        storage.close()
