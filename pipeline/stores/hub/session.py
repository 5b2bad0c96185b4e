"""Sessions of huggingface_hub: with time limits, faults on record, and no secret in errors or logs."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from email.message import Message
from functools import cache
from json import JSONDecodeError
from threading import Lock
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import hf_request_event_hook
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from raymerge.pipeline.errors import MergeError
from raymerge.pipeline.stores.remote import LEAST_NBYTES, REQUEST_SECONDS
from raymerge.pipeline.stores.retry import Fault, one_line
from raymerge.pipeline.stores.web.client import find_target, origin_of
from raymerge.pipeline.stores.web.connection import make_tls
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web, explain_broken

_BODY_SECONDS = 60
"""Longest silence of a store over a body, or of the Hub over a commit."""

_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    ("It seems that you are about to commit a data file", UserWarning),  # the figures, beside the model they are of
    ("Use 'content=<...>' to upload raw bytes", DeprecationWarning),
)
"""Warnings of huggingface_hub and httpx2 about each other and about us, which nobody can do anything about."""

_AGENTS = "/api/agent-harnesses"
"""Asked for by huggingface_hub for its user agent; it keeps any answer for a day, and fails with one that is odd."""

_endpoint: ContextVar[str | None] = ContextVar("_endpoint", default=None)
"""The Hub's endpoint that this context asks; None while others use huggingface_hub."""


class StorageRefusalError(RefusalError):
    """The storage that the Hub's signed URLs lead to refuses."""


class HubSession(httpx2.Client):
    """The HTTP client of huggingface_hub in this process, which changes only requests that `own_requests` encloses.

    By itself huggingface_hub waits for an answer for ever, tries some requests again and others not, keeps no record of
    it, and logs signed URLs. Here a failure that may pass is raised as an error that it does not know and lets through.
    """

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:  # noqa: D102
        endpoint = _endpoint.get()
        if endpoint is None:
            return super().send(request, **options)
        if request.url.path == _AGENTS:
            raise BrokenError("not asked for", None)
        if origin_of(str(request.url)) != origin_of(endpoint):
            request.headers.pop("Authorization", None)
        seconds = _BODY_SECONDS if request.method == "PUT" or "/commit/" in request.url.path else REQUEST_SECONDS
        request.extensions = {**request.extensions, "timeout": httpx2.Timeout(seconds).as_dict()}
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            raise _explain_transport(error, request.url) from None
        if response.status_code >= 400 and classify_web(_refusal_of(response)) is not None:
            raise _refusal_of(response)
        return response


class _SteadyBody(httpx2.SyncByteStream):
    """A body whose sender may be slow, but not send a byte at a time; the time that its reader takes does not count."""

    def __init__(self, body: httpx2.SyncByteStream, seconds: float) -> None:
        self._body = body
        self._seconds = seconds

    def __iter__(self) -> Iterator[bytes]:
        since, nbytes, is_late = time.monotonic(), 0, False
        for chunk in self._body:
            if is_late:  # and this chunk was not the end
                raise httpx2.ReadTimeout("the answer comes too slowly")
            nbytes += len(chunk)
            now = time.monotonic()
            if now - since > self._seconds:
                is_late = nbytes < LEAST_NBYTES
                since, nbytes = now, 0
            yield chunk
            since += time.monotonic() - now

    def close(self) -> None:
        self._body.close()


@contextmanager
def own_requests(endpoint: str) -> Iterator[None]:
    """Make what huggingface_hub asks in this block requests of ours, and its errors ours.

    Raises:
        RefusalError: the Hub refuses, or its storage does.
        BrokenError: no whole answer came, or not one of a Hub.
    """
    _install()
    token = _endpoint.set(endpoint)
    try:
        yield
    except MergeError:
        raise
    except Exception as error:  # huggingface_hub takes the types in an answer for granted
        raise _translate(error) from None
    finally:
        _endpoint.reset(token)


class _Noise:
    """Progress bars and warnings while huggingface_hub uploads: switches of the process, which several threads turn.

    Its own context manager turns the bars on again when the first of two uploads ends, in the middle of the other.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._num_quiet = 0
        self._were_on = False

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Keep huggingface_hub from warnings in this block, and from bars unless the environment asks for them."""
        for message, category in _NOISE:
            warnings.filterwarnings("ignore", re.escape(message), category)
        if HF_HUB_DISABLE_PROGRESS_BARS is not None:  # then the switch has no effect
            yield
            return
        with self._lock:
            if not self._num_quiet:
                self._were_on = not are_progress_bars_disabled()
                disable_progress_bars()
            self._num_quiet += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_quiet -= 1
                if not self._num_quiet and self._were_on:
                    enable_progress_bars()


quiet = _Noise().silenced


@cache
def _install() -> None:
    def watch(response: httpx2.Response) -> None:
        if _endpoint.get() is None:
            return
        if response.has_redirect_location:  # httpx2 has odd ones that lead nowhere look like a broken connection
            response.headers["Location"] = find_target(str(response.request.url), response.headers["Location"])
        if isinstance(response.stream, httpx2.SyncByteStream):
            seconds = response.request.extensions.get("timeout", {}).get("read") or REQUEST_SECONDS
            response.stream = _SteadyBody(response.stream, seconds)

    def make_session() -> HubSession:
        hooks: dict[str, list[Callable[..., Any]]] = {"request": [hf_request_event_hook], "response": [watch]}
        return HubSession(verify=make_tls(), event_hooks=hooks, follow_redirects=True, timeout=None)

    set_client_factory(make_session)


def _translate(error: Exception) -> Exception:
    """Return the error of ours that an error of huggingface_hub comes down to, or was raised from."""
    cause = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _refusal_of(error.response)
    if isinstance(error, RefusalError | BrokenError):
        return error
    if isinstance(cause, RefusalError | BrokenError):
        return cause
    if isinstance(cause, HfHubHTTPError):
        return _translate(cause)
    if isinstance(error, JSONDecodeError):
        hint = "is HF_ENDPOINT the address of a Hub, and is no login page in between?"
        return BrokenError(f"the answer is not JSON; {hint}", None)
    if isinstance(error, TypeError | LookupError | AttributeError | ArithmeticError | RecursionError):
        return BrokenError(f"the answer is not that of a Hub: {type(error).__name__}: {one_line(error)}", None)
    why = f": {type(cause).__name__}: {one_line(cause)}" if isinstance(cause, Exception) else ""
    return BrokenError(f"{one_line(error)}{why}", None)


def _refusal_of(response: httpx2.Response) -> RefusalError:
    headers = Message()
    for name, value in response.headers.multi_items():
        headers[name] = value
    is_hub = origin_of(str(response.request.url)) == origin_of(_endpoint.get() or "")
    return (RefusalError if is_hub else StorageRefusalError)(response.status_code, headers, response.read())


def _explain_transport(error: httpx2.TransportError, url: httpx2.URL) -> BrokenError:
    """Return the failure below httpx2, by the error that its own was raised from."""
    cause: BaseException | None = TimeoutError() if isinstance(error, httpx2.TimeoutException) else error
    while cause is not None:
        if isinstance(cause, OSError):
            return explain_broken(cause, str(url))
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx2.NetworkError | httpx2.RemoteProtocolError):
        return BrokenError(f"the connection to {url.host} broke", Fault("connection broken"))
    return BrokenError(f"{url.host}: the request cannot be made: {type(error).__name__}", None)
