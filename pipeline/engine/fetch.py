"""Reads a task's inputs, window by window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from queue import SimpleQueue

from raymerge.ops.stored import RunAll
from raymerge.pipeline.engine.threads import run_in_turn
from raymerge.pipeline.plan.memory.windows import Fetch, Window
from raymerge.pipeline.stores.files import Buffer, ByteRange, aligned
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.ranges import GAP_NBYTES, coalesce
from raymerge.pipeline.stores.remote import PIECE_NBYTES
from raymerge.pipeline.stores.seam import Storage

REPORT_NBYTES = 64 * 2**20
"""Read between two reports, at most: a worker that is silent for long is taken for one that hangs."""

_AHEAD_NBYTES = 64 * 2**20
"""Bytes announced to storages before they are read, so that a cold disk stays busy."""

_PART_NBYTES = 4 * 2**20
"""Read by one of several threads in one go."""

_REPORT_SECONDS = 1.0
"""Between reports of what a thread reads ahead, while nothing can be merged."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A window whose bytes have arrived."""

    window: Window
    views: tuple[tuple[memoryview, ...], ...]
    """For each source the bytes of its ranges, in order; valid until the next window is asked for.

    What the window's passes do not need has a place without these bytes.
    """
    buffer: Buffer
    """Holds all of them."""
    offsets: tuple[int, ...]
    """Where the first range of each source begins in it; or where its decoded values go, if there is room for them."""

    def list_places(self) -> Iterator[memoryview]:
        """Yield where the ranges that are read belong, one after the other."""
        for ranges, views, needed in zip(self.window.ranges, self.views, self.window.needed, strict=True):
            if ranges:
                yield from compress(views, needed)


def fetch_windows(
    stores: Stores,
    fetches: Iterable[Fetch],
    buffers: Sequence[Buffer],
    on_read: Callable[[int], None],
    run_all: RunAll = run_in_turn,
) -> Generator[Filled, None, None]:
    """Yield a task's windows, filled.

    With one buffer, reading and merging are done by the same thread, so that bytes are still in its core's cache when
    they are merged, and storages are told what is read next. With two, one is filled while the other is merged, and
    both where merging waits: requests of the next fetch are on their way before the last ones of this fetch arrive.

    Args:
        stores: that have the inputs.
        fetches: in order.
        buffers: one or two; no fetch is larger.
        on_read: told of so many bytes that have arrived, often, in the caller's thread.
        run_all: reads several pieces into one buffer at once.

    Raises:
        FetchError: a range could not be read, or its file has changed.
    """
    if len(buffers) > 1:

        def fill(fetch: Fetch, number: int, on_read: Callable[[int], None]) -> list[Filled]:
            return _fill(stores, fetch, buffers[number], on_read, run_in_turn)

        yield from fill_ahead(fill, fetches, on_read)
    else:
        yield from _fill_in_turn(stores, fetches, buffers[0], on_read, run_all)


def fill_ahead(
    fill: Callable[[Fetch, int, Callable[[int], None]], list[Filled]],
    fetches: Iterable[Fetch],
    on_read: Callable[[int], None],
) -> Generator[Filled, None, None]:
    """Yield windows while a thread fills those that come next.

    Args:
        fill: fills one of two buffers, 0 or 1, which nobody uses any more, and tells of the bytes that have arrived.
        fetches: in order.
        on_read: told of so many bytes that have arrived, often, in the caller's thread.
    """
    arrived: SimpleQueue[int] = SimpleQueue()

    def wait_for(windows: Future[list[Filled]]) -> list[Filled]:
        is_done = False
        while not is_done:
            is_done = bool(wait([windows], _REPORT_SECONDS).done)
            if nbytes := sum(arrived.get() for _ in range(arrived.qsize())):  # none is no sign of life
                on_read(nbytes)
        return windows.result()

    with ThreadPoolExecutor(2, thread_name_prefix="fetch") as reader:
        waiting: Future[list[Filled]] | None = None
        windows: Future[list[Filled]] | None
        for number, fetch in enumerate(fetches):
            windows, waiting = waiting, reader.submit(fill, fetch, number % 2, arrived.put)
            if windows is not None:
                yield from wait_for(windows)
        if waiting is not None:
            yield from wait_for(waiting)


def _fill_in_turn(
    stores: Stores, fetches: Iterable[Fetch], buffer: Buffer, on_read: Callable[[int], None], run_all: RunAll
) -> Iterator[Filled]:
    rest = iter(fetches)
    coming = deque((fetch, 0) for fetch in islice(rest, 1))
    while coming:
        windows = _fill(stores, coming.popleft()[0], buffer, on_read, run_all)
        while sum(nbytes for _, nbytes in coming) < _AHEAD_NBYTES and (fetch := next(rest, None)) is not None:
            ranges = [piece for window in fetch for piece in window.wanted]
            for storage, positions in _by_storage(stores, ranges).items():
                storage.will_read([ranges[k] for k in positions])
            by_row = [rows for window in fetch for parts in window.rows for rows in parts]
            coming.append((fetch, sum(item.nbytes for item in ranges) + sum(rows.nbytes for rows in by_row)))
        yield from windows


def _fill(
    stores: Stores, fetch: Fetch, buffer: Buffer, on_read: Callable[[int], None], run_all: RunAll
) -> list[Filled]:
    windows = _lay_out(fetch, buffer)
    for is_gathered in (False, True):
        own = [filled for filled in windows if filled.window.is_gathered == is_gathered]
        views = [view for filled in own for view in filled.list_places()]
        wanted = [piece for filled in own for piece in filled.window.wanted]
        read_ranges(stores, wanted, views, on_read, run_all, max_gap=GAP_NBYTES if is_gathered else 0)
    for filled in windows:
        _read_rows(stores, filled, on_read)
    return windows


def _read_rows(stores: Stores, filled: Filled, on_read: Callable[[int], None]) -> None:
    """Fill the places of sources that are read by row; the first window has their files read ahead as a whole."""
    window = filled.window
    for source, all_rows, views, needed in zip(
        window.merge.sources, window.rows, filled.views, window.needed, strict=True
    ):
        if not all_rows or not any(needed):
            continue
        if not window.start:
            for tensor in source.origins:
                whole = tensor.ranges(0, tensor.num_elements)
                stores.at(tensor.file.url).will_read(whole)
        for rows, view in zip(all_rows, views, strict=True):
            stores.at(rows.file.url).read_rows(rows, view)
            on_read(rows.nbytes)


def read_ranges(
    stores: Stores,
    ranges: Sequence[ByteRange],
    views: Sequence[memoryview],
    on_read: Callable[[int], None],
    run_all: RunAll = run_in_turn,
    *,
    max_gap: int = 0,
) -> None:
    """Fill each view with its range.

    Args:
        stores: that have them.
        ranges: in any order.
        views: as large as the ranges.
        on_read: told of so many bytes that have arrived, often.
        run_all: reads several pieces at once.
        max_gap: see `Storage.read_into`; bytes between ranges are told of, too, where requests read them.

    Raises:
        FetchError: a range could not be read, or its file has changed.
    """
    for storage, positions in _by_storage(stores, ranges).items():
        for pieces, places in _cut([ranges[k] for k in positions], [views[k] for k in positions], REPORT_NBYTES):
            if storage.is_remote and max_gap:
                storage.read_into(pieces, places, max_gap=max_gap)
                on_read(sum(group.nbytes for group in coalesce(pieces, max_nbytes=PIECE_NBYTES, max_gap=max_gap)))
                continue
            if storage.is_remote or run_all is run_in_turn:
                storage.read_into(pieces, places)
            else:
                run_all([partial(storage.read_into, *part) for part in _cut(pieces, places, _PART_NBYTES)])
            on_read(sum(piece.nbytes for piece in pieces))


def _cut(
    ranges: Sequence[ByteRange], views: Sequence[memoryview], most: int
) -> Iterator[tuple[list[ByteRange], list[memoryview]]]:
    """Yield ranges and their places in groups of so many bytes at most."""
    sizes = [item.nbytes for item in ranges]
    if sizes and all(sizes) and sum(sizes) <= most:
        yield list(ranges), list(views)
        return
    pieces: list[ByteRange] = []
    places: list[memoryview] = []
    room = most
    for item, view in zip(ranges, views, strict=True):
        start = 0
        while start < item.nbytes:
            stop = min(item.nbytes, start + room)
            pieces.append(ByteRange(item.file, item.start + start, item.start + stop))
            places.append(view[start:stop])
            room -= stop - start
            start = stop
            if not room:
                yield pieces, places
                pieces, places, room = [], [], most
    if pieces:
        yield pieces, places


def _by_storage(stores: Stores, ranges: Iterable[ByteRange]) -> dict[Storage, list[int]]:
    """Return the positions of the ranges that each storage serves."""
    found: dict[Storage, list[int]] = {}
    for position, item in enumerate(ranges):
        found.setdefault(stores.at(item.file.url), []).append(position)
    return found


def _lay_out(fetch: Fetch, buffer: memoryview) -> list[Filled]:
    """Give each source of each window its place in a buffer."""
    windows = []
    offset = 0
    for window in fetch:
        views, offsets = [], []
        for ranges, rows, decoded_nbytes in zip(window.ranges, window.rows, window.decoded_nbytes(), strict=True):
            places = []
            offsets.append(offset)
            offset += decoded_nbytes
            for nbytes in (*(piece.nbytes for piece in ranges), *(part.nbytes for part in rows)):
                places.append(buffer[offset : offset + nbytes])
                offset += aligned(nbytes)
            views.append(tuple(places))
        windows.append(Filled(window, tuple(views), buffer, tuple(offsets)))
    return windows
