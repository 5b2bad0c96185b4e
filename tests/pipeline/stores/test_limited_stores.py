"""S3 stores that refuse conditions or checksums, and buckets that ask for more than a key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymerge.pipeline.errors import FetchError, HeldError, OutputError
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import Library, StoreSettings
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all
from tests.servers.faults import FaultProxy, Request
from tests.servers.s3 import S3Server
from tests.servers.sink import NullSink

CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum-")
CONDITIONS = ("if-none-match", "if-match")
REFUSALS = {
    "501": (
        "501 Not Implemented",
        "NotImplemented",
        "A header you provided implies functionality that is not implemented",
    ),
    "400": (
        "400 Bad Request",
        "InvalidArgument",
        "Unsupported header 'x-amz-checksum-crc64nvme' received for this API call.",
    ),
}
DENIED = ("403 Forbidden", "AccessDenied", "Access Denied")


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(params=["auto", "fsspec"])
def stores(request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[Stores]:
    with open_stores(StoreSettings(library=request.param)) as stores:
        yield stores


def refuse(proxy: FaultProxy, prefixes: tuple[str, ...], refusal: tuple[str, str, str]) -> list[Request]:
    """Refuse writes with a header that begins so; return the requests that will be refused."""
    refused: list[Request] = []

    def rule(request: Request) -> tuple[str, str, str] | None:
        writes = request.method in ("PUT", "POST", "DELETE")
        if writes and any(name.startswith(prefixes) for name in request.headers):
            refused.append(request)
            return refusal
        return None

    proxy.rule = rule
    return refused


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize(
    "prefixes", [CONDITIONS, CHECKSUMS, CONDITIONS + CHECKSUMS], ids=["conditions", "checksums", "both"]
)
def test_a_store_that_refuses_headers(
    stores: Stores, proxy: FaultProxy, bucket: str, prefixes: tuple[str, ...], status: str
) -> None:
    refused = refuse(proxy, prefixes, REFUSALS[status])
    url = f"s3://{bucket}/out"
    storage = stores.at(url)
    with storage.lock(f"{url}/.raymerge/lock") as lock:
        lock.check()
        with pytest.raises(HeldError, match="is writing to"), storage.lock(f"{url}/.raymerge/lock"):
            pass
        for nbytes in (10, 9 * MIB):
            content = make_bytes(nbytes)
            assert read_all(storage, storage.write(f"{url}/{nbytes}", content)) == content
        storage.write(f"{url}/once", b"first", exclusive=True)
        with pytest.raises(FileExistsError):
            storage.write(f"{url}/once", b"second", exclusive=True)
    assert list(storage.list(url)) == ["10", str(9 * MIB), "once"]
    assert len(refused) <= 6
    limits = " ".join(stores.faults.limits)
    assert ("no conditional writes" in limits) == (CONDITIONS[0] in prefixes)
    assert ("refuses checksums" in limits) == (CHECKSUMS[0] in prefixes)
    assert not stores.faults.drain()


@pytest.mark.parametrize("library", ["auto", "fsspec"])
def test_a_store_that_ignores_conditions(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with NullSink() as sink, FaultProxy(sink.endpoint) as proxy:
        proxy.hidden_headers = CONDITIONS
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        url = "s3://bucket/out"
        with (
            open_stores(StoreSettings(library=library)) as stores,
            open_stores(StoreSettings(library=library)) as others,
        ):
            with stores.at(url).lock(f"{url}/.raymerge/lock"):
                with pytest.raises(HeldError), others.at(url).lock(f"{url}/.raymerge/lock"):
                    pass
                stores.at(url).write(f"{url}/once", b"first", exclusive=True)
                with pytest.raises(FileExistsError):
                    stores.at(url).write(f"{url}/once", b"second", exclusive=True)
            assert any("no conditional writes" in limit for limit in stores.faults.limits)


@pytest.mark.parametrize("library", ["auto", "fsspec"])
def test_aws_itself_is_not_probed(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with NullSink() as sink, FaultProxy(sink.endpoint) as proxy:
        monkeypatch.setattr("raymerge.pipeline.stores.abilities.AWS_DOMAINS", ("127.0.0.1",))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with open_stores(StoreSettings(library=library)) as stores:
            stores.at("s3://bucket/a").write("s3://bucket/a", b"1234")
        assert [request.path for request in proxy.requests if request.method == "PUT"] == ["/bucket/a"]


def test_checksums_are_off_where_the_aws_tools_are_told_so(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "When_Required")
    refused = refuse(proxy, CHECKSUMS, REFUSALS["400"])
    for library in ("auto", "fsspec"):
        with open_stores(StoreSettings(library=library)) as stores:
            url = f"s3://{bucket}/{library}"
            assert stores.at(url).write(url, make_bytes(9 * MIB)).nbytes == 9 * MIB
            assert not stores.faults.drain()
    assert not refused


@pytest.mark.parametrize("num_strays", [1, 3])
def test_a_stray_refusal_takes_nothing_away(stores: Stores, proxy: FaultProxy, bucket: str, num_strays: int) -> None:
    strays = [REFUSALS["400"]] * num_strays
    proxy.rule = lambda request: strays.pop() if strays and request.method == "PUT" else None
    url = f"s3://{bucket}/a"
    stores.at(url).write(url, b"1234")
    assert not strays
    assert not stores.faults.drain()


@pytest.mark.parametrize("code", ["ExpiredToken", "AuthorizationHeaderMalformed"])
def test_a_refusal_of_credentials_is_not_one_of_headers(
    stores: Stores, proxy: FaultProxy, bucket: str, code: str
) -> None:
    refusals = [("400 Bad Request", code, "No.")]
    proxy.rule = lambda request: refusals.pop() if refusals and request.method == "PUT" else None
    url = f"s3://{bucket}/a"
    with pytest.raises(OutputError):
        stores.at(url).write(url, b"1234")
    assert stores.at(url).write(url, b"1234").nbytes == 4
    assert not stores.faults.drain()


def test_a_probe_that_fails_leaves_nothing_behind(stores: Stores, proxy: FaultProxy, bucket: str) -> None:
    proxy.rule = lambda request: REFUSALS["501"] if request.method == "PUT" else None
    url = f"s3://{bucket}/a"
    with pytest.raises(OutputError):
        stores.at(url).write(url, b"1234")
    sent: list[Request] = []
    proxy.rule = lambda request: sent.append(request) if request.operation == "PutObject" else None
    stores.at(url).write(url, b"1234")
    assert any(name.startswith(CHECKSUMS) for request in sent for name in request.headers)
    assert any(name in CONDITIONS for request in sent for name in request.headers)
    assert not stores.faults.drain()


def test_the_probe_is_beside_what_is_written(stores: Stores, proxy: FaultProxy, bucket: str) -> None:
    paths: list[str] = []
    proxy.rule = lambda request: paths.append(request.path) if request.method == "PUT" else None
    url = f"s3://{bucket}/model.raymerge/a"
    stores.at(url).write(url, b"1234")
    assert any(path.startswith(f"/{bucket}/model.raymerge/.raymerge/probe.") for path in paths)


def test_a_store_that_takes_no_writes_says_why(stores: Stores, proxy: FaultProxy, bucket: str) -> None:
    proxy.rule = lambda request: REFUSALS["501"] if request.method == "PUT" else None
    with pytest.raises(OutputError, match=r"out/a: .*not implemented"):
        stores.at(f"s3://{bucket}").write(f"s3://{bucket}/out/a", b"1")
    assert proxy.operations["PutObject"] <= 4


def test_an_archived_object(stores: Stores, proxy: FaultProxy, bucket: str) -> None:
    file = stores.at(f"s3://{bucket}").write(f"s3://{bucket}/a", b"1234")
    invalid = ("403 Forbidden", "InvalidObjectState", "The operation is not valid for the object's storage class")
    proxy.rule = lambda request: invalid if request.operation == "GetObject" else None
    with pytest.raises(FetchError, match=r"/a: .*InvalidObjectState.*archived.*restore it first"):
        read_all(stores.at(file.url), file)


def test_a_bucket_whose_readers_pay(
    stores: Stores, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/a"
    stores.at(url).write(url, b"1234")
    proxy.rule = lambda request: None if request.headers.get("x-amz-request-payer") == "requester" else DENIED
    stores.close()
    with pytest.raises(FetchError, match="set AWS_REQUEST_PAYER=requester"):
        stores.at(url).read(url, 10)
    stores.close()
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    assert stores.at(url).read(url, 10) == b"1234"
    assert stores.at(url).write(url, make_bytes(9 * MIB)).nbytes == 9 * MIB


def test_a_bucket_that_asks_for_encryption(
    stores: Stores, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/a"

    def rule(request: Request) -> tuple[str, str, str] | None:
        is_write = request.operation in ("PutObject", "CreateMultipartUpload")
        return DENIED if is_write and request.headers.get("x-amz-server-side-encryption") != "AES256" else None

    proxy.rule = rule
    with pytest.raises(OutputError, match="set AWS_SERVER_SIDE_ENCRYPTION"):
        stores.at(url).write(url, b"1234")
    stores.close()
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "AES256")
    for nbytes in (4, 9 * MIB):
        content = make_bytes(nbytes)
        assert read_all(stores.at(url), stores.at(url).write(url, content)) == content
