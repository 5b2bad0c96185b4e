"""Answers to ListObjectsV2."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape


def make_listing(bucket: str, objects: Iterable[tuple[str, int, str]], *, prefix: str = "") -> str:
    """Return a ListObjectsV2 answer of one page.

    Args:
        bucket: its name.
        objects: key, bytes and ETag of each.
        prefix: as asked for; `objects` is filtered by the caller.
    """
    items = [
        f"<Contents><Key>{escape(key)}</Key><LastModified>2000-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{etag}&quot;</ETag><Size>{nbytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, nbytes, etag in objects
    ]
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items)}</KeyCount>"
        f"<MaxKeys>{len(items)}</MaxKeys><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
    )
