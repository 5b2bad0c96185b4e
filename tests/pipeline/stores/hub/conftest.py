"""A Hub, and a storage that reads from it and writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from raymerge.pipeline.stores.hub.storage import HubStorage
from raymerge.pipeline.stores.retry import FaultLog
from tests.pipeline.stores.hub.models import FILES, READER, WRITER, new_name
from tests.servers.hub import HubServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token(WRITER, user="me", can_write=["me"])
        server.add_token(READER, user="reader")
        yield server


@pytest.fixture(autouse=True)
def _environment(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server.reset_requests()
    server.part_nbytes = None
    server.redirect_regular = False
    yield
    assert not server.leaked_tokens
    assert not any(WRITER in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


@pytest.fixture
def storage() -> Iterator[HubStorage]:
    storage = HubStorage(FaultLog(), private=True)
    yield storage
    storage.close()


@pytest.fixture
def repo(server: HubServer) -> str:
    name = new_name("model")
    server.create_repo(name)
    return name


@pytest.fixture
def model(server: HubServer, repo: str) -> str:
    """A repository with a model in it."""
    server.upload(repo, FILES)
    return repo
