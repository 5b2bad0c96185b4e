"""Lines that are slow but steady, and peers that send a byte at a time; a second here is twenty outside."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from raymerge.pipeline.errors import FetchError, StalledError
from raymerge.pipeline.stores import remote, retry
from raymerge.pipeline.stores.fsspec import files, loop, parts
from raymerge.pipeline.stores.fsspec import s3 as fsspec_s3
from raymerge.pipeline.stores.hub import session
from raymerge.pipeline.stores.objects import bucket as object_bucket
from raymerge.pipeline.stores.objects.writer import NUM_PARTS, PART_NBYTES
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from raymerge.pipeline.stores.web import client, connection
from tests.pipeline.stores.storage_contract import make_bytes, read_all
from tests.servers.faults import Fault, FaultProxy, Request, is_operation
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.servers.static import NginxServer

CONTENT = make_bytes(600_000)
SLOW = 200_000.0
"""Bytes a second."""


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote, client, connection, object_bucket, loop, fsspec_s3, session):
        monkeypatch.setattr(module, "REQUEST_SECONDS", 1.0)
    for module in (files, loop, parts, fsspec_s3):
        monkeypatch.setattr(module, "WRITE_SECONDS", 2.0)
    monkeypatch.setattr(remote, "PIECE_NBYTES", 250_000)
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.75)


@pytest.fixture(params=["web", "s3", "s3 by s3fs"])
def line(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultProxy, str, StoreSettings]]:
    """A proxy, the URL of a file behind it, and how to read that."""
    if request.param == "web":
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "file").write_bytes(CONTENT)
        with NginxServer(tmp_path) as nginx, FaultProxy(nginx.endpoint, is_s3=False) as proxy:
            yield proxy, f"{proxy.url}/models/file", StoreSettings()
        return
    server: S3Server = request.getfixturevalue("s3_server")
    name: str = request.getfixturevalue("bucket")
    server.client().put_object(Bucket=name, Key="file", Body=CONTENT)
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy, f"s3://{name}/file", StoreSettings(library="fsspec" if "s3fs" in request.param else "auto")


def test_a_slow_but_steady_line_ends_well(line: tuple[FaultProxy, str, StoreSettings]) -> None:
    proxy, url, settings = line
    with open_stores(settings) as stores:
        file = stores.at(url).stat(url)
        proxy.nbytes_per_s = SLOW
        assert read_all(stores.at(url), file) == CONTENT
        proxy.nbytes_per_s = None


@pytest.mark.parametrize("is_worker", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_byte_a_second_is_given_up(line: tuple[FaultProxy, str, StoreSettings], is_worker: bool) -> None:
    proxy, url, settings = line
    with open_stores(settings) as stores:
        file = stores.at(url).stat(url)
        proxy.is_shared, proxy.nbytes_per_s = False, 20.0
        reader = pickle.loads(pickle.dumps(stores)) if is_worker else stores
        with pytest.raises(
            FetchError, match=r"(bytes [\d,]+ to [\d,]+|list of .*): gave up after [123] attempts? in \d{1,2} s"
        ):
            read_all(reader.at(url), file)
        reader.close()
        proxy.nbytes_per_s = None


def test_a_listing_that_comes_a_byte_a_second_is_given_up(line: tuple[FaultProxy, str, StoreSettings]) -> None:
    proxy, url, settings = line
    with open_stores(settings) as stores:
        proxy.is_shared, proxy.nbytes_per_s = False, 20.0
        with pytest.raises(FetchError, match=r"gave up after [123] attempts? in \d{1,2} s"):
            stores.at(url).list(url.rpartition("/")[0])
        proxy.nbytes_per_s = None


def test_an_answer_of_the_hub_that_comes_byte_by_byte_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(tmp_path / "hub") as hub, FaultProxy(hub.url, is_s3=False) as proxy:
        hub.create_repo("me/model")
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        with open_stores() as stores:
            pinned = stores.at("hf://me/model").pin("hf://me/model", None)
            proxy.nbytes_per_s = 20.0
            with pytest.raises(FetchError, match=r"revision: gave up after [123] attempts? in \d{1,2} s"):
                stores.at(pinned).pin("hf://me/model", None)
            proxy.nbytes_per_s = None


def test_uploads_on_a_slow_line(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_bytes(1_500_000)
    with FaultProxy(s3_server.endpoint) as proxy, open_stores() as stores:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        url = f"s3://{bucket}/file"
        stores.at(url).check_space(url, 1)
        proxy.nbytes_per_s = 1_000_000.0
        file = stores.at(url).write(url, content)
        proxy.nbytes_per_s = None
        assert read_all(stores.at(url), file) == content
    assert NUM_PARTS * PART_NBYTES / object_bucket._UPLOAD_SECONDS < 0.15e6
    assert PART_NBYTES / object_bucket._PUT_SECONDS < 0.15e6


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_upload_that_is_stuck_is_tried_again(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    monkeypatch.setattr(object_bucket, "_PUT_SECONDS", 3.0)  # longer than the patience
    content = make_bytes(1_500_000)
    with FaultProxy(s3_server.endpoint, stall_s=30.0) as proxy, open_stores() as stores:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        url = f"s3://{bucket}/file"
        stores.at(url).write(f"{url}.first", b"1234")
        proxy.script([Fault.STALL], only=is_operation("PutObject"))
        assert read_all(stores.at(url), stores.at(url).write(url, content, exclusive=exclusive)) == content


def test_parts_that_are_stuck_are_worth_one_more_try(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_bucket, "_UPLOAD_SECONDS", 2.0)
    with FaultProxy(s3_server.endpoint) as proxy, open_stores() as stores:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        url = f"s3://{bucket}/file"
        stores.at(url).write(f"{url}.first", b"1234")

        def trickle(request: Request) -> None:
            if request.operation == "UploadPart":
                proxy.is_shared, proxy.nbytes_per_s = False, 20.0

        proxy.rule = trickle
        with pytest.raises(StalledError) as caught:
            stores.at(url).write(url, make_bytes(PART_NBYTES + 1))
        assert caught.value.num_attempts == 2
        assert not proxy.operations["ListMultipartUploads"], "its answer would take as long again"


class Chunks(httpx2.SyncByteStream):
    """A body of one byte a chunk, each after a pause."""

    def __init__(self, num_chunks: int, seconds: float) -> None:
        self._num_chunks = num_chunks
        self._seconds = seconds

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self._num_chunks):
            time.sleep(self._seconds)
            yield b"1"


def test_a_body_that_is_whole_is_not_too_slow() -> None:
    assert b"".join(session._SteadyBody(Chunks(1, 0.2), 0.1)) == b"1"
    assert b"".join(session._SteadyBody(Chunks(3, 0.1), 5.0)) == b"111"
    with pytest.raises(httpx2.ReadTimeout, match="too slowly"):
        list(session._SteadyBody(Chunks(3, 0.2), 0.1))
    for _ in session._SteadyBody(Chunks(3, 0.0), 0.5):
        time.sleep(0.6)  # the reader's time
