"""A proxy that stands between any client and an HTTP server, and lets things go wrong.

Everything it does not break passes through byte for byte: signatures cover the Host header that the client sent, and
S3 servers compute them from the header that arrives.
"""

from __future__ import annotations

import contextlib
import enum
import random
import re
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, Self
from urllib.parse import parse_qsl, urlsplit

from tests.servers import Reader, free_ports, parse_headers


class Fault(enum.Enum):
    """What can happen to a request. Each is applied only to requests that `applies_to` allows."""

    SLOW_DOWN = "slow down"
    """503, in S3's words where the upstream is S3; the upstream hears nothing."""
    SERVER_ERROR = "server error"
    """500; the upstream hears nothing."""
    TOO_MANY = "too many requests"
    """429 with `Retry-After: retry_after`; the upstream hears nothing."""
    EXPIRED = "signature expired"
    """403 on a GET or HEAD of a URL that carries its signature; the upstream hears nothing."""
    RESET = "reset"
    """The connection is reset before anything was sent upstream."""
    STALL = "stall"
    """Nothing arrives for `stall_s`, then the connection is reset; the upstream hears nothing."""
    RESET_IN_BODY = "reset in body"
    """A GET's answer is reset in the middle of its body."""
    STALL_IN_BODY = "stall in body"
    """A GET's answer stops in the middle of its body for `stall_s`, and is then reset."""
    SHORT_BODY = "short body"
    """A GET's answer ends in the middle of its body, with an orderly close."""
    LOST_RESPONSE = "lost response"
    """The upstream carries out a write; its answer is lost, and the connection closed."""
    FLIPPED_BYTE = "flipped byte"
    """One byte in the middle third of a PUT's body arrives changed."""

    def applies_to(self, request: Request) -> bool:
        """Say whether this can happen to a request."""
        if self in (Fault.RESET_IN_BODY, Fault.STALL_IN_BODY, Fault.SHORT_BODY):
            return request.method == "GET"
        if self is Fault.LOST_RESPONSE:
            return request.operation in WRITES
        if self is Fault.FLIPPED_BYTE:
            return request.method == "PUT" and request.num_body_bytes != 0
        if self is Fault.EXPIRED:
            return request.method in ("GET", "HEAD") and bool(_SIGNATURE_PARAMETERS & request.parameters.keys())
        return True


WRITES = frozenset(
    {
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
        "AbortMultipartUpload",
        "PutObject",
        "DeleteObject",
        "DeleteObjects",
        "LfsPut",
        "Commit",
    }
)
"""The operations that change what the upstream stores."""

_SIGNATURE_PARAMETERS = {"X-Amz-Signature", "Signature"}


@dataclass(frozen=True)
class Request:
    """A request that arrived."""

    method: str
    """GET, PUT and so on."""
    path: str
    """As sent, without the query."""
    query: str
    """As sent, without the question mark."""
    headers: Mapping[str, str]
    """Names in lower case."""
    operation: str
    """S3's name of it, or one of LfsPut, LfsBatch, Commit, Resolve for a Hub; else the method."""
    fault: Fault | None = None
    """What was done to it."""

    @property
    def parameters(self) -> dict[str, str]:
        """The query, decoded."""
        return dict(parse_qsl(self.query, keep_blank_values=True))

    @property
    def num_body_bytes(self) -> int | None:
        """The body's length on the wire, or None when it comes in chunks."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return None
        return int(self.headers.get("content-length", 0))


Predicate = Callable[[Request], bool]
"""Picks requests."""


def is_operation(*names: str) -> Predicate:
    """Return a predicate for requests of these operations."""
    return lambda request: request.operation in names


class FaultProxy:
    """An HTTP/1.1 proxy in front of one server, which fails as it is told.

    Attributes:
        url: where clients connect.
        faults: probability of each fault, per request that it applies to; their sum is at most 1.
        only: what `faults` is restricted to.
        stall_s: seconds of silence of `Fault.STALL` and `Fault.STALL_IN_BODY`.
        retry_after: seconds that `Fault.TOO_MANY` asks for.
        rule: returns status, code and message of a refusal for requests that this server never serves, else None.
        hidden_headers: names, in lower case, of headers of requests that the upstream does not see.
        nbytes_per_s: how much of all bodies, in both directions together, gets through; None is no limit.
        is_shared: whether all connections take turns at that; else each has so much for itself.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        seed: int = 0,
        is_s3: bool = True,
        rewrites: Mapping[str, str] | None = None,
        stall_s: float = 1.0,
        retry_after: int = 1,
    ) -> None:
        """Listen on a free port of 127.0.0.1.

        Args:
            upstream_url: `http://HOST:PORT`.
            seed: of the choice of faults. The order in which concurrent requests arrive is not its to decide.
            is_s3: whether the upstream speaks S3 (its errors are XML then) or is a Hub.
            rewrites: texts to replace in Location headers and LFS answers, such as the URL of a CDN by that of a second
                proxy in front of it.
            stall_s: see above.
            retry_after: see above.
        """
        upstream = urlsplit(upstream_url)
        assert upstream.scheme == "http", upstream_url
        self._upstream = (upstream.hostname or "127.0.0.1", upstream.port or 80)
        self._is_s3 = is_s3
        self._rewrites = {old.encode(): new.encode() for old, new in (rewrites or {}).items()}
        self._random = random.Random(seed)
        self.faults: dict[Fault, float] = {}
        self.only: Predicate = lambda _: True
        self.stall_s = stall_s
        self.retry_after = retry_after
        self.rule: Callable[[Request], tuple[str, str, str] | None] = lambda _: None
        self.hidden_headers: tuple[str, ...] = ()
        self.nbytes_per_s: float | None = None
        self.is_shared = True
        self._line_is_free_at = 0.0
        self._script: deque[tuple[Fault | None, Predicate]] = deque()
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._injected: Counter[Fault] = Counter()
        self._connections: set[socket.socket] = set()
        self._down = False
        self._may_accept = threading.Event()
        self._may_accept.set()
        self._closed = threading.Event()
        (port,) = free_ports(1)  # a port asked for by number stays with its socket while that does not listen
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.url = f"http://127.0.0.1:{port}"
        self._thread = threading.Thread(target=self._accept, name="fault proxy", daemon=True)
        self._thread.start()

    def script(self, faults: Iterable[Fault | None], *, only: Predicate = lambda _: True) -> None:
        """Give the next matching requests these faults, one each and in this order; None lets one pass unharmed.

        Before `faults` is asked. A fault waits for a request that it applies to.
        """
        with self._lock:
            self._script.extend((fault, only) for fault in faults)

    @property
    def injected(self) -> Counter[Fault]:
        """How often each fault was injected."""
        with self._lock:
            return Counter(self._injected)

    @property
    def requests(self) -> list[Request]:
        """The requests so far, in order of arrival."""
        with self._lock:
            return list(self._requests)

    @property
    def operations(self) -> Counter[str]:
        """How many requests of each operation arrived."""
        return Counter(request.operation for request in self.requests)

    def clear(self) -> None:
        """Forget all requests, and inject nothing more."""
        with self._lock:
            self._requests.clear()
            self._injected.clear()
            self._script.clear()
            self.faults = {}
            self.only = lambda _: True

    @property
    def down(self) -> bool:
        """Whether every connection is refused. Setting it resets the open connections as well."""
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        if down == self._down:
            return
        self._down = down
        if down:
            self._may_accept.clear()
            self._listener.shutdown(socket.SHUT_RDWR)
            self._reset_connections()
        else:
            self._listener.listen(128)
            self._may_accept.set()

    def close(self) -> None:
        """Stop, and reset what is open."""
        self._closed.set()
        self._may_accept.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset_connections()
        self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reset_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed.is_set():
            self._may_accept.wait()
            try:
                client, _ = self._listener.accept()
            except OSError:  # down, or closed
                continue
            with self._lock:
                self._connections.add(client)
            threading.Thread(target=self._serve, args=(client,), name="fault proxy connection", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError, EOFError):
                if not self._down:
                    _Connection(self, client).serve()
        finally:
            with self._lock:
                self._connections.discard(client)

    def _arrived(self, head: bytes) -> Request:
        """Record a request, and decide its fault."""
        request = _parse_request(head, is_s3=self._is_s3)
        with self._lock:
            fault = self._next_fault(request)
            request = replace(request, fault=fault)
            self._requests.append(request)
            if fault:
                self._injected[fault] += 1
        return request

    def _next_fault(self, request: Request) -> Fault | None:
        if self._script:
            fault, only = self._script[0]
            if only(request) and (fault is None or fault.applies_to(request)):
                self._script.popleft()
                return fault
        if not self.only(request):
            return None
        drawn = self._random.random()
        for fault, probability in self.faults.items():
            if fault.applies_to(request):
                if drawn < probability:
                    return fault
                drawn -= probability
        return None

    def _paced(self, data: bytes) -> Iterator[bytes]:
        """Yield data in pieces at the pace of the line."""
        start = 0
        while start < len(data):
            rate = self.nbytes_per_s
            if rate is None:
                yield data[start:]
                return
            piece = data[start : start + max(1, min(_PACKET_NBYTES, int(rate / 50)))]
            with self._lock:
                now = time.monotonic()
                self._line_is_free_at = max(now, self._line_is_free_at) + len(piece) / rate
                wait = self._line_is_free_at - now if self.is_shared else len(piece) / rate
            if self._closed.wait(wait):
                return
            yield piece
            start += len(piece)

    def _draw_position(self, num_bytes: int | None) -> int:
        """Return a position in the middle third of a body; the first one where its length is unknown."""
        if num_bytes is None:
            return 0
        with self._lock:
            return self._random.randrange(num_bytes // 3, num_bytes - num_bytes // 3)


_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Connection:
    """One client's connection; the upstream gets a new one for each request."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._from_client = Reader(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        """Answer requests until either side closes."""
        while head := self._from_client.read_head():
            if not self._answer(head, self._proxy._arrived(head)):
                return

    def _answer(self, head: bytes, request: Request) -> bool:
        """Answer one request; return whether the connection may be used again."""
        if request.fault in _ERRORS:
            return self._refuse(request, _ERRORS[request.fault])
        if refusal := self._proxy.rule(request):
            return self._refuse(request, refusal)
        if request.fault is Fault.RESET:
            return self._reset()
        if request.fault is Fault.STALL:
            self._proxy._closed.wait(self._proxy.stall_s)
            return self._reset()
        with socket.create_connection(self._proxy._upstream, timeout=120) as upstream:
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            from_upstream = Reader(upstream)
            whole, answer = self._forward(head, request, upstream, from_upstream)
            while _status(answer) < 200:
                self._client.sendall(answer)
                answer = from_upstream.read_head()
            reusable = self._relay(answer, request, from_upstream)
        if reusable and not whole:
            self._drain()
        return reusable and whole and not _closes(head)

    def _forward(
        self, head: bytes, request: Request, upstream: socket.socket, from_upstream: Reader
    ) -> tuple[bool, bytes]:
        """Send a request upstream; return whether all of its body went there, and the head of the answer."""
        hidden = self._proxy.hidden_headers
        lines = head.split(b"\r\n")
        upstream.sendall(b"\r\n".join(x for x in lines if x.partition(b":")[0].decode("latin-1").lower() not in hidden))
        if _expects_continue(request):
            if _readable(upstream, timeout=5):
                answer = from_upstream.read_head()
                if _status(answer) != 100:
                    return False, answer
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._from_client.before_receive = lambda: self._wait(upstream)
        try:
            self._send_body(request, upstream)
        except _AnsweredError:
            return False, from_upstream.read_head()
        finally:
            self._from_client.before_receive = lambda: None
        return True, from_upstream.read_head()

    def _wait(self, upstream: socket.socket) -> None:
        """Wait for more of a request's body, or for an answer before its end."""
        poll = select.poll()  # not select: it takes no descriptor above 1023
        poll.register(self._client, select.POLLIN)
        poll.register(upstream, select.POLLIN)
        if any(descriptor == upstream.fileno() for descriptor, _ in poll.poll()):
            raise _AnsweredError

    def _send_body(self, request: Request, upstream: socket.socket) -> None:
        flips = request.fault is Fault.FLIPPED_BYTE
        flip_at = self._proxy._draw_position(request.num_body_bytes) if flips else -1
        position = 0
        for data, is_payload in _framed(self._from_client, request.num_body_bytes):
            sent = data
            if is_payload:
                if position <= flip_at < position + len(data):
                    sent = _flipped(data, flip_at - position)
                position += len(data)
            try:
                for piece in self._proxy._paced(sent):
                    upstream.sendall(piece)
            except OSError as error:  # it has answered, and closed
                raise _AnsweredError from error

    def _relay(self, answer: bytes, request: Request, from_upstream: Reader) -> bool:
        """Pass on an answer, or what the fault leaves of it; return whether the connection may be used again."""
        has_body = request.method != "HEAD" and _status(answer) not in (204, 304)
        headers = parse_headers(answer)
        chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = int(headers["content-length"]) if "content-length" in headers else None
        body: Iterator[tuple[bytes, bool]] = iter(())
        if has_body and (chunked or length is not None):
            body = _framed(from_upstream, None if chunked else length)
        elif has_body:
            body = ((data, True) for data in iter(lambda: from_upstream.read1(_PIECE_NBYTES), b""))
        if self._proxy._rewrites:
            answer, body = self._rewritten(answer, body, request, chunked=chunked)
        if request.fault is Fault.LOST_RESPONSE:
            for _ in body:
                pass
            return False
        self._client.sendall(answer)
        if request.fault in (Fault.RESET_IN_BODY, Fault.STALL_IN_BODY, Fault.SHORT_BODY):
            self._cut(body, length)
            if request.fault is Fault.SHORT_BODY:
                return False
            self._proxy._closed.wait(self._proxy.stall_s if request.fault is Fault.STALL_IN_BODY else 0.02)
            return self._reset()
        for data, _ in body:
            for piece in self._proxy._paced(data):
                self._client.sendall(piece)
        return not _closes(answer) and (not has_body or chunked or length is not None)

    def _cut(self, body: Iterator[tuple[bytes, bool]], length: int | None) -> None:
        """Pass on half of a body, or half of its first piece where its length is unknown."""
        left = None if length is None else length // 2
        for data, is_payload in body:
            if is_payload:
                left = len(data) // 2 if left is None else left
                data = data[:left]
                left -= len(data)
            self._client.sendall(data)
            if left == 0:
                return

    def _rewritten(
        self, answer: bytes, body: Iterator[tuple[bytes, bool]], request: Request, *, chunked: bool
    ) -> tuple[bytes, Iterator[tuple[bytes, bool]]]:
        lines = answer.split(b"\r\n")
        if request.operation == "LfsBatch":
            text = self._replaced(b"".join(data for data, is_payload in body if is_payload))
            body = iter([(text, True)])
            framing = b"transfer-encoding:" if chunked else b"content-length:"
            length = b"Content-Length: %d" % len(text)
            lines = [length if line.lower().startswith(framing) else line for line in lines]
        lines = [self._replaced(line) if line.lower().startswith(b"location:") else line for line in lines]
        return b"\r\n".join(lines), body

    def _replaced(self, text: bytes) -> bytes:
        for old, new in self._proxy._rewrites.items():
            text = text.replace(old, new)
        return text

    def _refuse(self, request: Request, error: tuple[str, str, str]) -> bool:
        """Answer with an error of the proxy's own."""
        status, code, message = error
        waits = _expects_continue(request)
        if not waits:
            for _ in _framed(self._from_client, request.num_body_bytes):
                pass
        if self._proxy._is_s3:
            content_type = "application/xml"
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'
        else:
            content_type = "application/json"
            body = f'{{"error":"{message}"}}'
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        if request.fault is Fault.TOO_MANY:
            lines.append(f"Retry-After: {self._proxy.retry_after}")
        if waits:
            lines.append("Connection: close")
        head = "\r\n".join(lines) + "\r\n\r\n"
        self._client.sendall((head if request.method == "HEAD" else head + body).encode())
        return not waits and request.headers.get("connection", "").lower() != "close"

    def _reset(self) -> bool:
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        return False

    def _drain(self) -> None:
        """Close in order although the client may still be sending, so that it can read the answer."""
        self._client.shutdown(socket.SHUT_WR)
        self._client.settimeout(2)
        while self._client.recv(_PIECE_NBYTES):
            pass


_PIECE_NBYTES = 1 << 16
_PACKET_NBYTES = 1400
"""What connections take turns with on a slow line."""

_ERRORS: Mapping[Fault | None, tuple[str, str, str]] = {
    Fault.SLOW_DOWN: ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    Fault.SERVER_ERROR: ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    Fault.TOO_MANY: ("429 Too Many Requests", "TooManyRequests", "We had to rate limit you."),
    Fault.EXPIRED: ("403 Forbidden", "AccessDenied", "Request has expired"),
}


def _parse_request(head: bytes, *, is_s3: bool) -> Request:
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    path, _, query = target.partition("?")
    request = Request(method, path, query, parse_headers(head), method)
    return replace(request, operation=_s3_operation(request) if is_s3 else _hub_operation(request))


def _s3_operation(request: Request) -> str:
    parameters = request.parameters
    in_bucket = "/" not in request.path.strip("/")
    match request.method:
        case "POST" if "uploads" in parameters:
            return "CreateMultipartUpload"
        case "POST" if "uploadId" in parameters:
            return "CompleteMultipartUpload"
        case "POST" if "delete" in parameters:
            return "DeleteObjects"
        case "PUT" if "partNumber" in parameters:
            return "UploadPart"
        case "PUT":
            return "CreateBucket" if in_bucket else "PutObject"
        case "DELETE" if "uploadId" in parameters:
            return "AbortMultipartUpload"
        case "DELETE":
            return "DeleteBucket" if in_bucket else "DeleteObject"
        case "GET" if "uploads" in parameters:
            return "ListMultipartUploads"
        case "GET" if "uploadId" in parameters:
            return "ListParts"
        case "GET":
            return "ListObjects" if in_bucket else "GetObject"
        case "HEAD":
            return "HeadBucket" if in_bucket else "HeadObject"
    return request.method


def _hub_operation(request: Request) -> str:
    match request.method:
        case "POST" if request.path.endswith("/info/lfs/objects/batch"):
            return "LfsBatch"
        case "POST" if "/commit/" in request.path or re.match(r"/api/buckets/.*/batch$", request.path):
            return "Commit"
        case "PUT":
            return "LfsPut"
        case "GET" | "HEAD" if "/resolve/" in request.path:
            return "Resolve"
    return request.method


def _status(answer: bytes) -> int:
    if not answer:
        raise EOFError
    return int(answer.split(b" ", 2)[1])


def _closes(head: bytes) -> bool:
    return parse_headers(head).get("connection", "").lower() == "close"


def _expects_continue(request: Request) -> bool:
    return "100-continue" in request.headers.get("expect", "").lower()


def _framed(source: Reader, num_bytes: int | None) -> Iterator[tuple[bytes, bool]]:
    """Yield a body in pieces as it is on the wire, each with whether it is payload; chunks when num_bytes is None."""
    if num_bytes is not None:
        yield from _payload(source, num_bytes)
        return
    while True:
        line = source.readline()
        num_bytes = int(line.split(b";")[0], 16) if line else _raise_eof()
        yield line, False
        if num_bytes == 0:
            break
        yield from _payload(source, num_bytes)
        yield source.readline(), False
    while (line := source.readline()) not in (b"\r\n", b""):
        yield line, False
    yield line, False


def _payload(source: Reader, num_bytes: int) -> Iterator[tuple[bytes, bool]]:
    while num_bytes:
        data = source.read1(min(num_bytes, _PIECE_NBYTES)) or _raise_eof()
        num_bytes -= len(data)
        yield data, True


def _raise_eof() -> NoReturn:
    raise EOFError


def _flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def _readable(connection: socket.socket, *, timeout: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


class _AnsweredError(Exception):
    """The upstream has answered before the end of the request's body."""
