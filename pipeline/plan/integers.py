"""Tensors that are not floating-point: small ones are compared while planning, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import sha256

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.resolve import COPY
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 2**16
"""Of a tensor: larger ones are compared where they are copied."""
_MAX_COMPARED = 256
"""Of tensors: each takes a read from every model."""
_SHOWN = 5


def check_integers(stores: Stores, merges: Iterable[TensorMerge]) -> None:
    """Compare counters, positions and other small integers, which must be the same in all models.

    Raises:
        TensorMismatchError: they differ; the message names them and the way to choose.
        FetchError: a file could not be read.
    """
    copied = [merge for merge in merges if merge.op == COPY and len(merge.sources) > 1]
    different = []
    for merge in [merge for merge in copied if merge.nbytes <= _MAX_NBYTES][:_MAX_COMPARED]:
        first, *others = contents = [_read(stores, source) for source in merge.sources]
        if any(other != first for other in others):
            models = (source.model for source in merge.sources)
            values = zip(models, (_show(merge, content) for content in contents), strict=True)
            different.append(f"{merge.name}: " + ", ".join(f"{value} in {model}" for model, value in values))
    if different:
        raise TensorMismatchError(
            "tensors that are not floating-point differ, and are copied, not merged:\n  "
            + listing(different, _SHOWN, separator="\n  ")
            + "\nTo take those of the base, or else of the first model, add `integers: donor` to the config."
        )


def _read(stores: Stores, source: Source) -> bytes:
    """Return the bytes of a source."""
    pieces = source.ranges(0, source.num_elements)
    buffers = [bytearray(piece.nbytes) for piece in pieces]
    stores.at(pieces[0].file.url).read_into(pieces, [memoryview(buffer) for buffer in buffers])
    return b"".join(buffers)


def _show(merge: TensorMerge, content: bytes) -> str:
    """Return a single number as such, and of more of them a checksum."""
    if math.prod(merge.shape) == 1:
        return str(int.from_bytes(content, "little", signed=merge.out_dtype.startswith("I")))
    return f"{list(merge.shape)} of {DTYPES[merge.out_dtype].torch_name}, sha256 {sha256(content).hexdigest()[:8]}"
