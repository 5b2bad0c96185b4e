"""Runs work on the GPUs of a Ray cluster: in actors, which keep theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from raymerge.cluster.ray.attempt import Attempt, choose_node
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import RESERVED_MEM, Node, list_nodes
from raymerge.cluster.ray.task import Message, serve
from raymerge.cluster.runner import Item, Report, Resources, Result, Work


@dataclass(slots=True)
class _Hired:
    """An actor that works for this run."""

    handle: Any
    mem_nbytes: int


class ActorRunner(RayRunner):
    """Actors that work off one item after the other; as many share a GPU as the plan says.

    A task would have to be given a fresh process each time: a process that has used one GPU does not let go of it.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        num_sharing: int,
        host: str | None = None,
        **options: Any,
    ) -> None:
        """Begin.

        Args:
            num_slots: items in work at once.
            num_sharing: items that share a GPU.
            host: the only one to run on; any by default.
            options: those of `RayRunner`.
        """
        num_gpus = math.floor(10_000 / num_sharing) / 10_000  # Ray counts in such steps
        super().__init__(num_slots, host=host, num_gpus=num_gpus, **options)
        self._most_slots = num_slots
        self._idle: list[_Hired] = []
        self._busy: dict[Any, _Hired] = {}
        self._actor = ray.remote(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            max_restarts=0,
            resources={f"node:{host}": 0.001} if host else {},
        )(_Server)

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes; see `RayRunner.run`."""
        mem_nbytes = max((r.mem_nbytes for r in resources), default=0)  # every actor can do every item
        # An actor that finds no room would keep its item waiting while others are idle.
        nodes = [node for node in list_nodes() if self._is_fit(node)]
        slots = sum(self._count_slots(node, mem_nbytes + RESERVED_MEM) for node in nodes)
        self.num_slots = max(1, min(self._most_slots, slots))
        try:
            yield from super().run(work, items, [replace(r, mem_nbytes=mem_nbytes) for r in resources], on_progress)
        finally:
            for hired in [*self._idle, *self._busy.values()]:
                ray.kill(hired.handle)
            self._idle, self._busy = [], {}

    def _count_slots(self, node: Node, mem_nbytes: int) -> int:
        """Return how many actors a node has room for."""
        return min(
            node.num_cpus // self._num_cpus, node.num_gpus * int(1 / self._num_gpus), node.mem_nbytes // mem_nbytes
        )

    def _start(self, attempt: Attempt, packed: bytes, item: object, run_key: bytes) -> Any:
        hired = self._hire(attempt)
        stream = hired.handle.serve.options(num_returns="streaming").remote(packed, item, run_key, attempt.key)
        self._busy[stream] = hired
        return stream

    def _hire(self, attempt: Attempt) -> _Hired:
        """Return an idle actor with enough memory, or a new one, on another node where it was tried on one before."""
        self._idle.sort(key=lambda hired: hired.mem_nbytes)
        if self._idle:
            hired = self._idle.pop()
            if hired.mem_nbytes >= attempt.mem_nbytes and not attempt.avoided:
                return hired
            ray.kill(hired.handle)
        actor = self._actor.options(memory=attempt.mem_nbytes, scheduling_strategy=choose_node(attempt))
        return _Hired(actor.remote(), attempt.mem_nbytes)

    def _release(self, stream: Any, *, is_needed: bool) -> None:
        if is_needed:
            self._idle.append(self._busy.pop(stream))
        else:  # there may be one that waits for its place
            self._kill(stream)

    def _kill(self, stream: Any) -> None:
        if hired := self._busy.pop(stream, None):
            ray.kill(hired.handle)


class _Server:
    """Lives in a worker process."""

    def serve(self, packed: bytes, item: object, run_key: bytes, stop_key: bytes) -> Iterator[Message]:
        """Run one item; see `task.serve`."""
        yield from serve(packed, item, run_key, stop_key)
