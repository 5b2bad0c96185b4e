"""Running one item on a Ray worker, and its reports to the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
from ray import cloudpickle
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from raymerge.cluster.errors import StoppedError
from raymerge.cluster.host import name_host
from raymerge.cluster.outcome import Done, Failed, make_picklable
from raymerge.cluster.runner import Progress, Work

_REPORT_SECONDS = 0.2
"""Between reports of a worker."""

_STOP_SECONDS = 0.5
"""Between looks of a worker at whether the run has stopped."""

_NAMESPACE = b"raymerge"


@dataclass(frozen=True, slots=True)
class Begun:
    """An item is in work; what its worker says first."""

    node_id: str
    """The worker's node, by Ray's name for it."""
    host: str
    """Its address."""


Message = Begun | Progress | Done | Failed
"""Reports of an item: it begins, some progress, and how it ended."""


def serve(packed: bytes, item: object, run_key: bytes, stop_key: bytes) -> Iterator[Message]:
    """Run one item in a worker: its progress now and then, and at the end what came of it.

    The driver says under a key that it is to stop, and the worker looks there. An interrupt from Ray may get
    lost, or strike while Ray itself takes a report, with nobody left to end the work.

    Args:
        packed: the work, by `pack`.
        item: what it is called with.
        run_key: of the run.
        stop_key: of this attempt.
    """
    lock = threading.Lock()
    untold: Progress | None = None
    stopped = threading.Event()
    outcome: list[Done | Failed] = []

    def report(progress: Progress) -> None:
        nonlocal untold
        if stopped.is_set():
            raise StoppedError("stopped")
        with lock:
            untold = (untold or Progress()) + progress

    def work_off() -> None:
        try:
            outcome.append(Done(_unpack(packed, run_key)(item, report)))
        except BaseException as error:  # raised in the driver
            outcome.append(Failed(make_picklable(error)))

    def take() -> Iterator[Progress]:
        nonlocal untold
        with lock:
            taken, untold = untold, None
        if taken is not None:
            yield taken

    host = ray.util.get_node_ip_address()
    yield Begun(ray.get_runtime_context().get_node_id(), host)
    if _has_stopped(stop_key):
        yield Failed(StoppedError("stopped"))
        return
    name_host(host)
    thread = threading.Thread(target=work_off, name="work", daemon=True)
    thread.start()
    look_at = time.monotonic() + _STOP_SECONDS
    while thread.is_alive():
        thread.join(_REPORT_SECONDS)
        yield from take()
        if time.monotonic() > look_at:
            look_at = time.monotonic() + _STOP_SECONDS
            if _has_stopped(stop_key):
                stopped.set()
    yield from take()
    yield outcome[0]


def pack(work: Work[Any, Any]) -> bytes:
    """Return work in a form that workers can be sent."""
    packed: bytes = cloudpickle.dumps(work)
    return packed


@lru_cache(maxsize=1)
def _unpack(packed: bytes, run_key: bytes) -> Work[Any, Any]:
    """Return a run's work: the same for all its items that this worker is given, so that it keeps its connections."""
    work: Work[Any, Any] = cloudpickle.loads(packed)
    return work


def stop(stop_key: bytes) -> None:
    """Have an attempt end at its next report, or as soon as it begins."""
    _internal_kv_put(stop_key, b"", namespace=_NAMESPACE)


def _has_stopped(stop_key: bytes) -> bool:
    return bool(_internal_kv_exists(stop_key, namespace=_NAMESPACE))
