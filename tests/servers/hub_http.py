"""What the two listeners of the test Hub share: connections, bodies, refusals, ranges."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

FieldT = TypeVar("FieldT")
NO_LINES = {ord("\r"): " ", ord("\n"): " "}
MAX_JSON_NBYTES = 64 << 20


class Request(NamedTuple):
    """One request as it was answered; the path is without its query."""

    method: str
    path: str
    status: int
    nbytes: int = 0
    """Of the body that was sent."""


class Refusal(Exception):  # noqa: N818
    """An answer other than success, with the headers the Hub's clients look at."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.fields = {"error": message}
        """The body of the answer."""
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **(headers or {})}


class Listener(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1 that keeps what it was asked and stops at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[Request] = []
        self.failures: list[str] = []
        """Tracebacks of what went wrong in the server itself."""
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._loop = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Close the port and every open connection, and wait for their threads."""
        self.shutdown()
        self.server_close()
        self._loop.join()
        for connection in self._connections.values():
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._connections:
            thread.join(timeout=30)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections = {thread: each for thread, each in self._connections.items() if thread.is_alive()}
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        thread.start()
        self._connections[thread] = request

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            self.failures.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """One connection; subclasses say in `answer` what a request gets."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener
    _num_sent = 0

    def answer(self) -> None:
        """Answer the request with one of the `send_` methods, or raise a `Refusal`."""
        raise NotImplementedError

    def _handle(self) -> None:
        self._chunks: Iterator[bytes] = iter(())
        self._has_answered = False
        self._num_sent = 0
        try:
            try:
                self._chunks = self._read_chunks(
                    self._parse_nbytes(self.headers.get("Content-Length", "0").encode(), 10)
                )
                self.answer()
            except Refusal as refusal:
                self.send_refusal(refusal)
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                self.server.failures.append(traceback.format_exc())
                self.close_connection = True
                if not self._has_answered:
                    self.send_refusal(
                        Refusal(500, "Internal Error - We're working hard to fix this as soon as possible!")
                    )
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep the request, before its answer leaves."""
        path = str(getattr(self, "path", "")).partition("?")[0]
        self.server.requests.append(Request(self.command or "", path, int(code), self._num_sent))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""

    def _read_chunks(self, left: int) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while nbytes := self._parse_nbytes(self.rfile.readline(64).partition(b";")[0], 16):
                yield self._read_exactly(nbytes)
                self.rfile.readline(8)
            while self.rfile.readline(1024).strip():
                pass
            return
        while left > 0:
            yield (chunk := self._read_exactly(min(left, 1 << 20)))
            left -= len(chunk)

    def _read_exactly(self, nbytes: int) -> bytes:
        content = self.rfile.read(nbytes)
        if len(content) < nbytes:
            raise ConnectionError("the body ends early")
        return content

    def _parse_nbytes(self, text: bytes, base: int) -> int:
        if not re.fullmatch(rb"[0-9a-fA-F]+" if base == 16 else rb"[0-9]+", text.strip()):
            self.close_connection = True  # nobody knows where the next request starts
            raise Refusal(400, "Bad Request")
        return int(text, base)

    def read_chunks(self) -> Iterator[bytes]:
        """Read what is left of the request's body, as it arrives."""
        return self._chunks

    def read_body(self) -> bytes:
        """Read the whole body."""
        chunks, nbytes = [], 0
        for chunk in self._chunks:
            nbytes += len(chunk)
            if nbytes > MAX_JSON_NBYTES:
                self.close_connection = True
                self._chunks = iter(())
                raise Refusal(413, "request entity too large")
            chunks.append(chunk)
        return b"".join(chunks)

    def read_json(self) -> dict[str, Any]:
        """Read a body that is one JSON object."""
        return parse_object(self.read_body())

    def send(self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send an answer whose body is in memory."""
        self._send_head(status, len(content), headers or {})
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send a JSON answer."""
        head = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self.send(status, json.dumps(value).encode(), head)

    def send_refusal(self, refusal: Refusal) -> None:
        """Send an error as the Hub does."""
        self.send_json(refusal.fields, refusal.status, refusal.headers)

    def send_file(self, path: Path, etag: str, headers: Mapping[str, str]) -> None:
        """Send a file or the range of it that was asked for, after looking at the preconditions."""
        tag, nbytes = f'"{etag}"', path.stat().st_size
        head = {"ETag": tag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if (wanted := self.headers.get("If-Match")) and not has_tag(wanted, tag):
            raise Refusal(412, "Precondition Failed", headers={"ETag": tag})
        if (known := self.headers.get("If-None-Match")) and has_tag(known, tag):
            return self.send(304, headers=head)
        asked = self.headers.get("Range") if self.headers.get("If-Range", tag) == tag else None
        chosen = parse_range(asked, nbytes)
        start, stop = chosen or (0, nbytes)
        if chosen:
            head["Content-Range"] = f"bytes {start}-{stop - 1}/{nbytes}"
        self._send_head(206 if chosen else 200, stop - start, head)
        if self.command != "HEAD" and stop > start:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, stop - start)
        return None

    def _send_head(self, status: int, nbytes: int, headers: Mapping[str, str]) -> None:
        with suppress(Refusal):  # a bad chunk; the connection is closed after it
            for _ in self._chunks:  # what is not read now would be taken for the next request
                pass
        self._has_answered = True
        self._num_sent = nbytes if self.command != "HEAD" else 0
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode().translate(NO_LINES))
        if status != 304:
            self.send_header("Content-Length", str(nbytes))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def has_tag(header: str, tag: str) -> bool:
    """Whether a list of entity tags, or `*`, has this one."""
    return header.strip() == "*" or tag in (each.strip().removeprefix("W/") for each in header.split(","))


def parse_range(header: str | None, nbytes: int) -> tuple[int, int] | None:
    """Return start and stop (half-open) of the range asked for; None for the whole file, as for several ranges.

    >>> parse_range("bytes=2-3", 10), parse_range("bytes=-3", 10), parse_range("bytes=4-99", 10)
    ((2, 4), (7, 10), (4, 10))
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, nbytes - int(last))
    stop = min(nbytes, int(last) + 1) if first and last else nbytes
    if start >= nbytes:
        raise Refusal(416, "Requested Range Not Satisfiable", headers={"Content-Range": f"bytes */{nbytes}"})
    return start, stop


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object that a client sent."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refusal(400, f"Invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "Invalid JSON: expected an object")
    return value


def get_field(value: Mapping[str, Any], name: str, kind: type[FieldT]) -> FieldT:
    """Return a field of a JSON object, of this type and no other."""
    field = value.get(name)
    if not isinstance(field, kind) or (kind is int and isinstance(field, bool)):
        raise Refusal(400, f"Invalid request: {name} should be of type {kind.__name__}")
    return field
