"""Merges that cannot finish before a test has killed or stopped them, however fast the machine is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any
from uuid import uuid4

from raymerge.cluster.runner import Progress, Report
from raymerge.pipeline import execution
from raymerge.pipeline.cli.app import main
from raymerge.pipeline.engine.shard import run_shard
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import ShardTask
from raymerge.pipeline.stores.open import Stores
from tests.commands import start_program

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Held:
    """Makes a number of shards; further ones wait until the hold is over."""

    directory: Path
    """Has a file for each shard that was begun or waits; and `go` when the hold is over."""
    num_shards: int

    def __call__(self, stores: Stores, task: ShardTask, report: Report, **more: Any) -> ShardResult:
        """Make a shard; see `run_shard`."""
        if not self._begin():
            (self.directory / f"held-{uuid4().hex}").touch()
            while not (self.directory / "go").exists():
                time.sleep(0.01)
                report(Progress())
        return run_shard(stores, task, report, **more)

    def _begin(self) -> bool:
        """Take one of the places of shards that do not wait; of two processes only one gets it."""
        for number in range(self.num_shards):
            with suppress(FileExistsError):
                (self.directory / f"shard-{number}").touch(exist_ok=False)
                return True
        return False


def start_held(
    directory: Path,
    num_shards: int,
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
) -> Popen[str]:
    """Start a raymerge process that makes so many shards, and further ones once there is the file `go` in a directory.

    Args:
        directory: is made where it is not there; of this process alone.
        num_shards: that it makes before.
        arguments: of the command.
        cwd: where it runs.
        env: changes to the environment; None takes a variable out.
        prefix: a program that starts it.
    """
    directory.mkdir()
    directory.chmod(0o777)  # the process may run as somebody else
    code = "from tests.holding import run_held; run_held()"
    own = {"PYTHONPATH": str(_ROOT), **(env or {})}
    return start_program("-c", code, directory, str(num_shards), *arguments, cwd=cwd, env=own, prefix=prefix)


def run_held() -> None:
    """Run the command line that follows the directory and the number of shards; see `start_held`."""
    directory, num_shards = sys.argv[1:3]
    del sys.argv[1:3]
    vars(execution)["run_shard"] = Held(Path(directory), int(num_shards))
    main()
