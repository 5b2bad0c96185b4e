"""Mutated answers of a Hub; what is accepted of them is a commit, and files of known sizes below their directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from huggingface_hub import constants

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import open_stores
from tests.fuzz.campaign import Campaign
from tests.fuzz.mutation import NUMBERS, VALUES, dump, mutate, parse_pairs, spoil
from tests.servers.hub_http import Handler, Listener

_COMMIT = "0123456789" * 4
_MODEL, _BUCKET = "hf://me/model", "hf://buckets/me/files"
_ENTRY: dict[str, Any] = {"type": "file", "path": "a/config.json", "size": 2, "oid": "0" * 40}
_LFS = {**_ENTRY, "path": "x.safetensors", "lfs": {"oid": "1" * 64, "size": 2, "pointerSize": 130}, "xetHash": "2" * 64}
_ANSWERS: dict[str, Any] = {
    "revision": {"id": "me/model", "sha": _COMMIT, "gated": False, "private": False, "siblings": [{"rfilename": "a"}],
                 "lastModified": "2026-01-01T00:00:00.000Z", "cardData": {"license": "mit"}, "tags": ["x"],
                 "safetensors": {"parameters": {"F32": 5}, "total": 5}, "gguf": {"total": 1}},
    "tree": [_ENTRY, _LFS, {"type": "directory", "path": "a", "oid": "3" * 40, "size": 0}],
    "paths-info": [_ENTRY, {**_LFS, "lastCommit": {"id": _COMMIT, "title": "t", "date": "2026-01-01T00:00:00.000Z"}}],
    "bucket": [{"type": "file", "path": "a", "size": 2, "xetHash": "0" * 64, "uploadedAt": "2026-01-01T00:00:00.000Z"}],
}  # fmt: skip
_STATUSES = (200, 201, 204, 206, 301, 302, 308, 400, 401, 403, 404, 409, 410, 416, 418, 451)
_VALUES = (*VALUES, *NUMBERS, f'"{_COMMIT}"', '"file"', '"directory"', '"a/../../b"', '"a//b"', '"%2e%2e/x"', "1e30")
_LOCATIONS = (
    "http://[::1",
    "http://host:port/x",
    "file:///etc/passwd",
    "ftp://h/x",
    "//",
    "http://",
    "::",
    "\\\\",
    "/x",
)
_HEADERS = ("X-Repo-Commit", "ETag", "X-Linked-ETag", "X-Linked-Size", "Link", "X-Error-Code", "X-Error-Message",
            "X-Xet-Hash", "Content-Type", "Retry-After", "RateLimit", "Content-Encoding", "Content-Range")  # fmt: skip


class HubCase(NamedTuple):
    """An answer to one kind of request; the others are sound."""

    kind: str
    status: int
    headers: dict[str, str]
    content: bytes


class _Server(Listener):
    def __init__(self) -> None:
        super().__init__(_Handler)
        self.case = HubCase("", 200, {}, b"")


class _Handler(Handler):
    server: _Server

    def answer(self) -> None:
        self.read_body()
        path = self.path.partition("?")[0]
        kind = next((part for part in ("revision", "tree", "paths-info", "resolve") if f"/{part}/" in path), "revision")
        kind = "bucket" if "/api/buckets/" in path else kind
        case = self.server.case
        if kind == case.kind:
            self.send(case.status, case.content, case.headers)
        elif kind == "resolve":
            self.send(200, b"{}", {"ETag": f'"{"0" * 40}"', "X-Repo-Commit": _COMMIT})
        else:
            self.send(200, json.dumps(_ANSWERS[kind]).encode(), {"Content-Type": "application/json"})


class Hubs(Campaign[HubCase]):
    """A Hub on this machine, which answers as it should but for one kind of request."""

    def __init__(self, directory: Path) -> None:
        self._server = _Server()
        self._server.start()
        self._before = dict(os.environ)
        os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}", "HF_HUB_OFFLINE": "0"}
        os.environ |= {"HF_HUB_CACHE": str(directory / "cache"), "XDG_STATE_HOME": str(directory / "state")}
        self._agents, constants.AGENT_HARNESSES_PATH = constants.AGENT_HARNESSES_PATH, str(directory / "agents")
        self._found: list[StoredFile] = []
        self._pinned = ""

    def close(self) -> None:
        self._server.stop()
        constants.AGENT_HARNESSES_PATH = self._agents
        os.environ.clear()
        os.environ.update(self._before)

    def make(self, random: Random) -> HubCase:
        kind = random.choice([*_ANSWERS, "resolve"])
        content = b"{}"
        headers = {"Content-Type": "application/json"}
        if kind == "resolve":
            headers = {"ETag": f'"{"0" * 40}"', "X-Repo-Commit": _COMMIT}
        else:
            content = spoil(dump(mutate(parse_pairs(json.dumps(_ANSWERS[kind])), random, _VALUES)), random, 0.1)
        status = random.choice(_STATUSES) if random.random() < 0.2 else 200
        if kind == "resolve" or random.random() < 0.2:
            values = [*NUMBERS[:10], '"x"', "W/x", "", "<x>; rel=next", "a" * 5000, "GatedRepo", "é", "-1", "gzip"]
            headers[random.choice(_HEADERS)] = random.choice(values)
        if status in (301, 302, 308):
            headers["Location"] = random.choice(_LOCATIONS)
        return HubCase(kind, status, headers, b"" if status == 204 else content)

    def attempt(self, case: HubCase) -> None:
        self._server.case = case
        with open_stores() as stores:
            if case.kind == "bucket":
                self._found = list(stores.at(_BUCKET).list(_BUCKET).values())
                return
            storage = stores.at(_MODEL)
            self._pinned = storage.pin(_MODEL, None)
            self._found = list(storage.list(self._pinned).values())
        with open_stores() as stores:  # which knows nothing of that listing
            try:
                file = stores.at(_MODEL).stat(f"{self._pinned}/a/config.json")
                stores.at(_MODEL).read(file.url, 100)
            except FileNotFoundError as error:
                raise FetchError(str(error)) from error
            self._found.append(file)

    def explain_refusal(self, case: HubCase) -> str:
        if case.kind != "bucket" and self._pinned != f"{_MODEL}@{_COMMIT}":
            return f"{self._pinned} is no commit"
        for file in self._found:
            names = file.url.removeprefix(f"{_BUCKET if case.kind == 'bucket' else self._pinned}/").split("/")
            if (
                not {"", ".", ".."}.isdisjoint(names)
                or type(file.nbytes) is not int
                or file.nbytes < 0
                or not file.etag
            ):
                return f"{file}"
        return ""
