"""A whole campaign: python -m tests.fuzz headers --count 400000 --seed 1."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.campaign import run_campaign
from tests.fuzz.campaigns import CAMPAIGNS


def main() -> int:
    """Run a campaign, and print what came of it."""
    parser = argparse.ArgumentParser(prog="tests.fuzz")
    parser.add_argument("kind", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    arguments = parser.parse_args()
    start = time.monotonic()
    make = CAMPAIGNS[arguments.kind]
    with TemporaryDirectory(prefix="raymerge-fuzz-") as directory, closing(make(Path(directory))) as campaign:
        numbers = range(arguments.first, arguments.first + arguments.count)
        counts = run_campaign(campaign, numbers, arguments.seed)
    for fault in counts.faults:
        print(f"{fault}\n")
    print(f"{arguments.kind}: {arguments.count:,} in {time.monotonic() - start:.0f} s: {counts}")
    return bool(counts.faults)


if __name__ == "__main__":
    raise SystemExit(main())
