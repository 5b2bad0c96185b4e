"""Connections to web servers: through which proxy, and with which certificates."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

from raymerge.pipeline.stores.remote import CHUNK_NBYTES, REQUEST_SECONDS
from raymerge.pipeline.stores.web.errors import BrokenError, find_proxy


def make_connection(
    parts: SplitResult, proxy: SplitResult | None, find_tls: Callable[[], ssl.SSLContext]
) -> http.client.HTTPConnection:
    """Return the connection for requests to a host.

    Args:
        parts: the request's URL.
        proxy: that of the environment, if it names one.
        find_tls: returns the certificates that are trusted, where the host is spoken to by TLS.

    Raises:
        BrokenError: the environment names a proxy of a kind that is not supported.
    """
    host, port = parts.hostname or "", parts.port
    if proxy is not None and proxy.scheme != "http":
        raise BrokenError(f"a {proxy.scheme}:// proxy is set, and only http:// ones are supported", None)
    through = (proxy.hostname or "", proxy.port or 80) if proxy else (host, port)
    if parts.scheme != "https":
        return http.client.HTTPConnection(*through, blocksize=CHUNK_NBYTES)
    connection = http.client.HTTPSConnection(*through, context=find_tls(), blocksize=CHUNK_NBYTES)
    if proxy is not None:
        connection.set_tunnel(host, port or 443, proxy_credentials(proxy))
    return connection


def make_response(deadline: float, connection: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
    """Return a response, of which nothing is read after a deadline, by the clock of `time.monotonic`."""
    return http.client.HTTPResponse(cast(socket.socket, _TimedSocket(connection, deadline)), *args, **options)


def make_tls(authorities: str | None = None) -> ssl.SSLContext:
    """Return the certificates that the environment has trusted.

    Args:
        authorities: further ones (PEM).

    Raises:
        BrokenError: it names a file that has none.
    """
    from httpx2 import create_ssl_context  # where huggingface_hub takes its certificates from

    try:
        context = create_ssl_context()
        if authorities:
            context.load_verify_locations(cadata=authorities)
        return context
    except OSError as error:
        hint = "SSL_CERT_FILE or SSL_CERT_DIR names a file that is not there, or that has no certificate (PEM)"
        raise BrokenError(f"no certificates: {hint}: {error}", None) from None


def split_web_url(url: str) -> SplitResult:
    """Return the parts of a web server's URL, which a server may have sent.

    Raises:
        BrokenError: it is none.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise BrokenError(f"{url[:200]!r} is not the URL of a web server", None)


def parse_proxy(parts: SplitResult) -> SplitResult | None:
    """Return the proxy that the environment names for a URL, if it does.

    Raises:
        BrokenError: what it names is not the URL of one.
    """
    found, variable = find_proxy(parts.geturl())
    if not found:
        return None
    try:
        proxy = urlsplit(found if "://" in found else f"http://{found}")
        _ = proxy.port
    except ValueError:
        raise BrokenError(f"the proxy that the environment names ({variable}) is no URL", None) from None
    return proxy


def proxy_credentials(proxy: SplitResult) -> dict[str, str]:
    """Return the headers by which a proxy knows us."""
    return {"Proxy-Authorization": basic_credentials(proxy)} if proxy.username else {}


def basic_credentials(parts: SplitResult) -> str:
    """Return the Authorization header for the user and password in a URL."""
    text = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return f"Basic {b64encode(text.encode()).decode()}"


class _TimedSocket:
    """A socket as http.client reads it: a peer that sends a byte at a time does not get more time for each."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._connection, self._deadline))


class _TimedReader(io.RawIOBase):
    """The bytes that come on a socket until a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        if left < REQUEST_SECONDS / 2:
            self._connection.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
