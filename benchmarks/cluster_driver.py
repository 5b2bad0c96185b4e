"""Merge, and print as JSON what it took the driver: `python benchmarks/cluster_driver.py CONFIG OUT OPTIONS`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from raymerge import Event, Resumed, ShardResult, merge


class Clock:
    """Notes when shards begin and end."""

    def __init__(self) -> None:
        self.first = self.last = time.monotonic()

    def note(self, event: Event) -> None:
        """Begin when the work does; note the end of each shard."""
        if isinstance(event, Resumed):
            self.first = self.last = time.monotonic()
        if isinstance(event, ShardResult):
            self.last = time.monotonic()
            print("finished", event.file, flush=True)


def main(config: str, out: str, options: str) -> None:
    """Merge with the options of `raymerge.merge`, as JSON."""
    arguments: dict[str, Any] = json.loads(options)
    clock = Clock()
    report = merge(Path(config), out, on_event=clock.note, **arguments)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": report.seconds,
                "merge_seconds": clock.last - clock.first,
                "num_shards": report.num_shards,
                "num_resumed": report.num_resumed,
                "faults": dict(report.faults),
                "cpu": usage.ru_utime + usage.ru_stime,
                "rss": usage.ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
