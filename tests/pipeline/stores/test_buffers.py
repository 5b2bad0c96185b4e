"""Buffers that are used again."""

from __future__ import annotations

import multiprocessing
import sys

import pytest

from raymerge.pipeline.stores.buffers import BufferPool

NBYTES = 2**12


def fill(pool: BufferPool) -> None:
    pool.acquire(NBYTES)[:] = b"x" * NBYTES


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool()
    buffer = pool.acquire(NBYTES)
    pool.release(buffer)
    assert pool.acquire(2 * NBYTES) is not buffer
    assert pool.acquire(NBYTES) is buffer
    assert pool.acquire(NBYTES) is not buffer


def test_a_closed_pool_holds_nothing() -> None:
    pool = BufferPool()
    buffer = pool.acquire(NBYTES)
    pool.release(buffer)
    pool.close()
    assert pool.acquire(NBYTES) is not buffer


def test_lent_buffers_are_kept_or_have_the_room_of_those_that_are() -> None:
    pool = BufferPool()
    with pool.lend(NBYTES, 2) as buffers:
        buffers[0][:1] = b"x"
        del buffers
    assert sum(map(len, pool._free.values())) == 2
    with pool.lend(3 * NBYTES, 1, keep=False):
        assert sum(map(len, pool._free.values())) == 0
    assert sum(map(len, pool._free.values())) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forked_processes_do_not_share_buffers() -> None:
    pool = BufferPool()
    buffer = pool.acquire(NBYTES)
    buffer[:] = bytes(NBYTES)
    pool.release(buffer)
    process = multiprocessing.get_context("fork").Process(target=fill, args=(pool,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert pool.acquire(NBYTES)[:] == bytes(NBYTES)
