"""The S3 servers, asked by clients that know nothing of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import s3fs
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store

from tests.servers.s3 import JuiceServer, Keys, S3Server
from tests.servers.s3_clients import PART_NBYTES, failure_of, open_store


@pytest.fixture
def store(s3_server: S3Server, bucket: str) -> S3Store:
    return open_store(s3_server, bucket)


@pytest.fixture
def client(s3_server: S3Server) -> Any:
    return s3_server.client()


def test_obstore_reads_what_it_wrote_and_ranges_of_it(store: S3Store) -> None:
    data = random.Random(0).randbytes(100_000)
    store.put("dir/file", data)
    assert bytes(store.get("dir/file").bytes()) == data
    assert bytes(store.get_range("dir/file", start=10, end=1010)) == data[10:1010]
    assert [item["path"] for items in store.list() for item in items] == ["dir/file"]


def test_the_environment_leads_s3fs_to_the_server(bucket: str, s3_server: S3Server) -> None:
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.pipe_file(f"{bucket}/file", b"0123456789")
    assert files.cat_file(f"{bucket}/file", start=2, end=5) == b"234"
    assert s3_server.keys_of(bucket) == ["file"]


def test_the_environment_leads_obstore_to_the_server(bucket: str, s3_server: S3Server) -> None:
    S3Store(bucket, client_options={"allow_http": True}).put("file", b"0123456789")
    assert s3_server.keys_of(bucket) == ["file"]


def test_a_bucket_is_empty_at_first(bucket: str, s3_server: S3Server) -> None:
    assert s3_server.keys_of(bucket) == []
    assert s3_server.uploads_of(bucket) == []


def test_a_wrong_secret_is_refused(s3_server: S3Server, bucket: str, store: S3Store) -> None:
    store.put("file", b"1")
    wrong = Keys(s3_server.admin.access_key_id, "wrong")
    with pytest.raises(PermissionDeniedError):
        open_store(s3_server, bucket, wrong).get("file")
    client = s3_server.client(wrong)
    assert failure_of(lambda: client.get_object(Bucket=bucket, Key="file")) == (403, "SignatureDoesNotMatch")
    client = s3_server.client(Keys("nobody", "wrong"))
    assert failure_of(lambda: client.get_object(Bucket=bucket, Key="file")) == (403, "InvalidAccessKeyId")


def test_identities_may_do_what_they_are_for(s3_server: S3Server, bucket: str, store: S3Store) -> None:
    store.put("file", b"1")
    reader = s3_server.client(s3_server.reader)
    assert reader.get_object(Bucket=bucket, Key="file")["Body"].read() == b"1"
    assert reader.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
    denied = (403, "AccessDenied")
    assert failure_of(lambda: reader.put_object(Bucket=bucket, Key="other", Body=b"1")) == denied
    assert failure_of(lambda: reader.create_multipart_upload(Bucket=bucket, Key="other")) == denied
    assert failure_of(lambda: reader.delete_object(Bucket=bucket, Key="file")) == denied
    stranger = s3_server.client(s3_server.stranger)
    assert failure_of(lambda: stranger.get_object(Bucket=bucket, Key="file")) == denied
    assert failure_of(lambda: stranger.list_objects_v2(Bucket=bucket)) == denied
    assert failure_of(lambda: stranger.put_object(Bucket=bucket, Key="other", Body=b"1")) == denied
    assert s3_server.keys_of(bucket) == ["file"]


def test_anybody_reads_the_public_bucket_and_nobody_else_another(s3_server: S3Server, bucket: str) -> None:
    s3_server.client().put_object(Bucket=s3_server.public_bucket, Key="file", Body=b"1")
    s3_server.client().put_object(Bucket=bucket, Key="file", Body=b"1")
    anybody = S3Store(
        s3_server.public_bucket,
        endpoint=s3_server.endpoint,
        skip_signature=True,
        client_options={"allow_http": True},
    )
    assert bytes(anybody.get("file").bytes()) == b"1"
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(f"{s3_server.endpoint}/{bucket}/file")
    caught.value.close()
    write = urllib.request.Request(f"{s3_server.endpoint}/{s3_server.public_bucket}/other", b"1", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(write)
    caught.value.close()


def test_a_missing_bucket_is_not_made_by_a_put(s3_server: S3Server, client: Any) -> None:
    assert failure_of(lambda: client.put_object(Bucket="missing", Key="file", Body=b"1")) == (404, "NoSuchBucket")
    assert failure_of(lambda: client.get_object(Bucket="missing", Key="file")) == (404, "NoSuchBucket")
    assert failure_of(lambda: client.list_objects_v2(Bucket="missing")) == (404, "NoSuchBucket")


def test_a_read_of_another_version_is_refused(client: Any, bucket: str, store: S3Store) -> None:
    etag = str(store.put("file", b"0123456789")["e_tag"])
    got = obstore.get(store, "file", options={"range": (2, 5), "if_match": etag})
    assert bytes(got.bytes()) == b"234"
    store.put("file", b"abcdefghij")
    with pytest.raises(PreconditionError):
        obstore.get(store, "file", options={"range": (2, 5), "if_match": etag})
    status, _ = failure_of(lambda: client.get_object(Bucket=bucket, Key="file", IfMatch=etag))
    assert status == 412


def test_a_range_past_the_end_is_refused(client: Any, bucket: str, store: S3Store) -> None:
    store.put("file", b"0123456789")
    assert client.get_object(Bucket=bucket, Key="file", Range="bytes=8-20")["Body"].read() == b"89"
    assert failure_of(lambda: client.get_object(Bucket=bucket, Key="file", Range="bytes=10-20"))[0] == 416


def test_put_if_none_match_keeps_what_is_there(client: Any, bucket: str, store: S3Store) -> None:
    store.put("file", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        store.put("file", b"2", mode="create")
    failure = failure_of(lambda: client.put_object(Bucket=bucket, Key="file", Body=b"2", IfNoneMatch="*"))
    assert failure == (412, "PreconditionFailed")
    assert bytes(store.get("file").bytes()) == b"1"


@pytest.mark.parametrize(
    "checksum",
    [
        {"ChecksumCRC64NVME": "AAAAAAAAAAA="},
        {"ChecksumCRC32C": "AAAAAA=="},
        {"ChecksumSHA256": "A" * 43 + "="},
        {"ContentMD5": "A" * 22 + "=="},
    ],
    ids=lambda checksum: next(iter(checksum)),
)
def test_a_wrong_checksum_is_refused(client: Any, bucket: str, s3_server: S3Server, checksum: dict[str, str]) -> None:
    status, code = failure_of(lambda: client.put_object(Bucket=bucket, Key="file", Body=b"1234", **checksum))
    assert status == 400
    assert "Digest" in code or "Checksum" in code, code
    upload_id = client.create_multipart_upload(Bucket=bucket, Key="file")["UploadId"]
    part = {"Bucket": bucket, "Key": "file", "UploadId": upload_id, "PartNumber": 1, "Body": b"1234"}
    status, code = failure_of(lambda: client.upload_part(**part, **checksum))
    assert status == 400
    assert "Digest" in code or "Checksum" in code, code
    assert s3_server.keys_of(bucket) == []
    client.abort_multipart_upload(Bucket=bucket, Key="file", UploadId=upload_id)


def test_a_right_checksum_is_kept(client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="file", Body=b"123456789", ChecksumAlgorithm="CRC64NVME")
    head = client.head_object(Bucket=bucket, Key="file", ChecksumMode="ENABLED")
    assert head["ChecksumCRC64NVME"] == "rosUhgp5mIg="  # the check value of its definition, 0xAE8B14860A799888


def test_multipart_uploads_are_listed_and_aborted(client: Any, bucket: str, s3_server: S3Server) -> None:
    upload = {"Bucket": bucket, "Key": "dir/file"}
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
    client.upload_part(**upload, PartNumber=1, Body=b"1" * PART_NBYTES)
    assert s3_server.uploads_of(bucket) == ["dir/file"]
    assert [part["Size"] for part in client.list_parts(**upload)["Parts"]] == [PART_NBYTES]
    client.abort_multipart_upload(**upload)
    assert s3_server.uploads_of(bucket) == []
    assert s3_server.keys_of(bucket) == []


def test_a_small_part_before_the_last_is_refused(client: Any, bucket: str) -> None:
    upload = {"Bucket": bucket, "Key": "file"}
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
    parts = [
        {"PartNumber": number, "ETag": client.upload_part(**upload, PartNumber=number, Body=b"1")["ETag"]}
        for number in (1, 2)
    ]
    failure = failure_of(lambda: client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}))
    assert failure == (400, "EntityTooSmall")
    client.abort_multipart_upload(**upload)


def test_an_object_appears_when_its_upload_completes(store: S3Store, bucket: str, s3_server: S3Server) -> None:
    data = random.Random(1).randbytes(2 * PART_NBYTES + 1)
    with obstore.open_writer(store, "file", buffer_size=PART_NBYTES) as writer:
        writer.write(data[: PART_NBYTES + 7])
        assert s3_server.uploads_of(bucket) == ["file"]
        assert s3_server.keys_of(bucket) == []
        writer.write(data[PART_NBYTES + 7 :])
    assert s3_server.uploads_of(bucket) == []
    assert bytes(store.get("file").bytes()) == data


def test_versions_are_kept_where_asked_for(client: Any, bucket: str) -> None:
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = client.put_object(Bucket=bucket, Key="file", Body=b"1")["VersionId"]
    second = client.put_object(Bucket=bucket, Key="file", Body=b"2")["VersionId"]
    assert first != second
    assert client.get_object(Bucket=bucket, Key="file")["Body"].read() == b"2"
    assert client.get_object(Bucket=bucket, Key="file", VersionId=first)["Body"].read() == b"1"
    assert len(client.list_object_versions(Bucket=bucket)["Versions"]) == 2


def test_servers_do_not_share_anything(s3_server: S3Server, bucket: str) -> None:
    with S3Server() as other:
        assert other.endpoint != s3_server.endpoint
        names = [each["Name"] for each in other.client().list_buckets()["Buckets"]]
        assert names == [other.public_bucket]


@pytest.mark.slow
def test_a_server_dies_with_the_process_that_started_it() -> None:
    program = (
        "from tests.servers.s3 import S3Server; s = S3Server(); print(s.pid, *s.socket_files(), flush=True); input()"
    )
    with (
        tempfile.TemporaryDirectory() as short,  # sockets' paths have at most 108 letters
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TMPDIR": short},
        ) as process,
    ):
        assert process.stdout is not None
        number, *socket_files = process.stdout.readline().split()
        pid = int(number)
        assert is_alive(pid)
        process.kill()
    give_up = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < give_up:
        time.sleep(0.01)
    for file in socket_files:
        Path(file).unlink()
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the server has outlived its parent")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_environment_names_no_file_of_the_user(s3_server: S3Server) -> None:
    environment = s3_server.environment(s3_server.reader, endpoint="http://127.0.0.1:1")
    assert environment["AWS_CONFIG_FILE"] == environment["AWS_SHARED_CREDENTIALS_FILE"] == os.devnull
    assert environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert environment["AWS_ACCESS_KEY_ID"] == s3_server.reader.access_key_id


@pytest.fixture(scope="module")
def juice() -> Iterator[JuiceServer]:
    with JuiceServer() as server:
        yield server


@pytest.mark.slow
def test_the_second_opinion_agrees(juice: JuiceServer) -> None:
    bucket = juice.create_bucket("agreed")
    store = open_store(juice, bucket)
    data = random.Random(2).randbytes(2 * PART_NBYTES + 1)
    with obstore.open_writer(store, "dir/file", buffer_size=PART_NBYTES) as writer:
        writer.write(data[: PART_NBYTES + 7])
        assert juice.uploads_of(bucket) == ["dir/file"]
        writer.write(data[PART_NBYTES + 7 :])
    assert juice.uploads_of(bucket) == []
    assert juice.keys_of(bucket) == ["dir/file"]
    etag = str(store.head("dir/file")["e_tag"])
    got = obstore.get(store, "dir/file", options={"range": (PART_NBYTES - 5, PART_NBYTES + 5), "if_match": etag})
    assert bytes(got.bytes()) == data[PART_NBYTES - 5 : PART_NBYTES + 5]
    with pytest.raises(PreconditionError):
        obstore.get(store, "dir/file", options={"range": (2, 5), "if_match": '"other"'})
    client = juice.client()
    assert failure_of(lambda: client.put_object(Bucket="missing", Key="file", Body=b"1")) == (404, "NoSuchBucket")
    wrong = juice.client(Keys(juice.admin.access_key_id, "wrong"))
    assert failure_of(lambda: wrong.list_objects_v2(Bucket=bucket)) == (403, "SignatureDoesNotMatch")
    refused = failure_of(lambda: client.put_object(Bucket=bucket, Key="x", Body=b"1", ContentMD5="A" * 22 + "=="))
    assert refused == (400, "BadDigest")
