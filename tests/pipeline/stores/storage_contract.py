"""What every storage promises; a storage's tests are a subclass with two fixtures."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from raymerge.pipeline.errors import CheckpointError, FetchError, OutputError
from raymerge.pipeline.stores import lease
from raymerge.pipeline.stores.files import ByteRange, ByteRows, StoredFile
from raymerge.pipeline.stores.seam import Storage, Writer

MIB = 2**20
NAMES = ["plain", "with space", "ümläut-日本語-😀", "100%25 #1?x=y&z", "a'b\"c", "deep/er/and deeper/file.bin"]


def make_bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def read_ranges(storage: Storage, ranges: list[ByteRange]) -> list[bytes]:
    buffers = [bytearray(item.nbytes) for item in ranges]
    storage.read_into(ranges, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


def read_all(storage: Storage, file: StoredFile) -> bytes:
    return read_ranges(storage, [ByteRange(file, 0, file.nbytes)])[0]


class StorageContract:
    """Subclasses provide `storage`, and `root`: the URL of a directory that does not exist yet."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise NotImplementedError

    @pytest.fixture
    def root(self) -> str:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _settled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)

    # what is there

    def test_stat(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"12345")
        file = storage.stat(f"{root}/a")
        assert (file.url, file.nbytes) == (f"{root}/a", 5)
        assert file == storage.stat(f"{root}/a")

    @pytest.mark.parametrize("name", ["missing", "dir", "dir/file/below"])
    def test_stat_of_no_file(self, storage: Storage, root: str, name: str) -> None:
        storage.write(f"{root}/dir/file", b"")
        with pytest.raises(FileNotFoundError):
            storage.stat(f"{root}/{name}")
        with pytest.raises(FileNotFoundError):
            storage.read(f"{root}/{name}", 10)

    def test_list(self, storage: Storage, root: str) -> None:
        assert list(storage.list(root)) == []
        names = ["b", "a", ".hidden/x", "dir/b", "dir/a", "dir.txt", *NAMES]
        for name in names:
            storage.write(f"{root}/{name}", b"")
        assert list(storage.list(root)) == sorted(names)
        assert list(storage.list(f"{root}/dir")) == ["a", "b"]
        assert list(storage.list(f"{root}/a")) == []
        assert list(storage.list(f"{root}/a/below")) == []

    def test_list_tells_what_stat_tells(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"12345")
        storage.write(f"{root}/dir/b", b"")
        assert storage.list(root) == {name: storage.stat(f"{root}/{name}") for name in ("a", "dir/b")}

    def test_absolute(self, storage: Storage, root: str) -> None:
        assert storage.absolute(f"{root}/") == storage.absolute(root) == storage.absolute(storage.absolute(root))
        assert storage.resolve(f"{root}/a") == f"{storage.resolve(root)}/a"

    def test_only_the_hub_has_revisions(self, storage: Storage, root: str) -> None:
        assert storage.pin(root, None) == storage.absolute(root)
        with pytest.raises(CheckpointError, match="only a Hub repository has revisions"):
            storage.pin(root, "main")

    @pytest.mark.parametrize("name", NAMES)
    def test_names(self, storage: Storage, root: str, name: str) -> None:
        url = f"{root}/{name}"
        storage.write(url, b"content")
        assert storage.stat(url).url == url
        assert storage.read(url, 7) == b"content"
        assert list(storage.list(root)) == [name]
        storage.delete(url)
        assert list(storage.list(root)) == []

    def test_delete(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"")
        storage.write(f"{root}/dir/b", b"")
        storage.delete(f"{root}/a")
        storage.delete(f"{root}/a")
        storage.delete(f"{root}/missing/a")
        storage.delete(f"{root}/dir/b/below")
        assert list(storage.list(root)) == ["dir/b"]
        storage.delete(f"{root}/dir/b")
        assert list(storage.list(root)) == []

    # reading

    def test_ranges_in_any_order(self, storage: Storage, root: str) -> None:
        content = {name: make_bytes(10_000, seed) for seed, name in enumerate("ab")}
        for name, data in content.items():
            storage.write(f"{root}/{name}", data)
        a, b = storage.stat(f"{root}/a"), storage.stat(f"{root}/b")
        pieces = [
            (a, 50, 60),
            (b, 0, 10_000),
            (a, 60, 70),
            (a, 60, 70),
            (a, 0, 0),
            (a, 65, 3_000),
            (a, 70, 71),
            (a, 9_999, 10_000),
        ]
        expected = [content[file.url[-1]][start:stop] for file, start, stop in pieces]
        assert read_ranges(storage, [ByteRange(*piece) for piece in pieces]) == expected

    def test_many_neighbours(self, storage: Storage, root: str) -> None:
        data = make_bytes(5_000)
        storage.write(f"{root}/a", data)
        file = storage.stat(f"{root}/a")
        ranges = [ByteRange(file, start, start + 2) for start in range(0, 5_000, 2)]
        random.Random(1).shuffle(ranges)
        assert read_ranges(storage, ranges) == [data[item.start : item.stop] for item in ranges]

    @pytest.mark.parametrize("max_gap", [1, 100, 10_000])
    def test_with_gaps_between(self, storage: Storage, root: str, max_gap: int) -> None:
        data = make_bytes(5_000)
        storage.write(f"{root}/a", data)
        file = storage.stat(f"{root}/a")
        pieces = [(4_000, 4_001), (10, 20), (21, 30), (15, 25), (130, 140), (241, 300), (1_000, 1_000), (4_102, 4_900)]
        ranges = [ByteRange(file, *piece) for piece in pieces]
        buffers = [bytearray(item.nbytes) for item in ranges]
        storage.read_into(ranges, [memoryview(buffer) for buffer in buffers], max_gap=max_gap)
        assert [bytes(buffer) for buffer in buffers] == [data[item.start : item.stop] for item in ranges]

    def test_rows_of_one_length(self, storage: Storage, root: str) -> None:
        data = make_bytes(10_240)
        storage.write(f"{root}/a", data)
        file = storage.stat(f"{root}/a")
        starts = [300, 310, 320, 7, 10_230, 7, 0]
        buffer = bytearray(10 * len(starts))
        storage.read_rows(ByteRows(file, np.array(starts, np.int64), 10), memoryview(buffer))
        assert bytes(buffer) == b"".join(data[start : start + 10] for start in starts)
        beyond = ByteRows(file, np.array([0, 10_235], np.int64), 10)
        with pytest.raises(FetchError, match="bytes 10,235 to 10,245"):
            storage.read_rows(beyond, memoryview(bytearray(20)))

    def test_nothing_to_read(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"")
        file = storage.stat(f"{root}/a")
        storage.read_into([], [])
        assert read_ranges(storage, [ByteRange(file, 0, 0)]) == [b""]
        assert storage.read(file.url, 0) == b""

    def test_a_buffer_of_another_size_is_a_bug(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"1234")
        with pytest.raises(ValueError, match="3 bytes for a range of 4"):
            storage.read_into([ByteRange(storage.stat(f"{root}/a"), 0, 4)], [memoryview(bytearray(3))])

    def test_past_the_end(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", make_bytes(100))
        with pytest.raises(FetchError, match=f"{root}/a.*100"):
            read_ranges(storage, [ByteRange(storage.stat(f"{root}/a"), 90, 110)])

    def test_larger_than_expected(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", make_bytes(100))
        with pytest.raises(FetchError, match="100 bytes, at most 99"):
            storage.read(f"{root}/a", 99)

    def test_many_threads_and_files(self, storage: Storage, root: str) -> None:
        content = [make_bytes(3_000, seed) for seed in range(80)]
        for number, data in enumerate(content):
            storage.write(f"{root}/{number}", data)
        files = [storage.stat(f"{root}/{number}") for number in range(len(content))]

        def read(seed: int) -> bool:
            order = random.Random(seed).sample(range(len(files)), len(files))
            return all(read_all(storage, files[number]) == content[number] for number in order)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))

    def test_close_forgets_nothing(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"1234")
        file = storage.stat(f"{root}/a")
        for _ in range(2):
            assert read_all(storage, file) == b"1234"
            storage.close()

    # changes

    @pytest.mark.parametrize("data", [b"12345678", b"1234567", b"123456789"], ids=["same size", "shorter", "longer"])
    @pytest.mark.parametrize("is_open", [False, True], ids=["not read before", "read before"])
    def test_replaced(self, storage: Storage, root: str, data: bytes, is_open: bool) -> None:
        storage.write(f"{root}/a", b"abcdefgh")
        file = storage.stat(f"{root}/a")
        storage.check_unchanged(file)
        if is_open:
            assert read_all(storage, file) == b"abcdefgh"
        storage.write(f"{root}/a", data)
        assert storage.stat(f"{root}/a").etag != file.etag
        with pytest.raises(FetchError, match=f"{root}/a.*changed since the plan was made"):
            storage.check_unchanged(file)
        if not is_open:
            with pytest.raises(FetchError, match=f"{root}/a.*changed since the plan was made"):
                read_all(storage, file)
        assert read_all(storage, storage.stat(f"{root}/a")) == data

    def test_deleted(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"abcdefgh")
        file = storage.stat(f"{root}/a")
        storage.delete(f"{root}/a")
        with pytest.raises(FetchError, match=f"{root}/a"):
            storage.check_unchanged(file)
        with pytest.raises(FetchError, match=f"{root}/a"):
            read_all(storage, file)

    def test_planned_with_another_size(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"abcdefgh")
        file = replace(storage.stat(f"{root}/a"), nbytes=9)
        with pytest.raises(FetchError, match=r"changed.*expected 9 bytes.*found 8 bytes"):
            read_ranges(storage, [ByteRange(file, 0, 4)])

    # writing

    @pytest.mark.parametrize(
        "nbytes", [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 5 * MIB + 3, 8 * MIB, 9 * MIB + 4096]
    )
    @pytest.mark.parametrize("chunk", [777_777, 4 * MIB, 64 * MIB])
    def test_written_is_what_is_read(self, storage: Storage, root: str, nbytes: int, chunk: int) -> None:
        data = make_bytes(nbytes)
        writer = storage.open_writer(f"{root}/a", nbytes)
        buffer = bytearray(min(chunk, nbytes))
        for start in range(0, nbytes, chunk):
            piece = data[start : start + chunk]
            buffer[: len(piece)] = piece
            writer.write(memoryview(buffer)[: len(piece)])
            buffer[:] = bytes(len(buffer))
        committed = writer.commit()
        file = storage.stat(f"{root}/a")
        assert committed == file
        assert file.nbytes == nbytes
        assert read_all(storage, file) == data
        assert list(storage.list(root)) == ["a"]

    @pytest.mark.parametrize("partial", [None, ".raymerge/a.partial"])
    @pytest.mark.parametrize("nbytes", [1_000, 5 * MIB + 3])
    def test_not_visible_before_commit(self, storage: Storage, root: str, nbytes: int, partial: str | None) -> None:
        writer = storage.open_writer(f"{root}/a", nbytes, f"{root}/{partial}" if partial else None)
        writer.write(make_bytes(nbytes))
        with pytest.raises(FileNotFoundError):
            storage.stat(f"{root}/a")
        writer.commit()
        assert list(storage.list(root)) == ["a"]
        assert storage.stat(f"{root}/a").nbytes == nbytes

    @pytest.mark.parametrize("nbytes", [1_000, 9 * MIB + 3])
    def test_abort_leaves_nothing(self, storage: Storage, root: str, nbytes: int) -> None:
        for num_written in (0, nbytes // 2, nbytes):
            writer = storage.open_writer(f"{root}/a", nbytes)
            writer.write(bytes(num_written))
            writer.abort()
            writer.abort()
            assert list(storage.list(root)) == []

    def test_the_earlier_file_stays_until_commit(self, storage: Storage, root: str) -> None:
        storage.write(f"{root}/a", b"old")
        writer = storage.open_writer(f"{root}/a", 4)
        writer.write(b"new!")
        assert storage.read(f"{root}/a", 10) == b"old"
        writer.abort()
        assert storage.read(f"{root}/a", 10) == b"old"
        storage.write(f"{root}/a", b"new!")
        assert storage.read(f"{root}/a", 10) == b"new!"

    def test_an_exclusive_file_replaces_nothing(self, storage: Storage, root: str) -> None:
        assert storage.write(f"{root}/a", b"first", exclusive=True) == storage.stat(f"{root}/a")
        with pytest.raises(FileExistsError):
            storage.write(f"{root}/a", b"second", exclusive=True)
        assert storage.read(f"{root}/a", 10) == b"first"
        assert list(storage.list(root)) == ["a"]

    def test_one_of_many_exclusive_writers_wins(self, storage: Storage, root: str) -> None:
        def write(number: int) -> bool:
            try:
                storage.write(f"{root}/a", b"writer %d" % number, exclusive=True)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(write, range(6)))
        assert won.count(True) == 1
        assert storage.read(f"{root}/a", 10) == b"writer %d" % won.index(True)

    def test_fewer_bytes_than_announced(self, storage: Storage, root: str) -> None:
        writer = storage.open_writer(f"{root}/a", 2 * MIB)
        writer.write(b"abc")
        with pytest.raises(
            OutputError, match=f"{root.removeprefix('file://')}/a: 3 bytes given, 2,097,152 were announced"
        ):
            writer.commit()
        assert list(storage.list(root)) == []

    def test_more_bytes_than_announced(self, storage: Storage, root: str) -> None:
        writer = storage.open_writer(f"{root}/a", 2)
        with pytest.raises(OutputError, match="3 bytes given, 2 were announced"):
            writer.write(b"abc")
        writer.abort()
        assert list(storage.list(root)) == []

    def test_an_unfinished_file_of_a_killed_run_is_no_hindrance(self, storage: Storage, root: str) -> None:
        abandoned = storage.open_writer(f"{root}/a", 9 * MIB)
        abandoned.write(bytes(5 * MIB))
        storage.write(f"{root}/a", b"content")
        assert storage.read(f"{root}/a", 10) == b"content"
        abandoned.abort()

    def test_files_written_at_once(self, storage: Storage, root: str) -> None:
        def write(seed: int) -> None:
            data = memoryview(make_bytes(3 * MIB + seed, seed))
            writer = storage.open_writer(f"{root}/{seed}", data.nbytes)
            for start in range(0, data.nbytes, 500_000):
                writer.write(data[start : start + 500_000])
            writer.commit()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(8)))
        for seed in range(8):
            assert storage.read(f"{root}/{seed}", 4 * MIB) == make_bytes(3 * MIB + seed, seed)

    def test_write_removes_what_it_could_not_write(
        self, storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_writer: Callable[..., Writer] = storage.open_writer

        def open_short(url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False) -> Writer:
            return open_writer(url, nbytes - 1, partial_url, exclusive=exclusive)

        monkeypatch.setattr(storage, "open_writer", open_short)
        with pytest.raises(OutputError):
            storage.write(f"{root}/a", b"content")
        assert list(storage.list(root)) == []

    # locking

    def test_lock(self, storage: Storage, root: str) -> None:
        url = f"{root}/.raymerge/lock"
        with storage.lock(url) as lock:
            lock.check()
            with pytest.raises(OutputError, match=r"another raymerge run \(pid \d+, since .*\) is writing to"):
                storage.lock(url).__enter__()
            with storage.lock(f"{root}/other"):
                pass
        assert list(storage.list(root)) == []
        with storage.lock(url):
            pass

    def test_lock_is_released_by_an_exception(self, storage: Storage, root: str) -> None:
        with pytest.raises(KeyError), storage.lock(f"{root}/lock"):
            raise KeyError
        with storage.lock(f"{root}/lock"):
            pass

    def test_lock_survives_the_deletion_of_its_directory(self, storage: Storage, root: str) -> None:
        with storage.lock(f"{root}/.raymerge/lock"):
            storage.delete(f"{root}/.raymerge/lock")
            with storage.lock(f"{root}/.raymerge/lock"):
                pass
        assert list(storage.list(root)) == []

    def test_one_thread_has_the_lock(self, storage: Storage, root: str) -> None:
        inside, most, rounds = 0, 0, 0
        guard = threading.Lock()

        def run(_: int) -> None:
            nonlocal inside, most, rounds
            for _ in range(50):
                try:
                    with storage.lock(f"{root}/.raymerge/lock"):
                        with guard:
                            inside, most, rounds = inside + 1, max(most, inside + 1), rounds + 1
                        with guard:
                            inside -= 1
                except OutputError:
                    pass

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
        assert most == 1
        assert rounds > 0
