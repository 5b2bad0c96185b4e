"""Files of machine code: kept only where they can be trusted, and made by one process at a time."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from raymerge.ops.loops.code_files import CodeFile, find_directory


@pytest.fixture
def file(tmp_path: Path) -> CodeFile:
    return CodeFile(tmp_path / "loops" / "combine-1234")


def test_one_at_a_time_makes_a_file(file: CodeFile) -> None:
    lock = file.try_lock()
    assert lock is not None
    assert file.try_lock() is None
    file.unlock(lock)
    assert [*file.path.parent.iterdir()] == []
    again = file.try_lock()
    assert again is not None
    file.unlock(again)


def test_a_lock_ends_with_all_who_have_it(file: CodeFile) -> None:
    lock = file.try_lock()
    assert lock is not None
    inherited = os.dup(lock)
    os.close(lock)
    assert file.try_lock() is None
    os.close(inherited)  # as when a process is killed, which deletes nothing
    with file.hold():
        assert file.try_lock() is None
    assert [*file.path.parent.iterdir()] == []


def test_who_waits_finds_what_was_made(file: CodeFile) -> None:
    lock = file.try_lock()
    assert lock is not None
    found: list[bytes] = []

    def wait() -> None:
        with file.hold():
            found.append(file.read())

    thread = threading.Thread(target=wait)
    thread.start()
    file.write(b"code")
    file.unlock(lock)
    thread.join()
    assert found == [b"code"]


def test_where_nothing_can_be_written_there_is_no_lock_to_wait_for() -> None:
    file = CodeFile(Path("/proc/raymerge/combine-1234"))
    with pytest.raises(OSError, match="/proc/raymerge"):
        file.try_lock()
    with file.hold():
        file.write(b"code")
    assert file.read() == b""


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_directory() == tmp_path / "raymerge" / "loops"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert find_directory() == Path("/home/someone/.cache/raymerge/loops")
