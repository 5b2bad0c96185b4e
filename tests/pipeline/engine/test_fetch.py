"""Windows of a task's inputs: the right bytes, in order, each valid until the next is asked for."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from raymerge.ops.kernels.linear import LinearCombination
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.engine import fetch
from raymerge.pipeline.engine.fetch import Filled, fetch_windows
from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.plan.memory.windows import Fetch, Window
from raymerge.pipeline.plan.types import TensorMerge, Variant
from raymerge.pipeline.stores.files import Buffer, ByteRange, aligned
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.seam import Storage

NUM_ELEMENTS = 3000
NBYTES = 4 * NUM_ELEMENTS
OFFSET = 17
"""Of the tensor in each file; no multiple of anything."""


@pytest.fixture
def stores() -> Iterator[Stores]:
    with open_stores() as stores:
        yield stores


@pytest.fixture
def contents() -> list[bytes]:
    return [random.Random(k).randbytes(OFFSET + NBYTES) for k in range(3)]


@pytest.fixture
def urls(stores: Stores, contents: list[bytes], tmp_path: Path) -> list[str]:
    """Files in two kinds of store."""
    urls = [str(tmp_path / "a"), f"memory://{tmp_path.name}/b", str(tmp_path / "c")]
    for url, content in zip(urls, contents, strict=True):
        stores.at(url).write(url, content)
    return urls


@pytest.fixture
def merge(stores: Stores, urls: list[str]) -> TensorMerge:
    """A tensor with one source in each file."""
    files = [stores.at(url).stat(url) for url in urls]
    sources = tuple(
        StoredTensor(file.url, "w", "F32", (NUM_ELEMENTS,), file, OFFSET, OFFSET + NBYTES) for file in files
    )
    variant = Variant((), LinearCombination((1.0,) * len(sources)), 0)
    return TensorMerge("w", (NUM_ELEMENTS,), "F32", "F32", "linear", sources, (variant,))


def cut(merge: TensorMerge, *counts: int) -> list[Fetch]:
    """Cut a tensor into fetches of so many windows of 100 elements."""
    starts = iter(range(0, merge.num_elements, 100))
    return [
        tuple(Window(merge, start, start + 100, range(1)) for start in itertools.islice(starts, count))
        for count in counts
    ]


def room_for(fetches: Sequence[Fetch]) -> int:
    return max(sum(window.nbytes() for window in fetch) for fetch in fetches)


def copy(filled: Filled) -> list[bytes]:
    return [b"".join(bytes(view) for view in views) for views in filled.views]


def expected(contents: list[bytes], start: int, stop: int) -> list[bytes]:
    return [content[OFFSET + 4 * start : OFFSET + 4 * stop] for content in contents]


@pytest.fixture(params=[1, 2], ids=["in turn", "ahead"])
def make_buffers(request: pytest.FixtureRequest) -> Callable[[Sequence[Fetch]], list[Buffer]]:
    def make(fetches: Sequence[Fetch]) -> list[Buffer]:
        return [memoryview(bytearray(room_for(fetches))) for _ in range(request.param)]

    return make


def ignore(nbytes: int) -> None:
    """Take no note of what has arrived."""


MakeBuffers = Callable[[Sequence[Fetch]], list[Buffer]]


def test_every_window_has_its_bytes_and_they_stay_until_the_next(
    stores: Stores, merge: TensorMerge, contents: list[bytes], make_buffers: MakeBuffers
) -> None:
    fetches = cut(merge, 1, 4, 2, 7, 1, 1, 14)
    seen = []
    for filled in fetch_windows(stores, fetches, make_buffers(fetches), ignore):
        found = copy(filled)
        assert found == expected(contents, filled.window.start, filled.window.stop)
        wait_for_reader()
        assert copy(filled) == found, "overwritten while it was merged"
        seen.append(filled.window)
    assert seen == [window for fetch in fetches for window in fetch]


def test_bytes_are_told_as_they_arrive_in_the_callers_thread(
    stores: Stores, merge: TensorMerge, contents: list[bytes], make_buffers: MakeBuffers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("raymerge.pipeline.engine.fetch.REPORT_NBYTES", 1000)
    fetches = cut(merge, 20, 10)
    told: list[int] = []
    threads = set()

    def tell(nbytes: int) -> None:
        told.append(nbytes)
        threads.add(threading.current_thread())

    for filled in fetch_windows(stores, fetches, buffers := make_buffers(fetches), tell):
        assert copy(filled) == expected(contents, filled.window.start, filled.window.stop)
    assert sum(told) == 3 * NBYTES
    assert threads == {threading.current_thread()}
    if len(buffers) == 1:
        assert len(told) == 2 * (8 + 4) + 12  # two files of one store together, the third by itself
        assert max(told) <= 1000


def wait_for_reader() -> None:
    """Give a reader that runs ahead the time to do harm."""
    event = threading.Event()
    if any(thread.name.startswith("fetch") for thread in threading.enumerate()):
        event.wait(0.02)


def test_sources_begin_where_any_dtype_is_aligned(
    stores: Stores, merge: TensorMerge, make_buffers: MakeBuffers
) -> None:
    fetches = [(Window(merge, 0, 7, range(1)), Window(merge, 7, 21, range(1)))]
    (buffer, *_) = buffers = make_buffers(fetches)
    for number, filled in enumerate(fetch_windows(stores, fetches, buffers, ignore)):
        offset = number * 3 * aligned(28)
        for k, (view,) in enumerate(filled.views):
            first = offset + k * aligned(view.nbytes)
            assert buffer[first : first + view.nbytes] == view


def test_nothing_to_fetch(stores: Stores, make_buffers: MakeBuffers) -> None:
    assert list(fetch_windows(stores, [], make_buffers([()]), ignore)) == []


def test_fetches_are_planned_as_they_are_needed(
    stores: Stores, merge: TensorMerge, make_buffers: MakeBuffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a large tensor has very many windows."""
    monkeypatch.setattr(fetch, "_AHEAD_NBYTES", 1)
    fetches = cut(merge, *[1] * 30)
    num_planned = 0

    def planned() -> Iterator[Fetch]:
        nonlocal num_planned
        for each in fetches:
            num_planned += 1
            yield each

    for number, _ in enumerate(fetch_windows(stores, planned(), make_buffers(fetches), ignore), start=1):
        assert num_planned <= number + 2


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_that_has_changed(
    stores: Stores, urls: list[str], merge: TensorMerge, make_buffers: MakeBuffers, which: int
) -> None:
    fetches = cut(merge, 1, 1, 1, 1)
    url = urls[which]
    stores.at(url).write(url, b"x" * (OFFSET + NBYTES + 1))
    with pytest.raises(FetchError, match=Path(url).name):
        list(fetch_windows(stores, fetches, make_buffers(fetches), ignore))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_an_end_before_the_last_window(stores: Stores, merge: TensorMerge, make_buffers: MakeBuffers) -> None:
    fetches = cut(merge, 1, 1, 1, 1)
    with closing(fetch_windows(stores, fetches, make_buffers(fetches), ignore)) as windows:
        next(windows)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_storages_are_told_what_is_read_next(
    stores: Stores, urls: list[str], merge: TensorMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, Storage, int]] = []
    for storage in {stores.at(url): None for url in urls}:
        read_into, will_read = storage.read_into, storage.will_read

        def read(
            ranges: Sequence[ByteRange],
            buffers: Sequence[Buffer],
            *,
            storage: Storage = storage,
            read_into: Callable[..., None] = read_into,
        ) -> None:
            log.extend(("read", storage, piece.start) for piece in ranges)
            read_into(ranges, buffers)

        def hint(
            ranges: Sequence[ByteRange], *, storage: Storage = storage, will_read: Callable[..., None] = will_read
        ) -> None:
            log.extend(("hint", storage, piece.start) for piece in ranges)
            will_read(ranges)

        monkeypatch.setattr(storage, "read_into", read)
        monkeypatch.setattr(storage, "will_read", hint)
    fetches = cut(merge, 1, 2, 1)
    list(fetch_windows(stores, fetches, [memoryview(bytearray(room_for(fetches)))], ignore))
    reads = [entry[1:] for entry in log if entry[0] == "read"]
    hints = [entry[1:] for entry in log if entry[0] == "hint"]
    assert len(reads) == 12
    assert sorted(hints, key=repr) == sorted(reads[3:], key=repr), "all but the first fetch, which nobody waits for"
    for entry in hints:
        assert log.index(("hint", *entry)) < log.index(("read", *entry))


def test_with_two_buffers_the_next_is_read_meanwhile(
    stores: Stores, urls: list[str], merge: TensorMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, is_read = stores.at(urls[0]), threading.Event()
    read_into = storage.read_into

    def read(ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        read_into(ranges, buffers)
        if ranges[0].start == OFFSET + 400:
            is_read.set()

    monkeypatch.setattr(storage, "read_into", read)
    fetches = cut(merge, 1, 1, 1)
    buffers = [memoryview(bytearray(room_for(fetches))) for _ in range(2)]
    with closing(fetch_windows(stores, fetches, buffers, ignore)) as windows:
        next(windows)
        assert is_read.wait(60)


def test_requests_of_the_next_fetch_do_not_wait_for_the_last_of_this_one(
    stores: Stores, urls: list[str], merge: TensorMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, both = stores.at(urls[0]), threading.Barrier(2, timeout=60)
    read_into = storage.read_into

    def read(ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        if ranges[0].start in (OFFSET, OFFSET + 400):
            both.wait()
        read_into(ranges, buffers)

    monkeypatch.setattr(storage, "read_into", read)
    fetches = cut(merge, 1, 1, 1)
    buffers = [memoryview(bytearray(room_for(fetches))) for _ in range(2)]
    assert len(list(fetch_windows(stores, fetches, buffers, ignore))) == 3
