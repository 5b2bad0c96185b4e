"""A lock in a store: an object that is renewed, and taken by others when it is not.

It is exact where the store has conditional writes; elsewhere it is looked at again after others have had their time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import HeldError, OutputError
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Lock

TTL_SECONDS = 30.0
"""A lock that has not been renewed for so long, by the store's clock, may be taken."""

RENEWAL_SECONDS = 10.0
"""Time between renewals."""

_MARGIN_SECONDS = 2.0
"""The holder gives up so much earlier than others may take it: stores tell times in whole seconds."""

_LEAVING_SECONDS = 5.0
"""Longest wait at the end for a renewal that is under way."""

_SETTLE_SECONDS = 1.0
"""Without conditional writes: how long another run, which saw no lock either, is given to write its own."""

_MAX_TRIES = 10


class LeaseStore(Protocol):
    """The operations of a store that a lock is made of.

    Each call tries again by itself after faults that may pass, and raises an OutputError or FetchError where that does
    not help. A write whose answer was lost may therefore look as if it had failed a condition: the lock finds that out.
    """

    is_weak: bool
    """Whether it has no conditional writes: it looks first and writes then, and another run may write in between."""

    def create(self, url: str, data: bytes) -> str | None:
        """Write an object unless there is one, and return its etag; None where there is one."""

    def replace(self, url: str, data: bytes, etag: str) -> str | None:
        """Write an object that has this etag still, and return its new one; None where it has not, or is gone."""

    def read_with_age(self, url: str) -> tuple[bytes, str, float] | None:
        """Return an object's content, etag, and the seconds since it was written by the store's clock; None if gone."""

    def delete_if(self, url: str, etag: str) -> None:
        """Delete an object if it has this etag still. Tries for a few seconds at most."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a lock, as its object says in JSON."""

    pid: int
    host: str
    boot: str
    """Tells boots of a machine apart, and groups of processes that see each other; empty where that is not known."""
    since: str
    token: str
    """Random: no two holders have the same."""
    renewals: int = 0
    """Counted, so that every renewal changes the object."""

    def __str__(self) -> str:
        return f"pid {self.pid}, since {self.since}, on host {self.host}"

    def is_dead(self) -> bool:
        """Tell whether it was a process of this machine that has ended; False where that cannot be known."""
        if not self.boot or (self.host, self.boot) != (platform.node(), _boot_id()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def encode(self) -> bytes:
        """Return the object's content."""
        return json.dumps(dataclasses.asdict(self)).encode()


@contextmanager
def hold_lease(store: LeaseStore, url: str, faults: FaultLog) -> Iterator[Lock]:
    """Hold the lock at a URL, and renew it on a thread of its own, until the context ends.

    Raises:
        HeldError: another run holds it, and has renewed it lately.
        OutputError: it cannot be written.
    """
    lease = _take(store, url)
    if store.is_weak:
        faults.note_limit(
            _target_of(url),
            "this store has no conditional writes: a run that begins in the same second may be noticed late",
        )
        try:
            _settle(store, url, lease)
        except HeldError:
            raise
        except BaseException:  # Ctrl-C too: the lock would refuse others for a while
            lease.drop()
            raise
    lease.start()
    try:
        yield lease
    finally:
        lease.leave()


class _Lease(Lock):
    """A lock that is held, as far as is known."""

    def __init__(self, store: LeaseStore, url: str, holder: Holder, etag: str, written_at: float) -> None:
        self.token = holder.token
        self._store = store
        self._url = url
        self._holder = holder
        self._etag = etag
        self._renewed_at = written_at  # before the request was sent: the store's clock began to run later
        self._lost_to: str | None = None
        self._is_left = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="renew lock", daemon=True)

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def check(self) -> None:
        if self._lost_to is not None:
            raise OutputError(f"{self._url}: {self._lost_to}")
        seconds = _now() - self._renewed_at
        if seconds > TTL_SECONDS - _MARGIN_SECONDS:
            raise OutputError(
                f"{self._url}: the lock could not be renewed for {seconds:.0f} s, and may be taken after"
                f" {TTL_SECONDS:.0f}; run the same command again when the store can be reached"
            )

    def leave(self) -> None:
        """Let go of it, unless it may be somebody else's by now; where the store is down, it ends by itself."""
        self._is_left.set()
        self._thread.join(_LEAVING_SECONDS)
        self.drop()

    def drop(self) -> None:
        """Delete it, unless it may be somebody else's by now."""
        if self._lost_to is None and _now() - self._renewed_at < TTL_SECONDS - _MARGIN_SECONDS:
            with suppress(OSError):
                self._store.delete_if(self._url, self._etag)

    def _renew_often(self) -> None:
        while not self._is_left.wait(RENEWAL_SECONDS):
            with suppress(OSError):  # `check` knows since when
                if not self._renew():
                    return

    def _renew(self) -> bool:
        """Renew it once; return whether it is still ours."""
        started = _now()
        holder = dataclasses.replace(self._holder, renewals=self._holder.renewals + 1)
        etag = self._store.replace(self._url, holder.encode(), self._etag)
        if etag is None:
            found = self._store.read_with_age(self._url)
            other = _decode(found[0]) if found else None
            if found is None or other is None or other.token != holder.token:
                self._lost_to = _explain_loss(found is not None, other)
                return False
            holder, etag = other, found[1]
        self._holder, self._etag, self._renewed_at = holder, etag, started
        return True


def _settle(store: LeaseStore, url: str, lease: Lock) -> None:
    """Make sure that the lock is still ours after a while: of several that wrote it, the last has it."""
    time.sleep(_SETTLE_SECONDS)
    found = store.read_with_age(url)
    holder = _decode(found[0]) if found else None
    if holder is None or holder.token != lease.token:
        raise HeldError(_refusal(url, holder, found[2] if found else 0.0))


def _take(store: LeaseStore, url: str) -> _Lease:
    since = datetime.now(UTC).astimezone().isoformat(sep=" ", timespec="seconds")
    ours = Holder(os.getpid(), platform.node(), _boot_id(), since, secrets.token_hex(16))
    for _ in range(_MAX_TRIES):
        started = _now()
        etag = store.create(url, ours.encode())
        if etag is not None:
            return _Lease(store, url, ours, etag, started)
        found = store.read_with_age(url)
        if found is None:  # just deleted
            continue
        content, etag, age = found
        holder = _decode(content)
        if holder is not None and holder.token == ours.token:  # it is there, and the answer was lost
            return _Lease(store, url, ours, etag, _now() - age)
        if age < TTL_SECONDS and not (holder and holder.is_dead()):
            raise HeldError(_refusal(url, holder, age))
        started = _now()
        new_etag = store.replace(url, ours.encode(), etag)
        if new_etag is not None:
            return _Lease(store, url, ours, new_etag, started)
    raise OutputError(
        f"{url}: other runs took the lock or let it go each of the {_MAX_TRIES} times that it was tried;"
        " wait until nobody else writes there, or choose another directory"
    )


def _explain_loss(is_there: bool, other: Holder | None) -> str:
    """Say why a lock is not this run's any more, and what to do."""
    if not is_there:
        return (
            "the lock of this run is gone: the output, or the bucket that it is in, was deleted meanwhile; run again"
            " when nobody else works there"
        )
    taker = f"another raymerge run ({other})" if other else "somebody"
    return (
        f"{taker} has taken the lock of this run, which had not renewed it in time; run again when nobody else writes"
        " there"
    )


def _refusal(url: str, holder: Holder | None, age: float) -> str:
    return (
        f"another raymerge run ({holder or 'just started'}) is writing to {_target_of(url)};"
        f" wait for it to end, or choose another directory; if it was killed,"
        f" try again in {max(1.0, TTL_SECONDS - age):.0f} s"
    )


def _target_of(url: str) -> str:
    return url.rpartition("/")[0].removesuffix("/.raymerge")


def _decode(content: bytes) -> Holder | None:
    try:
        holder: Holder = decode(parse_json(content), Holder)
    except (ValueError, TypeError, KeyError):
        return None
    return holder


def _now() -> float:
    """Return seconds that go on while the machine sleeps, as those of the store do."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot_id() -> str:
    """Return the identity of this process's view of processes: two containers have one kernel, and two of these."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
