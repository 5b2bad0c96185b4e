"""Runs work on Ray: one task for each item, done again elsewhere where its worker is lost, hangs, or cannot do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import OutOfMemoryError, RayError

from raymerge.cluster.errors import HeadLostError, ResourceError, TaskFailedError, WorkerLostError
from raymerge.cluster.outcome import Done
from raymerge.cluster.ray import silence
from raymerge.cluster.ray.attempt import Attempt, choose_node, has_room
from raymerge.cluster.ray.ledger import Ledger
from raymerge.cluster.ray.losses import LOST, explain, explain_loss, explain_missing
from raymerge.cluster.ray.session import RESERVED_MEM, HeadWatch, Node, list_nodes
from raymerge.cluster.ray.silence import PATIENCE_SECONDS, find_overdue
from raymerge.cluster.ray.task import Begun, Message, pack, serve, stop
from raymerge.cluster.runner import NUM_ATTEMPTS, Item, Progress, Report, Resources, Result, Runner, Work

LONELY_SECONDS = 120.0
"""Longest time for which no node has room for an item: a node that is powered off may be replaced."""

_LOOK_SECONDS = 5.0
"""Between looks at the nodes, while no item has anything to tell."""

_BRISK_SECONDS = 1.0
"""The same while the run is ending, or a twin could begin."""


class RayRunner(Runner):
    """One Ray task for each item, spread over the nodes, the costliest first. Needs a session of `ray_session`."""

    def __init__(
        self,
        num_slots: int,
        *,
        num_cpus: int = 1,
        num_gpus: float = 0.0,
        host: str | None = None,
        retry_on: tuple[type[Exception], ...] = (),
        on_retry: Callable[[str], None] = lambda reason: None,
        on_giving_up: Callable[[int, Exception], Any] | None = None,
        has_twins: bool = True,
        advice: str = "make items smaller, or add a larger node",
    ) -> None:
        """Begin.

        Args:
            num_slots: items in work at once.
            num_cpus: that an item takes up, which limits how many one node has.
            num_gpus: that an item takes up: a part of one, or whole ones.
            host: the only one to run on; any by default.
            retry_on: errors of the work that may not come again on another node.
            on_retry: told why an item is done again.
            on_giving_up: returns the result of an item that was tried in vain, by its position; else the run ends.
            has_twins: whether an item that takes far longer than its like is begun once more elsewhere.
            advice: what to do about an item that needs more memory than any node has.
        """
        if num_slots < 1:
            raise ValueError(f"{num_slots} slots are given, at least 1 is needed")
        self.num_slots = num_slots
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._host = host
        self._retry_on = retry_on
        self._on_retry = on_retry
        self._on_giving_up = on_giving_up
        self._given_up: list[tuple[int, Exception]] = []
        self._has_twins = has_twins
        self._advice = advice
        self._task = ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
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
        first = [self._ask(item, each, nodes) for item, each in enumerate(resources)]
        ledger = Ledger(first, resources, self.num_slots, on_progress, has_twins=self._has_twins)
        running = ledger.running
        error: BaseException | None = None
        packed, run_key = pack(work), uuid4().hex.encode()
        if first:
            self._check(max(attempt.mem_nbytes for attempt in first), nodes)

        def start(attempt: Attempt) -> None:
            attempt.key, attempt.heard_at = f"stop-{uuid4().hex}".encode(), time.monotonic()
            running[self._start(attempt, packed, items[attempt.item], run_key)] = attempt

        head = HeadWatch()
        try:
            while ledger:
                while attempt := ledger.take():
                    start(attempt)
                for stream in self._wait(ledger, head):
                    if (attempt := running.get(stream)) is None:
                        continue
                    attempt.heard_at = time.monotonic()
                    try:
                        message: Message = ray.get(next(stream))
                    except LOST as lost:
                        more = 2 * attempt.mem_nbytes if isinstance(lost, OutOfMemoryError) else None
                        self._lose(ledger, stream, explain_loss(lost), more)
                        continue
                    if isinstance(message, Begun):
                        attempt.begin(message)
                    elif isinstance(message, Progress):
                        ledger.count(attempt, message)
                    elif attempt.is_beaten:
                        self._lose(ledger, stream, "its twin was faster")
                    elif isinstance(message, Done):
                        if (twin := ledger.finish(stream)) is not None and head.check():
                            stop(twin.key)
                        self._release(stream, is_needed=ledger.has_waiting)
                        yield message.result
                    elif ledger.find_twin(stream) is not None or self._may_pass(message.error, attempt):
                        reason = f"{type(message.error).__name__}: {message.error}"
                        self._lose(ledger, stream, reason, elsewhere=True)
                    else:
                        ledger.drop(stream)
                        self._release(stream, is_needed=False)
                        if self._on_giving_up is not None and isinstance(message.error, self._retry_on):
                            self._given_up.append((attempt.item, message.error))
                        elif error is None:
                            error = explain_missing(message.error)
                            ledger.end()
                            _stop_all(running)
                for stream in find_overdue(ledger):
                    self._kill(stream)
                    attempt = running[stream]
                    if attempt.begun or attempt.is_beaten or ledger.is_ending:
                        self._lose(ledger, stream, f"it had reported nothing for {silence.HANG_SECONDS:.0f} s")
                    else:
                        attempt.elsewhere = False
                        start(running.pop(stream))
                while self._given_up:
                    item, why = self._given_up.pop()
                    if self._on_giving_up is None:
                        raise why
                    yield self._on_giving_up(item, why)
                for stream in _keep_read(ledger.find_stragglers()):
                    if head.check() and ledger.take_twin(stream):
                        start(self._make_twin(running[stream]))
        except HeadLostError:  # nobody to tell, and the workers end without it
            raise
        except BaseException as broken:  # raised again: whatever broke the run off, its items end
            _stop_all(running)
            self._end(running)
            if isinstance(broken, RayError):
                raise TaskFailedError(explain(broken)) from broken
            raise
        if error is not None:
            raise error

    def _start(self, attempt: Attempt, packed: bytes, item: object, run_key: bytes) -> Any:
        """Have an item run; return the stream of what it tells."""
        task = self._task.options(
            num_cpus=attempt.num_cpus, memory=attempt.mem_nbytes, scheduling_strategy=choose_node(attempt)
        )
        return task.remote(packed, item, run_key, attempt.key)

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
            _, left = ray.wait(left, num_returns=len(left), timeout=PATIENCE_SECONDS)
        for stream in running if left else ():
            self._kill(stream)

    def _may_pass(self, error: BaseException, attempt: Attempt) -> bool:
        """Tell whether an error may not come again on another node, and there is one."""
        return isinstance(error, self._retry_on) and attempt.number < NUM_ATTEMPTS and len(list_nodes()) > 1

    def _check(self, mem_nbytes: int, nodes: Sequence[Node]) -> None:
        """Refuse what would wait for ever."""
        if mem_nbytes > (largest := self._find_largest(nodes)):
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

    def _wait(self, ledger: Ledger, head: HeadWatch) -> Collection[Any]:
        """Return the streams that have something to say; none where there is something else to do.

        Raises:
            WorkerLostError: there has been no node for a while on which all of them could run.
            HeadLostError: the cluster's head does not answer any more.
        """
        running = ledger.running
        deadline = time.monotonic() + LONELY_SECONDS
        while True:
            is_brisk = ledger.is_ending or ledger.has_spare
            ready, _ = ray.wait(list(running), timeout=_BRISK_SECONDS if is_brisk else _LOOK_SECONDS)
            head.check_sometimes()
            if ready:
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            if ready or ledger.is_ending or find_overdue(ledger) or ledger.find_stragglers():
                return frozenset(ready)
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

    def _lose(
        self, ledger: Ledger, stream: Any, reason: str, mem_nbytes: int | None = None, *, elsewhere: bool = False
    ) -> None:
        """Take an attempt out that has failed, and have its item done again unless its twin goes on; see `_again`."""
        attempt, twin = ledger.running[stream], ledger.drop(stream)
        self._release(stream, is_needed=False)
        if twin is not None:
            twin.number += 1
        elif not attempt.is_beaten and not ledger.is_ending:
            try:
                ledger.repeat(self._again(attempt, reason, mem_nbytes, elsewhere=elsewhere))
            except WorkerLostError as error:
                self._given_up.append((attempt.item, error))

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
        if attempt.number >= NUM_ATTEMPTS:
            raise WorkerLostError(
                f"gave up an item after {NUM_ATTEMPTS} attempts, at last because {reason}; what is finished is kept:"
                " run the same command again"
            )
        self._on_retry(f"{reason} (on {attempt.begun.host})" if attempt.begun else reason)
        again = attempt.make_next()
        again.number += 1
        if mem_nbytes is not None:
            nodes = list_nodes()
            again.mem_nbytes = max(attempt.mem_nbytes, min(mem_nbytes, self._find_largest(nodes)))
            again.num_cpus = self._count_cpus(again.num_slots, again.mem_nbytes, nodes)
        elif elsewhere:
            again.elsewhere = self._has_other(again)
        return again

    def _make_twin(self, attempt: Attempt) -> Attempt:
        """Return a second attempt at an item, on another node if one has room; the first goes on."""
        assert attempt.begun
        self._on_retry(f"it was slow (on {attempt.begun.host}), and was begun once more elsewhere")
        twin = attempt.make_next()
        twin.elsewhere = self._has_other(twin)
        return twin

    def _has_other(self, attempt: Attempt) -> bool:
        """Tell whether a node has room on which the item was not tried."""
        others = [node for node in list_nodes() if self._is_fit(node) and node.node_id not in attempt.avoided]
        return bool(attempt.avoided) and any(has_room(node, attempt) for node in others)


def _keep_read(streams: Sequence[Any]) -> Sequence[Any]:
    """Return the streams that have nothing more to tell for now: another may have come far already."""
    return ray.wait(list(streams), num_returns=len(streams), timeout=0)[1] if streams else ()


def _stop_all(running: Mapping[Any, Attempt]) -> None:
    for attempt in running.values():
        stop(attempt.key)
