"""URLs of local files, and paths."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit


def local_path(url: str) -> Path:
    """Return the path that a plain path or a file:// URL means.

    >>> local_path("file:///models/a%20b").as_posix(), local_path("models/a%20b").as_posix()
    ('/models/a b', 'models/a%20b')
    """
    return Path(unquote(urlsplit(url).path)) if url.startswith("file://") else Path(url)
