"""Errors of web servers: refusals, missing answers, and which of them may pass."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import time
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.stores.retry import Fault

_MAX_MESSAGE_NBYTES = 2000
_PASSING = (408, 429, 500, 502, 503, 504)
_SECONDS = re.compile(r"[0-9]{1,9}")
_NOT_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
"""OpenSSL's codes for an answer that is not TLS; a connection that breaks gives others."""


class RefusalError(Exception):
    """An answer other than success; its text is the server's reason."""

    def __init__(self, status: int, headers: Message, content: bytes) -> None:
        self.status = status
        self.headers = headers
        reason = headers.get("X-Error-Message") or _find_reason(content)
        super().__init__(
            f"{status} {http.client.responses.get(status, '')}".rstrip() + (f": {reason}" if reason else "")
        )


class BrokenError(Exception):
    """No whole answer came."""

    def __init__(self, message: str, fault: Fault | None) -> None:
        self.fault = fault
        super().__init__(message)


def classify_web(error: Exception) -> Fault | None:
    """Return the fault that an error of a `WebClient` is, or None where trying again is useless."""
    if isinstance(error, BrokenError):
        return error.fault
    if isinstance(error, RefusalError) and error.status in _PASSING:
        return Fault(str(error.status), _find_wait(error.headers))
    return None


def explain_broken(error: Exception, url: str) -> BrokenError:
    """Return the fault behind an error of http.client, or of the socket below it, in a request for a URL."""
    host = urlsplit(url).hostname or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return BrokenError(
            f"the certificate of {host} is not trusted ({error.verify_message});"
            " if it is signed by an authority of your own, name that in SSL_CERT_FILE",
            None,
        )
    if isinstance(error, socket.gaierror):
        fault = Fault("name lookup failed") if error.errno == socket.EAI_AGAIN else None
        return BrokenError(f"there is no host {host}: {error.strerror}; check the name and the network", fault)
    if isinstance(error, TimeoutError):
        return BrokenError(f"{host}{_name_proxy(url)} did not answer in time", Fault("timeout"))
    if isinstance(error, ConnectionRefusedError):
        return BrokenError(f"{host}{_name_proxy(url)} refuses connections", Fault("connection refused"))
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
        return BrokenError(
            f"{host} does not speak TLS there; write http:// instead of https://, or check the port", None
        )
    if isinstance(error, OSError | http.client.RemoteDisconnected):
        return BrokenError(f"the connection to {host} broke", Fault("connection broken"))
    if isinstance(error, http.client.IncompleteRead):
        return BrokenError(f"the answer of {host} is cut short", Fault("short body"))
    if isinstance(error, http.client.BadStatusLine | http.client.LineTooLong):
        return BrokenError(f"the answer of {host} is not HTTP", Fault("not HTTP"))
    return BrokenError(f"{host}: the request cannot be made: {type(error).__name__}", None)


def find_proxy(url: str) -> tuple[str, str]:
    """Return the proxy that the environment names for a URL, and its variable; empty where there is none."""
    parts, proxies = urlsplit(url), getproxies()
    for name in (parts.scheme, "all"):
        if proxies.get(name) and not proxy_bypass(parts.hostname or ""):
            return proxies[name], f"{name}_proxy"
    return "", ""


def _name_proxy(url: str) -> str:
    """Name the proxy that a URL is asked through, which may be the one with the fault; nothing where there is none."""
    given, variable = find_proxy(url)
    proxy = given.rpartition("@")[2]
    return f", or the proxy {proxy} that it is asked through ({variable}; no_proxy exempts hosts)," if proxy else ""


def _find_wait(headers: Message) -> float | None:
    """Return the seconds that the server asks to be left alone: as a number, a date, or the Hub's RateLimit header."""
    asked = (headers.get("Retry-After") or "").strip()
    if _SECONDS.fullmatch(asked):
        return float(asked)
    if asked:
        try:
            return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    fields = dict(part.strip().partition("=")[::2] for part in (headers.get("RateLimit") or "").split(";"))
    return float(fields["t"]) if fields.get("r") == "0" and _SECONDS.fullmatch(fields.get("t", "")) else None


def _find_reason(content: bytes) -> str:
    """Return the reason that a refusal gives, on one line."""
    text = content[:_MAX_MESSAGE_NBYTES].decode(errors="replace").strip()
    if text.startswith("<"):
        return ""
    with suppress(ValueError, KeyError, TypeError):
        text = str(parse_json(content)["error"])
    return " ".join(text.split())[:300]
