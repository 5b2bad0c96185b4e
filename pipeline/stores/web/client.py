"""HTTP/1.1 with as little between the socket and the caller as there can be; every connection is used again.

Ranged reads through http.client cost a third of the CPU time that they cost through httpx2.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from email.message import Message
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import SplitResult, urljoin

from raymerge import __version__
from raymerge.pipeline.stores.files import Buffer
from raymerge.pipeline.stores.remote import CHUNK_NBYTES, REQUEST_SECONDS
from raymerge.pipeline.stores.retry import Fault
from raymerge.pipeline.stores.web.connection import (
    make_connection,
    make_response,
    make_tls,
    parse_proxy,
    proxy_credentials,
    split_web_url,
)
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, explain_broken

_MAX_ANSWER_NBYTES = 256 * 2**20
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_SECRET_HEADERS = ("authorization", "cookie")


class Reply(NamedTuple):
    """An answer that was read whole."""

    status: int
    headers: Message
    content: bytes


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port: what credentials are for.

    Raises:
        BrokenError: it is not the URL of a web server.

    >>> origin_of("https://user@Host/a")
    ('https', 'host', 443)
    """
    parts = split_web_url(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


class WebClient:
    """Makes requests; safe to use from several threads. Proxies and certificates are those of the environment."""

    def __init__(self, authorities: str | None = None) -> None:
        """Begin.

        Args:
            authorities: certificates (PEM) that are trusted besides those of the environment.
        """
        self._authorities = authorities
        self._idle: dict[tuple[object, ...], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None

    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        redirects: bool = False,
    ) -> Answer:
        """Send a request and return the answer, of which nothing but the headers has been read.

        Args:
            method: such as `GET`.
            url: without credentials.
            headers: credentials among them are not sent to another host that a redirect leads to.
            redirects: whether to follow them.

        Raises:
            BrokenError: no answer came.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self._send(method, url, headers)
            location = answer.headers.get("Location")
            if not redirects or answer.status not in _REDIRECTS or location is None:
                return answer
            answer.finish()
            target = find_target(url, location)
            if origin_of(target) != origin_of(url):
                headers = {name: value for name, value in headers.items() if name.lower() not in _SECRET_HEADERS}
            url = target
        raise BrokenError(f"redirected more than {_MAX_REDIRECTS} times", None)

    def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        redirects: bool = False,
    ) -> Reply:
        """Send a request and return the whole answer, or a redirect that is not to be followed.

        Raises:
            RefusalError: it is not a success.
            BrokenError: no whole answer came.
        """
        with self.open(method, url, headers, redirects=redirects) as answer:
            content = answer.read()
            if answer.status >= 400:
                raise RefusalError(answer.status, answer.headers, content)
            return Reply(answer.status, answer.headers, content)

    def close(self) -> None:
        """Close the connections that are idle, and forget which certificates are trusted."""
        with self._lock:
            connections = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
            self._tls = None
        for connection in connections:
            connection.close()

    def give_back(self, key: tuple[object, ...], connection: http.client.HTTPConnection) -> None:
        """Keep a connection for the next request."""
        with self._lock:
            self._idle.setdefault(key, []).append(connection)

    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> Answer:
        parts = split_web_url(url)
        proxy = parse_proxy(parts)
        key = (*origin_of(url), proxy and proxy.geturl())
        target = parts._replace(fragment="").geturl() if proxy and parts.scheme == "http" else _target_of(parts)
        own = {"User-Agent": f"raymerge/{__version__}", "Accept-Encoding": "identity"}
        if proxy and parts.scheme == "http":
            own |= proxy_credentials(proxy)
        connection = self._take(key) or make_connection(parts, proxy, self._find_tls)
        deadline = time.monotonic() + REQUEST_SECONDS
        try:
            connection.timeout = REQUEST_SECONDS
            if connection.sock is not None:
                connection.sock.settimeout(REQUEST_SECONDS)
            connection.response_class = partial(make_response, deadline)  # type: ignore[assignment]
            connection.request(method, target, headers={**own, **headers})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise explain_broken(error, url) from None
        except BaseException:
            connection.close()
            raise
        return Answer(self, url, key, connection, response)

    def _find_tls(self) -> ssl.SSLContext:
        tls = self._tls
        if tls is None:
            tls = self._tls = make_tls(self._authorities)
        return tls

    def _take(self, key: tuple[object, ...]) -> http.client.HTTPConnection | None:
        """Return an idle connection that the server has not closed."""
        while True:
            with self._lock:
                kept = self._idle.get(key)
                connection = kept.pop() if kept else None
            if connection is None or (connection.sock is not None and not _is_readable(connection.sock)):
                return connection
            connection.close()


class Answer:
    """An answer that is being read."""

    def __init__(
        self,
        client: WebClient,
        url: str,
        key: tuple[object, ...],
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> None:
        self.status = response.status
        self.headers: Message = response.headers
        self._client = client
        self._url = url
        self._key = key
        self._connection = connection
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def readinto(self, buffer: Buffer) -> int:
        """Put what has come of the body into a buffer, straight from the socket, and return its size; 0 at the end.

        A body that is cut short just ends.

        Raises:
            BrokenError: the connection broke, or the request has taken too long.
        """
        response = self._response
        try:
            if response.chunked or not response.length:
                return response.readinto(buffer)
            count = response.fp.readinto1(buffer[: response.length])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise explain_broken(error, self._url) from None
        response.length -= count
        if not response.length:
            response.close()
        return count

    def read(self, max_nbytes: int = _MAX_ANSWER_NBYTES) -> bytes:
        """Return the body.

        Raises:
            BrokenError: it did not come whole, or is too long.
        """
        expected = self._response.length
        content = b"".join(map(bytes, self._chunks(max_nbytes)))
        if expected is not None and len(content) < expected:
            raise BrokenError(f"the answer ended after {len(content):,} of {expected:,} bytes", Fault("short body"))
        return content

    def finish(self) -> None:
        """Read over what is left, and let go of the connection."""
        with self:
            for _ in self._chunks(_MAX_ANSWER_NBYTES):
                pass

    def _chunks(self, max_nbytes: int) -> Iterator[memoryview]:
        """Yield the body as it comes; a chunk is valid until the next."""
        buffer = memoryview(bytearray(CHUNK_NBYTES))
        total = 0
        while count := self.readinto(buffer):
            total += count
            if total > max_nbytes:
                raise BrokenError(f"the answer has more than {max_nbytes:,} bytes", None)
            yield buffer[:count]

    def close(self) -> None:
        """Keep the connection for the next request if the whole body was read, and close it otherwise."""
        response = self._response
        if response.isclosed() and not response.length and not response.will_close and self._connection.sock:
            self._client.give_back(self._key, self._connection)
        else:
            response.close()
            self._connection.close()


def find_target(url: str, location: str) -> str:
    """Return where a redirect leads; raises BrokenError where that is nowhere, or to where secrets could be read."""
    try:
        target = urljoin(url, location)
    except ValueError:
        target = location
    scheme = split_web_url(url).scheme
    if split_web_url(target).scheme not in ("https", scheme):
        raise BrokenError(f"redirected from {scheme} to {split_web_url(target).scheme}", None)
    return target


def _target_of(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _is_readable(connection: socket.socket) -> bool:
    """Tell whether something has come on an idle connection: nothing but its end can."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
