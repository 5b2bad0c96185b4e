"""Have `RayRunner` run items that only sleep: `python benchmarks/scheduling.py simulated|ray NUM_SLOTS NUM_ITEMS`.

On `ray`, a real one, started here. What is `simulated` is Ray: tasks begin at once, as many as there are slots, and
cost nobody anything. So it tells whether the runner's own loop leaves slots idle, and not whether Ray would.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from raymerge.cluster.outcome import Done
from raymerge.cluster.ray import runner as ray_runner
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import Node, start_ray
from raymerge.cluster.runner import Progress, Report, Resources

_SECONDS = 0.1
"""That an item takes."""


def sleep(item: int, report: Report) -> int:
    """Do nothing for a while."""
    time.sleep(_SECONDS)
    return item


class SimulatedRay:
    """As much of Ray as the runner's loop uses: streams that have one message, some time after they were made."""

    def remote(self, **options: Any) -> Any:
        """Return what makes remote functions."""
        return lambda function: SimpleNamespace(options=lambda **options: SimpleNamespace(remote=Stream))

    def wait(
        self, streams: Sequence[Stream], timeout: float, num_returns: int = 1
    ) -> tuple[list[Stream], list[Stream]]:
        """Return the first that is ready, once it is: the oldest, as all take as long."""
        first = streams[0]
        time.sleep(max(0.0, first.ready_at - time.perf_counter()))
        return [first], []

    def get(self, message: Done) -> Done:
        """Return a message."""
        return message


class Stream:
    """What comes of one item."""

    def __init__(self, work: object, item: int, run_key: bytes, stop_key: bytes) -> None:
        self.item = item
        self.ready_at = time.perf_counter() + _SECONDS

    def __next__(self) -> Done:
        return Done(self.item)


def main(where: str, num_slots: int, num_items: int) -> None:
    """Print how busy the slots were, and what it took the driver, as JSON."""
    with ExitStack() as stack:
        if where == "simulated":
            vars(ray_runner).update(ray=SimulatedRay(), list_nodes=lambda: (Node("simulated", num_slots, 2**50),))
        else:
            stack.enter_context(start_ray(num_slots))
            _run(num_slots, 25 * num_slots)  # until all workers have started
        before = _cpu_seconds()
        start = time.perf_counter()
        _run(num_slots, num_items)
        seconds = time.perf_counter() - start
        cpu = _cpu_seconds() - before
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    busy = num_items * _SECONDS / (num_slots * seconds)
    print(json.dumps({"busy": busy, "seconds": seconds, "cpu_per_item": cpu / num_items, "rss": rss}))


def _run(num_slots: int, num_items: int) -> None:
    items = list(range(num_items))

    def ignore(progress: Progress) -> None:
        pass

    results = RayRunner(num_slots).run(sleep, items, [Resources(mem_nbytes=1, cost=1)] * num_items, ignore)
    if sorted(results) != items:
        raise AssertionError("not every item was run once")


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
