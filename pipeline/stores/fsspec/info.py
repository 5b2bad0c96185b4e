"""File metadata of fsspec's file systems, each of which has names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile

_CONTENT_KEYS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "Content-MD5", "checksum", "sha", "generation")
"""In fsspec's information about a file: the first that is there tells whether the content has changed."""

_CHANGE_KEYS = (
    *("mtime", "modified", "modify", "modificationTime", "LastModified", "Last-Modified", "last_modified", "updated"),
    *("created", "ino", "unique", "fileId", "version"),
)
"""The same where there is none of those: all that are there, with the size."""


def is_directory(info: Mapping[str, Any]) -> bool:
    """Tell whether this is about a directory, or about the object that stands for one."""
    return info.get("type") == "directory" or str(info.get("name", "")).endswith("/")


def stored_file(url: str, info: Mapping[str, Any]) -> StoredFile:
    """Return a file's size, and what changes when its content does.

    Raises:
        FetchError: the store does not know its size.
    """
    nbytes = info.get("size")
    if nbytes is None:
        raise FetchError(f"{url}: the store does not say how large it is; copy it to one that does")
    return StoredFile(url, int(nbytes), _etag(info))


def _etag(info: Mapping[str, Any]) -> str:
    for key in _CONTENT_KEYS:
        if info.get(key):
            return str(info[key]).removeprefix("W/").strip('"')
    values = [f"{info['size']:x}"]
    for key in _CHANGE_KEYS:
        value = info.get(key)
        if value is not None:
            values.append(str(value.timestamp() if hasattr(value, "timestamp") else value))
    return "-".join(values)
