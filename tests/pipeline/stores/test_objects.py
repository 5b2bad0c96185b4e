from __future__ import annotations

import base64
import hmac
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path

import pytest

from raymerge.pipeline.errors import ConfigError, CorruptedError, FetchError, OutputError
from raymerge.pipeline.stores import remote, retry
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.lease import Holder
from raymerge.pipeline.stores.objects.errors import ObjectError
from raymerge.pipeline.stores.objects.storage import ObjectStorage
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Storage, Writer
from tests.pipeline.stores.storage_contract import MIB, StorageContract, make_bytes, read_all
from tests.servers import ServerProcess, free_ports
from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import Keys, S3Server

PARTS = make_bytes(18 * MIB)
"""Three parts."""


@pytest.fixture
def storage() -> Iterator[ObjectStorage]:
    storage = ObjectStorage("s3", FaultLog(), BufferPool())
    yield storage
    storage.close()


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that all requests of the storage go through; the store counts as down after 3 seconds."""
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 3.0)
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = base64.b64encode(b"not a secret: the emulator is told to take it").decode()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an Azure emulator, with a container `models`."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs Azurite: npm install -g azurite")
    (port,) = free_ports(1)
    server = ServerProcess(
        [program, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"],
        directory=tmp_path_factory.mktemp("azurite"),
        environment={"PATH": os.environ["PATH"], "AZURITE_ACCOUNTS": f"{_AZURE_ACCOUNT}:{_AZURE_KEY}"},
    )
    endpoint = f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}"
    server.wait_until(lambda: make_container(endpoint, "models"))
    yield endpoint
    server.stop()


def make_container(endpoint: str, name: str) -> bool:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    signed = "\n".join(["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in sorted(headers.items()))])
    signed += f"\n/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{name}\nrestype:container"
    digest = hmac.digest(base64.b64decode(_AZURE_KEY), signed.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = HTTPConnection(endpoint.split("/")[2], timeout=5)
    try:
        connection.request("PUT", f"/{_AZURE_ACCOUNT}/{name}?restype=container", headers=headers)
        return connection.getresponse().status == 201
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
class TestAzure(StorageContract):
    @pytest.fixture
    def storage(self, azurite: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", _AZURE_ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", _AZURE_KEY)
        monkeypatch.setenv("AZURE_ENDPOINT", azurite)
        storage = ObjectStorage("az", FaultLog(), BufferPool())
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return f"az://models/{tmp_path.name}/root dir"


class TestS3(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[ObjectStorage]:
        storage = ObjectStorage("s3", FaultLog(), BufferPool())
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, bucket: str) -> str:
        return f"s3://{bucket}/models/root dir"


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
    with storage.open_range(file, 0, MIB) as chunks:
        assert sum(len(memoryview(chunk)) for chunk in chunks) == MIB
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=make_bytes(4 * MIB, 1))
    with pytest.raises(FetchError, match=rf"{url}: changed since the plan was made.*found 4,194,304 bytes, etag"):
        read_all(storage, file)


def test_a_store_that_ignores_conditions_cannot_hide_a_change(storage: ObjectStorage, bucket: str) -> None:
    url = f"s3://{bucket}/a"
    storage.write(url, b"12345678")
    file = replace(storage.stat(url), etag="")  # no If-Match is sent then
    with pytest.raises(FetchError, match="changed since the plan was made"):
        read_all(storage, file)


# faults

READ_FAULTS = {
    Fault.SLOW_DOWN: "503 SlowDown",
    Fault.SERVER_ERROR: "500 InternalError",
    Fault.TOO_MANY: "429 TooManyRequests",
    Fault.RESET: "connection reset",
    Fault.STALL: "timeout",
    Fault.RESET_IN_BODY: "connection reset",
    Fault.STALL_IN_BODY: "timeout",
    Fault.SHORT_BODY: "short body",
}


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymerge.pipeline.stores.objects.bucket.REQUEST_SECONDS", 0.5)


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
        with pytest.raises((FetchError, OutputError), match=rf"s3://{bucket}: .* gave up after \d+ attempts in \d s"):
            attempt()
    start = time.monotonic()
    with pytest.raises(OutputError, match=rf"{url}: upload failed after \d+ attempts: broken connection"):
        finish(writer, PARTS[10 * MIB :])
    assert time.monotonic() - start < 10
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
    assert 15 < time.monotonic() - start < 60


# who may do what

MAY_NOT = {
    "wrong key": (
        Keys("AKNOBODY000000000001", "x" * 40),
        r"403 InvalidAccessKeyId.*credentials of the environment.*does not know this access key",
    ),
    "wrong secret": (
        Keys(S3Server.admin.access_key_id, "very-secret-" * 3),
        r"403 SignatureDoesNotMatch.*credentials of the environment.*the secret key does not belong",
    ),
    "stranger": (S3Server.stranger, r"403 AccessDenied.*credentials of the environment.*may not read"),
}


@pytest.mark.parametrize("who", MAY_NOT)
def test_credentials_that_are_refused(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    keys, expected = MAY_NOT[who]
    use(monkeypatch, keys)
    for attempt in (lambda: storage.stat(f"s3://{bucket}/a"), lambda: storage.list(f"s3://{bucket}")):
        with pytest.raises(FetchError, match=rf"s3://{bucket}.*{expected}") as caught:
            attempt()
        assert keys.secret_access_key not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_an_identity_that_may_only_read(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/a"
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    use(monkeypatch, S3Server.reader)
    assert storage.read(url, 1) == b"1"
    expected = (
        rf"{url}: (PUT|POST|DELETE) failed: 403 AccessDenied.*credentials of the environment.*may not write there"
    )
    with pytest.raises(OutputError, match=expected):
        storage.write(url, b"2")
    with pytest.raises(OutputError, match=expected):
        write_parts(storage, url)
    with pytest.raises(OutputError, match=expected):
        storage.delete(url)
    with pytest.raises(OutputError, match="403 AccessDenied"):
        storage.lock(f"s3://{bucket}/lock").__enter__()


def test_without_credentials_requests_are_anonymous(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=b"1")
    s3_server.client().put_object(Bucket=s3_server.public_bucket, Key="a", Body=b"public")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert storage.read(f"s3://{s3_server.public_bucket}/a", 10) == b"public"
    with pytest.raises(FetchError, match=r"403 AccessDenied.*no credentials were found.*AWS_PROFILE"):
        storage.stat(f"s3://{bucket}/a")


def test_a_bucket_that_does_not_exist(storage: ObjectStorage, bucket: str) -> None:
    expected = "NoSuchBucket.*there is no s3://nowhere: check its spelling, or make it first"
    with pytest.raises(FetchError, match=expected):
        storage.stat("s3://nowhere/a")
    with pytest.raises(FetchError, match=expected):
        storage.list("s3://nowhere/a")
    with pytest.raises(OutputError, match=expected):
        storage.write("s3://nowhere/a", b"1")
    with pytest.raises(OutputError, match=expected):
        storage.lock("s3://nowhere/a")


def test_a_profile_of_the_credentials_file(
    storage: ObjectStorage, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    admin = S3Server.admin
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id={admin.access_key_id}\naws_secret_access_key={admin.secret_access_key}\n"
        f"[wrong]\naws_access_key_id={admin.access_key_id}\naws_secret_access_key=not-this-one\n"
    )
    endpoint = f"endpoint_url = {s3_server.endpoint}\n"
    (tmp_path / "config").write_text(f"[profile mine]\n{endpoint}region = eu-central-1\n[profile wrong]\n{endpoint}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    storage.write(f"s3://{bucket}/a", b"1")
    assert storage.read(f"s3://{bucket}/a", 1) == b"1"
    storage.close()
    monkeypatch.setenv("AWS_PROFILE", "wrong")
    with pytest.raises(FetchError, match=r"SignatureDoesNotMatch.*of profile wrong, from the credentials file"):
        storage.stat(f"s3://{bucket}/a")
    storage.close()
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(FetchError, match=r"profile \(missing\) could not be found.*check AWS_PROFILE"):
        storage.stat(f"s3://{bucket}/a")


def test_an_endpoint_that_does_not_speak_tls(
    storage: ObjectStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:"))
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"does not speak TLS: write http://"):
        storage.stat(f"s3://{bucket}/a")
    assert time.monotonic() - start < 5


def test_a_clock_that_is_wrong() -> None:
    """What AWS answers, as its documentation has it: no server here checks the time."""
    from obstore.exceptions import PermissionDeniedError

    from raymerge.pipeline.stores.objects.errors import translated

    with pytest.raises(ObjectError) as caught, translated("GET"):
        raise PermissionDeniedError(
            "Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code: 403 Forbidden: <Error>"
            "<Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message>"
            "<RequestTime>20260102T031000Z</RequestTime><ServerTime>2026-01-02T03:00:00Z</ServerTime></Error>"
        )
    assert (caught.value.status, caught.value.code, caught.value.skew) == (403, "RequestTimeTooSkewed", 600)


def test_a_read_that_is_refused_names_the_caller(
    storage: ObjectStorage, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(f"s3://{bucket}/a", b"1")
    file = storage.stat(f"s3://{bucket}/a")
    storage.close()
    use(monkeypatch, S3Server.stranger)
    with pytest.raises(
        FetchError, match=rf"s3://{bucket}/a: GET failed: 403 AccessDenied.*of the environment.*may not read"
    ):
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
    s3_server.client().put_object(Bucket=bucket, Key="lock", Body=holder.encode())
    time.sleep(2)
    with pytest.raises(OutputError, match=r"pid 12, since 2026-01-02.*on host elsewhere.*try again in 2[789] s"):
        storage.lock(url).__enter__()
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
        give_up = time.monotonic() + 10
        while proxy.operations["PutObject"] < 8 and time.monotonic() < give_up:
            time.sleep(0.05)
        lock.check()
    assert proxy.injected == {fault: 4}
    assert s3_server.keys_of(bucket) == []
