"""Windows whose sources are gathered from rows, made into what compiled loops take: values one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.decoder import Plain
from raymerge.ops.decoders.rows import MEAN, PAD
from raymerge.ops.lazy import np
from raymerge.ops.stored import Stored, item_nbytes, widen
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.plan.memory.projection import SEGMENT_ELEMENTS, measure_demand
from raymerge.pipeline.stores.files import aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

Place = tuple[int, str]
"""Offset of the first value in a buffer, and dtype."""


class Gatherer:
    """Puts rows together, in scratch of its own, where they are not neighbours in the bytes that were read."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.uint8)

    def cut(self, filled: Filled) -> Iterator[Stored]:
        """Yield a window in pieces of whole blocks, or as one where all values lie one after the other."""
        window = filled.window
        sources = [_open(filled, k) for k in range(len(window.merge.sources))]
        whole = [source.find(window.start, window.stop) for source in sources]
        if all(place is not None for place in whole):
            yield _make_stored(window.start, window.stop, filled.buffer, [place for place in whole if place])
            return
        block = measure_demand(window.merge).block_elements
        step = max(1, SEGMENT_ELEMENTS // block) * block
        for start in range(window.start, window.stop, step):
            yield self._put_together(filled, sources, start, min(window.stop, start + step))

    def _put_together(self, filled: Filled, sources: list[_Source], start: int, stop: int) -> Stored:
        places = [source.find(start, stop) for source in sources]
        found = [place for place in places if place is not None]
        if len(found) == len(sources):
            return _make_stored(start, stop, filled.buffer, found)
        room = sum(source.count_nbytes(start, stop) for source in sources)
        if len(self._scratch) < room:
            self._scratch = np.empty(aligned(room), np.uint8)
        offset, found = 0, []
        for source in sources:
            skipped, dtype = source.write(start, stop, self._scratch[offset:])
            found.append((offset + skipped, dtype))
            offset += source.count_nbytes(start, stop)
        return _make_stored(start, stop, self._scratch.data, found)


def _make_stored(start: int, stop: int, buffer: memoryview, places: list[Place]) -> Stored:
    offsets, dtypes = zip(*places, strict=True)
    return Stored(start, stop, buffer, offsets, dtypes)


def _open(filled: Filled, number: int) -> _Source:
    source = filled.window.merge.sources[number]
    return _Rows(filled, number, source) if isinstance(source, GatheredRows) else _Source(filled, number)


class _Source:
    """A source whose values lie one after the other."""

    def __init__(self, filled: Filled, number: int) -> None:
        self._buffer = np.frombuffer(filled.buffer, np.uint8)
        self._start = filled.window.start
        decoder = filled.window.merge.sources[number].decoder
        self._dtype = decoder.dtype if isinstance(decoder, Plain) else "float32"  # decoded already
        self._offset = filled.offsets[number]

    def find(self, start: int, stop: int) -> Place | None:
        """Return where elements [start, stop) lie, one after the other; None if they do not."""
        return self._offset + (start - self._start) * item_nbytes(self._dtype), self._dtype

    def count_nbytes(self, start: int, stop: int) -> int:
        """Return the room that `write` needs, in bytes."""
        return aligned((stop - start) * item_nbytes(self._dtype))

    def write(self, start: int, stop: int, out: NDArray[Any]) -> Place:
        """Write elements [start, stop), and return where in `out` the first one is."""
        offset, nbytes = self._offset + (start - self._start) * item_nbytes(self._dtype), item_nbytes(self._dtype)
        out[: (stop - start) * nbytes] = self._buffer[offset : offset + (stop - start) * nbytes]
        return 0, self._dtype


class _Rows(_Source):
    """A source whose rows lie wherever they were read to."""

    def __init__(self, filled: Filled, number: int, source: GatheredRows) -> None:
        super().__init__(filled, number)
        window = filled.window
        self._dtype = DTYPES[source.dtype].torch_name
        self._columns = source.columns
        self._padding = np.frombuffer(source.padding, np.float32)
        self._layout = layout = source.decoder.lay_out(window.start, window.stop)
        self._dtypes = [DTYPES[part.dtype].torch_name for part in source.parts]
        self._nbytes = np.array([item_nbytes(dtype) * self._columns for dtype in self._dtypes] or [0], np.int64)
        sizes = [aligned(len(view)) for view in filled.views[number]]
        self._spans = self._offset + np.cumsum([0, *sizes])[:-1] if sizes else np.zeros(1, np.int64)
        nbytes = self._nbytes[np.maximum(layout.parts, 0)]
        self._places = self._spans[layout.span] + layout.index * nbytes
        self._is_row = layout.parts >= 0

    def find(self, start: int, stop: int) -> Place | None:
        """Return where elements lie if their rows do so one after the other, in one dtype."""
        rows = self._rows(start, stop)
        parts, places = self._layout.parts[rows], self._places[rows]
        first = int(parts[0])
        if not self._is_row[rows].all() or len(self._list_dtypes(parts)) > 1:
            return None
        if (np.diff(places) != self._nbytes[first]).any():
            return None
        dtype = self._dtypes[first]
        return int(places[0]) + self._skip(start, dtype), dtype

    def count_nbytes(self, start: int, stop: int) -> int:
        """Return the room of whole rows, in the dtype that they are written in."""
        rows = self._rows(start, stop)
        return aligned((rows.stop - rows.start) * self._columns * item_nbytes(self._choose_dtype(rows)))

    def write(self, start: int, stop: int, out: NDArray[Any]) -> Place:
        """Write whole rows: as they are stored where all are of one dtype, else as float32."""
        rows = self._rows(start, stop)
        dtype = self._choose_dtype(rows)
        parts, places = self._layout.parts[rows], self._places[rows]
        nbytes = self._columns * item_nbytes(dtype)
        table = out[: len(parts) * nbytes].reshape(-1, nbytes)
        is_row = self._is_row[rows]
        if not is_row.all():
            table[~is_row] = 0
        if self._list_dtypes(parts) <= {dtype}:
            self._take(places[is_row], nbytes, table, is_row)
        else:
            for other in dict.fromkeys(self._dtypes):
                chosen = is_row & np.isin(parts, [k for k, each in enumerate(self._dtypes) if each == other])
                stored = np.empty((int(chosen.sum()), self._columns * item_nbytes(other)), np.uint8)
                self._take(places[chosen], stored.shape[1], stored, np.ones(len(stored), bool))
                table.view(np.float32)[chosen] = _widen(stored.reshape(-1), other).reshape(-1, self._columns)
        for k in np.flatnonzero(parts == MEAN).tolist():
            table[k].view(np.float32)[:] = self._average(rows.start + k)
        if (parts == PAD).any():
            table.view(np.float32)[parts == PAD] = self._padding
        return self._skip(start, dtype), dtype

    def _list_dtypes(self, parts: NDArray[Any]) -> set[str]:
        """Return the dtypes of the rows that are those of parts."""
        return {self._dtypes[part] for part in np.flatnonzero(np.bincount(parts[parts >= 0])).tolist()}

    def _rows(self, start: int, stop: int) -> slice:
        return slice(start // self._columns - self._layout.start, -(-stop // self._columns) - self._layout.start)

    def _skip(self, start: int, dtype: str) -> int:
        """Return the bytes of a row before an element."""
        return start % self._columns * item_nbytes(dtype)

    def _choose_dtype(self, rows: slice) -> str:
        parts = self._layout.parts[rows]
        dtypes = self._list_dtypes(parts)
        if len(dtypes) > 1 or (parts <= MEAN).any():
            return "float32"
        return dtypes.pop() if dtypes else self._dtype

    def _take(self, places: NDArray[Any], nbytes: int, out: NDArray[Any], chosen: NDArray[Any]) -> None:
        """Copy rows of so many bytes to the rows of `out` that are chosen."""
        if not len(places):
            return
        first = int(places.min()) % nbytes
        if not ((places - first) % nbytes).any():
            table = self._buffer[first : first + (len(self._buffer) - first) // nbytes * nbytes].reshape(-1, nbytes)
            if chosen.all():
                np.take(table, (places - first) // nbytes, axis=0, out=out, mode="clip")
            else:
                out[chosen] = table[(places - first) // nbytes]
            return
        for row, place in zip(np.flatnonzero(chosen).tolist(), places.tolist(), strict=True):
            out[row] = self._buffer[place : place + nbytes]

    def _average(self, row: int) -> NDArray[Any]:
        """Return a mean, added up in float32 in the order of the models."""
        members = self._layout.means[row]
        total = np.zeros(self._columns, np.float32)
        for number, (span, index) in enumerate(members):
            part = self._layout.spans[span][0]
            place = int(self._spans[span]) + index * int(self._nbytes[part])
            values = _widen(self._buffer[place : place + int(self._nbytes[part])], self._dtypes[part])
            total = values.copy() if number == 0 else total + values
        return total / np.float32(len(members))


def _widen(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return stored values as float32."""
    if dtype == "bfloat16":
        return widen(stored.view(np.uint16))
    return stored.view(dtype).astype(np.float32)
