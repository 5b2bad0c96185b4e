from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from email.message import Message
from email.utils import formatdate
from html import escape
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from raymerge.pipeline.errors import CheckpointError, ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.web.client import WebClient
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, explain_broken
from raymerge.pipeline.stores.web.index import parse_index
from raymerge.pipeline.stores.web.storage import WebStorage
from tests.pipeline.stores.storage_contract import MIB, make_bytes, read_all, read_ranges
from tests.servers.faults import Fault, FaultProxy
from tests.servers.hub_http import Handler, Listener, Refusal
from tests.servers.static import NginxServer

CREDENTIALS = "user name:p@ss"


class FileServer(Listener):
    """A plain web server over a directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(FileHandler)
        self.root = root
        self.index = "html"
        """Or `json`, or empty for none."""
        self.tag = "strong"
        """Or `weak`, or `date`, or `none`."""
        self.has_ranges = True
        self.missing = 404
        self.redirect_to = ""
        """Where files are in fact."""
        self.credentials = ""
        self.seen: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class FileHandler(Handler):
    server: FileServer

    def answer(self) -> None:
        server = self.server
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        expected = f"Basic {base64.b64encode(server.credentials.encode()).decode()}"
        if server.credentials and self.headers.get("Authorization") != expected:
            raise Refusal(401, "who are you?")
        path = server.root / unquote(self.path).strip("/")
        if path.is_dir() and self.path.endswith("/") and server.index:
            return self._send_index(path)
        if not path.is_file():
            if server.missing == 200:
                return self.send(200, b"<html>home</html>", {"Content-Type": "text/html"})
            raise Refusal(server.missing, "nothing here")
        if server.redirect_to:
            return self.send(302, headers={"Location": server.redirect_to + self.path})
        if not server.has_ranges:
            return self.send(200, path.read_bytes(), {"ETag": '"fixed"'})
        try:
            return self._send_content(path)
        except FileNotFoundError:  # deleted while a client that has hung up was still being answered
            raise Refusal(server.missing, "nothing here") from None

    def _send_index(self, path: Path) -> None:
        children = sorted(path.iterdir())
        if self.server.index == "json":
            kinds = {True: "directory", False: "file"}
            return self.send_json([{"name": each.name, "type": kinds[each.is_dir()]} for each in children])
        links = ["../", "?C=N;O=D", "http://elsewhere/x", "/absolute", "#top", "..%2Fevil"]
        links += [quote(each.name) + "/" * each.is_dir() for each in children]
        text = "".join(f"<a href='{escape(link)}'>{escape(link)}</a>\n" for link in links)
        return self.send(200, text.encode(), {"Content-Type": "text/html; charset=utf-8"})

    def _send_content(self, path: Path) -> None:
        status = path.stat()
        etag, date = f"{status.st_mtime_ns:x}-{status.st_size:x}", formatdate(status.st_mtime, usegmt=True)
        if self.server.tag == "strong":
            return self.send_file(path, etag, {})
        if self.headers.get("If-Match"):
            raise Refusal(412, "not with this kind of tag")
        if (since := self.headers.get("If-Unmodified-Since")) and since != date:
            raise Refusal(412, "changed")
        extra = {"weak": {"ETag": f'W/"{etag}"'}, "date": {"ETag": "", "Last-Modified": date}, "none": {"ETag": ""}}
        return self.send_file(path, etag, extra[self.server.tag])


FILES = {
    "config.json": b"{}",
    "model.safetensors": make_bytes(9 * MIB + 5),
    "sub/deeper/with space": b"spaced",
    "sub/100%25 #1?x=y&z": b"odd",
    "ümläut": b"",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "files" / "model"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = FileServer(root.parent)
    server.start()
    yield server
    server.stop()
    assert not server.failures


@pytest.fixture
def storage() -> Iterator[WebStorage]:
    storage = WebStorage(FaultLog())
    yield storage
    storage.close()


def read_model(storage: WebStorage, url: str) -> dict[str, bytes]:
    return {name: read_all(storage, file) for name, file in storage.list(storage.pin(url, None)).items()}


@pytest.mark.parametrize("index", ["html", "json"])
@pytest.mark.parametrize("tag", ["strong", "weak", "date"])
def test_list_and_read(server: FileServer, storage: WebStorage, index: str, tag: str) -> None:
    server.index, server.tag = index, tag
    assert read_model(storage, f"{server.url}/model/") == FILES
    assert list(storage.list(f"{server.url}/model/sub")) == ["100%25 #1?x=y&z", "deeper/with space"]
    file = storage.stat(f"{server.url}/model/config.json")
    assert file == storage.list(f"{server.url}/model")["config.json"]
    storage.check_unchanged(file)
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{server.url}/model/missing")
    spaced = storage.stat(f"{server.url}/model/sub/deeper/with space")
    assert read_all(storage, spaced) == b"spaced"


@pytest.mark.parametrize("missing", [404, 403, 200])
def test_without_an_index(server: FileServer, storage: WebStorage, root: Path, missing: int) -> None:
    server.index, server.missing = "", missing
    assert list(storage.list(f"{server.url}/model")) == ["config.json", "model.safetensors"]
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "../config.json"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "part-1.safetensors").write_bytes(b"12345678")
    (root / "part-2.safetensors").write_bytes(b"1234567")
    found = storage.list(f"{server.url}/model")
    assert {name: found[name].nbytes for name in found if name.startswith("part")} == {
        "part-1.safetensors": 8,
        "part-2.safetensors": 7,
    }


def test_nothing_there(server: FileServer, storage: WebStorage) -> None:
    assert storage.list(f"{server.url}/elsewhere") == {}
    server.missing = 403
    with pytest.raises(FetchError, match=r"elsewhere/config\.json: 403.*name and a password"):
        storage.list(f"{server.url}/elsewhere")


@pytest.mark.parametrize("tag", ["strong", "weak", "date"])
@pytest.mark.parametrize("is_read", [False, True])
def test_replaced(server: FileServer, storage: WebStorage, root: Path, tag: str, is_read: bool) -> None:
    server.tag = tag
    file = storage.list(f"{server.url}/model")["model.safetensors"]
    if is_read:
        assert read_all(storage, file) == FILES["model.safetensors"]
    path = root / "model.safetensors"
    path.write_bytes(FILES["model.safetensors"][::-1])
    ahead = time.time() + 10
    os.utime(path, (ahead, ahead))
    with pytest.raises(FetchError, match=r"model\.safetensors: changed"):
        read_ranges(storage, [ByteRange(file, 0, 10)])
    with pytest.raises(FetchError, match=r"model\.safetensors: changed"):
        storage.check_unchanged(file)


@pytest.mark.parametrize("content", [b"short", make_bytes(10 * MIB)], ids=["shorter", "longer"])
def test_another_size(server: FileServer, storage: WebStorage, root: Path, content: bytes) -> None:
    server.tag = "weak"
    file = storage.list(f"{server.url}/model")["model.safetensors"]
    (root / "model.safetensors").write_bytes(content)
    with pytest.raises(FetchError, match=rf"changed.*expected {file.nbytes:,} bytes.*found {len(content):,} bytes"):
        read_ranges(storage, [ByteRange(file, MIB, MIB + 10)])
    (root / "model.safetensors").unlink()
    with pytest.raises(FetchError, match=r"model\.safetensors.*404"):
        read_ranges(storage, [ByteRange(file, MIB, MIB + 10)])
    with pytest.raises(FetchError, match=r"model\.safetensors.*gone"):
        storage.check_unchanged(file)


def test_no_way_to_tell_a_change_is_said_before_the_merge(server: FileServer, storage: WebStorage) -> None:
    server.tag = "none"
    with pytest.raises(FetchError, match=r"neither ETag nor Last-Modified.*download the model"):
        storage.list(f"{server.url}/model")


def test_a_listing_without_end(server: FileServer, storage: WebStorage, root: Path) -> None:
    for number in range(150):
        (root / f"dir{number}").mkdir()
    with pytest.raises(FetchError, match="more than 100 directories"):
        storage.list(f"{server.url}/model")


def test_no_ranges_is_said_before_the_merge(server: FileServer, storage: WebStorage) -> None:
    server.has_ranges = False
    with pytest.raises(FetchError, match=r"model\.safetensors.*sends the whole file.*download the model"):
        storage.list(f"{server.url}/model")
    file = StoredFile(f"{server.url}/model/config.json", 2, '"fixed"')
    assert read_all(storage, file) == b"{}"


def test_credentials_stay_with_their_host_and_out_of_messages(
    server: FileServer, storage: WebStorage, root: Path
) -> None:
    other = FileServer(root.parent)
    other.start()
    server.credentials, server.redirect_to = CREDENTIALS, other.url.replace("127.0.0.1", "localhost")
    url = f"{server.url}/model".replace("://", "://user%20name:p%40ss@")
    try:
        assert read_model(storage, url) == FILES
        assert other.seen
        assert not any("authorization" in headers for headers in other.seen)
        assert all("authorization" in headers for headers in server.seen)
        server.credentials = "changed"
        with pytest.raises(FetchError, match=r"://\*\*\*@.*401") as caught:
            storage.stat(f"{url}/config.json")
        assert "ss@" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert storage.store_name(url) == server.url
    finally:
        other.stop()


def test_redirects_that_never_end(server: FileServer, storage: WebStorage) -> None:
    server.redirect_to = server.url
    with pytest.raises(FetchError, match="redirected more than 5 times"):
        storage.stat(f"{server.url}/model/config.json")


@pytest.mark.parametrize(
    "fault", [Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.TOO_MANY, Fault.RESET, Fault.RESET_IN_BODY, Fault.SHORT_BODY]
)
def test_faults(server: FileServer, storage: WebStorage, fault: Fault) -> None:
    with FaultProxy(server.url, is_s3=False) as proxy:
        file = storage.list(f"{proxy.url}/model")["model.safetensors"]
        proxy.script([fault, fault])
        assert read_all(storage, file) == FILES["model.safetensors"]
        assert proxy.injected[fault] == 2
        storage.close()
    assert sum(count for _, count in storage.faults.drain()) == 2


def test_connections_are_used_again(server: FileServer, storage: WebStorage) -> None:
    with FaultProxy(server.url, is_s3=False) as proxy:
        url = f"{proxy.url}/model/model.safetensors"
        file = storage.stat(url)
        for start in range(20):
            assert read_ranges(storage, [ByteRange(file, start, start + 5)]) == [
                FILES["model.safetensors"][start : start + 5]
            ]
        assert len(proxy._connections) == 1
        storage.close()


def test_through_a_proxy(server: FileServer, storage: WebStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(server.url, is_s3=False) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://user:secret@"))
        monkeypatch.setenv("no_proxy", "")
        with contextlib.suppress(FetchError, FileNotFoundError):
            storage.stat("http://models.invalid/model/config.json")
        (request,) = proxy.requests
        assert request.path.startswith("http://models.invalid/")
        assert request.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:secret').decode()}"
        assert request.headers["host"] == "models.invalid"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert storage.stat(f"{server.url}/model/config.json").nbytes == 2
        assert len(proxy.requests) == 1
        storage.close()


def test_waits_that_are_asked_for(storage: WebStorage) -> None:
    def wait(**headers: str) -> float | None:
        message = Message()
        for name, value in headers.items():
            message[name.replace("_", "-")] = value
        fault = storage.classify(RefusalError(429, message, b""))
        assert fault is not None
        return fault.retry_after

    assert wait(Retry_After="7") == 7
    assert wait(Retry_After=formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert wait(RateLimit='"api";r=0;t=55') == 55
    assert wait(RateLimit='"api";r=3;t=55') is None
    assert wait(Retry_After="soon") is None
    assert wait() is None


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_certificates_are_checked(
    server: FileServer, storage: WebStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = FileServer(server.root)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    secure.handle_error = lambda *_: None  # type: ignore[method-assign]
    secure.start()
    url = f"{secure.url}/model/config.json".replace("http:", "https:")
    try:
        with pytest.raises(FetchError, match=r"certificate of 127\.0\.0\.1 is not trusted.*SSL_CERT_FILE"):
            storage.stat(url)
        storage.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert read_all(storage, storage.stat(url)) == b"{}"
        secure.redirect_to = server.url
        with pytest.raises(FetchError, match="redirected from https to http"):
            storage.stat(url)
    finally:
        secure.stop()


def test_no_such_host(storage: WebStorage) -> None:
    with pytest.raises(FetchError, match=r"no host models\.invalid"):
        storage.stat("http://models.invalid/config.json")


def test_nothing_can_be_written(storage: WebStorage) -> None:
    for write in (
        lambda: storage.open_writer("http://host/a", 1),
        lambda: storage.delete("http://host/a"),
        lambda: storage.lock("http://host/a"),
    ):
        with pytest.raises(OutputError, match="http:// cannot be written to"):
            write()


def test_urls(storage: WebStorage) -> None:
    assert storage.absolute("http://host/a/") == "http://host/a"
    with pytest.raises(ConfigError, match="%3F"):
        storage.absolute("http://host/a?b=c")
    with pytest.raises(CheckpointError, match="only a Hub repository"):
        storage.pin("http://host/a", "main")
    with pytest.raises(CheckpointError, match="hf://org/name"):
        storage.pin("https://huggingface.co/org/name/tree/main", None)


def test_nginx(storage: WebStorage, root: Path) -> None:
    with NginxServer(root.parent) as nginx:
        files = storage.list(f"{nginx.endpoint}/model")
        assert {name: read_all(storage, file) for name, file in files.items()} == {
            name: FILES[name] for name in ("config.json", "model.safetensors")
        }
        (root / "model.safetensors").write_bytes(b"replaced")
        with pytest.raises(FetchError, match="changed"):
            read_all(storage, files["model.safetensors"])


def test_bodies_are_asked_for_as_they_are(server: FileServer, storage: WebStorage) -> None:
    storage.stat(f"{server.url}/model/config.json")
    assert server.seen[-1]["accept-encoding"] == "identity"


def test_an_index_never_leads_out_of_its_directory() -> None:
    links = ["..", "a/../../b", "/m/ok", "http://host/m/fine", "http://other/m/no", "%2e%2e", "x%2Fy", "./", "sub/x"]
    page = "".join(f'<a href="{link}">x</a>' for link in links).encode()
    assert parse_index("text/html", page, "http://host/m/") == [("ok", False), ("fine", False)]
    listing = json.dumps([{"name": "../x", "type": "file"}, {"name": "a", "type": "file"}]).encode()
    assert parse_index("application/json", listing, "http://host/m/") == [("a", False)]
    assert parse_index("application/json", b'{"error": 1}', "http://host/m/") == []


def test_an_endless_answer_is_not_read(server: FileServer) -> None:
    client = WebClient()
    answer = client.open("GET", f"{server.url}/model/model.safetensors", {})
    with pytest.raises(BrokenError, match=re.escape("more than 1,000 bytes")), answer:
        answer.read(1000)
    client.close()


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    plain, secure = "http://models.org/a", "https://models.org/a"

    def explain(url: str) -> str:
        return str(explain_broken(ConnectionRefusedError(), url))

    assert explain(plain) == explain(secure) == "models.org refuses connections"
    monkeypatch.setenv("https_proxy", "http://me:hidden@10.0.0.1:3128")
    through = "models.org, or the proxy 10.0.0.1:3128 that it is asked through ({}; no_proxy exempts hosts), refuses"
    assert explain(secure).startswith(through.format("https_proxy"))
    assert explain(plain) == "models.org refuses connections"
    monkeypatch.setenv("all_proxy", "http://me:hidden@10.0.0.2:3128")
    assert explain(plain).startswith(through.format("all_proxy").replace("0.1", "0.2"))
    monkeypatch.setenv("no_proxy", "models.org")
    assert explain(plain) == explain(secure) == "models.org refuses connections"
