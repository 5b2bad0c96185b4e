from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymerge.pipeline.errors import ConfigError, FetchError, HeldError, OutputError
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.hub.bucket import BucketStorage
from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Storage
from tests.pipeline.stores.hub.models import READER, SHARD, new_name
from tests.pipeline.stores.storage_contract import MIB, StorageContract, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy
from tests.servers.hub import HubServer


@pytest.fixture
def storage() -> Iterator[BucketStorage]:
    storage = BucketStorage(FaultLog(), private=True)
    yield storage
    storage.close()


@pytest.fixture
def bucket(server: HubServer) -> str:
    name = new_name("bucket")
    server.create_bucket(name)
    return name


class TestBucket(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[BucketStorage]:
        storage = BucketStorage(FaultLog(), private=True)
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, bucket: str) -> str:
        return f"hf://buckets/{bucket}/models/a"

    @pytest.mark.slow
    def test_one_thread_has_the_lock(self, storage: Storage, root: str) -> None:
        super().test_one_thread_has_the_lock(storage, root)

    @pytest.mark.slow
    def test_many_threads_and_files(self, storage: Storage, root: str) -> None:
        super().test_many_threads_and_files(storage, root)


def test_who_serves_what() -> None:
    stores = Stores()
    assert isinstance(stores.at("hf://buckets/me/bucket/a"), BucketStorage)
    assert isinstance(stores.at("hf://me/buckets"), HubStorage)
    assert stores.at("hf://buckets/me/bucket/a") is stores.at("hf://buckets/you/other")
    stores.close()


@pytest.mark.parametrize("url", ["hf://buckets", "hf://buckets/me", "hf://buckets/me/", "hf://buckets/me/a@main/b"])
def test_malformed(storage: BucketStorage, url: str) -> None:
    with pytest.raises(ConfigError, match="hf://buckets/org/name"):
        storage.absolute(url)


def test_a_bucket_is_made_and_private_unless_asked_for(server: HubServer) -> None:
    for private in (True, False):
        name = new_name("bucket")
        storage = BucketStorage(FaultLog(), private=private)
        out = f"hf://buckets/{name}/out"
        assert storage.list(out) == {}
        with storage.lock(f"{out}/.raymerge/lock"):
            storage.write(f"{out}/config.json", b"{}")
            with pytest.raises(HeldError, match="another raymerge run"):
                storage.lock(f"{out}/.raymerge/lock").__enter__()
        assert server.buckets[name].private == private
        assert server.read_bucket(name) == {"out/config.json": b"{}"}
        storage.close()


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (READER, "me/bucket-of-mine", "403.*check what the token may do"),
        ("hf_wrongwrongwrong", "me/bucket-of-mine", "401.*check what the token may do"),
        (None, "me/bucket-of-mine", "only who is logged in.*hf auth login"),
    ],
)
def test_no_write_access(
    server: HubServer,
    storage: BucketStorage,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    name: str,
    message: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=message) as caught:
        storage.lock(f"hf://buckets/{name}/.raymerge/lock").__enter__()
    assert "wrongwrong" not in str(caught.value)
    assert name not in server.buckets


def test_a_private_bucket_of_somebody_else(
    server: HubServer, storage: BucketStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create_bucket("me/hidden", private=True)
    storage.write("hf://buckets/me/hidden/a", b"a")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert storage.list("hf://buckets/me/hidden") == {}
    with pytest.raises(FileNotFoundError):
        storage.stat("hf://buckets/me/hidden/a")


def test_one_request_to_the_hub_for_all_ranges(server: HubServer, storage: BucketStorage, bucket: str) -> None:
    file = storage.write(f"hf://buckets/{bucket}/model.safetensors", SHARD)
    server.reset_requests()
    for _ in range(3):
        ranges = [ByteRange(file, start, start + 1000) for start in range(0, 3 * MIB, 300_000)]
        assert read_ranges(storage, ranges) == [SHARD[item.start : item.stop] for item in ranges]
    assert [(request.method, "/resolve/" in request.path) for request in server.requests] == [("HEAD", True)]
    server.expire_urls()
    assert read_all(storage, file) == SHARD


def test_a_file_that_is_replaced(storage: BucketStorage, bucket: str) -> None:
    file = storage.write(f"hf://buckets/{bucket}/model.safetensors", SHARD)
    storage.write(file.url, SHARD[::-1])
    for look in (lambda: storage.check_unchanged(file), lambda: read_all(storage, file)):
        with pytest.raises(FetchError, match="changed since the plan was made"):
            look()


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET, Fault.STALL, Fault.LOST_RESPONSE])
def test_faults(
    server: HubServer, storage: BucketStorage, bucket: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(server.url, is_s3=False, stall_s=0.2) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        proxy.script([fault] * 3, only=lambda request: not request.path.endswith("-token"))
        file = storage.write(f"hf://buckets/{bucket}/model.safetensors", SHARD)
        assert read_all(storage, file) == SHARD
        assert list(storage.list(f"hf://buckets/{bucket}")) == ["model.safetensors"]
        assert proxy.injected[fault] == 3
        storage.close()
    assert sum(count for _, count in storage.faults.drain()) == 3
