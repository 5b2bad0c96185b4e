"""Models in repositories of a test Hub, and what stands between them and us."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from raymerge.pipeline.stores.hub.storage import HubStorage
from tests.pipeline.stores.storage_contract import MIB, make_bytes
from tests.servers.faults import FaultProxy
from tests.servers.hub import HubServer

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"
SHARD = make_bytes(3 * MIB + 17)
FILES = {"config.json": b'{"a": 1}', "model.safetensors": SHARD, "sub/notes.txt": b"some text"}
_numbers = itertools.count()


def new_name(kind: str) -> str:
    """Return a name that no repository has."""
    return f"me/{kind}-{next(_numbers)}"


@contextmanager
def proxies(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> Iterator[tuple[FaultProxy, FaultProxy]]:
    """Put one in front of the Hub and one in front of its storage, and have everything go through them."""
    with FaultProxy(server.storage.url, seed=seed, is_s3=False, stall_s=0.2) as cdn:
        rewrites = {server.storage.url: cdn.url.replace("127.0.0.1", "localhost")}
        with FaultProxy(server.url, seed=seed + 1, is_s3=False, rewrites=rewrites) as hub:
            hub._rewrites[server.url.encode()] = hub.url.encode()
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            yield hub, cdn


def write_model(storage: HubStorage, out: str) -> None:
    storage.write(f"{out}/.raymerge/plan.json", b"{}")
    for name, content in FILES.items():
        storage.write(f"{out}/{name}", content)
