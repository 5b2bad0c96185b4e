"""Runs work on Ray: one task for each item, done again elsewhere where its worker is lost."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

from raymerge.cluster.errors import ResourceError, StoppedError, TaskFailedError, WorkerLostError
from raymerge.cluster.outcome import Done, Failed, make_picklable
from raymerge.cluster.ray_session import Node, list_nodes
from raymerge.cluster.runner import Item, Progress, Report, Resources, Result, Runner, Work

NUM_ATTEMPTS = 4
"""At an item whose worker is lost."""

RESERVED_MEM = 400 * 2**20
"""Bytes that a worker takes besides its tensors: interpreter, torch, Ray."""

LONELY_SECONDS = 120.0
"""How long no node may have room for an item: one that is powered off may be replaced."""

_LOOK_SECONDS = 5.0
"""Between looks at the nodes, while no item has anything to tell."""

_REPORT_SECONDS = 0.2
"""Between reports of a worker."""

_STOP_SECONDS = 0.5
"""Between looks of a worker at whether the run has stopped."""

_PATIENCE_SECONDS = 4.0
"""For workers to end what they are doing when the run is broken off."""

_NAMESPACE = b"raymerge"

_LOST: Mapping[type[RayError], str] = {
    OutOfMemoryError: "its node ran out of memory",
    NodeDiedError: "its node died",
    LocalRayletDiedError: "its node died",
    WorkerCrashedError: "its worker died",
    ActorDiedError: "its worker died",
    ActorUnavailableError: "its worker could not be reached",
    OwnerDiedError: "its worker died",
    ObjectLostError: "its answer was lost with a node",
    TaskCancelledError: "its task was cancelled",
}
"""What happens to workers, and how it is told."""


@dataclass(slots=True)
class _Attempt:
    """An item in work, or to be."""

    item: int
    """Its position."""
    number: int
    """From 1."""
    mem_nbytes: int
    """Asked of Ray."""
    told: Progress = field(default_factory=Progress)
    """What it has reported, which is taken back if the worker is lost."""


class RayRunner(Runner):
    """One Ray task for each item, spread over the nodes, the costliest first. Needs a session of `ray_session`."""

    def __init__(
        self,
        num_slots: int,
        *,
        num_cpus: int = 1,
        host: str | None = None,
        on_retry: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Begin.

        Args:
            num_slots: items in work at once.
            num_cpus: that an item takes up, which limits how many one node has.
            host: the only one to run on; any by default.
            on_retry: told why an item is done again.
        """
        if num_slots < 1:
            raise ValueError(f"{num_slots} slots are given, at least 1 is needed")
        self.num_slots = num_slots
        self._num_cpus = num_cpus
        self._num_gpus = 0.0
        self._on_retry = on_retry
        self._task = ray.remote(
            num_cpus=num_cpus,
            max_retries=0,
            scheduling_strategy="SPREAD",
            num_returns="streaming",
            resources={f"node:{host}": 0.001} if host else {},
        )(serve)

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes; see `Runner.run`.

        Raises:
            ResourceError: no node has the memory that an item needs.
            WorkerLostError: an item's worker was lost as often as it was tried, or no node is left.
            TaskFailedError: Ray cannot run the work.
        """
        order = sorted(range(len(items)), key=lambda i: (-resources[i].cost, i))
        waiting = deque(_Attempt(i, 1, resources[i].mem_nbytes + RESERVED_MEM) for i in order)
        running: dict[Any, _Attempt] = {}
        error: BaseException | None = None
        stop_key = f"stop-{uuid4().hex}".encode()
        if waiting:
            self._check(max(attempt.mem_nbytes for attempt in waiting))
        try:
            while running or waiting:
                while waiting and len(running) < self.num_slots:
                    attempt = waiting.popleft()
                    running[self._start(work, items[attempt.item], stop_key, attempt.mem_nbytes)] = attempt
                for stream in self._wait(running):
                    attempt = running[stream]
                    try:
                        message = _receive(stream)
                    except tuple(_LOST) as lost:
                        del running[stream]
                        self._release(stream, is_needed=False)
                        on_progress(Progress(-attempt.told.read_nbytes, -attempt.told.written_nbytes))
                        if error is None:
                            waiting.appendleft(self._again(attempt, lost))
                        continue
                    if isinstance(message, Progress):
                        attempt.told = _add(attempt.told, message)
                        on_progress(message)
                        continue
                    del running[stream]
                    self._release(stream, is_needed=bool(waiting))
                    if isinstance(message, Done):
                        yield message.result
                    elif error is None:
                        waiting.clear()
                        error = message.error
                        _stop(stop_key)
        except BaseException as broken:  # raised again: whatever broke the run off, its items end
            _stop(stop_key)
            self._end(running)
            if isinstance(broken, RayError):
                raise TaskFailedError(_explain(broken)) from broken
            raise
        if error is not None:
            raise error

    def _start(self, work: Work[Any, Any], item: object, stop_key: bytes, mem_nbytes: int) -> Any:
        """Have an item run with so much memory; return the stream of what it tells."""
        return self._task.options(memory=mem_nbytes).remote(work, item, stop_key)

    def _release(self, stream: Any, *, is_needed: bool) -> None:
        """Take note that an item has ended, and whether its worker is needed for another."""

    def _kill(self, stream: Any) -> None:
        """End an item and its worker at once."""
        with suppress(RayError):
            ray.cancel(stream, force=True)

    def _end(self, running: Mapping[Any, _Attempt]) -> None:
        """Wait for what has been stopped, and kill workers that do not end it themselves after a while."""
        left = [stream.completed() for stream in running]
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_PATIENCE_SECONDS)
        for stream in running if left else ():
            self._kill(stream)

    def _check(self, mem_nbytes: int) -> None:
        """Refuse what would wait for ever."""
        largest = self._find_largest(list_nodes())
        if mem_nbytes > largest:
            raise ResourceError(
                f"a shard needs {mem_nbytes:,} bytes of memory, and no node of the cluster"
                f"{' with a GPU' if self._num_gpus else ''} has more than {largest:,} to offer; allow less with"
                " --memory, make shards smaller with --shard-size, or add a larger node"
            )

    def _find_largest(self, nodes: Sequence[Node]) -> int:
        """Return the most memory that one item can have, in bytes."""
        return max((node.mem_nbytes for node in nodes if self._is_fit(node)), default=0)

    def _is_fit(self, node: Node) -> bool:
        return node.num_cpus >= self._num_cpus and node.num_gpus >= self._num_gpus

    def _wait(self, running: Mapping[Any, _Attempt]) -> list[Any]:
        """Return the streams that have something to say, at least one.

        Raises:
            WorkerLostError: there has been no node for a while on which all of them could run.
        """
        deadline = time.monotonic() + LONELY_SECONDS
        while True:
            ready, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
            if ready:
                return list(ready)
            needed = max(attempt.mem_nbytes for attempt in running.values())
            if self._find_largest(list_nodes()) >= needed:
                deadline = time.monotonic() + LONELY_SECONDS
            elif time.monotonic() > deadline:
                raise WorkerLostError(
                    f"no node of the cluster has had {needed:,} bytes of memory and {self._num_cpus} processors for a"
                    f" shard in the last {LONELY_SECONDS:.0f} s; what is finished is kept: run the same command again"
                    " when one has"
                )

    def _again(self, attempt: _Attempt, lost: RayError) -> _Attempt:
        """Return the next attempt at an item whose worker is lost.

        Raises:
            WorkerLostError: there were enough of them.
        """
        reason = next(text for kind, text in _LOST.items() if isinstance(lost, kind))
        if attempt.number == NUM_ATTEMPTS:
            raise WorkerLostError(
                f"gave up an item after {NUM_ATTEMPTS} attempts, at last because {reason}; what is finished is kept:"
                " run the same command again"
            )
        self._on_retry(reason)
        nbytes = attempt.mem_nbytes
        if isinstance(lost, OutOfMemoryError):
            nbytes = max(nbytes, min(2 * nbytes, self._find_largest(list_nodes())))
        return _Attempt(attempt.item, attempt.number + 1, nbytes)


def _receive(stream: Any) -> Progress | Done | Failed:
    message: Progress | Done | Failed = ray.get(next(stream))
    return message


def serve(work: Work[Any, Any], item: object, stop_key: bytes) -> Iterator[Progress | Done | Failed]:
    """Run one item in a worker: its progress now and then, and at the end what came of it.

    The driver says under a key that the run has stopped, and every worker looks there. An interrupt from Ray may get
    lost, or strike while Ray itself takes a report, with nobody left to end the work.
    """
    lock = threading.Lock()
    untold: Progress | None = None
    stop = threading.Event()
    outcome: list[Done | Failed] = []

    def report(progress: Progress) -> None:
        nonlocal untold
        if stop.is_set():
            raise StoppedError("stopped")
        with lock:
            untold = _add(untold or Progress(), progress)

    def work_off() -> None:
        try:
            outcome.append(Done(work(item, report)))
        except BaseException as error:  # raised in the driver
            outcome.append(Failed(make_picklable(error)))

    def take() -> Iterator[Progress]:
        nonlocal untold
        with lock:
            taken, untold = untold, None
        if taken is not None:
            yield taken

    if _has_stopped(stop_key):
        yield Failed(StoppedError("stopped"))
        return
    thread = threading.Thread(target=work_off, name="work", daemon=True)
    thread.start()
    look_at = time.monotonic() + _STOP_SECONDS
    while thread.is_alive():
        thread.join(_REPORT_SECONDS)
        yield from take()
        if time.monotonic() > look_at:
            look_at = time.monotonic() + _STOP_SECONDS
            if _has_stopped(stop_key):
                stop.set()
    yield from take()
    yield outcome[0]


def _has_stopped(stop_key: bytes) -> bool:
    return bool(_internal_kv_exists(stop_key, namespace=_NAMESPACE))


def _add(one: Progress, other: Progress) -> Progress:
    return Progress(one.read_nbytes + other.read_nbytes, one.written_nbytes + other.written_nbytes)


def _stop(stop_key: bytes) -> None:
    """Have items end at their next report, and those that have not begun return at once."""
    _internal_kv_put(stop_key, b"", namespace=_NAMESPACE)


def _explain(error: RayError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"Ray cannot run the work: {lines[-1].strip()}; every machine of the cluster needs the same versions of Python"
        " and Ray, and what `pip install 'raymerge[ray]'` installs"
    )
