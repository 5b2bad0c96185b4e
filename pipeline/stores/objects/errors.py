"""Errors of object stores in one form: status, code, and the kind of network trouble."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from raymerge.pipeline.errors import MergeError
from raymerge.pipeline.stores.retry import Fault, one_line
from raymerge.pipeline.stores.web.errors import classify_web

BAD_CHECKSUM_CODES = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "Md5Mismatch"})
"""The store found other bytes than the sender's checksum is of."""

_PASSING_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted", "InternalError", "ServerBusy"}
)

NO_STORE = "not the answer of an object store"

_FINAL_TROUBLES = ("", "TLS", "not TLS", NO_STORE, "unusable name")

_STATUS = re.compile(r"status code: (\d{3})|\bstatus: (\d{3}),")
_METHOD = re.compile(r"Error performing (?:list request: Error performing )?([A-Z]+) ")
_FIELDS = {
    name: re.compile(rf"<{name}>([^<]{{1,300}})</{name}>")
    for name in ("Code", "Message", "Region", "RequestTime", "ServerTime")
}
_SECONDS = re.compile(r"\bError performing [^\n]* in (\d+(?:\.\d+)?)s\b")
_RETRIES = re.compile(r"\bretries: (\d+),|\bafter (\d+) retries")
_QUOTED_PATH = re.compile(r"(?<=\bpath: )\"(?:[^\"\\]|\\.){1,1000}\"")
_BULK_CODE = re.compile(r"\(code: (\w+)\)")
_STATUS_OF_TYPE = {
    AlreadyExistsError: 412,
    PreconditionError: 412,
    PermissionDeniedError: 403,
    UnauthenticatedError: 401,
    FileNotFoundError: 404,
}
_NO_LOCATION = "Received redirect without LOCATION"
"""obstore's text for S3's PermanentRedirect, of which it shows nothing."""

_NETWORK = (
    (re.compile(r"non-partial response"), NO_STORE),
    (re.compile(r"dns error|failed to lookup address|Name or service not known", re.I), "name not found"),
    (re.compile(r"InvalidContentType"), "not TLS"),
    (re.compile(r"[Cc]ertificate|UnknownIssuer|NotValidForName|HandshakeFailure"), "TLS"),
    (re.compile(r"IncompleteBody|UnexpectedEof|IncompleteMessage"), "short body"),
    (re.compile(r"ConnectionRefused"), "connection refused"),
    (re.compile(r"ConnectionReset|BrokenPipe|ConnectionAborted|ChannelClosed|kind: Interrupted"), "connection reset"),
    (re.compile(r"TimedOut|kind: Timeout"), "timeout"),
    (re.compile(r"kind: (?:Connect|Request|Decode|Unknown)|HTTP error"), "broken connection"),
)


class ObjectError(Exception):
    """An error answer of an object store, or of the way there; its text holds no secret.

    Attributes:
        method: of the request, such as GET.
        status: of the answer; 0 where there was none.
        code: of the store, such as `SlowDown`; may be empty.
        trouble: what was wrong with the connection, where there was no answer.
        region: where the bucket is, where the store says so.
        skew: seconds that our clock is ahead of the store's, where it says so.
        num_attempts: how often obstore tried.
        seconds: how long that took, where it says so and it was a second or more.
    """

    def __init__(self, method: str, status: int, code: str, message: str, trouble: str = "", region: str = "") -> None:
        self.method = method
        self.status = status
        self.code = code
        self.trouble = trouble
        self.region = region
        self.skew: float | None = None
        self.num_attempts = 1
        self.seconds = 0.0
        text = " ".join(str(part) for part in (status or "", code) if part) or trouble
        super().__init__(": ".join(part for part in (text, message.rstrip(".")) if part))

    @property
    def is_bad_checksum(self) -> bool:
        """Whether the store got something else than was sent."""
        text = str(self).lower()  # one that is refused as such is no mismatch
        is_mismatch = self.status == 400 and "checksum" in text and "match" in text
        return self.code in BAD_CHECKSUM_CODES or is_mismatch

    def as_fault(self) -> Fault | None:
        """Return the fault that it is, or None where trying again is useless."""
        if self.is_bad_checksum:
            return Fault(f"{self.status} {self.code}")
        if not self.status:
            return None if self.trouble in _FINAL_TROUBLES else Fault(self.trouble)
        if self.status in (408, 429, 500, 502, 503, 504) or self.code in _PASSING_CODES:
            return Fault(f"{self.status} {self.code}".strip())
        return Fault(f"{self.status}") if self.status > 504 else None


def classify_fault(error: Exception) -> Fault | None:
    """Return the fault that an error is, or None where trying again is useless."""
    return error.as_fault() if isinstance(error, ObjectError) else classify_web(error)


def refusal(method: str, status: int, content: bytes) -> ObjectError:
    """Return the error for an answer other than success, from what it says."""
    found = _find_fields(content.decode(errors="replace"))
    return ObjectError(method, status, found.get("Code", ""), found.get("Message", ""))


@contextmanager
def translated(method: str) -> Iterator[None]:
    """Raise an ObjectError for what obstore raises, whose text may hold more than is to be shown.

    Args:
        method: of the request, where the error does not tell.
    """
    try:
        yield
    except MergeError:
        raise
    except (BaseError, OSError) as error:  # its writer raises OSError
        raise _translate(error, method) from None


def _translate(error: Exception, method: str) -> ObjectError:
    text = str(error)
    if isinstance(error, InvalidPathError):
        name = quoted[0] if (quoted := _QUOTED_PATH.search(text)) else one_line(error)
        return ObjectError(method, 0, "", f"there is an object of the name {name}", "unusable name")
    if _NO_LOCATION in text:
        return ObjectError(method, 301, "PermanentRedirect", "")
    found = _find_fields(text)
    if made := _METHOD.search(text):
        method = made[1]
    status_match = _STATUS.search(text)
    status = int(status_match[1] or status_match[2]) if status_match else 0
    status = status or next((value for kind, value in _STATUS_OF_TYPE.items() if isinstance(error, kind)), 0)
    code = found.get("Code", "")
    if not status and (bulk := _BULK_CODE.search(text)):
        status, code = 403, bulk[1]
    trouble = "" if status else next((name for pattern, name in _NETWORK if pattern.search(text)), "")
    message = found.get("Message", "") if status or trouble else text.splitlines()[0]
    result = ObjectError(method, status, code, message, trouble, found.get("Region", ""))
    if took := _SECONDS.search(text):
        result.seconds = float(took[1])
    result.skew = _skew(found.get("RequestTime"), found.get("ServerTime"))
    if retries := _RETRIES.search(text):
        result.num_attempts += int(retries[1] or retries[2])
    return result


def _find_fields(text: str) -> dict[str, str]:
    return {name: match[1] for name, pattern in _FIELDS.items() if (match := pattern.search(text))}


def _skew(ours: str | None, theirs: str | None) -> float | None:
    """Return how far our clock is ahead, in seconds."""
    try:
        return (_parse_time(ours or "") - _parse_time(theirs or "")).total_seconds()
    except ValueError:
        return None


def _parse_time(text: str) -> datetime:
    for form in ("%Y%m%dT%H%M%S%z", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z"):
        try:
            return datetime.strptime(text.replace("Z", "+0000"), form)
        except ValueError:
            continue
    raise ValueError(text)
