"""An S3 server that keeps nothing but small files, for benchmarks: what they measure is the client."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape, unescape

from tests.servers import Reader, ServerProcess, free_ports, parse_headers
from tests.servers.local_server import OPENER, LocalServer, answers
from tests.servers.s3_listing import make_listing

KEPT_NBYTES = 1 << 20
"""Objects that are put in one piece, and are no larger, can be read."""


class NullSink(LocalServer):
    """An S3 server, in a process of its own, that throws away what is written to it and remembers how much it was.

    It answers CreateMultipartUpload, UploadPart, CompleteMultipartUpload, AbortMultipartUpload, PutObject (also with
    If-Match and If-None-Match), HeadObject, DeleteObject(s), ListMultipartUploads and ListObjectsV2 (all in one page),
    and GetObject for small objects.
    Every bucket exists; no signature and no checksum is checked.
    """

    def __init__(self) -> None:
        super().__init__("null-sink-")
        self.start()

    def _start(self) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        self._process = ServerProcess(
            [sys.executable, "-m", "tests.servers.sink", str(port)],
            directory=self._directory,
            environment={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self._process.wait_until(lambda: answers(self.endpoint + "/.state"))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each complete object, by BUCKET/KEY."""
        return {str(name): int(nbytes) for name, nbytes in self._state()["sizes"].items()}

    def uploads(self) -> list[str]:
        """Return BUCKET/KEY of each multipart upload under way."""
        return [str(name) for name in self._state()["uploads"]]

    def clear(self) -> None:
        """Forget all objects and uploads."""
        OPENER.open(urllib.request.Request(self.endpoint + "/.state", method="DELETE"), timeout=5).close()

    def _state(self) -> Any:
        with OPENER.open(self.endpoint + "/.state", timeout=5) as answer:
            return json.load(answer)


@dataclass(frozen=True)
class _Object:
    nbytes: int
    etag: str
    content: bytes | None
    """None where it was thrown away."""
    written_at: float


@dataclass
class _Upload:
    name: str
    """BUCKET/KEY."""
    parts: dict[int, int] = field(default_factory=dict)
    """Bytes by part number."""


@dataclass(frozen=True)
class _Request:
    method: str
    name: str
    """BUCKET/KEY, or BUCKET."""
    parameters: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes | None
    """None where it was thrown away."""
    nbytes: int
    """Of the body."""

    @property
    def key(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class _Answer:
    status: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class _Sink:
    """What the process of a `NullSink` remembers."""

    def __init__(self) -> None:
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, _Upload] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def serve(self, port: int) -> None:
        """Answer until killed."""
        with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError, EOFError):
            source = _Source(connection)
            while request := source.read_request():
                with self._lock:
                    answer = self._answer(request)
                headers = {"Content-Length": str(len(answer.body)), **answer.headers}
                lines = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in headers.items())]
                sent = b"" if request.method == "HEAD" else answer.body
                connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + sent)

    def _answer(self, request: _Request) -> _Answer:
        if request.name == ".state":
            return self._answer_state(request)
        upload_id = request.parameters.get("uploadId", "")
        if upload_id:
            if upload_id not in self._uploads:
                return _error("404 Not Found", "NoSuchUpload")
            return self._answer_upload(request, upload_id)
        if "/" in request.name and request.method != "POST":
            return self._answer_object(request)
        match request.method:
            case "POST" if "uploads" in request.parameters:
                upload_id = f"upload-{next(self._numbers)}"
                self._uploads[upload_id] = _Upload(request.name)
                return _ok("InitiateMultipartUploadResult", Key=request.key, UploadId=upload_id)
            case "POST" if "delete" in request.parameters:
                keys = re.findall(r"<Key>(.*?)</Key>", (request.body or b"").decode())
                for key in keys:
                    self._objects.pop(f"{request.name}/{unescape(key)}", None)
                return _ok("DeleteResult", "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys))
            case "PUT" | "HEAD":  # CreateBucket, HeadBucket
                return _Answer("200 OK")
            case "GET" if "uploads" in request.parameters:
                return self._list_uploads(request.name)
            case "GET":
                return self._list_objects(request.name, request.parameters.get("prefix", ""))
        return _error("405 Method Not Allowed", "MethodNotAllowed")

    def _answer_state(self, request: _Request) -> _Answer:
        if request.method == "DELETE":
            self._objects.clear()
            self._uploads.clear()
        sizes = {name: found.nbytes for name, found in self._objects.items()}
        return _Answer("200 OK", json.dumps({"sizes": sizes, "uploads": self._names_of_uploads()}).encode())

    def _names_of_uploads(self) -> list[str]:
        return [upload.name for upload in self._uploads.values()]

    def _answer_upload(self, request: _Request, upload_id: str) -> _Answer:
        parts = self._uploads[upload_id].parts
        match request.method:
            case "PUT":
                parts[int(request.parameters["partNumber"])] = request.nbytes
                return _Answer("200 OK", headers={"ETag": f'"{_etag(request.name, request.nbytes)}"'})
            case "DELETE":
                del self._uploads[upload_id]
                return _Answer("204 No Content")
            case "POST":
                numbers = [
                    int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", request.body or b"")
                ]
                if not numbers or not parts.keys() >= set(numbers):
                    return _error("404 Not Found", "InvalidPart")
                if refusal := self._check_conditions(request):
                    return refusal
                del self._uploads[upload_id]
                etag = self._add(request.name, sum(parts[number] for number in numbers), None)
                return _ok("CompleteMultipartUploadResult", Key=request.key, ETag=f"&quot;{etag}&quot;")
        return _error("405 Method Not Allowed", "MethodNotAllowed")

    def _answer_object(self, request: _Request) -> _Answer:
        found = self._objects.get(request.name)
        if request.method == "PUT":
            if refusal := self._check_conditions(request):
                return refusal
            return _Answer("200 OK", headers={"ETag": f'"{self._add(request.name, request.nbytes, request.body)}"'})
        if request.method == "DELETE":
            self._objects.pop(request.name, None)
            return _Answer("204 No Content")
        if found is None:
            return _error("404 Not Found", "NoSuchKey")
        if request.headers.get("if-match", found.etag).strip('"') != found.etag:
            return _error("412 Precondition Failed", "PreconditionFailed")
        headers = {"ETag": f'"{found.etag}"', "Last-Modified": formatdate(found.written_at, usegmt=True)}
        if request.method == "HEAD":
            return _Answer("200 OK", headers={"Content-Length": str(found.nbytes), **headers})
        if found.content is None:
            return _error("405 Method Not Allowed", "NotKept")
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if bounds is None:
            return _Answer("200 OK", found.content, headers)
        start, stop = int(bounds[1]), min(int(bounds[2]) + 1, found.nbytes)
        if start >= stop:
            return _error("416 Range Not Satisfiable", "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.nbytes}"
        return _Answer("206 Partial Content", found.content[start:stop], headers)

    def _check_conditions(self, request: _Request) -> _Answer | None:
        """Return a refusal where a write's conditions do not hold."""
        found = self._objects.get(request.name)
        if request.headers.get("if-none-match") == "*" and found:
            return _error("412 Precondition Failed", "PreconditionFailed")
        if_match = request.headers.get("if-match")
        if if_match is not None and (found is None or if_match.strip('"') != found.etag):
            return _error("412 Precondition Failed", "PreconditionFailed")
        return None

    def _add(self, name: str, nbytes: int, content: bytes | None) -> str:
        etag = _etag(name, nbytes) if content is None else hashlib.md5(content, usedforsecurity=False).hexdigest()
        self._objects[name] = _Object(nbytes, etag, content, time.time())
        return etag

    def _list_objects(self, bucket: str, prefix: str) -> _Answer:
        start = f"{bucket}/{prefix}"
        found = [
            (name.partition("/")[2], each.nbytes, each.etag)
            for name, each in sorted(self._objects.items())
            if name.startswith(start)
        ]
        return _Answer("200 OK", make_listing(bucket, found, prefix=prefix).encode(), _XML)

    def _list_uploads(self, bucket: str) -> _Answer:
        items = (
            f"<Upload><Key>{escape(upload.name.partition('/')[2])}</Key><UploadId>{upload_id}</UploadId></Upload>"
            for upload_id, upload in self._uploads.items()
            if upload.name.startswith(f"{bucket}/")
        )
        return _ok("ListMultipartUploadsResult", "".join(items))


class _Source(Reader):
    """What a client sends."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._nowhere = bytearray(_DISCARD_NBYTES)

    def read_request(self) -> _Request | None:
        """Return the next request, its body read or thrown away; None at the end of the stream."""
        head = self.read_head()
        if not head:
            return None
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        headers = parse_headers(head)
        if "100-continue" in headers.get("expect", "").lower():
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        path, _, query = target.partition("?")
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        nbytes = int(headers.get("content-length", 0))
        is_plain = "content-encoding" not in headers and "transfer-encoding" not in headers
        body = None
        if method == "POST" or (is_plain and nbytes <= KEPT_NBYTES and "uploadId" not in parameters):
            body = self._read(nbytes)
        else:
            nbytes = self._discard_body(headers)
        return _Request(method, unquote(path).strip("/"), parameters, headers, body, nbytes)

    def _read(self, nbytes: int) -> bytes:
        """Return exactly so many bytes."""
        pieces = []
        while nbytes:
            pieces.append(self.read1(nbytes))
            if not pieces[-1]:
                raise EOFError
            nbytes -= len(pieces[-1])
        return b"".join(pieces)

    def _discard_body(self, headers: Mapping[str, str]) -> int:
        """Throw a body away, and return how many bytes an object made of it has."""
        nbytes = 0
        if "chunked" in headers.get("transfer-encoding", ""):
            while chunk_nbytes := int(self.readline().split(b";")[0], 16):
                self._discard(chunk_nbytes)
                nbytes += chunk_nbytes
                self.readline()
            while self.readline() not in (b"\r\n", b""):
                pass
        else:
            nbytes = int(headers.get("content-length", 0))
            self._discard(nbytes)
        return int(headers.get("x-amz-decoded-content-length", nbytes))

    def _discard(self, nbytes: int) -> None:
        nbytes -= len(self.take_ahead(nbytes))
        while nbytes:
            # with MSG_TRUNC the kernel drops what has arrived, and copies nothing
            received = self._connection.recv_into(self._nowhere, min(nbytes, _DISCARD_NBYTES), socket.MSG_TRUNC)
            if not received:
                raise EOFError
            nbytes -= received


_DISCARD_NBYTES = 1 << 20
_XML = {"Content-Type": "application/xml"}


def _etag(name: str, nbytes: int) -> str:
    return hashlib.md5(f"{name} {nbytes}".encode(), usedforsecurity=False).hexdigest()


def _ok(element: str, inner: str = "", **fields: str) -> _Answer:
    inner += "".join(
        f"<{name}>{value if value.startswith('&') else escape(value)}</{name}>" for name, value in fields.items()
    )
    text = f'<{element} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</{element}>'
    return _Answer("200 OK", f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), _XML)


def _error(status: str, code: str) -> _Answer:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return _Answer(status, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), _XML)


if __name__ == "__main__":
    _Sink().serve(int(sys.argv[1]))
