"""Shards that are written side by side: the right bytes and digests, whatever is filled or fails first."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raymerge.ops.loops import digest_loops
from raymerge.ops.loops.digest_loops import has_instructions
from raymerge.pipeline.engine import digests
from raymerge.pipeline.engine.digests import Digest, can_share, make_digests
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.local.writer import LocalWriter
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES

SIZES = (0, 5, 64, OUTPUT_BUFFER_NBYTES - 1, OUTPUT_BUFFER_NBYTES, 2 * OUTPUT_BUFFER_NBYTES + 100, 3, 9 * 2**20)


class FullDisk(LocalWriter):
    """Takes nothing."""

    def take(self, buffer: mmap.mmap, nbytes: int, release: Callable[[mmap.mmap], None]) -> None:
        release(buffer)
        raise OutputError("the disk is full")


def make_contents(sizes: Sequence[int]) -> list[bytes]:
    return [np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)]


def open_shards(
    directory: Path, contents: Sequence[bytes], shared: Iterable[Digest], failing: Sequence[int] = ()
) -> list[ShardWriter]:
    pool = BufferPool()
    shards = []
    for number, (content, digest) in enumerate(zip(contents, shared, strict=True)):
        path = directory / str(number)
        kind = FullDisk if number in failing else LocalWriter
        writer = kind(str(path), path, path.with_suffix(".partial"), len(content), exclusive=False)
        shards.append(ShardWriter(writer, pool, digest))
    return shards


def write_side_by_side(shards: Sequence[ShardWriter], contents: Sequence[bytes], nbytes: int) -> None:
    """Append so many bytes to each in turn."""
    for start in range(0, max(map(len, contents)), nbytes):
        for shard, content in zip(shards, contents, strict=True):
            shard.append_bytes(content[start : start + nbytes])


def write_in_turn(shards: Sequence[ShardWriter], contents: Sequence[bytes]) -> None:
    """Append all of each, more than its buffers hold, before anything of the next."""
    for shard, content in zip(shards, contents, strict=True):
        shard.append_bytes(content)


@pytest.mark.parametrize("how", ["side by side", "in turn"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, len(SIZES)])
@pytest.mark.parametrize("is_shared", [True, False])
def test_bytes_and_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_shards: int, how: str, is_shared: bool
) -> None:
    if not is_shared:
        monkeypatch.setattr(digests, "can_share", lambda: False)
    contents = make_contents(SIZES[-num_shards:])
    shards = open_shards(tmp_path, contents, make_digests(num_shards))
    if how == "in turn":
        write_in_turn(shards, contents)
    else:
        write_side_by_side(shards, contents, 3 * 2**20 + 1)
    for shard in shards:
        shard.close()
    assert [shard.finish() for shard in shards] == [hashlib.sha256(content).hexdigest() for content in contents]
    for number, (shard, content) in enumerate(zip(shards, contents, strict=True)):
        assert shard.commit().nbytes == len(content)
        assert (tmp_path / str(number)).read_bytes() == content


@pytest.mark.parametrize("num_failing", [1, 2])
def test_shards_are_finished_beside_those_that_fail(tmp_path: Path, num_failing: int) -> None:
    contents = make_contents([5 * OUTPUT_BUFFER_NBYTES] * 3)
    shards = open_shards(tmp_path, contents, make_digests(3), failing=range(num_failing))
    for number, (shard, content) in enumerate(zip(shards, contents, strict=True)):
        if number < num_failing:
            with pytest.raises(OutputError, match="the disk is full"):
                shard.append_bytes(content)
        else:
            shard.append_bytes(content)
    for shard in shards:
        shard.close()
    for shard in shards[:num_failing]:
        with pytest.raises(OutputError, match="the disk is full"):
            shard.finish()
        shard.abort()
    for shard, content in zip(shards[num_failing:], contents[num_failing:], strict=True):
        assert shard.finish() == hashlib.sha256(content).hexdigest()
        shard.commit()


def test_shards_are_given_up_while_others_have_less(tmp_path: Path) -> None:
    before = threading.active_count()
    contents = make_contents([2 * OUTPUT_BUFFER_NBYTES] * 3)
    shards = open_shards(tmp_path, contents, make_digests(3))
    shards[1].append_bytes(contents[1])
    shards[2].append_bytes(b"some")
    for shard in shards:
        shard.abort()
    assert threading.active_count() == before
    assert not [*tmp_path.iterdir()]


def test_shards_are_given_up_when_an_interrupt_comes_while_a_piece_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    contents = make_contents([2 * OUTPUT_BUFFER_NBYTES] * 3)
    shared = make_digests(3)
    announce = shared[1].announce

    def interrupt() -> None:
        announce()
        raise KeyboardInterrupt

    monkeypatch.setattr(shared[1], "announce", interrupt)
    shards = open_shards(tmp_path, contents, shared)
    shards[0].append_bytes(contents[0])
    with pytest.raises(KeyboardInterrupt):
        shards[1].append_bytes(contents[1])
    for shard in shards:
        shard.abort()
    assert threading.active_count() == before
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not has_instructions(), reason="no instructions for SHA")
def test_loops_that_give_other_digests_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one file may be right while those of several are not: each number of them has code of its own."""
    compress = digest_loops.compress

    def miss_the_third(addresses: Any, states: Any, num_blocks: int) -> None:
        compress(addresses[:2], states[:2], num_blocks)

    assert can_share.__wrapped__()
    monkeypatch.setattr(digests, "digest_loops", SimpleNamespace(**vars(digest_loops) | {"compress": miss_the_third}))
    monkeypatch.setattr(digests, "list_loops", lambda: [miss_the_third])
    assert not can_share.__wrapped__()


def test_files_side_by_side_share_the_processor_where_it_has_instructions() -> None:
    assert can_share() == has_instructions()
    assert (type(make_digests(2)[0]) is Digest) != has_instructions()
    assert type(make_digests(1)[0]) is Digest
