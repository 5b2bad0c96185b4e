"""The fault proxy: what it does to a connection, and that clients see through it to the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store

from tests.servers.faults import Fault, FaultProxy, is_operation
from tests.servers.s3 import S3Server
from tests.servers.s3_clients import PART_NBYTES, failure_of, open_store
from tests.servers.sink import NullSink
from tests.servers.static import NginxServer

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NginxServer]:
    directory = tmp_path_factory.mktemp("files")
    (directory / "bucket").mkdir()
    (directory / "bucket" / "file").write_bytes(DATA)
    with NginxServer(directory) as server:
        yield server


@pytest.fixture(scope="module")
def sink() -> Iterator[NullSink]:
    with NullSink() as server:
        yield server


@pytest.fixture
def reads(files: NginxServer) -> Iterator[FaultProxy]:
    """Stands in front of a server to read from."""
    with FaultProxy(files.endpoint, stall_s=0.3, retry_after=7) as proxy:
        yield proxy


@pytest.fixture
def writes(sink: NullSink) -> Iterator[FaultProxy]:
    """Stands in front of a server to write to."""
    with FaultProxy(sink.endpoint, stall_s=0.3) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    address = urlsplit(proxy.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def canned(answer: bytes, *, num_bytes: int = 1) -> Iterator[tuple[str, list[bytes]]]:
    """Serve one connection: when so many bytes have arrived, it gets these in answer."""
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while sum(map(len, received)) < num_bytes:
                received.append(connection.recv(1 << 16))
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", received
        thread.join()


def fetch(connection: http.client.HTTPConnection, method: str = "GET", path: str = "/bucket/file") -> tuple[int, bytes]:
    connection.request(method, path)
    with connection.getresponse() as answer:
        return answer.status, answer.read()


def test_requests_and_answers_pass_through_unchanged(reads: FaultProxy) -> None:
    with connected(reads) as connection:
        assert fetch(connection) == (200, DATA)
        assert fetch(connection, "HEAD") == (200, b"")
        connection.request("GET", "/bucket/file", headers={"Range": "bytes=5-9"})
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (206, DATA[5:10])
            assert answer.headers["Content-Range"] == f"bytes 5-9/{len(DATA)}"
        assert fetch(connection, path="/bucket/missing")[0] == 404
    assert [(request.method, request.operation) for request in reads.requests] == [
        ("GET", "GetObject"),
        ("HEAD", "HeadObject"),
        ("GET", "GetObject"),
        ("GET", "GetObject"),
    ]
    assert not reads.injected


def test_a_request_reaches_the_upstream_byte_for_byte() -> None:
    sent = b"PUT /b/k%20?x=1&y HTTP/1.1\r\nhOST: elsewhere:1\r\nB: 2\r\na: 1\r\nContent-Length: 4\r\n\r\nbody"
    answer = b"HTTP/1.1 200 OK\r\nX-odd:  1\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    with canned(answer, num_bytes=len(sent)) as (url, received), FaultProxy(url) as proxy:
        assert exchange(proxy, sent) == answer
    assert b"".join(received) == sent


def exchange(proxy: FaultProxy, request: bytes) -> bytes:
    """Send bytes, and return all that comes back until the proxy closes."""
    address = urlsplit(proxy.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_bodies_in_chunks_pass_both_ways(writes: FaultProxy, sink: NullSink) -> None:
    with connected(writes) as connection:
        connection.request("PUT", "/bucket/chunked", iter([b"1" * 100_000, b"2" * 50_000]), encode_chunked=True)
        with connection.getresponse() as answer:
            answer.read()
    assert sink.sizes()["bucket/chunked"] == 150_000
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nTrailer: 1\r\n\r\n"
    )
    with canned(chunked) as (url, _), FaultProxy(url) as proxy, connected(proxy) as connection:
        assert fetch(connection) == (200, b"abcdefg")


def test_a_body_up_to_the_close_passes() -> None:
    with canned(b"HTTP/1.1 200 OK\r\n\r\nabc") as (url, _), FaultProxy(url) as proxy, connected(proxy) as connection:
        assert fetch(connection) == (200, b"abc")


def test_a_client_that_waits_for_continue_is_told_to(writes: FaultProxy, sink: NullSink) -> None:
    address = urlsplit(writes.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(
            b"PUT /bucket/waits HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"12345")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
    assert sink.sizes()["bucket/waits"] == 5


def test_an_answer_before_the_end_of_the_body_arrives() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
    with canned(refusal) as (url, _), FaultProxy(url) as proxy, connected(proxy) as connection:
        connection.putrequest("PUT", "/bucket/file")
        connection.putheader("Content-Length", str(1 << 30))
        connection.endheaders()
        connection.send(b"1" * 1000)
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (403, b"no")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault.SLOW_DOWN, 503, b"<Code>SlowDown</Code>"),
        (Fault.SERVER_ERROR, 500, b"<Code>InternalError</Code>"),
        (Fault.TOO_MANY, 429, b"<Code>TooManyRequests</Code>"),
    ],
)
def test_errors_come_from_the_proxy_and_the_connection_lives_on(
    writes: FaultProxy, sink: NullSink, fault: Fault, status: int, code: bytes
) -> None:
    writes.script([fault])
    name = f"bucket/{fault.name}"
    with connected(writes) as connection:
        connection.request("PUT", f"/{name}", b"1" * 100_000)
        with connection.getresponse() as answer:
            assert answer.status == status
            assert code in answer.read()
        assert name not in sink.sizes()
        connection.request("PUT", f"/{name}", b"1" * 100_000)
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (200, b"")
    assert sink.sizes()[name] == 100_000
    assert writes.injected == {fault: 1}
    assert [request.fault for request in writes.requests] == [fault, None]


def test_too_many_says_when_to_come_again(reads: FaultProxy) -> None:
    reads.script([Fault.TOO_MANY])
    with connected(reads) as connection:
        connection.request("HEAD", "/bucket/file")
        with connection.getresponse() as answer:
            assert (answer.status, answer.headers["Retry-After"], answer.read()) == (429, "7", b"")
        assert fetch(connection) == (200, DATA)


def test_an_error_in_answer_to_head_has_no_body(reads: FaultProxy) -> None:
    reads.script([Fault.SLOW_DOWN])
    answer = exchange(reads, b"HEAD /bucket/file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b"\r\n\r\n")


def test_a_hub_does_not_answer_in_xml(files: NginxServer) -> None:
    with FaultProxy(files.endpoint, is_s3=False) as proxy, connected(proxy) as connection:
        proxy.script([Fault.SERVER_ERROR])
        status, body = fetch(connection)
    assert status == 500
    assert "error" in json.loads(body)


def test_reset_comes_before_anything_went_upstream(writes: FaultProxy, sink: NullSink) -> None:
    writes.script([Fault.RESET])
    with connected(writes) as connection, pytest.raises(ConnectionResetError):
        fetch(connection, "PUT", "/bucket/reset")
    assert "bucket/reset" not in sink.sizes()


def test_stall_is_silent_and_then_a_reset(reads: FaultProxy) -> None:
    reads.script([Fault.STALL])
    started = time.monotonic()
    with connected(reads) as connection, pytest.raises(ConnectionResetError):
        fetch(connection)
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("fault", [Fault.RESET_IN_BODY, Fault.STALL_IN_BODY])
def test_an_answer_is_reset_in_its_middle(reads: FaultProxy, fault: Fault) -> None:
    reads.script([fault])
    started = time.monotonic()
    with connected(reads) as connection:
        connection.request("GET", "/bucket/file")
        with connection.getresponse() as answer:
            assert answer.length == len(DATA)
            got = bytearray(answer.read(1000))
            with pytest.raises(ConnectionResetError):
                got += b"".join(iter(lambda: answer.read1(1000), b""))
    assert DATA.startswith(got)
    assert 1000 <= len(got) <= len(DATA) // 2
    assert (time.monotonic() - started >= 0.3) == (fault is Fault.STALL_IN_BODY)


def test_a_short_body_ends_in_its_middle(reads: FaultProxy) -> None:
    reads.script([Fault.SHORT_BODY])
    with connected(reads) as connection:
        connection.request("GET", "/bucket/file")
        with connection.getresponse() as answer, pytest.raises(http.client.IncompleteRead) as caught:
            answer.read()
    assert caught.value.partial == DATA[: len(DATA) // 2]


def test_a_body_in_chunks_is_cut_as_well() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with canned(head + b"4\r\nabcd\r\n0\r\n\r\n") as (url, _), FaultProxy(url) as proxy:
        proxy.script([Fault.SHORT_BODY])
        assert exchange(proxy, b"GET / HTTP/1.1\r\n\r\n") == head + b"4\r\nab"


def test_a_write_with_a_lost_response_is_carried_out(writes: FaultProxy, sink: NullSink) -> None:
    writes.script([Fault.LOST_RESPONSE])
    with connected(writes) as connection:
        assert fetch(connection, "HEAD", "/bucket/lost")[0] == 404  # no write: the fault waits
        connection.request("PUT", "/bucket/lost", b"12345")
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
    assert sink.sizes()["bucket/lost"] == 5


def test_a_signed_url_expires_and_others_do_not(reads: FaultProxy) -> None:
    reads.faults = {Fault.EXPIRED: 1.0}
    with connected(reads) as connection:
        assert fetch(connection) == (200, DATA)
        status, body = fetch(connection, path="/bucket/file?X-Amz-Expires=1&X-Amz-Signature=0")
        assert status == 403
        assert b"expired" in body
        assert fetch(connection, path="/bucket/file?Expires=1&Signature=0&Key-Pair-Id=0")[0] == 403
    assert reads.injected == {Fault.EXPIRED: 2}


def test_one_bit_of_a_body_is_flipped() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    head = b"PUT /b/k HTTP/1.1\r\nContent-Length: 900\r\nConnection: close\r\n\r\n"
    with canned(answer, num_bytes=len(head) + 900) as (url, received), FaultProxy(url) as proxy:
        proxy.script([Fault.FLIPPED_BYTE])
        assert exchange(proxy, head + bytes(900)) == answer
    arrived = b"".join(received)
    assert arrived.startswith(head)
    (position,) = (i for i, byte in enumerate(arrived.removeprefix(head)) if byte)
    assert 300 <= position < 600
    assert proxy.injected == {Fault.FLIPPED_BYTE: 1}


def test_the_hosts_of_another_server_are_rewritten() -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://cdn:1/x?y\r\nX-Other: http://cdn:1\r\nContent-Length: 0\r\n\r\n"
    with canned(moved) as (url, _), FaultProxy(url, is_s3=False, rewrites={"http://cdn:1": "http://proxy:22"}) as proxy:
        with connected(proxy) as connection:
            connection.request("GET", "/model/resolve/main/file")
            with connection.getresponse() as answer:
                assert answer.headers["Location"] == "http://proxy:22/x?y"
                assert answer.headers["X-Other"] == "http://cdn:1"
        assert proxy.operations == {"Resolve": 1}
    text = b'{"objects":[{"href":"http://cdn:1/upload"}]}'
    batch = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
    with canned(batch) as (url, _), FaultProxy(url, is_s3=False, rewrites={"http://cdn:1": "http://proxy:22"}) as proxy:
        with connected(proxy) as connection:
            _, body = fetch(connection, "POST", "/model.git/info/lfs/objects/batch")
        assert json.loads(body)["objects"][0]["href"] == "http://proxy:22/upload"


def test_operations_are_told_apart(writes: FaultProxy) -> None:
    with connected(writes) as connection:
        for method, path in [
            ("POST", "/b/k?uploads="),
            ("PUT", "/b/k?partNumber=1&uploadId=u"),
            ("POST", "/b/k?uploadId=u"),
            ("DELETE", "/b/k?uploadId=u"),
            ("PUT", "/b/k"),
            ("DELETE", "/b/k"),
            ("GET", "/b?list-type=2"),
            ("GET", "/b?uploads="),
        ]:
            fetch(connection, method, path)
    assert [request.operation for request in writes.requests] == [
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
        "AbortMultipartUpload",
        "PutObject",
        "DeleteObject",
        "ListObjects",
        "ListMultipartUploads",
    ]


def test_a_script_waits_for_the_request_that_it_is_for(reads: FaultProxy) -> None:
    reads.script([None, Fault.SLOW_DOWN], only=is_operation("GetObject"))
    with connected(reads) as connection:
        statuses = [fetch(connection, method)[0] for method in ("HEAD", "GET", "HEAD", "GET", "GET")]
    assert statuses == [200, 200, 200, 503, 200]


def test_faults_are_drawn_by_probability_from_the_seed(files: NginxServer) -> None:
    def draw(seed: int) -> list[int]:
        with FaultProxy(files.endpoint, seed=seed) as proxy, connected(proxy) as connection:
            proxy.faults = {Fault.SLOW_DOWN: 0.2, Fault.SERVER_ERROR: 0.3}
            proxy.only = lambda request: request.method == "HEAD"
            assert [fetch(connection)[0] for _ in range(10)] == [200] * 10
            return [fetch(connection, "HEAD")[0] for _ in range(200)]

    drawn = draw(1)
    assert drawn == draw(1)
    assert drawn != draw(2)
    assert 20 <= drawn.count(503) <= 60
    assert 40 <= drawn.count(500) <= 80


def test_a_store_that_is_down_refuses_and_comes_back(reads: FaultProxy) -> None:
    with connected(reads) as connection:
        assert fetch(connection) == (200, DATA)
        reads.down = True
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            fetch(connection)
    with connected(reads) as connection, pytest.raises(ConnectionRefusedError):
        fetch(connection)
    reads.down = False
    with connected(reads) as connection:
        assert fetch(connection) == (200, DATA)


def test_clear_forgets_everything(reads: FaultProxy) -> None:
    reads.script([Fault.SLOW_DOWN, Fault.SLOW_DOWN])
    with connected(reads) as connection:
        assert fetch(connection)[0] == 503
        reads.clear()
        assert fetch(connection)[0] == 200
    assert reads.injected == {}
    assert len(reads.requests) == 1


@pytest.fixture
def proxied(s3_server: S3Server, bucket: str) -> Iterator[tuple[FaultProxy, S3Store]]:
    """A proxy in front of the real server, and obstore that knows the proxy only."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy, open_store(s3_server, bucket, endpoint=proxy.url)


def test_signatures_hold_through_the_proxy(
    proxied: tuple[FaultProxy, S3Store], s3_server: S3Server, bucket: str
) -> None:
    proxy, store = proxied
    data = random.Random(1).randbytes(2 * PART_NBYTES + 1)
    with obstore.open_writer(store, "dir/file", buffer_size=PART_NBYTES) as writer:
        writer.write(data)
    client = s3_server.client(endpoint=proxy.url)
    assert client.get_object(Bucket=bucket, Key="dir/file")["Body"].read() == data
    assert client.put_object(Bucket=bucket, Key="other", Body=b"1")["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert proxy.operations == {
        "CreateMultipartUpload": 1,
        "UploadPart": 3,
        "CompleteMultipartUpload": 1,
        "GetObject": 1,
        "PutObject": 1,
    }


def test_obstore_survives_one_503_in_twenty(proxied: tuple[FaultProxy, S3Store]) -> None:
    proxy, store = proxied
    data = random.Random(2).randbytes(100_000)
    store.put("file", data)
    proxy.faults = {Fault.SLOW_DOWN: 0.05}
    for start in range(0, 100_000, 1000):
        assert bytes(store.get_range("file", start=start, end=start + 1000)) == data[start : start + 1000]
    num_injected = proxy.injected[Fault.SLOW_DOWN]
    assert num_injected >= 1
    assert proxy.operations["GetObject"] == 100 + num_injected


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.LOST_RESPONSE, Fault.SERVER_ERROR])
def test_obstore_survives_a_fault_while_writing(proxied: tuple[FaultProxy, S3Store], fault: Fault) -> None:
    proxy, store = proxied
    data = random.Random(3).randbytes(2 * PART_NBYTES)
    proxy.script([fault], only=is_operation("UploadPart"))
    with obstore.open_writer(store, "file", buffer_size=PART_NBYTES) as writer:
        writer.write(data)
    assert proxy.injected == {fault: 1}
    assert proxy.operations["UploadPart"] == 3
    assert bytes(store.get("file").bytes()) == data


def test_a_flipped_byte_is_refused_by_the_checksum(proxied: tuple[FaultProxy, S3Store], s3_server: S3Server) -> None:
    proxy, store = proxied
    bucket = store.prefix or str(store.config["bucket"])
    client = s3_server.client(endpoint=proxy.url)
    proxy.faults = {Fault.FLIPPED_BYTE: 1.0}
    failure = failure_of(
        lambda: client.put_object(Bucket=bucket, Key="file", Body=b"1" * 1000, ChecksumAlgorithm="CRC64NVME")
    )
    assert failure == (400, "BadDigest")
    assert s3_server.keys_of(bucket) == []
