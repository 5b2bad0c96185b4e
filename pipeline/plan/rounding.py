"""Values stored as float32 that a shorter dtype rounds: what small tensors lose by it is found while planning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.config.fields import SENSITIVE_TO_ROUNDING
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 2**20
"""Size of the largest tensors that are read here."""
_MAX_TOTAL = 2**23
"""Bytes that are read here, the smallest tensors first."""
_MAX_READ = 512
"""Number of tensors that are read here, in all models together."""
_SHOWN = 6


def warn_of_rounding(stores: Stores, merges: Iterable[TensorMerge], kept: Sequence[str]) -> list[str]:
    """Warn of float32 tensors among shorter ones that `dtype` rounds: models have reasons for them.

    Args:
        stores: of the inputs.
        merges: every output tensor.
        kept: the patterns given under `keep_float32`.

    Raises:
        FetchError: a file could not be read.
    """
    floats = [merge for merge in merges if DTYPES[merge.out_dtype].is_mergeable]
    long = {merge.name: sources for merge in floats if (sources := _list_long(merge))}
    rounded = [merge for merge in floats if merge.name in long and DTYPES[merge.out_dtype].num_bits == 16]
    if not rounded or not any(_is_short(merge) for merge in floats):
        return []
    rounded.sort(key=lambda merge: merge.nbytes)
    small: dict[str, list[Source]] = {}
    num_read = nbytes = 0
    for merge in rounded:
        sources = long[merge.name]
        num_read += len(sources)
        nbytes += sum(source.nbytes for source in sources)
        if max(source.nbytes for source in sources) > _MAX_NBYTES or nbytes > _MAX_TOTAL or num_read > _MAX_READ:
            break
        small[merge.name] = sources
    found = iter(stores.read_ranges([source.ranges(0, source.num_elements)[0] for s in small.values() for source in s]))
    dtype = rounded[0].out_dtype
    changes = {name: [_measure(next(found), dtype) for _ in sources] for name, sources in small.items()}
    changed = [name for name, sources in changes.items() if any(change.any() for change in sources)]
    untried = [merge.name for merge in rounded if merge.name not in small]
    stored = f"stored as float32 among shorter ones, and rounded to {DTYPES[dtype].torch_name}"
    warnings = []
    if changed:
        values = np.concatenate([change for name in changed for change in changes[name]])
        by = f"by up to {100 * values.max():.2g}%" if np.isfinite(values).all() else "some to infinity"
        number = f"{np.count_nonzero(values):,} of {counted(values.size, 'value')}"
        warnings.append(
            f"{_list(changed)} {stored}, which changes {number} in all models, {by}; {_advise(changed, kept)}"
        )
    if untried:
        warnings.append(
            f"{_list(untried)} {stored}, and too large to tell now what that changes; {_advise(untried, kept)}"
        )
    return warnings


def _list_long(merge: TensorMerge) -> list[Source]:
    """Return the sources that are stored as float32, in one range each."""
    return [source for source in merge.tensors if source.dtype == "F32" and isinstance(source, StoredTensor)]


def _is_short(merge: TensorMerge) -> bool:
    """Tell whether a tensor is made of stored ones, in whatever way, and none of them is float32."""
    stored = [tensor for source in merge.tensors for tensor in source.origins]
    return bool(stored) and all(tensor.dtype != "F32" for tensor in stored)


def _measure(content: bytes, dtype: str) -> np.ndarray:
    """Return by how much rounding changes each of some float32 values, relative to it."""
    values = np.frombuffer(content, "<f4")
    with np.errstate(all="ignore"):
        if dtype == "F16":
            rounded = values.astype(np.float16).astype(np.float32)
        else:  # to nearest, ties to even
            bits = values.view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return np.where(np.isnan(values) | (rounded == values), 0, np.abs(rounded / values.astype(np.float64) - 1))


def _list(names: Sequence[str]) -> str:
    """Return how many tensors these are, and patterns of their names for all layers."""
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return f"{counted(len(names), 'tensor')} ({listing(patterns, _SHOWN)})"


def _advise(names: Sequence[str], kept: Sequence[str]) -> str:
    if not kept and all(any(fnmatchcase(name, pattern) for pattern in SENSITIVE_TO_ROUNDING) for name in names):
        return "`keep_float32: true` keeps them as they are"
    return "to keep them as they are, list such patterns under `keep_float32`"
