"""Ranged GETs: one request, and its answer checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.message import Message

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores import files
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.web.client import Answer, WebClient
from raymerge.pipeline.stores.web.errors import RefusalError

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NBYTES = re.compile(r"[0-9]{1,18}")


def open_range(
    client: WebClient,
    url: str,
    headers: Mapping[str, str],
    file: StoredFile,
    start: int,
    stop: int,
    check: Callable[[Message], None] = lambda headers: None,
) -> Answer:
    """Make one request for bytes [start, stop) of a file and return the answer, whose body they are.

    Args:
        client: makes it.
        url: where the bytes are, which need not be the file's own URL.
        headers: credentials and conditions.
        file: as planned, for its size and for messages.
        start: first byte.
        stop: after the last.
        check: is given the answer's headers; raises FetchError where they are those of another content.

    Raises:
        FetchError: the file has changed, or the server cannot serve parts of it.
        RefusalError: the server refuses.
        BrokenError: no whole answer came.
    """
    answer = client.open("GET", url, {**headers, "Range": f"bytes={start}-{stop - 1}"}, redirects=True)
    try:
        check_range(answer, file, start, stop)
        check(answer.headers)
    except BaseException:
        answer.close()
        raise
    return answer


def changed(file: StoredFile, nbytes: int | None, etag: str | None) -> FetchError:
    """Return the error for a file that changed after planning."""
    found = f"{nbytes:,} bytes" if nbytes is not None else "another size"
    return files.changed(file, f"{found}, etag {etag or 'unknown'}")


def parse_nbytes(headers: Message) -> int | None:
    """Return the Content-Length, where there is a sensible one."""
    text = headers.get("Content-Length") or ""
    return int(text) if _NBYTES.fullmatch(text) else None


def check_range(answer: Answer, file: StoredFile, start: int, stop: int) -> None:
    """Make sure that an answer has bytes [start, stop) of a file.

    Raises:
        FetchError: the file has changed, or the server cannot serve parts of it.
        RefusalError: the server refuses.
    """
    etag = answer.headers.get("ETag")
    if answer.status == 206:
        match = _CONTENT_RANGE.fullmatch((answer.headers.get("Content-Range") or "").strip())
        if match is None or int(match[1]) != start or int(match[2]) >= stop:
            found = answer.headers.get("Content-Range")
            raise FetchError(
                f"{file.url}: bytes {start:,} to {stop:,} were asked for, and the server sends {found!r};"
                " is it behind a broken proxy?"
            )
        if match[3] != "*" and int(match[3]) != file.nbytes:
            raise changed(file, int(match[3]), etag)
    elif answer.status == 200:
        nbytes = parse_nbytes(answer.headers)
        if nbytes is not None and nbytes != file.nbytes:
            raise changed(file, nbytes, etag)
        if start or stop != file.nbytes:
            raise FetchError(
                f"{file.url}: bytes {start:,} to {stop:,} were asked for, and the server sends the whole file;"
                " it cannot serve parts of files: download the model, and name the local directory"
            )
    elif answer.status in (412, 416):
        total = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
        raise changed(file, int(total) if _NBYTES.fullmatch(total) else None, etag)
    else:
        raise RefusalError(answer.status, answer.headers, answer.read() if answer.status >= 400 else b"")
