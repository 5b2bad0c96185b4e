from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pytest
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores import retry
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.fsspec import loop as fsspec_loop
from raymerge.pipeline.stores.fsspec import s3 as fsspec_s3
from raymerge.pipeline.stores.fsspec.errors import classify_error
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage, S3Leases
from raymerge.pipeline.stores.fsspec.storage import FsspecStorage
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Sharing
from raymerge.pipeline.stores.settings import StoreSettings
from tests.pipeline.stores.storage_contract import MIB, StorageContract, make_bytes, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import Keys, S3Server
from tests.servers.static import NginxServer

_numbers = itertools.count()


class PlainFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A file system of the plain kind: it writes in place, and does not rename over a file."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("plain://").rstrip("/")

    def _open(self, path: str, mode: str = "rb", *, autocommit: bool = True, **kwargs: Any) -> Any:
        if not autocommit:
            raise NotImplementedError("autocommit=False")
        return super()._open(path, mode, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if Path(path2).exists():
            raise FileExistsError(path2)
        Path(path1).rename(path2)


register_implementation("plain", PlainFileSystem, clobber=True)


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> FsspecStorage:
        return FsspecStorage("memory", FaultLog())

    @pytest.fixture
    def root(self) -> str:
        return f"memory://test-{next(_numbers)}/root dir"


class TestPlain(StorageContract):
    @pytest.fixture
    def storage(self) -> FsspecStorage:
        return FsspecStorage("plain", FaultLog())

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return f"plain://{tmp_path}/root dir"


@pytest.fixture(scope="module")
def shared_s3() -> Iterator[S3fsStorage]:
    """One for many tests, as it takes a while to connect; it does so in the first test that reads or writes."""
    storage = S3fsStorage(FaultLog())
    yield storage
    storage.close()


@pytest.mark.slow  # the contract holds for s3fs as for the other libraries behind fsspec
class TestS3fs(StorageContract):
    @pytest.fixture
    def storage(self, bucket: str, shared_s3: S3fsStorage) -> S3fsStorage:
        return shared_s3

    @pytest.fixture
    def root(self, bucket: str) -> str:
        return f"s3://{bucket}/root dir"


@pytest.fixture
def s3(bucket: str, shared_s3: S3fsStorage) -> S3fsStorage:
    return shared_s3


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3fsStorage]:
    """A storage whose requests all go through the fault proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    storage = S3fsStorage(FaultLog())
    yield storage
    storage.close()


def write_parts(storage: FsspecFiles, url: str, data: bytes, *, exclusive: bool = False) -> None:
    writer = storage.open_writer(url, len(data), exclusive=exclusive)
    for start in range(0, len(data), 3 * MIB):
        writer.write(data[start : start + 3 * MIB])
    writer.commit()


# which storage


def test_which_urls_it_serves() -> None:
    memory, ftp = (Stores().at(f"{scheme}://a/b") for scheme in ("memory", "ftp"))
    assert isinstance(memory, FsspecStorage)
    assert isinstance(ftp, FsspecStorage)
    assert (memory.is_remote, memory.sharing) == (False, Sharing.THREADS)
    assert (ftp.is_remote, ftp.sharing) == (True, Sharing.FRESH)
    assert isinstance(Stores(StoreSettings("fsspec")).at("s3a://a/b"), S3fsStorage)


def test_absolute() -> None:
    assert FsspecStorage("memory", FaultLog()).absolute("memory:///a/b/") == "memory://a/b"
    assert S3fsStorage(FaultLog()).absolute("s3a://bucket/a b/") == "s3://bucket/a b"


@pytest.mark.parametrize(
    ("scheme", "hidden", "message"),
    [
        ("gs", "gcsfs", r"^gs://\.\.\. with --storage fsspec needs gcsfs: pip install gcsfs$"),
        ("sftp", "paramiko", r"^sftp://\.\.\. needs paramiko: pip install paramiko$"),
        ("smb", "smbclient", r"^smb://\.\.\. needs smbprotocol: pip install smbprotocol$"),
    ],
)
def test_a_package_that_is_missing(scheme: str, hidden: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ConfigError, match=message):
        FsspecStorage(scheme, FaultLog())


# names


@pytest.mark.parametrize("kind", ["memory", "plain", "s3"])
def test_names_are_no_patterns(kind: str, request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> None:
    storage = request.getfixturevalue("s3") if kind == "s3" else FsspecStorage(kind, FaultLog())
    root = {"memory": f"memory://test-{next(_numbers)}", "plain": f"plain://{tmp_path}", "s3": f"s3://{bucket}"}[kind]
    for name in ("[ab]", "a", "b", "*", "**", "x*/[a]", "x1/a", "?"):
        storage.write(f"{root}/{name}", name.encode())
    assert [storage.read(f"{root}/{name}", 9) for name in ("[ab]", "*", "?")] == [b"[ab]", b"*", b"?"]
    assert list(storage.list(f"{root}/x*")) == ["[a]"]
    for name in ("[ab]", "*", "**", "x*/[a]", "?"):
        storage.delete(f"{root}/{name}")
    assert list(storage.list(root)) == ["a", "b", "x1/a"]


@pytest.mark.parametrize("url", ["s3://bucket/a?versionId=1", "sftp://host/dir/a?b"])
def test_a_name_that_fsspec_would_cut(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url.startswith("sftp"):
        monkeypatch.setitem(_registry, "sftp", PlainFileSystem)
        monkeypatch.setattr(PlainFileSystem, "_strip_protocol", lambda path: path.partition("?")[0])
    with pytest.raises(FetchError, match=f"^{re.escape(url)}: fsspec takes a part of this name"):
        Stores(StoreSettings("fsspec")).at(url).stat(url)


def test_directory_markers_are_no_files(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    for key in ("dir/", "dir/below/"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"")
    s3.write(f"s3://{bucket}/dir/a", b"")
    assert list(s3.list(f"s3://{bucket}")) == ["dir/a"]
    assert list(s3.list(f"s3://{bucket}/dir/below")) == []
    for name in ("dir", "dir/", "dir/below"):
        with pytest.raises(FileNotFoundError):
            s3.stat(f"s3://{bucket}/{name}")


def test_nothing_is_remembered(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    client = s3_server.client()
    assert list(s3.list(f"s3://{bucket}/dir")) == []
    for content in (b"1", b"22"):
        client.put_object(Bucket=bucket, Key="dir/a", Body=content)
        assert s3.stat(f"s3://{bucket}/dir/a").nbytes == len(content)
        assert [file.nbytes for file in s3.list(f"s3://{bucket}/dir").values()] == [len(content)]
    client.delete_object(Bucket=bucket, Key="dir/a")
    assert list(s3.list(f"s3://{bucket}/dir")) == []
    with pytest.raises(FileNotFoundError):
        s3.stat(f"s3://{bucket}/dir/a")


def test_etags_are_those_of_obstore(s3: S3fsStorage, s3_server: S3Server, bucket: str) -> None:
    s3.write(f"s3://{bucket}/small", b"1234")
    write_parts(s3, f"s3://{bucket}/large", make_bytes(9 * MIB))
    store = obstore.store.S3Store(
        bucket,
        endpoint=s3_server.endpoint,
        access_key_id=s3_server.admin.access_key_id,
        secret_access_key=s3_server.admin.secret_access_key,
        region=s3_server.region,
        client_options={"allow_http": True},
    )
    for name in ("small", "large"):
        assert s3.stat(f"s3://{bucket}/{name}").etag == (obstore.head(store, name)["e_tag"] or "").strip('"')


# reading


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


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


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


# writing


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


# refusals


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


# locking


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
