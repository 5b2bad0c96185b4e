"""The test Hub, asked in plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers.hub import HubServer
from tests.servers.hub_clients import CONFIG, WEIGHTS, Answer, ask
from tests.servers.hub_git import make_commit, make_lfs_entry


def test_tokens_and_stale_signatures_are_refused_by_the_storage(hub: HubServer) -> None:
    hub.upload("me/model", {"model.safetensors": WEIGHTS})
    target = f"{hub.url}/me/model/resolve/main/model.safetensors"

    def resolve() -> str:
        answer = ask(target)
        assert answer.status == 302
        return answer.headers["Location"]

    good = resolve()
    assert ask(good).content == WEIGHTS
    assert urlsplit(good).hostname != urlsplit(hub.url).hostname
    assert ask(good, headers={"Authorization": "Bearer hf_writer"}).status == 400
    assert hub.leaked_tokens == ["Bearer hf_writer"]
    assert ask(good.replace("Expires=", "Expires=9")).status == 403
    assert ask(good, "PUT", b"other").status == 403
    hub.signature_seconds = -1
    assert ask(resolve()).status == 403
    hub.signature_seconds = 60
    assert ask(resolve()).status == 200
    hub.expire_urls()
    assert ask(good).status == 403
    assert ask(resolve(), "HEAD").headers["Content-Length"] == str(len(WEIGHTS))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_ranges_and_preconditions(hub: HubServer, name: str) -> None:
    content = {"config.json": CONFIG, "model.safetensors": WEIGHTS}[name]
    hub.upload("me/model", {name: content})
    url = f"{hub.url}/me/model/resolve/main/{name}"
    head = ask(url, "HEAD")
    etag, is_lfs = head.headers["X-Linked-ETag"] or head.headers["ETag"], name == "model.safetensors"
    assert head.headers["X-Repo-Commit"] == hub.get_head("me/model")
    assert (head.headers["X-Linked-Size"], head.status) == ((str(len(content)), 302) if is_lfs else (None, 200))
    url = head.headers["Location"] or url
    nbytes = len(content)
    cases = {"0-0": (0, 1), "3-9": (3, 10), "5-": (5, nbytes), "-4": (nbytes - 4, nbytes), f"7-{nbytes}": (7, nbytes)}
    for text, (start, stop) in cases.items():
        answer = ask(url, headers={"Range": f"bytes={text}"})
        assert (answer.status, answer.content) == (206, content[start:stop])
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{nbytes}"
        assert answer.headers["ETag"] == etag
    beyond = ask(url, headers={"Range": f"bytes={nbytes}-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{nbytes}")
    assert ask(url, headers={"Range": "bytes=0-1,4-5"}).content == content
    assert ask(url, headers={"If-Match": etag}).status == 200
    assert ask(url, headers={"If-Match": '"other"'}).status == 412
    assert ask(url, headers={"If-None-Match": etag}).status == 304
    assert ask(url, headers={"If-None-Match": '"other"'}).content == content
    assert ask(url, headers={"If-Range": '"other"', "Range": "bytes=0-1"}).status == 200


def test_the_rate_limit_says_when_to_come_back(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{hub.url}/api/models/me/model"
    hub.limit_rate(after=2, retry_after=60)
    answers = [ask(url) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 429, 429]
    assert answers[2].headers["Retry-After"] == "60"
    assert answers[2].headers["RateLimit"] == '"api";r=0;t=60'
    monkeypatch.setattr("time.monotonic", lambda now=time.monotonic: now() + 61)
    assert ask(url).status == 200
    assert [request.status for request in hub.requests] == [200, 200, 429, 429, 200]
    assert {request[:3] for request in hub.requests} == {
        ("GET", "/api/models/me/model", 200),
        ("GET", "/api/models/me/model", 429),
    }
    hub.reset_requests()
    assert hub.requests == []


def start_upload(hub: HubServer, content: bytes, transfers: list[str] | None = None) -> dict[str, Any]:
    """Ask for the upload of one object; return its entry in the answer."""
    wanted = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    body = {"operation": "upload", "objects": [wanted], "transfers": transfers or ["basic"], "hash_algo": "sha256"}
    answer = ask(f"{hub.url}/me/model.git/info/lfs/objects/batch", "POST", body)
    assert answer.status == 200
    [entry] = json.loads(answer.content)["objects"]
    assert isinstance(entry, dict)
    return entry


def send_commit(hub: HubServer, *lines: tuple[str, object], parent: str | None = None) -> Answer:
    """Send a commit to main."""
    header = {"summary": "Test", **({"parentCommit": parent} if parent else {})}
    rows = [{"key": key, "value": value} for key, value in (("header", header), *lines)]
    body = "\n".join(map(json.dumps, rows)).encode()
    return ask(f"{hub.url}/api/models/me/model/commit/main", "POST", body)


def test_objects_have_the_announced_content(hub: HubServer) -> None:
    content = b"c" * 1000
    oid = hashlib.sha256(content).hexdigest()
    line = ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 1000})
    actions = start_upload(hub, content)["actions"]
    verify = {"oid": oid, "size": 1000}
    assert ask(actions["upload"]["href"], "PUT", b"d" * 1000).status == 400
    assert ask(actions["verify"]["href"], "POST", verify).status == 404
    assert send_commit(hub, line).status == 400
    assert ask(actions["upload"]["href"], "PUT", content).status == 200
    assert ask(actions["verify"]["href"], "POST", {**verify, "size": 1}).status == 422
    assert ask(actions["verify"]["href"], "POST", verify).status == 200
    assert "actions" not in start_upload(hub, content)
    assert send_commit(hub, line).status == 200
    assert hub.read_files("me/model")["x.bin"] == content
    body = {"operation": "download", "objects": [verify, {"oid": "0" * 64, "size": 1}]}
    found, missing = json.loads(ask(f"{hub.url}/me/model.git/info/lfs/objects/batch", "POST", body).content)["objects"]
    assert ask(found["actions"]["download"]["href"]).content == content
    assert missing["error"]["code"] == 404
    assert not list(hub.objects.directory.glob("incoming-*"))


def test_parts_are_joined_only_if_all_is_there(hub: HubServer) -> None:
    hub.part_nbytes = 400
    content = bytes(range(250)) * 4
    assert "header" not in start_upload(hub, content)["actions"]["upload"]  # who does not know of parts gets none
    upload = start_upload(hub, content, ["basic", "multipart"])["actions"]["upload"]
    urls = [upload["header"][f"{number:05d}"] for number in (1, 2, 3)]
    assert upload["header"]["chunk_size"] == "400"
    oid = hashlib.sha256(content).hexdigest()

    def complete(parts: list[str | None]) -> int:
        rows = [{"partNumber": number, "etag": etag} for number, etag in enumerate(parts, 1)]
        return ask(upload["href"], "POST", {"oid": oid, "parts": rows}).status

    pieces = [content[:400], content[400:800], content[800:]]
    etags = [ask(url, "PUT", piece).headers["ETag"] for url, piece in zip(urls[:2], pieces, strict=False)]
    assert complete([*etags]) == 400
    wrong = ask(urls[2], "PUT", b"w" * 200).headers["ETag"]
    assert complete([*etags, wrong]) == 422
    etags.append(ask(urls[2], "PUT", pieces[2]).headers["ETag"])
    assert complete([*etags[:2], wrong]) == 400
    assert complete([*etags]) == 200
    assert complete([*etags]) == 200  # as when the answer was lost
    assert "actions" not in start_upload(hub, content)


def test_upload_modes_follow_attributes_size_and_sample(hub: HubServer) -> None:
    hub.upload("me/model", {"known.txt": b"known"})

    def get_mode(path: str, nbytes: int = 100, sample: bytes = b"text", attributes: str | None = None) -> str:
        file = {"path": path, "size": nbytes, "sample": base64.b64encode(sample).decode()}
        body = {"files": [file], **({"gitAttributes": attributes} if attributes else {})}
        answer = ask(f"{hub.url}/api/models/me/model/preupload/main", "POST", body)
        return str(json.loads(answer.content)["files"][0]["uploadMode"])

    assert get_mode("deep/model.safetensors") == "lfs"
    assert get_mode("model.safetensors", nbytes=0) == "regular"
    assert get_mode("saved_model/deep/x") == "lfs"
    assert get_mode("tokenizer.json", nbytes=10 << 20) == "regular"
    assert get_mode("tokenizer.json", nbytes=(10 << 20) + 1) == "lfs"
    assert get_mode("model.gguf", sample=b"GGUF\3\0\0\0") == "lfs"
    assert get_mode("model.safetensors", attributes="*.txt filter=lfs") == "regular"
    binary = ("file", {"path": "x.bin", "content": base64.b64encode(b"x").decode(), "encoding": "base64"})
    assert send_commit(hub, binary).status == 400
    hub.upload("me/model", {"odd.dat": b"\0binary"})
    assert get_mode("odd.dat") == "lfs"
    assert hub.read_files("me/model")[".gitattributes"].endswith(b"\nodd.dat filter=lfs diff=lfs merge=lfs -text\n")


def test_branches_move_and_old_commits_stay(hub: HubServer) -> None:
    first = hub.upload("me/model", {"a.txt": b"1"})
    second = hub.upload("me/model", {"a.txt": b"2"})
    hub.move_branch("me/model", "main", first)
    for revision, content in {"main": b"1", first: b"1", second: b"2", "refs%2Fheads%2Fmain": b"1"}.items():
        assert ask(f"{hub.url}/me/model/resolve/{revision}/a.txt").content == content
    line = ("file", {"path": "a.txt", "content": "3"})
    assert send_commit(hub, line, parent=second).status == 412
    assert send_commit(hub, line, parent=first).status == 200
    assert hub.read_files("me/model")["a.txt"] == b"3"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", "/api/repos/create", b"[]", 400),
        ("POST", "/api/repos/create", {"name": 3}, 400),
        ("POST", "/api/repos/create", {"name": "..", "organization": "me"}, 400),
        ("POST", "/api/repos/create", {"name": "a/b", "organization": "me"}, 400),
        ("POST", "/api/repos/create", {"name": "x", "type": "dataset"}, 400),
        ("DELETE", "/api/repos/delete", {"name": "none", "organization": "me"}, 404),
        ("POST", "/api/models/me/model/branch/..%2Fx", {}, 400),
        ("POST", "/api/models/me/model/branch/main", {}, 409),
        ("POST", "/api/models/me/model/branch/x", {"startingPoint": "nope"}, 404),
        ("DELETE", "/api/models/me/model/branch/main", None, 403),
        ("GET", "/api/models/me/model/tree/main?cursor=%ff", None, 400),
        ("GET", "/api/models/me/model?expand=nope", None, 400),
        ("GET", "/api/models/me/none/tree/main", None, 404),
        ("GET", "/me/model/resolve/main/..%2F..%2Fetc%2Fpasswd", None, 404),
        ("GET", "/me/model/resolve/%0d%0aX-Evil:%201/a", None, 404),
        ("GET", "/elsewhere", None, 404),
        ("POST", "/api/models/me/model/preupload/main", {"files": [3]}, 400),
        ("POST", "/api/models/me/model/preupload/main", {"files": [{"path": "../x", "size": 1, "sample": ""}]}, 400),
        ("POST", "/api/models/me/model/preupload/main", {"files": [{"path": "x", "size": 1, "sample": "?"}]}, 400),
        ("POST", "/api/models/me/model/commit/main?create_pr=1", b'{"key":"header","value":{"summary":"x"}}', 400),
        ("POST", "/api/models/me/model/commit/nope", b'{"key":"header","value":{"summary":"x"}}', 404),
        ("POST", "/api/models/me/model/commit/main", b'{"key":"file","value":{}}', 400),
        ("POST", "/api/models/me/model/commit/main", b"", 400),
        ("POST", "/me/model.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{"oid": "../x"}]}, 400),
        ("POST", "/me/model.git/info/lfs/objects/batch", {"operation": "drop", "objects": [{}]}, 400),
        ("POST", "/api/complete_multipart?upload=x", {"oid": "x", "parts": []}, 403),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(hub: HubServer, method: str, path: str, body: object, status: int) -> None:
    before = hub.get_head("me/model")
    answer = ask(hub.url + path, method, body)
    assert (answer.status, "error" in json.loads(answer.content)) == (status, True)
    assert "X-Evil" not in answer.headers
    assert (hub.get_head("me/model"), list(hub.repos)) == (before, ["me/model"])


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", ".git/config", "a\\b", "a\nb", "", ".gitattributes/x"])
def test_no_commit_has_paths_that_lead_elsewhere(hub: HubServer, path: str) -> None:
    assert send_commit(hub, ("file", {"path": path, "content": "x"})).status == 400
    assert list(hub.read_files("me/model")) == [".gitattributes"]


@pytest.mark.parametrize("header", [{"Content-Length": "x"}, {"Content-Length": "-1"}])
def test_bodies_of_unknown_length_are_refused(hub: HubServer, header: dict[str, str]) -> None:
    assert ask(f"{hub.url}/api/models/me/model", headers=header).status == 400
    upload = start_upload(hub, WEIGHTS)["actions"]["upload"]["href"]
    assert ask(upload, "PUT", headers={"Transfer-Encoding": "chunked"}, body=b"0\r\n\r\n").status == 411


def test_connections_are_kept_also_after_refusals(hub: HubServer) -> None:
    [upload] = [start_upload(hub, WEIGHTS)["actions"]["upload"]["href"]]
    host = urlsplit(upload).netloc
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.connect()
    socket = connection.sock
    statuses = []
    for target in (upload + "0", upload, upload):
        connection.request("PUT", target.partition(host)[2], WEIGHTS)
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
        assert connection.sock is socket
    connection.close()
    assert statuses == [403, 200, 200]


def test_nothing_runs_after_the_end(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with HubServer(tmp_path / "hub") as hub:
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
        connection.request("GET", "/elsewhere")
        connection.getresponse().read()
    assert set(threading.enumerate()) <= threads, "that of the connection, too, which the client keeps open"
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(f"{hub.url}/api/whoami-v2")


def test_failures_of_the_hub_itself_fail_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hub: HubServer) -> None:
        with hub:
            monkeypatch.setattr(hub, "take_quota", lambda: 1 / 0)
            assert ask(f"{hub.url}/api/whoami-v2").status == 500

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        fail(HubServer(tmp_path / "hub"))


def test_equal_commits_have_ids_of_their_own() -> None:
    files = {"a.bin": make_lfs_entry("0" * 64, 1)}
    oids = {make_commit(None, files, "same", "", "me").oid for _ in range(3)}
    assert all(len(oid) == 40 for oid in oids)
