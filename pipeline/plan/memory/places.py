"""Places of inputs and outputs, and the cost of reading and writing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from raymerge.cluster.host import measure_memory
from raymerge.pipeline.plan.memory.projection import LOCAL_FETCH_NBYTES, MAX_FETCH_NBYTES, Transfer
from raymerge.pipeline.plan.memory.shares import Limits
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession

_CACHED = 0.5
"""Share of a machine's memory up to which files stay in its page cache while they are merged."""


def measure_places(
    stores: Stores, places: Sequence[tuple[str, int]], outs: Sequence[str], limits: Limits, session: RaySession | None
) -> Limits:
    """Return limits with the memory that reading and writing take.

    Args:
        stores: of the inputs and outputs.
        places: each input's URL, and the size of its weights in bytes.
        outs: paths or URLs of the outputs.
        limits: what the user allows.
        session: the Ray cluster that does the work, if any.
    """
    transfer = _measure_transfer(stores, [url for url, _ in places], outs, limits)
    return replace(limits, transfer=transfer, is_cached=_is_cached(stores, places, session))


def _is_cached(stores: Stores, inputs: Sequence[tuple[str, int]], session: RaySession | None) -> bool:
    """Return whether the inputs lie on this machine, and stay in its page cache once they have been read."""
    if session is not None and session.is_elsewhere:
        return False
    if any(stores.at(url).is_remote for url, _ in inputs):
        return False
    return sum(nbytes for _, nbytes in inputs) <= _CACHED * measure_memory()


def _measure_transfer(stores: Stores, urls: Sequence[str], outs: Sequence[str], limits: Limits) -> Transfer:
    inputs = dict.fromkeys(stores.at(url) for url in urls)
    outputs = [stores.at(out) for out in outs]
    is_remote = any(storage.is_remote for storage in inputs)
    transfer = Transfer(
        num_buffers=2 if is_remote or limits.gpus is not None else 1,
        nbytes=sum(storage.read_nbytes for storage in inputs)
        + sum(storage.write_nbytes for storage in outputs)
        + sum(storage.library_nbytes for storage in {*inputs, *outputs})
        + limits.runner_nbytes,
        num_outputs=len(outs),
    )
    if is_remote:
        return replace(transfer, staging_nbytes=MAX_FETCH_NBYTES)
    return transfer if limits.gpus is not None else replace(transfer, fetch_nbytes=LOCAL_FETCH_NBYTES)
