"""What every store promises, kept by repositories of the Hub."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.storage_contract import StorageContract
from tests.servers.hub import HubServer


class TestHub(StorageContract):
    """What is written shows before it is published, to whoever writes it."""

    @pytest.fixture
    def storage(self) -> Iterator[HubStorage]:
        storage = HubStorage(FaultLog(), private=True)
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, server: HubServer, repo: str) -> Iterator[str]:
        before = server.get_head(repo)
        yield f"hf://{repo}"
        assert server.get_head(repo) == before

    def test_only_the_hub_has_revisions(self, storage: HubStorage, root: str) -> None:  # type: ignore[override]
        assert storage.pin(root, "main") == storage.pin(root, None)


class TestHubWithOtherFiles(TestHub):
    """On top of a branch that has other files already: they are replaced and deleted, and show as they will be."""

    @pytest.fixture
    def root(self, server: HubServer, repo: str) -> str:
        server.upload(repo, {f"dir/{name}": b"\0old" for name in ("a", "b", "dir/b")})
        server.upload(repo, {"other/a": b"old"})
        return f"hf://{repo}/dir/below"
