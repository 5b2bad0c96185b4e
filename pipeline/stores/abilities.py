"""Limits and demands of S3 stores: writes that some refuse, and settings that some buckets ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from raymerge.pipeline.stores.retry import FaultLog

ARCHIVED = "the object is archived (Glacier): restore it first (`aws s3api restore-object`), or name a copy of it"
REQUESTER_PAYS = "; if the bucket has its readers pay, set AWS_REQUEST_PAYER=requester"
ENCRYPTED = (
    "; if the bucket asks for encryption, set AWS_SERVER_SIDE_ENCRYPTION=aws:kms, and AWS_SSE_KMS_KEY_ID where it asks"
    " for a certain key"
)
AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn")
_UNSUPPORTED_STATUS = (400, 405, 501)
"""Statuses of an answer to a request with a header that the store does not know."""
_OTHER_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "TokenRefreshRequired",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "AuthorizationHeaderMalformed",
        "RequestTimeTooSkewed",
        "RequestExpired",
        "RequestTimeout",
        "IllegalLocationConstraintException",
        "InvalidRegion",
    }
)
"""Codes about credentials, the clock, the region or the line, some with such a status."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """The headers of writes that a store takes."""

    has_checksums: bool = True
    """Checksums of what is written."""
    has_conditions: bool = True
    """If-None-Match and If-Match."""


class IgnoredError(Exception):
    """A store wrote an object although the condition did not hold."""


def is_aws(endpoint: str) -> bool:
    """Tell whether an endpoint is one of AWS, which takes all that is sent; an empty one is.

    >>> is_aws("https://s3.eu-west-1.amazonaws.com"), is_aws("https://amazonaws.com.example.org")
    (True, False)
    """
    host = urlsplit(endpoint).hostname or ""
    return not endpoint or host.endswith(AWS_DOMAINS)


def may_be_unsupported(status: int | None, code: str) -> bool:
    """Tell whether an answer may be about a header that the store does not know.

    >>> may_be_unsupported(501, "NotImplemented"), may_be_unsupported(400, "ExpiredToken")
    (True, False)
    """
    return status in _UNSUPPORTED_STATUS and code not in _OTHER_CODES


def find_abilities(
    attempt: Callable[[Abilities], object],
    *,
    most: Abilities,
    is_unsupported: Callable[[Exception], bool],
    faults: FaultLog,
    store: str,
) -> Abilities:
    """Return the most that a store takes, found by writing an object with all, some or none of the headers.

    What was refused is tried once more after a plainer write has worked, as one refusal alone may be a stray.

    Args:
        attempt: writes an object, with these headers.
        most: the headers that may be sent at all.
        is_unsupported: tells whether an error may be about a header.
        faults: where limits are noted.
        store: for these notes.

    Raises:
        Exception: of the plainest write, where no other works.
    """
    candidates = _candidates(most)
    plainest = candidates[-1]

    def takes(abilities: Abilities) -> bool:
        try:
            attempt(abilities)
        except Exception as error:
            if abilities == plainest or not is_unsupported(error):
                raise
            return False
        return True

    found = next(abilities for abilities in candidates if takes(abilities))
    refused = candidates[: candidates.index(found)]
    found = next((abilities for abilities in refused if takes(abilities)), found)
    if most.has_checksums and not found.has_checksums:
        faults.note_limit(store, "this store refuses checksums: what arrives is compared by its size alone")
    return found


def _candidates(most: Abilities) -> list[Abilities]:
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    return [Abilities(*pair) for pair in pairs if most.has_checksums or not pair[0]]


def requester_pays() -> bool:
    """Tell whether the user has agreed to pay for what is read, by the setting that obstore knows."""
    return os.environ.get("AWS_REQUEST_PAYER", "").lower() in ("requester", "true", "1", "yes", "on")


def encryption_parameters() -> dict[str, str]:
    """Return the parameters of writes for the encryption that is set, by the settings that obstore knows."""
    settings = {"ServerSideEncryption": "AWS_SERVER_SIDE_ENCRYPTION", "SSEKMSKeyId": "AWS_SSE_KMS_KEY_ID"}
    return {name: value for name, setting in settings.items() if (value := os.environ.get(setting))}
