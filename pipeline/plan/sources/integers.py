"""Tensors that are not floating-point: small ones are compared while planning, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import sha256

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.sources.resolve import COPY
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 2**16
"""Size of the largest tensors that are compared here; larger ones are where they are copied."""
_MAX_COMPARED = 256
"""Number of tensors that are compared here: each takes a read from every model."""
_SHOWN = 5


def check_integers(stores: Stores, merges: Iterable[TensorMerge]) -> None:
    """Compare counters, positions and other small integers, which must be the same in all models.

    Raises:
        TensorMismatchError: they differ; the message names them and the way to choose.
        FetchError: a file could not be read.
    """
    copied = [merge for merge in merges if merge.op == COPY and len(merge.sources) > 1]
    compared = [merge for merge in copied if merge.nbytes <= _MAX_NBYTES][:_MAX_COMPARED]
    sources = (source for merge in compared for source in merge.sources)
    found = iter(stores.read_ranges([piece for s in sources for piece in s.ranges(0, s.num_elements)]))
    different = []
    for merge in compared:
        first, *others = contents = [next(found) for _ in merge.sources]
        if any(other != first for other in others):
            models = (source.model for source in merge.sources)
            values = zip(models, (_show(merge, content) for content in contents), strict=True)
            different.append(f"{merge.name}: " + ", ".join(f"{value} in {model}" for model, value in values))
    if different:
        raise TensorMismatchError(
            "tensors that are not floating-point differ, and are copied, not merged:\n  "
            + listing(different, _SHOWN, separator="\n  ")
            + "\nTo take those of the base, or else of the first model, add `integers: donor` to the config; to"
            " combine those of all models, `max` or `sum`."
        )


def _show(merge: TensorMerge, content: bytes) -> str:
    """Return a single number as such, and of more of them a checksum."""
    if math.prod(merge.shape) == 1:
        return str(int.from_bytes(content, "little", signed=merge.out_dtype.startswith("I")))
    return f"{list(merge.shape)} of {DTYPES[merge.out_dtype].torch_name}, sha256 {sha256(content).hexdigest()[:8]}"
