"""Calls of fsspec file systems that do not wait for ever."""

from __future__ import annotations

from typing import Any

from fsspec.asyn import sync

from raymerge.pipeline.stores.remote import REQUEST_SECONDS

WRITE_SECONDS = 4.5 * REQUEST_SECONDS
"""Longest that a request with a body of 8 MiB may take: enough for 0.15 MB/s, also if lines are shared unevenly."""


def run_bounded(
    filesystem: Any, method: str, *arguments: object, seconds: float = REQUEST_SECONDS, **options: object
) -> Any:
    """Call a method of a file system, and wait for no longer than this where it can be interrupted.

    Raises:
        FSTimeoutError: it took longer.
    """
    if filesystem.async_impl:
        function = getattr(filesystem, f"_{method}")
        return sync(filesystem.loop, function, *arguments, timeout=seconds, **options)
    return getattr(filesystem, method)(*arguments, **options)
