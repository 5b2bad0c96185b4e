"""Small objects written to find out what a store takes: conditions, checksums."""

from __future__ import annotations

from contextlib import suppress

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore, S3Store

from raymerge.pipeline.stores.abilities import IgnoredError, may_be_unsupported
from raymerge.pipeline.stores.objects.errors import ObjectError, translated

AnyStore = S3Store | GCSStore | AzureStore


def write_probe(store: AnyStore, key: str, *, has_conditions: bool) -> None:
    """Write an object, under each kind of condition if they are to be tried."""
    with translated("PUT"):
        if not has_conditions:
            obstore.put(store, key, b"-", mode="overwrite")
            return
        with suppress(AlreadyExistsError):  # an earlier answer was lost
            obstore.put(store, key, b"-", mode="create")
        with suppress(AlreadyExistsError):
            obstore.put(store, key, b"-", mode="create")
            raise IgnoredError
        etag = obstore.head(store, key)["e_tag"]
        if etag:
            obstore.put(store, key, b"-", mode={"e_tag": etag})


def is_unsupported(error: Exception) -> bool:
    """Tell whether a store may have refused a request, or a condition of it, because it does not know its headers."""
    return isinstance(error, IgnoredError) or (
        isinstance(error, ObjectError) and may_be_unsupported(error.status, error.code)
    )
