"""Waits until the machines of a job have joined the Ray cluster of this one: `python -m raymerge.cluster.roll_call`."""

from __future__ import annotations

import sys
import time

from raymerge.cluster.ray.session import list_nodes

_LOOK_SECONDS = 0.5


def wait_for_nodes(num_nodes: int, seconds: float) -> int:
    """Return how many nodes have processors to offer: as many as asked for, or those there are after a while."""
    deadline = time.monotonic() + seconds
    while (present := len(list_nodes())) < num_nodes and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return present


def main() -> None:
    """Wait for a number of nodes, for so many seconds at most; fewer do the work too, and are mentioned."""
    import ray

    num_nodes, seconds = int(sys.argv[1]), float(sys.argv[2])
    ray.init("auto", log_to_driver=False, configure_logging=False)
    present = wait_for_nodes(num_nodes, seconds)
    missing = "" if present >= num_nodes else f", and no more after {seconds:g} s: going on without the others"
    print(f"raymerge: {present} of {num_nodes} nodes are there{missing}", file=sys.stderr)


if __name__ == "__main__":
    main()
