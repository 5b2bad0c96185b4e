"""Errors of fsspec's file systems, told by names and attributes: none of their libraries is imported here."""

from __future__ import annotations

import email.utils
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from raymerge.pipeline.stores.abilities import ARCHIVED, ENCRYPTED, REQUESTER_PAYS
from raymerge.pipeline.stores.retry import Fault, one_line
from raymerge.pipeline.urls import split_url

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch"}
)
_PASSING_NAMES: Mapping[str, str] = {
    "ConnectTimeoutError": "timeout",
    "ReadTimeoutError": "timeout",
    "ConnectionClosedError": "connection reset",
    "EndpointConnectionError": "no connection",
    "ProxyConnectionError": "no connection",
    "ClientConnectorError": "no connection",
    "ClientConnectionError": "connection reset",
    "ClientPayloadError": "short body",
    "IncompleteRead": "short body",
    "IncompleteReadError": "short body",
    "ResponseStreamingError": "short body",
    "ResponseParserError": "unreadable answer",
    "HTTPClientError": "connection reset",
    "ServiceRequestError": "connection reset",
    "ServiceResponseError": "connection reset",
    "SSHException": "connection reset",
    "EOFError": "connection reset",
    "error_temp": "4xx of FTP",
}
"""By the name of an error's class, or of one that it derives from."""
_FINAL_NAMES = frozenset({"SSLError", "ClientSSLError", "ClientConnectorCertificateError", "AuthenticationException"})
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})


def classify_error(error: BaseException) -> Fault | None:
    """Return the fault that an error is, or None where trying again is useless."""
    links = list(_chain(error))
    names = [name for link in links for name in _class_names(link)]
    if not _FINAL_NAMES.isdisjoint(names) or any(isinstance(link, ssl.SSLCertVerificationError) for link in links):
        return None
    if any(isinstance(link, socket.gaierror) and link.errno == socket.EAI_NONAME for link in links):
        return None  # no host has this name
    status, code = find_status(error), error_code(error)
    if status in _PASSING_STATUS or code in _PASSING_CODES:
        what = f"{status or ''} {code if code != str(status) else ''}".strip()
        return Fault(what, _retry_after(error))
    if status is not None:
        return None
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return None
    for link in links:
        if isinstance(link, TimeoutError):
            return Fault("timeout")
        if isinstance(link, ConnectionRefusedError):
            return Fault("no connection")
        if isinstance(link, ConnectionError):
            return Fault("connection reset")
    for name in names:
        if name in _PASSING_NAMES:
            return Fault(_PASSING_NAMES[name])
    return None


def explain_error(error: BaseException, url: str, credentials: str) -> str:
    """Return the message for an error that is final: the request, where, and the next step.

    Args:
        error: what was raised.
        url: of the file or directory.
        credentials: which ones were used, such as `with those of the environment`; never what they are.
    """
    code, status, text = error_code(error), find_status(error), one_line(_as_exception(error))
    said = f"{url}: {text}" if not code or code in text else f"{url}: {code}: {text}"
    names = {name for link in _chain(error) for name in _class_names(link)}
    if is_missing_bucket(error):
        return f"{url}: there is no bucket `{split_url(url)[0]}`; create it, or check its name and AWS_ENDPOINT_URL"
    if not _NO_CREDENTIALS.isdisjoint(names):
        return f"{url}: no credentials were found; set them where the store's own tools look for them"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
        return f"{said}; asked {credentials}: check the key, the secret and AWS_ENDPOINT_URL"
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return f"{said}; asked {credentials}: log in again"
    if code == "RequestTimeTooSkewed":
        return f"{said}; set this machine's clock"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException"):
        return f"{said}; the bucket seems to be in another region: set AWS_REGION to it"
    if code == "InvalidObjectState":
        return f"{said}; {ARCHIVED}"
    if isinstance(error, PermissionError) or status in (401, 403):
        settings = f"{REQUESTER_PAYS}{ENCRYPTED}" if url.startswith("s3://") else ""
        return f"{said}; asked {credentials}: use others, or have access granted{settings}"
    if any(isinstance(link, socket.gaierror) for link in _chain(error)):
        return f"{said}; no host has this name: check the URL and AWS_ENDPOINT_URL"
    if isinstance(error, NotImplementedError):
        return f"{url}: fsspec cannot do this with {url.partition('://')[0]}:// ({text or 'not implemented'})"
    return said


def error_code(error: BaseException) -> str:
    """Return S3's code of an error, such as `SlowDown`; empty where there is none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def is_missing_bucket(error: BaseException) -> bool:
    """Tell whether it is not the file that is missing, but all that it would be in."""
    return error_code(error) == "NoSuchBucket"


def is_changed(error: BaseException) -> bool:
    """Tell whether a condition on a file's content did not hold, or it is too short now."""
    return find_status(error) in (412, 416) or error_code(error) in ("PreconditionFailed", "InvalidRange")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _class_names(error: BaseException) -> list[str]:
    return [base.__name__ for base in type(error).__mro__]


def find_status(error: BaseException) -> int | None:
    """Return the status of the answer that an error is or comes from; None where there was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = next((getattr(link, name, None) for name in ("status", "status_code", "code")), None)
        if isinstance(found, int) and 300 <= found < 600:
            return found
    return None


def _retry_after(error: BaseException) -> float | None:
    for link in _chain(error):
        response = getattr(link, "response", None)
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders") if isinstance(response, dict) else None
        value = (headers or getattr(link, "headers", None) or {}).get("retry-after")
        if value is None:
            continue
        with suppress(ValueError):
            return float(value)
        with suppress(ValueError, TypeError):
            return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
