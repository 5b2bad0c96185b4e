"""Reads single tensors and rows as numbers, for the few values that planning needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from raymerge.ops.decoders.decoder import Raw
from raymerge.ops.decoders.intermediate import Intermediate
from raymerge.ops.lazy import np, torch
from raymerge.ops.stored import widen
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]


_CHUNK_ELEMENTS = 2**16
"""Elements decoded at once."""


def read_rows(stores: Stores, source: Source, rows: Sequence[int]) -> dict[int, Doubles]:
    """Return some rows of a matrix, and read no others; but all of one that is a merge itself.

    Raises:
        FetchError: a file could not be read.
    """
    width = source.shape[1]
    if isinstance(source.decoder, Intermediate):
        found = {row: np.empty(width) for row in rows}
        for start, values in stream_values(stores, source, unit=source.decoder.grid):
            stop = start + len(values)
            for row in range(start // width, -(-stop // width)):
                if row in found:
                    low, high = max(start, row * width), min(stop, (row + 1) * width)
                    found[row][low - row * width : high - row * width] = values[low - start : high - start].double()
        return found
    pieces = [source.ranges(row * width, (row + 1) * width) for row in rows]
    contents = iter(stores.read_ranges([piece for found in pieces for piece in found]))
    if isinstance(source, StoredTensor):  # without torch
        return {row: decode(next(contents), source.dtype) for row in rows}
    return {
        row: _decode(source, row * width, (row + 1) * width, [next(contents) for _ in found]).double().numpy()
        for row, found in zip(rows, pieces, strict=True)
    }


def read_tensor(stores: Stores, source: Source) -> torch.Tensor:
    """Return a tensor in float32.

    Raises:
        FetchError: a file could not be read.
    """
    if isinstance(source.decoder, Intermediate):
        chunks = [values for _, values in stream_values(stores, source, unit=source.decoder.grid)]
        return torch.cat(chunks).reshape(source.shape)
    contents = stores.read_ranges(source.ranges(0, source.num_elements))
    return _decode(source, 0, source.num_elements, contents).reshape(source.shape)


def stream_values(
    stores: Stores,
    source: Source,
    *,
    unit: int = 1,
    stop: int | None = None,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the values of a tensor in float32, chunk by chunk, after whatever passes they need; with where each begins.

    Args:
        stores: that have the inputs.
        source: the tensor.
        unit: elements of which chunks hold a multiple.
        stop: the element after the last that is wanted; all by default.
        on_read: called with the number of bytes of each read.

    Raises:
        FetchError: a file could not be read.
    """
    decoder = source.decoder.start()
    step = max(1, _CHUNK_ELEMENTS // unit) * unit

    def fetch(first: int, last: int) -> Raw:
        contents = stores.read_ranges(source.ranges(first, last))
        on_read(sum(map(len, contents)))
        return Raw([torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents], first, last)

    for index in range(decoder.num_passes):
        for first in range(0, source.num_elements, step):
            last = min(first + step, source.num_elements)
            decoder.measure(index, fetch(first, last), first, last)
        decoder.end_pass(index)
    end = source.num_elements if stop is None else stop
    for first in range(0, end, step):
        last = min(first + step, end)
        yield first, decoder.decode(fetch(first, last), first, last, torch.empty(last - first))


def encode(values: Floats, dtype: str) -> bytes:
    """Return float32 values as stored in a dtype, rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return bytes(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())
    return bytes(values.astype(np.dtype(DTYPES[dtype].torch_name).newbyteorder("<")).tobytes())


def decode(content: bytes, dtype: str) -> Doubles:
    """Return the values that are stored in a dtype."""
    if dtype == "BF16":
        return widen(np.frombuffer(content, "<u2")).astype(np.float64)
    return np.frombuffer(content, np.dtype(DTYPES[dtype].torch_name).newbyteorder("<")).astype(np.float64)


def _decode(source: Source, start: int, stop: int, contents: Sequence[bytes]) -> torch.Tensor:
    pieces = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    return source.decoder.decode(Raw(pieces, start, stop), start, stop, torch.empty(stop - start))
