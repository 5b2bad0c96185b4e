"""Life of a worker process, from its start to its end."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from raymerge.cluster.errors import StoppedError
from raymerge.cluster.outcome import Done, Failed, make_picklable
from raymerge.cluster.runner import Progress, Work


@dataclass(frozen=True, slots=True)
class Stop:
    """Sent to workers in place of an item."""


def serve_forked(
    connection: Connection, life: Connection, inherited: Sequence[Connection], work: Work[Any, Any]
) -> None:
    """Run items in a process that is forked from the driver.

    Args:
        connection: to the driver.
        life: ends when the driver does.
        inherited: the driver's ends, and those of other workers.
        work: to do.
    """
    gc.freeze()  # to look for garbage among what the driver has would take long, and copy it
    for other in inherited:
        other.close()
    _obey(life)
    _serve(connection, work)


def serve_fresh(
    connections: Sequence[Connection],
    life: Connection,
    environment: Mapping[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    """Run items in a process that is not, on a thread for each connection; the first one brings the work.

    Args:
        connections: to the driver.
        life: ends when the driver does.
        environment: of this process.
        prepare: called before anything else.
    """
    os.environ.clear()
    os.environ.update(environment)
    _obey(life)
    if prepare is not None:
        prepare()
    first, *others = connections
    try:
        work = first.recv()
    except (EOFError, ConnectionError):  # the driver has left
        return
    threads = [threading.Thread(target=_serve, args=(other, work), name="worker") for other in others]
    for thread in threads:
        thread.start()
    _serve(first, work)
    for thread in threads:
        thread.join()


def _obey(life: Connection) -> None:
    """Leave it to the driver when this process ends."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the driver is interrupted, and stops us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, args=(life,), name="end with driver", daemon=True).start()


def _end_with_driver(life: Connection) -> None:
    wait([life])
    os._exit(1)


def _serve(connection: Connection, work: Work[Any, Any]) -> None:
    """Run items in a thread of a worker process until the driver has no more."""

    def report(progress: Progress) -> None:
        if connection.poll():  # what the driver sends to a busy worker, and its leaving, mean one thing
            raise StoppedError("stopped")
        connection.send(progress)

    try:
        while not isinstance(item := connection.recv(), Stop):
            message: Done | Failed
            try:
                message = Done(work(item, report))
            except BaseException as error:
                message = Failed(make_picklable(error))
            connection.send(message)
    except (EOFError, ConnectionError):  # the driver has left
        return
