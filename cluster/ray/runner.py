"""Runs work on Ray: one task for each item, done again elsewhere where its worker is lost, hangs, or cannot do it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from raymerge.cluster.errors import HeadLostError, ResourceError, TaskFailedError, WorkerLostError
from raymerge.cluster.outcome import Done
from raymerge.cluster.ray.attempt import Attempt, choose_node, has_room
from raymerge.cluster.ray.session import RESERVED_MEM, HeadWatch, Node, list_nodes
from raymerge.cluster.ray.task import Begun, Message, pack, serve, stop_all
from raymerge.cluster.runner import NUM_ATTEMPTS, Item, Progress, Report, Resources, Result, Runner, Work
from raymerge.cluster.waiting import order_items

LONELY_SECONDS = 120.0
"""How long no node may have room for an item: one that is powered off may be replaced."""

HANG_SECONDS = 900.0
"""How long an item may report nothing; the longest that a store is waited for is less than half of it."""

ELSEWHERE_SECONDS = 30.0
"""How long an item waits for room on a node where it has not failed yet, before any node will do."""

_LOOK_SECONDS = 5.0
"""Between looks at the nodes, while no item has anything to tell."""

_PATIENCE_SECONDS = 4.0
"""For workers to end what they are doing when the run is broken off."""

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
    RuntimeEnvSetupError: "its node could not make its environment",
}
"""Losses of workers, and how they are reported."""


class RayRunner(Runner):
    """One Ray task for each item, spread over the nodes, the costliest first. Needs a session of `ray_session`."""

    def __init__(
        self,
        num_slots: int,
        *,
        num_cpus: int = 1,
        host: str | None = None,
        retry_on: tuple[type[Exception], ...] = (),
        on_retry: Callable[[str], None] = lambda reason: None,
        advice: str = "make items smaller, or add a larger node",
    ) -> None:
        """Begin.

        Args:
            num_slots: items in work at once.
            num_cpus: that an item takes up, which limits how many one node has.
            host: the only one to run on; any by default.
            retry_on: errors of the work that may not come again on another node.
            on_retry: told why an item is done again.
            advice: what to do about an item that needs more memory than any node has.
        """
        if num_slots < 1:
            raise ValueError(f"{num_slots} slots are given, at least 1 is needed")
        self.num_slots = num_slots
        self._num_cpus = num_cpus
        self._num_gpus = 0.0
        self._host = host
        self._retry_on = retry_on
        self._on_retry = on_retry
        self._advice = advice
        self._task = ray.remote(
            num_cpus=num_cpus,
            max_retries=0,
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
            HeadLostError: the cluster's head does not answer any more.
        """
        nodes = list_nodes() if items else ()
        waiting = deque(self._ask(i, resources[i], nodes) for i in order_items(resources))
        running: dict[Any, Attempt] = {}
        error: BaseException | None = None
        give_up_at = math.inf
        packed = pack(work)
        stop_key = f"stop-{uuid4().hex}".encode()
        if waiting:
            self._check(max(attempt.mem_nbytes for attempt in waiting), nodes)

        def do_again(stream: Any, reason: str, mem_nbytes: int | None = None, *, elsewhere: bool = False) -> None:
            attempt = running.pop(stream)
            self._release(stream, is_needed=False)
            on_progress(-attempt.told)
            if error is None:
                waiting.appendleft(self._again(attempt, reason, mem_nbytes, elsewhere=elsewhere))

        head = HeadWatch()
        try:
            while running or waiting:
                while attempt := _take(waiting, self.num_slots - sum(each.num_slots for each in running.values())):
                    attempt.heard_at = time.monotonic()
                    running[self._start(attempt, packed, items[attempt.item], stop_key)] = attempt
                for stream in self._wait(running, head, is_ending=error is not None):
                    attempt = running[stream]
                    attempt.heard_at = time.monotonic()
                    try:
                        message = _receive(stream)
                    except tuple(_LOST) as lost:
                        more = 2 * attempt.mem_nbytes if isinstance(lost, OutOfMemoryError) else None
                        do_again(stream, next(text for kind, text in _LOST.items() if isinstance(lost, kind)), more)
                        continue
                    if isinstance(message, Begun):
                        attempt.begun = message
                    elif isinstance(message, Progress):
                        attempt.told += message
                        on_progress(message)
                    elif isinstance(message, Done):
                        del running[stream]
                        self._release(stream, is_needed=bool(waiting))
                        yield message.result
                    elif self._may_pass(message.error, attempt):
                        do_again(stream, f"{type(message.error).__name__}: {message.error}", elsewhere=True)
                    else:
                        del running[stream]
                        self._release(stream, is_needed=False)
                        if error is None:
                            waiting.clear()
                            error = _explain_missing(message.error)
                            stop_all(stop_key)
                            give_up_at = time.monotonic() + _PATIENCE_SECONDS
                for stream in _find_overdue(running):
                    self._kill(stream)
                    if running[stream].begun:
                        do_again(stream, f"it had reported nothing for {HANG_SECONDS:.0f} s")
                    elif (attempt := running.pop(stream)) and error is None:
                        waiting.appendleft(replace(attempt, elsewhere=False))
                if time.monotonic() > give_up_at and not any(attempt.begun for attempt in running.values()):
                    for stream in running:  # they wait for room, perhaps for ever
                        self._kill(stream)
                    running.clear()
        except HeadLostError:  # nobody to tell, and the workers end without it
            raise
        except BaseException as broken:  # raised again: whatever broke the run off, its items end
            stop_all(stop_key)
            self._end(running)
            if isinstance(broken, RayError):
                raise TaskFailedError(_explain(broken)) from broken
            raise
        if error is not None:
            raise error

    def _start(self, attempt: Attempt, packed: bytes, item: object, stop_key: bytes) -> Any:
        """Have an item run; return the stream of what it tells."""
        task = self._task.options(
            num_cpus=attempt.num_cpus, memory=attempt.mem_nbytes, scheduling_strategy=choose_node(attempt)
        )
        return task.remote(packed, item, stop_key)

    def _ask(self, item: int, resources: Resources, nodes: Sequence[Node]) -> Attempt:
        """Return the first attempt at an item."""
        num_slots = min(resources.num_slots, self.num_slots)
        mem_nbytes = resources.mem_nbytes + RESERVED_MEM
        return Attempt(item, mem_nbytes, num_slots, self._count_cpus(num_slots, mem_nbytes, nodes))

    def _count_cpus(self, num_slots: int, mem_nbytes: int, nodes: Sequence[Node]) -> int:
        """Return the processors of so many slots, at most all of a node that has the memory."""
        fit = [node.num_cpus for node in nodes if self._is_fit(node) and node.mem_nbytes >= mem_nbytes]
        return min(self._num_cpus * num_slots, max(fit, default=self._num_cpus))

    def _release(self, stream: Any, *, is_needed: bool) -> None:
        """Take note that an item has ended, and whether its worker is needed for another."""

    def _kill(self, stream: Any) -> None:
        """End an item and its worker at once."""
        with suppress(RayError):
            ray.cancel(stream, force=True)

    def _end(self, running: Mapping[Any, Attempt]) -> None:
        """Wait for what has been stopped, and kill workers that do not end it themselves after a while."""
        left = [stream.completed() for stream in running]
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_PATIENCE_SECONDS)
        for stream in running if left else ():
            self._kill(stream)

    def _may_pass(self, error: BaseException, attempt: Attempt) -> bool:
        """Tell whether an error may not come again on another node, and there is one."""
        return isinstance(error, self._retry_on) and attempt.number < NUM_ATTEMPTS and len(list_nodes()) > 1

    def _check(self, mem_nbytes: int, nodes: Sequence[Node]) -> None:
        """Refuse what would wait for ever."""
        largest = self._find_largest(nodes)
        if mem_nbytes > largest:
            raise ResourceError(
                f"an item needs {mem_nbytes:,} bytes of memory, and no node of the cluster"
                f"{' with a GPU' if self._num_gpus else ''} has more than {largest:,} to offer; {self._advice}"
            )

    def _find_largest(self, nodes: Sequence[Node]) -> int:
        """Return the most memory that one item can have, in bytes."""
        return max((node.mem_nbytes for node in nodes if self._is_fit(node)), default=0)

    def _is_fit(self, node: Node) -> bool:
        has_room = node.num_cpus >= self._num_cpus and node.num_gpus >= self._num_gpus
        return has_room and self._host in (None, node.host)

    def _wait(self, running: Mapping[Any, Attempt], head: HeadWatch, *, is_ending: bool) -> list[Any]:
        """Return the streams that have something to say; none only where one may hang, or the run is ending.

        Raises:
            WorkerLostError: there has been no node for a while on which all of them could run.
            HeadLostError: the cluster's head does not answer any more.
        """
        deadline = time.monotonic() + LONELY_SECONDS
        while True:
            ready, _ = ray.wait(list(running), timeout=1.0 if is_ending else _LOOK_SECONDS)
            head.check_sometimes()
            if ready:
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            if ready or is_ending or _find_overdue(running):
                return list(ready)
            if not head.check():
                continue
            nodes = [node for node in list_nodes() if self._is_fit(node)]
            lonely = [each for each in running.values() if not any(has_room(node, each) for node in nodes)]
            if not lonely:
                deadline = time.monotonic() + LONELY_SECONDS
            elif time.monotonic() > deadline:
                raise WorkerLostError(
                    f"no node of the cluster has had {lonely[0].mem_nbytes:,} bytes of memory and {lonely[0].num_cpus}"
                    f" processors for a shard in the last {LONELY_SECONDS:.0f} s; what is finished is kept: run the"
                    " same command again when one has"
                )

    def _again(self, attempt: Attempt, reason: str, mem_nbytes: int | None, *, elsewhere: bool) -> Attempt:
        """Return the next attempt at an item, with more memory where it is given, up to what a node has.

        Args:
            attempt: the last one.
            reason: why it has failed.
            mem_nbytes: that would have been enough, if that was the reason.
            elsewhere: whether another node is to be waited for, if one has room. The cluster's head is asked which,
                and has to be there: where a worker was lost, it may be gone, too.

        Raises:
            WorkerLostError: there were enough of them.
        """
        if attempt.number == NUM_ATTEMPTS:
            raise WorkerLostError(
                f"gave up an item after {NUM_ATTEMPTS} attempts, at last because {reason}; what is finished is kept:"
                " run the same command again"
            )
        self._on_retry(f"{reason} (on {attempt.begun.host})" if attempt.begun else reason)
        avoided = (*attempt.avoided, attempt.begun.node_id) if attempt.begun else attempt.avoided
        again = replace(
            attempt, number=attempt.number + 1, avoided=avoided, elsewhere=False, begun=None, told=Progress()
        )
        if mem_nbytes is not None:
            nodes = list_nodes()
            again.mem_nbytes = max(attempt.mem_nbytes, min(mem_nbytes, self._find_largest(nodes)))
            again.num_cpus = self._count_cpus(again.num_slots, again.mem_nbytes, nodes)
        elif elsewhere and avoided:
            others = [node for node in list_nodes() if self._is_fit(node) and node.node_id not in avoided]
            again.elsewhere = any(has_room(node, again) for node in others)
        return again


def _take(waiting: deque[Attempt], num_free: int) -> Attempt | None:
    """Return the first attempt that so many free slots are enough for, which waits no more."""
    attempt = next((attempt for attempt in waiting if attempt.num_slots <= num_free), None)
    if attempt is not None:
        waiting.remove(attempt)
    return attempt


def _receive(stream: Any) -> Message:
    message: Message = ray.get(next(stream))
    return message


def _find_overdue(running: Mapping[Any, Attempt]) -> list[Any]:
    """Return the streams of items that have been silent for too long, or have waited so for another node."""
    now = time.monotonic()
    return [
        stream
        for stream, attempt in running.items()
        if (attempt.begun and attempt.heard_at < now - HANG_SECONDS)
        or (attempt.elsewhere and not attempt.begun and attempt.heard_at < now - ELSEWHERE_SECONDS)
    ]


def _explain(error: RayError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"Ray cannot run the work: {lines[-1].strip()}; {_NEEDED}"


def _explain_missing(error: BaseException) -> BaseException:
    """Return the error to raise for an error of the work: a machine may lack what it imports."""
    if isinstance(error, ModuleNotFoundError):
        return TaskFailedError(f"{error.name} is not installed on a machine of the cluster; {_NEEDED}")
    return error


_NEEDED = (
    "every machine of the cluster needs the same versions of Python and Ray, and what `pip install raymerge` installs"
)
