"""Hubs that answer oddly: mirrors that redirect or give no ETag are used; what is no answer of a Hub is an error."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from raymerge.pipeline.errors import ConfigError, FetchError, MergeError
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.web.index import parse_index, parse_weight_names
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all
from tests.servers.hub import HubServer
from tests.servers.hub_http import Handler, Listener

T = TypeVar("T")

COMMIT = "0123456789" * 4
FILES = {"config.json": b"{}", "model.safetensors": make_bytes(MIB)}
MODEL = "hf://me/model"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes


class OddHub(Listener):
    """A server whose answers a test makes up."""

    def __init__(self) -> None:
        super().__init__(OddHandler)
        self.make: Callable[[Handler], Answer] = lambda _: Answer(404, {}, b"")


class OddHandler(Handler):
    server: OddHub

    def answer(self) -> None:
        status, headers, content = self.server.make(self)
        self.send(status, content, headers)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OddHub]:
    """The Hub that everybody asks."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    odd = OddHub()
    odd.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{odd.server_address[1]}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents"))
    yield odd
    assert not (tmp_path / "agents").exists()  # an odd answer would be kept for a day
    odd.stop()
    assert not odd.failures


def redirect(hub: HubServer) -> Callable[[Handler], Answer]:
    return lambda asked: Answer(308, {"Location": hub.url.replace("127.0.0.1", "localhost") + asked.path}, b"")


def relay(hub: HubServer, etag: str | None) -> Callable[[Handler], Answer]:
    """Return answers of the Hub, with another ETag or none."""

    def make(asked: Handler) -> Answer:
        parts = urlsplit(hub.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        kept = {name: value for name, value in asked.headers.items() if name.lower() not in ("connection", "host")}
        connection.request(asked.command, asked.path, asked.read_body(), kept)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        nbytes = int(answer.getheader("Content-Length", "0"))
        dropped = ("etag", "x-linked-etag", "connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
        return Answer(answer.status, {**headers, **({"ETag": etag} if etag else {})}, content or bytes(nbytes))

    return make


@pytest.mark.parametrize("kind", ["redirects", "no etag", "another etag"])
def test_a_mirror(kind: str, tmp_path: Path, stores: Stores, odd: OddHub) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.create_repo("me/model")
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        hub.upload("me/model", {name: tmp_path / name for name in FILES})
        etag = 'W/"a1b2"' if kind == "another etag" else None
        odd.make = redirect(hub) if kind == "redirects" else relay(hub, etag)
        storage = stores.at(MODEL)
        found = storage.list(storage.pin(MODEL, None))
        assert {name: read_all(storage, file) for name, file in found.items() if name in FILES} == FILES


ODD_VALUES: tuple[Any, ...] = (5, -1, 1e30, 2**70, None, [], {}, True, "", "../../x", "a\x00b")
ODD_FILES: tuple[Any, ...] = (5, "x", [], {"oid": 5, "size": "x"}, {"oid": None, "size": 5}, {"sha256": 5})
DEEP = b"[" * 200_000
NUMBERS = [b"null", b"5", b"1e999", b"NaN", b"-1", b"true", b'"text"']
REVISIONS = [
    *NUMBERS, b"", b"[]", b"{}", b"[5]", b"\xff\xfe", b"<html>", b'{"sha": "0', DEEP,
    *(json.dumps({"id": "me/model", "sha": sha}).encode() for sha in (*ODD_VALUES, "main", "0" * 41)),
    *(
        json.dumps({"id": "me/model", "sha": COMMIT, key: value}).encode()
        for key in ("siblings", "lastModified", "createdAt", "safetensors", "cardData", "config", "gguf", "tags")
        for value in (5, "x", [5], {"a": 5})
    ),
]  # fmt: skip
ENTRY: dict[str, Any] = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}
TREES = [
    *NUMBERS, b"", b"{}", b"[5]", b"[null]", b"[[]]", b'["x"]', b"<html>", b"[{}]", DEEP, b'{"error": 5}',
    *(
        json.dumps([{**ENTRY, key: value}]).encode()
        for key in ENTRY
        for value in ODD_VALUES
    ),
    *(
        json.dumps([{**ENTRY, "lfs": value}]).encode()
        for value in ODD_FILES
    ),
]  # fmt: skip


def json_answer(content: bytes, asked: Handler) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, content)


def outcome(call: Callable[[], T]) -> T | str:
    """Return what a call returns, or the text of its error if it is one for users."""
    try:
        return call()
    except MergeError as error:
        return str(error)


def test_odd_json(stores: Stores, odd: OddHub) -> None:
    """No answer ends in a traceback; an accepted one gives a commit, and files of known sizes."""
    storage, pinned = stores.at(MODEL), f"{MODEL}@{COMMIT}"
    for content in REVISIONS:
        odd.make = partial(json_answer, content)
        text = outcome(lambda: storage.pin(MODEL, None))
        assert text == pinned or text.startswith(f"{MODEL}: "), content
    for content in TREES:
        odd.make = partial(json_answer, content)
        stores.close()
        found = outcome(lambda: storage.list(pinned))
        if isinstance(found, str):
            assert found.startswith(f"{pinned}: "), content
        else:
            assert all(type(file.nbytes) is int and file.nbytes >= 0 and file.etag for file in found.values()), content
            assert all(".." not in name for name in found), content
    odd.make = partial(json_answer, b'[{"type": "file", "path": "a", "size": "2", "oid": "0"}]')
    stores.close()
    with pytest.raises(FetchError, match="not that of a Hub"):
        storage.list(pinned)


def test_odd_json_of_a_bucket(stores: Stores, odd: OddHub) -> None:
    url = "hf://buckets/me/files"
    entry = {"type": "file", "path": "a", "size": 2, "xetHash": "0" * 64, "uploadedAt": "2026-01-01T00:00:00.000Z"}
    forms = [json.dumps([{**entry, key: value}]).encode() for key in entry for value in ODD_VALUES]
    for content in (*TREES, *forms):
        odd.make = partial(json_answer, content)
        found = outcome(lambda: stores.at(url).list(url))
        if isinstance(found, str):
            assert found.startswith(f"{url}: "), content
        else:
            assert all(type(file.nbytes) is int and file.nbytes >= 0 and file.etag for file in found.values()), content
            assert all(".." not in name for name in found), content


@pytest.mark.parametrize(
    "location",
    ["http://[::1", "http://host:port/x", "file:///etc/passwd", "ftp://host/x", "//", "http://", "::", "\\\\"],
)
def test_odd_locations(location: str, stores: Stores, odd: OddHub) -> None:
    def make(asked: Handler) -> Answer:
        if "/resolve/" in asked.path:
            return Answer(302, {"Location": location, "X-Linked-ETag": "0" * 40, "X-Linked-Size": "2"}, b"")
        return json_answer(json.dumps([ENTRY]).encode(), asked)

    odd.make = make
    file = stores.at(MODEL).list(f"{MODEL}@{COMMIT}")["config.json"]
    with pytest.raises(FetchError, match=r"hf://me/model@.*config\.json: "):
        read_all(stores.at(MODEL), file)
    odd.make = lambda _: Answer(302, {"Location": location}, b"")
    with pytest.raises(FetchError, match=rf"{MODEL}: ") as caught:
        stores.at(MODEL).pin(MODEL, None)
    assert "broke" not in str(caught.value)  # which would be tried again, for most of a minute


@pytest.mark.parametrize("url", ["http://[::1", "http://[::1/model", "https://host:port/model"])
def test_a_url_that_is_none(url: str, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not a URL"):
        stores.at(url)
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(FetchError, match="HF_ENDPOINT is"):
        stores.at(MODEL).pin(MODEL, None)


def test_pages_and_indexes_that_are_damaged() -> None:
    for content in (b"<![x<a href='a'>", b"<a href='http://[x'>", DEEP, b"[5]", b"{}", b'[{"name": 5, "type": 5}]'):
        for kind in ("text/html", "application/json"):
            assert parse_index(kind, content, "http://host/m/") == []
    assert parse_weight_names(DEEP) == []
