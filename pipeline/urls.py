"""Paths and URLs: what is meant, and whether it is written well.

Names after `scheme://` are taken as they are, not decoded, but in file:// and http(s):// URLs, which are standard ones.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from raymerge.pipeline.errors import ConfigError, FetchError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,})")
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az"}
_KNOWN = ("file", "s3", "gs", "az", "hf", "http", "https", "memory", "ftp", "sftp", "smb", "hdfs")
_MISTYPED = re.compile(rf"({'|'.join([*_KNOWN, *_ALIASES])})(?::(?!/)|//)(.*)", re.IGNORECASE | re.DOTALL)
"""A path that begins as a URL would, but for a sign or two."""
_MAX_NAME_NBYTES, _MAX_PATH_NBYTES = 255, 4095
_CHAINED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://.*)?::.*://")


def scheme_of(url: str) -> str:
    """Return a URL's scheme in its usual form; `file` for a path.

    >>> scheme_of("models/a"), scheme_of("s3a://bucket/a"), scheme_of("C:/models")
    ('file', 's3', 'file')
    """
    match = _SCHEME.match(url)
    if match is None:
        return "file"
    scheme = match[1].lower()
    return _ALIASES.get(scheme, scheme)


def is_url(url: str) -> bool:
    """Tell whether this is a URL, and not a path."""
    return _SCHEME.match(url) is not None


def split_url(url: str) -> tuple[str, str]:
    """Return the rest of a URL after `scheme://`, cut at the first slash: bucket and key, for example.

    >>> split_url("s3://bucket/models/a"), split_url("s3://bucket")
    (('bucket', 'models/a'), ('bucket', ''))
    """
    first, _, rest = url.partition("://")[2].partition("/")
    return first, rest


def revision_of(url: str) -> str | None:
    """Return the revision in a Hub URL; None where there is none.

    >>> revision_of("hf://org/name@1a2b/dir"), revision_of("org/name")
    ('1a2b', None)
    """
    if scheme_of(url) != "hf":
        return None
    return split_url(url)[1].partition("@")[2].partition("/")[0] or None


def repository_of(url: str) -> str | None:
    """Return the model repository of the Hub that a URL is in; None where it is in none.

    >>> repository_of("hf://org/name@1a2b/dir"), repository_of("/org/name"), repository_of("hf://buckets/org/name")
    ('org/name', None, None)
    """
    if scheme_of(url) != "hf":
        return None
    owner, rest = split_url(url)
    name = rest.partition("/")[0].partition("@")[0]
    return f"{owner}/{name}" if name and owner != "buckets" else None


def check_url(url: str) -> None:
    """Make sure that a URL is well-formed; any path is that does not look like a mistyped URL.

    Raises:
        ConfigError: saying what it might have been.
    """
    if _CHAINED.match(url):
        raise ConfigError(f"{url}: URLs that are chained by :: are not supported; write a single one")
    match = _SCHEME.match(url)
    if match is None:
        _check_path(url)
        return
    scheme, slashes = match[1], match[2]
    rest = url[match.end() :]
    if scheme.lower() == "file":
        if len(slashes) != 3:
            raise ConfigError(f"{url}: write an absolute path after file://, as in file:///{rest}")
        return
    if len(slashes) != 2:
        raise ConfigError(f"{url}: {slashes} after {scheme}: instead of //; did you mean {scheme}://{rest}?")
    if scheme_of(url) not in _KNOWN and not _is_served_by_fsspec(scheme.lower()):
        nearest = difflib.get_close_matches(scheme.lower(), _KNOWN, 1)
        hint = f"; did you mean {nearest[0]}://?" if nearest else ""
        raise ConfigError(f"{url}: {scheme}:// is not a kind of URL that raymerge or fsspec knows{hint}")
    if not rest and scheme_of(url) != "memory":
        raise ConfigError(f"{url}: nothing is named after {scheme}://")
    if scheme_of(url) in ("s3", "gs", "az"):
        _check_bucket(url)
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        if scheme_of(url) in ("http", "https"):
            raise ConfigError(f"{url}: not a URL: {error}") from None
    if not {".", ".."}.isdisjoint(rest.split("/")):
        raise ConfigError(f"{url}: `.` and `..` have no meaning in a URL; write the path out")


def check_endpoint(setting: str, endpoint: str) -> None:
    """Make sure that a setting is the address of a server.

    Raises:
        FetchError: it is not, saying what it might have been.
    """
    with suppress(ValueError):
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in endpoint:
            return
    hint = "" if "://" in endpoint else f"; did you mean https://{endpoint}, or http://{endpoint}?"
    raise FetchError(f"{setting} is {endpoint!r}, which is not of the form https://host:port{hint}")


def suggest_directory(path: Path) -> str:
    """Return a question after the directory that is most like one that is not there; empty where none is like it."""
    names: list[str] = []
    with suppress(OSError):
        names = [other.name for other in path.parent.iterdir() if other.is_dir()]
    nearest = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else ""


def suggest_file(path: Path) -> str:
    """Return a question after the file that is most like one that is not there; empty where none is like it."""
    names: list[str] = []
    with suppress(OSError, ValueError):
        if not path.exists():
            names = sorted(other.name for other in path.parent.iterdir() if other.is_file())
    nearest = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else ""


def _check_path(path: str) -> None:
    """Refuse what is a path by its form only: nothing would be found there, or an output would end up there."""
    try:
        data = path.encode()  # as tables and records hold it
    except UnicodeEncodeError:
        raise ConfigError(f"{path!a}: the name is not UTF-8; rename it, or give a link with another name") from None
    if b"\0" in data:
        raise ConfigError(f"{path!a}: no file can have a NUL character in its name; leave that out")
    if len(data) > _MAX_PATH_NBYTES or any(len(name) > _MAX_NAME_NBYTES for name in data.split(b"/")):
        raise ConfigError(f"{path[:200]}...: File name too long; give a shorter one")
    if is_url(path.strip()):
        raise ConfigError(f"{path!r}: a URL, with white space before it; leave that out")
    mistyped = _MISTYPED.match(path)
    if mistyped is not None and not mistyped[2].startswith(":"):
        scheme = mistyped[1]
        rest = mistyped[2].lstrip("/")
        meant = f"file:///{rest}" if scheme.lower() == "file" else f"{scheme}://{rest}"
        raise ConfigError(f"{path}: did you mean {meant}? If it is a path, write ./{path}")


def _check_bucket(url: str) -> None:
    """Refuse credentials before the bucket, where some tools take them; they may have a slash in them."""
    bucket, rest = split_url(url)
    if re.match(r"abfss?://", url, re.IGNORECASE) and "@" in bucket:
        container = bucket.partition("@")[0]
        raise ConfigError(
            f"{url}: the account does not belong in the URL; write az://{container}/{rest},"
            " and name the account in AZURE_STORAGE_ACCOUNT_NAME"
        )
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise ConfigError(
            f"{url}: a `{'@' if '@' in bucket else ':'}` before the first slash; credentials do not belong in a URL:"
            " set the environment variables or files that the store's own tools use"
        )
    if odd := re.search(r"[^\w.$:-]", bucket):
        raise ConfigError(f"{url}: {odd[0]!r} is in no name of a bucket; write {scheme_of(url)}://bucket/directory")


def _is_served_by_fsspec(scheme: str) -> bool:
    from fsspec import available_protocols

    return scheme in available_protocols()
