"""Ctrl-C, SIGTERM and a terminal that is closed end the process within seconds, whatever it is waiting for."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

MESSAGE = "Interrupted. What is finished is kept: run the same command again to go on."

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_GRACE_SECONDS = 5.0
"""For tidying up: letting go of the lock, ending uploads."""


def _announce() -> None:
    print(MESSAGE, file=sys.stderr, flush=True)


_announcers = [_announce]
"""The last one is called before the process is ended."""


@contextmanager
def announced_by(announce: Callable[[], None]) -> Iterator[None]:
    """Have something else than a line on stderr say that the process is ended because of an interrupt."""
    _announcers.append(announce)
    try:
        yield
    finally:
        _announcers.remove(announce)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block, instead of somewhere in it; only for the main thread, which gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            raise KeyboardInterrupt


@cache
def watch_for_interrupts() -> None:
    """Have SIGTERM and SIGHUP do what Ctrl-C does, and a thread end the process if it is still there seconds later.

    SIGTERM is how schedulers end a job; SIGHUP tells of a closed terminal, unless `nohup` has it ignored. Python tells
    the main thread of a signal only when that is done with what it waits for, and a silent store may keep it long.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, theirs), name="watch for interrupts", daemon=True).start()


def _watch(ours: socket.socket, theirs: socket.socket) -> None:
    with ours, theirs:  # the second is only kept open here
        _wait_for_interrupt(ours)
        ours.settimeout(_GRACE_SECONDS)
        with suppress(TimeoutError):
            _wait_for_interrupt(ours)
        _announcers[-1]()
        os._exit(130)


def _wait_for_interrupt(signals: socket.socket) -> None:
    while signals.recv(1)[0] not in _SIGNALS:
        pass
