from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.local import open_files
from raymerge.pipeline.stores.local import storage as local_storage
from raymerge.pipeline.stores.local import writer as local_writer
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.pipeline.stores.storage_contract import MIB, StorageContract, make_bytes, read_all, read_ranges


@pytest.fixture
def storage() -> Iterator[LocalStorage]:
    storage = LocalStorage()
    yield storage
    storage.close()


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[LocalStorage]:
        storage = LocalStorage()
        yield storage
        storage.close()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path / "root dir")


class TestBufferedLocalStorage(TestLocalStorage):
    """A file system that has no direct I/O, and says so when the file is opened."""

    @pytest.fixture(autouse=True)
    def _buffered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local_writer, "_O_DIRECT", 0)


class TestFileUrls(TestLocalStorage):
    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return (tmp_path / "root").as_uri()

    @pytest.mark.skip("the names would have to be encoded")
    def test_names(self) -> None:  # type: ignore[override]
        pass

    @pytest.mark.skip("the names would have to be encoded")
    def test_list(self) -> None:  # type: ignore[override]
        pass


# reading


def test_list_follows_links_to_files_only(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"1234")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "real")
    (root / "broken").symlink_to(tmp_path / "gone")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert list(storage.list(str(root))) == ["link"]
    assert read_all(storage, storage.stat(str(root / "link"))) == b"1234"


def test_a_link_that_leads_elsewhere_has_changed(storage: LocalStorage, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "link").symlink_to("one")
    file = storage.stat(str(tmp_path / "link"))
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("two")
    with pytest.raises(FetchError, match="changed"):
        storage.check_unchanged(file)


@pytest.mark.parametrize("is_open", [False, True])
def test_changed_in_place(storage: LocalStorage, tmp_path: Path, is_open: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345678")
    os.utime(path, ns=(0, 1_000_000_000))
    file = storage.stat(str(path))
    if is_open:
        read_all(storage, file)
    with path.open("r+b") as stream:
        stream.write(b"abcd")
    for check in (storage.check_unchanged, lambda file: read_all(storage, file)):
        with pytest.raises(FetchError, match=r"expected 8 bytes, etag 3b9aca00-8-.*found 8 bytes"):
            check(file)


def test_cut_short_while_it_is_read(storage: LocalStorage, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    file = storage.stat(str(path))
    read_all(storage, file)
    os.truncate(path, 40)
    with pytest.raises(FetchError, match="bytes 10 to 90 were expected, the file ends at 40"):
        read_ranges(storage, [ByteRange(file, 10, 90)])


def test_reads_that_come_in_pieces(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_bytes(10_000)
    (tmp_path / "a").write_bytes(data)
    file = storage.stat(str(tmp_path / "a"))
    preadv = os.preadv

    def preadv_seven(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert all(buffer.nbytes for buffer in buffers)
        return preadv(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", preadv_seven)
    pieces = [(0, 10), (10, 11), (11, 11), (11, 5_000), (5_000, 10_000)]
    assert b"".join(read_ranges(storage, [ByteRange(file, *piece) for piece in pieces])) == data


def test_an_error_of_the_disk(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    file = storage.stat(str(tmp_path / "a"))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FetchError, match="a: bytes 10 to 20 of 100 could not be read: Input/output error") as caught:
        read_ranges(storage, [ByteRange(file, 10, 20)])
    assert isinstance(caught.value.__cause__, OSError)


def test_neighbours_are_read_in_one_call(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(make_bytes(3_000))
    file = storage.stat(str(tmp_path / "a"))
    calls: list[tuple[int, int]] = []
    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, len(buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    read_ranges(storage, [ByteRange(file, start, start + 10) for start in (30, 10, 20, 100)])
    assert calls == [(10, 3), (100, 1)]


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MAX_OPEN_FILES", 3)
    storage = LocalStorage()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(10):
        path = tmp_path / str(number)
        path.write_bytes(b"1234")
        assert read_all(storage, storage.stat(str(path))) == b"1234"
    assert len(os.listdir("/proc/self/fd")) == before + 3  # noqa: PTH208
    storage.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_hundred_files_that_are_read_in_turn_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage()
    opened: list[str] = []
    open_file = open_files.OpenFiles._open

    def note(files: open_files.OpenFiles, file: StoredFile) -> int:
        opened.append(file.url)
        return open_file(files, file)

    monkeypatch.setattr(open_files.OpenFiles, "_open", note)
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"1234")
    files = [storage.stat(str(tmp_path / str(number))) for number in range(100)]
    for file in [*files, *files]:
        assert read_all(storage, file) == b"1234"
    storage.close()
    assert len(opened) == len(set(opened)) == 100


def test_files_are_closed_for_others_where_the_process_can_open_no_more(tmp_path: Path) -> None:
    storage = LocalStorage()
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"1234")
    *files, last = [storage.stat(str(tmp_path / str(number))) for number in range(4)]
    for file in files:
        assert read_all(storage, file) == b"1234"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(tmp_path / "0", os.O_RDONLY)
    os.close(probe)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            os.open(tmp_path / "0", os.O_RDONLY)
        assert read_all(storage, last) == b"1234"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        storage.close()


# writing


def test_the_unfinished_file_is_hidden_and_beside_the_target(storage: LocalStorage, tmp_path: Path) -> None:
    writer = storage.open_writer(str(tmp_path / "out" / "a.safetensors"), 2 * MIB)
    assert list(storage.list(str(tmp_path))) == ["out/.a.safetensors.partial"]
    assert (tmp_path / "out" / ".a.safetensors.partial").stat().st_size == 2 * MIB
    writer.abort()
    writer = storage.open_writer(str(tmp_path / "out" / "a"), 2, str(tmp_path / "out" / ".raymerge" / "x"))
    assert list(storage.list(str(tmp_path))) == ["out/.raymerge/x"]
    writer.abort()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o000, 0o666)])
def test_mode(storage: LocalStorage, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        storage.write(str(tmp_path / "a"), b"1234")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_a_hidden_directory_goes_with_its_last_file(storage: LocalStorage, tmp_path: Path) -> None:
    for name in (".journal/a", ".journal/b", "visible/a"):
        storage.write(str(tmp_path / name), b"")
    storage.delete(str(tmp_path / ".journal" / "a"))
    assert (tmp_path / ".journal").is_dir()
    storage.delete(str(tmp_path / ".journal" / "b"))
    storage.delete(str(tmp_path / "visible" / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["visible"]


def fail_at_second(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the second write to disk fail."""
    pwrite, calls = os.pwrite, 0

    def pwrite_or_fail(descriptor: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite_or_fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_in_mid_file(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_at_second(monkeypatch, number)
    writer = storage.open_writer(str(tmp_path / "a"), 64 * MIB)
    with pytest.raises(
        OutputError, match=re.escape(f"{tmp_path}/a: cannot be written: {os.strerror(number)}")
    ) as caught:
        writer.write(bytes(64 * MIB))
    assert isinstance(caught.value.__cause__, OSError)
    if number != errno.EIO:
        assert re.search(r"needs 67,108,864 bytes, [\d,]+ are free in .*run the same command again", str(caught.value))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_making_it_durable(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = storage.open_writer(str(tmp_path / "a"), 3)
    writer.write(b"abc")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        writer.commit()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_direct_writes_that_are_refused(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_second(monkeypatch, errno.EINVAL)
    monkeypatch.setattr(local_writer, "_set_direct", lambda _, is_direct: is_direct)
    data = make_bytes(13 * MIB + 5)
    writer = storage.open_writer(str(tmp_path / "a"), len(data))
    writer.write(data[: 8 * MIB])
    writer.write(data[8 * MIB :])
    writer.commit()
    assert (tmp_path / "a").read_bytes() == data


def test_direct_writes_from_aligned_memory(storage: LocalStorage, tmp_path: Path) -> None:
    data = make_bytes(9 * MIB + 5)
    buffer = mmap.mmap(-1, 4 * MIB)
    writer = storage.open_writer(str(tmp_path / "a"), len(data))
    for start in range(0, len(data), 4 * MIB):
        piece = data[start : start + 4 * MIB]
        buffer[: len(piece)] = piece
        writer.write(memoryview(buffer)[: len(piece)])
    writer.commit()
    assert (tmp_path / "a").read_bytes() == data


def test_writes_that_come_in_pieces(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:99_999], offset))
    data = make_bytes(5 * MIB + 5)
    writer = storage.open_writer(str(tmp_path / "a"), len(data))
    writer.write(data)
    writer.commit()
    assert (tmp_path / "a").read_bytes() == data


def test_too_little_space_is_seen_before_anything_is_written(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match="cannot be written: No space left on device: it needs 1,152,921,504,606,846,976"
    ):
        storage.open_writer(str(tmp_path / "a"), 2**60)
    assert list(tmp_path.iterdir()) == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_a_limit_on_the_size_of_files(tmp_path: Path, has_fallocate: bool) -> None:
    result = run_python(f"""
        import ctypes, os, resource
        from raymerge.pipeline.errors import OutputError
        from raymerge.pipeline.stores.local.storage import LocalStorage
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 * 2**20, 6 * 2**20))
        if not {has_fallocate}:
            ctypes.CDLL = lambda *_, **__: None
        try:
            LocalStorage().write({str(tmp_path / "a")!r}, bytes(10 * 2**20))
        except OutputError as error:
            print(error)
        print(os.listdir({str(tmp_path)!r}))
    """)
    assert result.stderr == ""
    message, files = result.stdout.splitlines()
    assert "File too large" in message
    assert "--shard-size" in message
    assert files == "[]"


def test_a_small_file_system(storage: LocalStorage, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with pytest.raises(OutputError, match=r"No space left on device: it needs 4,194,304 bytes, [\d,]+ are free in"):
            storage.open_writer(str(tmp_path / "a"), 4 * MIB)
        first = storage.open_writer(str(tmp_path / "a"), 2 * MIB)
        with pytest.raises(OutputError, match="No space left on device"):
            storage.open_writer(str(tmp_path / "b"), 2 * MIB)
        first.write(make_bytes(2 * MIB))
        first.commit()
        assert (tmp_path / "a").read_bytes() == make_bytes(2 * MIB)
        assert list(storage.list(str(tmp_path))) == ["a"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_system_in_memory(storage: LocalStorage) -> None:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        pytest.skip("no /dev/shm")
    url = str(directory / f"raymerge-test-{os.getpid()}")
    data = make_bytes(9 * MIB + 5)
    try:
        storage.write(url, data)
        assert read_all(storage, storage.stat(url)) == data
    finally:
        storage.delete(url)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_may_not_be_written_to(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    message = f"{tmp_path}/a: cannot be created: {os.strerror(number)}; .*choose (a|another) directory"
    with pytest.raises(OutputError, match=message):
        storage.open_writer(str(tmp_path / "a"), 10)
    with pytest.raises(OutputError, match=message), storage.lock(str(tmp_path / "a")):
        pass


def test_a_path_through_a_file(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file/a", "file/dir/a"):
        with pytest.raises(OutputError, match=r"cannot be created: .*; a part of the path is a file"):
            storage.open_writer(str(tmp_path / name), 10)
        with pytest.raises(OutputError, match=r"cannot be created: .*; a part of the path is a file"):
            storage.lock(str(tmp_path / name)).__enter__()


def test_a_directory_in_place_of_the_target(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="cannot be written: Is a directory; a directory has this name"):
        storage.write(str(tmp_path / "a"), b"1234")
    assert list(storage.list(str(tmp_path))) == []
    with pytest.raises(OutputError, match="cannot be deleted"):
        storage.delete(str(tmp_path / "a"))


def test_a_link_in_place_of_the_unfinished_file_is_not_followed(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"1234")
    (tmp_path / ".a.partial").symlink_to("precious")
    storage.write(str(tmp_path / "a"), b"content")
    assert (tmp_path / "precious").read_bytes() == b"1234"
    assert (tmp_path / "a").read_bytes() == b"content"
    assert not (tmp_path / "a").is_symlink()


# locking


def test_lock_across_processes(storage: LocalStorage, tmp_path: Path) -> None:
    url = str(tmp_path / "out" / ".raymerge" / "lock")
    code = f"""
        import sys
        from raymerge.pipeline.stores.local.storage import LocalStorage
        with LocalStorage().lock({url!r}):
            print("locked", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=rf"another raymerge run \(pid {holder.pid}, since 20\d\d-"):
            storage.lock(url).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with storage.lock(url):
            pass
    assert list(storage.list(str(tmp_path))) == []


def test_a_file_system_without_locks(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match="cannot be locked: No locks available"):
        storage.lock(str(tmp_path / "lock")).__enter__()


@pytest.mark.parametrize("target", ["gone", "there"])
def test_a_link_in_the_place_of_a_lock(storage: LocalStorage, tmp_path: Path, target: str) -> None:
    (tmp_path / "there").write_text("content")
    lock = tmp_path / "lock"
    lock.symlink_to(target)
    with pytest.raises(OutputError, match=f"{lock}: a link, and a lock is needed there; delete the link"):
        storage.lock(str(lock)).__enter__()
    assert (tmp_path / "there").read_text() == "content"


def test_a_lock_that_is_deleted_whenever_it_is_made(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_storage, "is_at", lambda *_: False)
    with pytest.raises(OutputError, match="lock: deleted each of the 1,000 times that it was made; wait"):
        storage.lock(str(tmp_path / "lock")).__enter__()


def test_a_lock_where_nothing_can_be_made(storage: LocalStorage) -> None:
    with pytest.raises(OutputError, match="cannot be created"):
        storage.lock("/proc/nowhere/out/lock").__enter__()


def test_two_workers_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    storage = LocalStorage()
    url, partial = str(tmp_path / "a"), str(tmp_path / "a.partial")
    first = storage.open_writer(url, 4, partial)
    first.write(b"1234")
    second = storage.open_writer(url, 4, partial)
    second.write(b"12")
    first.commit()
    assert (tmp_path / "a").read_bytes() == b"1234"
    second.write(b"34")
    second.commit()
    assert (tmp_path / "a").read_bytes() == b"1234"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_unfinished_file_of_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"half")
    writer = LocalStorage().open_writer(str(tmp_path / "a"), 4, str(tmp_path / "a.partial"))
    writer.write(b"1234")
    writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_worker_that_was_given_up_does_not_publish_what_another_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as some file systems do
    storage = LocalStorage()
    url, partial = str(tmp_path / "a"), str(tmp_path / "a.partial")
    first = storage.open_writer(url, 4, partial)
    first.write(b"1234")
    second = storage.open_writer(url, 4, partial)
    second.write(b"12")
    with pytest.raises(OutputError, match="another worker has begun it again"):
        first.commit()
    assert not (tmp_path / "a").exists()
    second.write(b"34")
    second.commit()
    assert (tmp_path / "a").read_bytes() == b"1234"
