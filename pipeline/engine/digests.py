"""The sha256 of files that are written side by side: that of three takes a core little longer than that of one."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

from raymerge.ops.lazy import digest_loops, np
from raymerge.pipeline.stores.files import Buffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raymerge.ops.loops.compiler import Loop


class Digest:
    """The sha256 of one file. One thread announces pieces, and another one takes each, in order.

    `announce` and `waiting` are for the former; `update` and at last `close` for the latter. Then `hexdigest`.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def announce(self) -> None:
        """Tell that a piece will be taken, or just was."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell that the thread which announces pieces, of other files, too, waits for pieces to be taken."""
        yield

    def update(self, piece: Buffer) -> None:
        """Take a piece: of a multiple of 64 bytes, unless it is the last one."""
        self._digest.update(piece)

    def close(self) -> None:
        """Tell that nothing more is taken."""

    def hexdigest(self) -> str:
        """Return the digest of all pieces, in hex."""
        return self._digest.hexdigest()


def make_digests(count: int) -> Sequence[Digest]:
    """Return digests for so many files, whose pieces are announced by one thread."""
    if count == 1 or not can_share():
        return [Digest() for _ in range(count)]
    num_groups = -(-count // digest_loops.MAX_MESSAGES)
    groups = [_Group() for _ in range(num_groups)]
    return [_SharedDigest(groups[number % num_groups]) for number in range(count)]


def list_loops() -> list[Loop]:
    """Return the loops that take several digests at once, if this processor has what they need."""
    with suppress(ImportError):
        return [digest_loops.compress] if digest_loops.has_instructions() else []
    return []


@cache
def can_share() -> bool:
    """Return whether digests of several files can be taken at once here, and are right."""
    with suppress(Exception):  # whatever a compiler, its cache and its libraries may raise
        return bool(list_loops()) and all(map(_is_right, range(1, digest_loops.MAX_MESSAGES + 1)))
    return False


def _is_right(count: int) -> bool:
    """Take so many digests at once, and tell whether they are those of hashlib."""
    group = _Group()
    pieces = {_SharedDigest(group): memoryview(bytes(range(number, number + 200))) for number in range(count)}
    for digest, piece in pieces.items():
        digest.offer(piece)
    group.take(group.begin())
    if group.error is not None:
        raise group.error
    return all(digest.hexdigest() == hashlib.sha256(piece).hexdigest() for digest, piece in pieces.items())


class _Group:
    """Digests whose pieces are taken together, by the thread of one of them; the others wait for it."""

    def __init__(self) -> None:
        self.members: list[_SharedDigest] = []
        self.changed = threading.Condition()
        self.num_waiting = 0
        """Threads that announce nothing before some piece is taken."""
        self.is_taking = False
        self.error: BaseException | None = None

    def can_take(self) -> bool:
        """Return whether pieces can be taken, and no further one together with those that are there."""
        return not self.is_taking and all(
            member.piece is not None or member.is_closed or (self.num_waiting > 0 and member.num_announced <= 0)
            for member in self.members
        )

    def begin(self) -> dict[_SharedDigest, Buffer]:
        """Return the pieces that are there, to be taken by this thread."""
        self.is_taking = True
        return {member: member.piece for member in self.members if member.piece is not None}

    def take(self, pieces: Mapping[_SharedDigest, Buffer]) -> None:
        """Take a piece of each of these; other ones may come meanwhile."""
        try:
            _compress([member.state for member in pieces], [*pieces.values()])
        except BaseException as error:
            self.error = error
        with self.changed:
            self.is_taking = False
            for member in pieces:
                member.piece = None
                member.num_announced -= 1
            self.changed.notify_all()


class _SharedDigest(Digest):
    """A member of a group."""

    def __init__(self, group: _Group) -> None:
        self.state: NDArray[np.uint32] = np.array(digest_loops.FIRST_STATE, np.uint32)
        self.piece: Buffer | None = None
        """A piece of whole blocks that waits to be taken."""
        self.num_announced = 0
        """Announced pieces that are not taken yet; negative where one is taken before it is announced."""
        self.is_closed = False
        self._group = group
        self._nbytes = 0
        self._rest = b""
        group.members.append(self)

    def announce(self) -> None:
        with self._group.changed:
            self.num_announced += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._add_waiting(1)
        try:
            yield
        finally:
            self._add_waiting(-1)

    def update(self, piece: Buffer) -> None:
        group = self._group
        with group.changed:
            self.offer(piece)
            group.changed.notify_all()
            group.changed.wait_for(lambda: self.piece is None or group.can_take())
            pieces = group.begin() if self.piece is not None else {}
        if pieces:
            group.take(pieces)
        if group.error is not None:
            raise group.error

    def offer(self, piece: Buffer) -> None:
        """Have the whole blocks of a piece wait to be taken, and keep the rest for the end."""
        num_whole = len(piece) // digest_loops.BLOCK_NBYTES * digest_loops.BLOCK_NBYTES
        assert not self._rest
        self._rest = bytes(piece[num_whole:])
        self._nbytes += len(piece)
        self.piece = piece[:num_whole]

    def close(self) -> None:
        with self._group.changed:
            self.is_closed = True
            self._group.changed.notify_all()

    def hexdigest(self) -> str:
        padding = b"\x80" + bytes((55 - self._nbytes) % 64) + struct.pack(">Q", 8 * self._nbytes)
        state = self.state.copy()
        _compress([state], [memoryview(self._rest + padding)])
        return "".join(f"{state[place]:08x}" for place in digest_loops.ORDER)

    def _add_waiting(self, count: int) -> None:
        with self._group.changed:
            self._group.num_waiting += count
            self._group.changed.notify_all()


def _compress(states: Sequence[NDArray[np.uint32]], pieces: Sequence[Buffer]) -> None:
    """Take pieces of whole blocks into their states, as many at once as are there; the rest of longer ones after it."""
    arrays = [np.frombuffer(piece, np.uint8) for piece in pieces]
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    counts = [len(array) // digest_loops.BLOCK_NBYTES for array in arrays]
    done = 0
    while left := [number for number, count in enumerate(counts) if count > done]:
        stop = min(counts[number] for number in left)
        rows = np.stack([states[number] for number in left])
        digest_loops.compress(addresses[left] + done * digest_loops.BLOCK_NBYTES, rows, stop - done)
        for number, row in zip(left, rows, strict=True):
            states[number][:] = row
        done = stop
