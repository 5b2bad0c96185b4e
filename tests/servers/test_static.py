"""The servers for benchmarks: what clients see of them, and that they cost little."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions
import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError
from obstore.store import S3Store

from tests.servers.s3 import Keys, make_client
from tests.servers.s3_clients import PART_NBYTES, failure_of
from tests.servers.sink import KEPT_NBYTES, NullSink
from tests.servers.static import OUTPUT, LoggedRequest, NginxServer

DATA = random.Random(0).randbytes(100_000)
KEYS = Keys("any", "any")


def open_store(endpoint: str, bucket: str = "bucket") -> S3Store:
    return S3Store(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=KEYS.access_key_id,
        secret_access_key=KEYS.secret_access_key,
        client_options={"allow_http": True},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NginxServer]:
    directory = tmp_path_factory.mktemp("files")
    (directory / "bucket" / "dir").mkdir(parents=True)
    (directory / "bucket" / "dir" / "file & 1").write_bytes(DATA)
    (directory / "bucket" / "small").write_bytes(b"0123456789")
    with NginxServer(directory) as server:
        yield server


@pytest.fixture
def sink() -> Iterator[NullSink]:
    with NullSink() as server:
        yield server


def test_nginx_serves_ranges_of_the_version_asked_for(files: NginxServer) -> None:
    store = open_store(files.endpoint)
    head = store.head("dir/file & 1")
    assert head["size"] == len(DATA)
    assert head["e_tag"]
    got = obstore.get(store, "dir/file & 1", options={"range": (5, 500), "if_match": head["e_tag"]})
    assert bytes(got.bytes()) == DATA[5:500]
    with pytest.raises(PreconditionError):
        obstore.get(store, "dir/file & 1", options={"range": (5, 500), "if_match": '"other"'})
    with pytest.raises(FileNotFoundError):
        store.get("missing")


def test_botocore_reads_from_nginx(files: NginxServer) -> None:
    client = make_client(files.endpoint, KEYS)
    try:
        etag = client.head_object(Bucket="bucket", Key="small")["ETag"]
        answer = client.get_object(Bucket="bucket", Key="small", Range="bytes=2-4", IfMatch=etag)
        assert answer["Body"].read() == b"234"
        refused = failure_of(lambda: client.get_object(Bucket="bucket", Key="small", IfMatch='"other"'))
        assert refused[0] == 412
    finally:
        client.close()


def test_nginx_lists_what_it_serves(files: NginxServer) -> None:
    store = open_store(files.endpoint)
    listed = [item for items in store.list() for item in items]
    assert [(item["path"], item["size"]) for item in listed] == [("dir/file & 1", len(DATA)), ("small", 10)]
    for item in listed:
        assert store.head(item["path"])["e_tag"] == item["e_tag"]


def test_nginx_notes_what_it_was_asked(files: NginxServer) -> None:
    store = open_store(files.endpoint)
    store.get_range("dir/file & 1", start=5, end=10)
    with pytest.raises(FileNotFoundError):
        store.head("missing")
    expected = [
        LoggedRequest("GET", "/bucket/dir/file%20%26%201", 206, 5),
        LoggedRequest("HEAD", "/bucket/missing", 404),
    ]
    give_up = time.monotonic() + 60
    while files.requests()[-2:] != expected and time.monotonic() < give_up:
        time.sleep(0.01)
    assert files.requests()[-2:] == expected  # what other tests asked for may have been noted just now


def test_one_endpoint_serves_the_files_and_the_sink(tmp_path: Path, sink: NullSink) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "small").write_bytes(b"0123456789")
    with NginxServer(tmp_path, sink=sink) as server:
        assert bytes(open_store(server.endpoint).get_range("small", start=2, end=5)) == b"234"
        store = open_store(server.endpoint, OUTPUT)
        with obstore.open_writer(store, "dir/file & 1", buffer_size=PART_NBYTES) as writer:
            writer.write(bytes(2 * PART_NBYTES + 1))
        assert sink.sizes() == {f"{OUTPUT}/dir/file & 1": 2 * PART_NBYTES + 1}
        assert [item["path"] for item in itertools.chain(*store.list())] == ["dir/file & 1"]
        with pytest.raises(GenericError, match="405"):  # nothing is written beside the sink
            open_store(server.endpoint).put("small", b"")


def test_the_sink_remembers_how_much_it_got(sink: NullSink) -> None:
    store = open_store(sink.endpoint)
    with obstore.open_writer(store, "dir/file & 1", buffer_size=PART_NBYTES) as writer:
        writer.write(bytes(2 * PART_NBYTES + 1))
        assert sink.uploads() == ["bucket/dir/file & 1"]
        assert sink.sizes() == {}
    store.put("small", b"123")
    assert sink.uploads() == []
    assert sink.sizes() == {"bucket/dir/file & 1": 2 * PART_NBYTES + 1, "bucket/small": 3}
    assert store.head("dir/file & 1")["size"] == 2 * PART_NBYTES + 1
    assert [(item["path"], item["size"]) for item in itertools.chain(*store.list("dir"))] == [
        ("dir/file & 1", 2 * PART_NBYTES + 1)
    ]
    store.delete("dir/file & 1")
    assert sink.sizes() == {"bucket/small": 3}
    with pytest.raises(FileNotFoundError):
        store.head("dir/file & 1")


def test_the_sink_keeps_small_files_only(sink: NullSink) -> None:
    store = open_store(sink.endpoint)
    store.put("small", DATA, use_multipart=False)
    assert bytes(store.get("small").bytes()) == DATA
    assert bytes(store.get_range("small", start=5, end=500)) == DATA[5:500]
    assert store.head("small")["e_tag"] == f'"{hashlib.md5(DATA).hexdigest()}"'
    store.put("large", bytes(KEPT_NBYTES + 1), use_multipart=False)
    assert store.head("large")["size"] == KEPT_NBYTES + 1
    with pytest.raises(GenericError, match="NotKept"):
        store.get("large")
    sink.clear()
    assert sink.sizes() == {}


def test_the_sink_refuses_writes_whose_conditions_do_not_hold(sink: NullSink) -> None:
    store = open_store(sink.endpoint)
    etag = store.put("lock", b"1", mode="create")["e_tag"]
    with pytest.raises(AlreadyExistsError):
        store.put("lock", b"2", mode="create")
    store.put("lock", b"2", mode={"e_tag": etag})
    with pytest.raises(PreconditionError):
        store.put("lock", b"3", mode={"e_tag": etag})
    assert bytes(store.get("lock").bytes()) == b"2"
    with pytest.raises(PreconditionError):
        obstore.get(store, "lock", options={"if_match": etag})


def test_botocore_writes_to_the_sink(sink: NullSink) -> None:
    client = make_client(sink.endpoint, KEYS)
    try:
        client.put_object(Bucket="bucket", Key="file", Body=b"12345")
        assert client.head_object(Bucket="bucket", Key="file")["ContentLength"] == 5
        upload = {"Bucket": "bucket", "Key": "other"}
        upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
        client.upload_part(**upload, PartNumber=1, Body=bytes(PART_NBYTES))
        uploads = client.list_multipart_uploads(Bucket="bucket")["Uploads"]
        assert [(each["Key"], each["UploadId"]) for each in uploads] == [("other", upload["UploadId"])]
        parts = {"Parts": [{"PartNumber": 2, "ETag": "never sent"}]}
        assert failure_of(lambda: client.complete_multipart_upload(**upload, MultipartUpload=parts))[1] == "InvalidPart"
        client.abort_multipart_upload(**upload)
        with pytest.raises(botocore.exceptions.ClientError, match="NoSuchUpload"):
            client.upload_part(**upload, PartNumber=1, Body=b"1")
        assert sink.sizes() == {"bucket/file": 5}
    finally:
        client.close()


def test_a_sink_costs_less_than_a_second_per_gigabyte(sink: NullSink) -> None:
    store = open_store(sink.endpoint)
    data = bytes(1 << 24)
    before = sink.cpu_seconds()
    for _ in range(16):
        store.put("file", data, use_multipart=False)
    assert (sink.cpu_seconds() - before) / (len(data) * 16 / 1e9) < 1  # 0.1 on an idle machine


def test_nginx_costs_less_than_two_seconds_per_gigabyte(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    with (tmp_path / "bucket" / "file").open("wb") as file:
        file.truncate(1 << 24)
    with NginxServer(tmp_path) as server:
        store = open_store(server.endpoint)
        before = server.cpu_seconds()
        for _ in range(16):
            assert len(store.get_range("file", start=0, end=1 << 24)) == 1 << 24
        assert (server.cpu_seconds() - before) / ((1 << 28) / 1e9) < 2  # 0.3 on an idle machine
