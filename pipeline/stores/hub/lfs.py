"""Large files of the Hub: sent to where it says, in one piece or in parts, until it has the bytes that were meant."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raymerge.pipeline.errors import CorruptedError
from raymerge.pipeline.stores.hub.api import HubApi, HubPath, find_endpoint, parse_json
from raymerge.pipeline.stores.retry import Fault, Patience, one_line
from raymerge.pipeline.stores.web.client import Reply
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web

NUM_PARTS = 4
"""Parts of one file that are sent at a time."""

_HEADERS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
_MAX_CORRUPTED = 4
"""Times that a file is sent whose bytes do not arrive as they are."""
_PUT_SECONDS = 60
"""A store may take its time over a large body."""
_HAS_OTHER_BYTES = (400, 404, 409, 422)
"""What is answered to bytes that are not what was announced, when they are sent, joined or verified."""


def upload_lfs(api: HubApi, place: HubPath, oid: str, nbytes: int, descriptor: int) -> None:
    """Send a file, unless the repository has its content already.

    Args:
        api: of the Hub.
        place: the file's.
        oid: its sha256.
        nbytes: its size.
        descriptor: of a local file that holds it.

    Raises:
        CorruptedError: other bytes arrive than are sent, each time.
        RefusalError: the Hub or its store refuses.
        BrokenError: it is down.
    """
    patience = Patience(api.faults, find_endpoint(), "PUT")
    num_corrupted = 0
    while True:
        actions = _ask(api, place, "upload", [(oid, nbytes)])[0].get("actions") or {}
        if "upload" not in actions:
            return
        try:
            _send(api, actions["upload"], oid, nbytes, descriptor)
            if "verify" in actions:
                api.ask(
                    "POST", _rebase(actions["verify"]["href"]), value={"oid": oid, "size": nbytes}, headers=_HEADERS
                )
            return
        except (RefusalError, BrokenError) as error:
            if isinstance(error, RefusalError) and error.status in _HAS_OTHER_BYTES:
                num_corrupted += 1
                api.faults.note(find_endpoint(), "PUT", "other bytes arrived")
                if num_corrupted == _MAX_CORRUPTED:
                    raise CorruptedError(
                        f"{place.url}: sent {num_corrupted} times, and the store does not take it as what was sent"
                        f" ({one_line(error)}); is there a broken proxy?"
                    ) from None
                continue
            is_expired = isinstance(error, RefusalError) and error.status == 403
            fault = Fault("403 expired URL") if is_expired else classify_web(error)
            if fault is None:
                raise
            if not patience.failed(fault):
                raise BrokenError(f"upload: {patience.summary}: {one_line(error)}", None) from None


def find_missing(api: HubApi, place: HubPath, objects: Iterable[tuple[str, int]]) -> set[str]:
    """Return which of some contents, by sha256 and size, the repository has not; raises as `HubApi.ask` does."""
    known = list(objects)
    return {
        each["oid"]
        for start in range(0, len(known), 100)
        for each in _ask(api, place, "upload", known[start : start + 100])
        if "upload" in (each.get("actions") or {})
    }


def find_download(api: HubApi, place: HubPath, oid: str, nbytes: int) -> str | None:
    """Return where to read content that no commit has yet; None where the Hub does not say; raises as `HubApi.ask`."""
    found = _ask(api, place, "download", [(oid, nbytes)])[0]
    action = (found.get("actions") or {}).get("download")
    return str(action["href"]) if action else None


def _ask(api: HubApi, place: HubPath, operation: str, objects: list[tuple[str, int]]) -> list[Mapping[str, Any]]:
    reply = api.ask(
        "POST",
        f"/{place.repo}.git/info/lfs/objects/batch",
        value={
            "operation": operation,
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": oid, "size": nbytes} for oid, nbytes in objects],
            "hash_algo": "sha256",
            "ref": {"name": place.revision},
        },
        headers=_HEADERS,
    )
    answered: list[Mapping[str, Any]] = parse_json(reply)["objects"]
    for each in answered:
        if operation == "upload" and "error" in each:
            raise BrokenError(f"the Hub does not take the file: {each['error'].get('message')}", None)
    return answered


def _send(api: HubApi, action: Mapping[str, Any], oid: str, nbytes: int, descriptor: int) -> None:
    """Carry out an `upload` action."""
    header = action.get("header") or {}
    if "chunk_size" not in header:
        _put(api, action["href"], {str(name): str(value) for name, value in header.items()}, descriptor, 0, nbytes)
        return
    part_nbytes = int(header["chunk_size"])
    urls = [url for _, url in sorted((int(name), url) for name, url in header.items() if name.isdigit())]
    if len(urls) != math.ceil(nbytes / part_nbytes):
        raise BrokenError(f"{len(urls)} parts of {part_nbytes:,} bytes are offered for {nbytes:,} bytes", None)

    def put(number: int) -> str:
        start = number * part_nbytes
        return _put_part(api, urls[number], descriptor, start, min(start + part_nbytes, nbytes))

    with ThreadPoolExecutor(NUM_PARTS, thread_name_prefix="part") as pool:
        pending = [pool.submit(put, number) for number in range(len(urls))]
        try:
            parts = [{"partNumber": number, "etag": future.result()} for number, future in enumerate(pending, start=1)]
        finally:
            pool.shutdown(cancel_futures=True)
    api.ask("POST", _rebase(action["href"]), value={"oid": oid, "parts": parts}, headers=_HEADERS, seconds=_PUT_SECONDS)


def _put_part(api: HubApi, url: str, descriptor: int, start: int, stop: int) -> str:
    """Send one part, several times if need be, and return its etag."""
    patience = Patience(api.faults, find_endpoint(), "PUT")
    while True:
        try:
            etag = _put(api, url, {}, descriptor, start, stop).headers.get("ETag")
        except (RefusalError, BrokenError) as error:
            fault = classify_web(error)
            if fault is None or not patience.failed(fault):
                raise
            continue
        if not etag:
            raise BrokenError("the store sends no ETag for a part", None)
        return etag


def _put(api: HubApi, url: str, header: Mapping[str, str], descriptor: int, start: int, stop: int) -> Reply:
    def pieces() -> Iterator[memoryview]:
        with api.client.lend_buffer() as buffer:
            offset = start
            while offset < stop:
                count = os.preadv(descriptor, [buffer[: stop - offset]], offset)
                if not count:
                    raise BrokenError("the file that waits to be sent has been cut short", None)
                yield buffer[:count]
                offset += count

    headers = {**header, "Content-Length": str(stop - start)}
    return api.client.ask("PUT", url, headers, body=pieces(), seconds=_PUT_SECONDS)


def _rebase(url: str) -> str:
    """Return a URL of the Hub at the endpoint in use, which may be a mirror of it."""
    return url.replace("https://huggingface.co", find_endpoint(), 1)
