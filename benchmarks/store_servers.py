"""S3 servers for benchmarks, and merges from one bucket to another.

The servers are those of the tests: nginx for reads, and behind it a sink for writes, both in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merges import OFFLINE, Bench, Merge
from processes import Usage, measure

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.servers.sink import NullSink
from tests.servers.static import OUTPUT, NginxServer

UNLIMITED = 1 << 60
"""Bytes."""


@dataclass(frozen=True)
class S3:
    """The servers, with one bucket for each directory of a family, and one for the output."""

    nginx: NginxServer
    sink: NullSink
    home: Path
    """Home, temporary files and working directory of the clients; empty at the start."""

    def environment(self) -> dict[str, str]:
        """Return what leads clients here, and to nothing of the user's."""
        return {
            "AWS_ENDPOINT_URL": self.nginx.endpoint,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "XDG_CACHE_HOME": str(self.home.parent / "cache"),  # compiled once, as on any machine
        }

    def cpu_seconds(self) -> float:
        """Return what the servers have used."""
        return self.nginx.cpu_seconds() + self.sink.cpu_seconds()


@contextmanager
def serve(bench: Bench, directory: Path) -> Iterator[S3]:
    """Start the servers for what is below a directory."""
    home = bench.workdir / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    with NullSink() as sink, NginxServer(directory, sink=sink) as nginx:
        yield S3(nginx, sink, home)
    shutil.rmtree(home, ignore_errors=True)


def write_config(bench: Bench, merge: Merge, name: str, buckets: Sequence[str]) -> Path:
    """Write the config of a merge of these buckets, and return its path."""
    text = merge.to_yaml([Path(bucket) for bucket in buckets])
    path = bench.workdir / f"s3-{merge.method}-{merge.num_tunes}-{name}.yml"
    config = json.loads(text)
    if "base_model" in config:
        config["base_model"] = f"s3://{config['base_model']}"
    for model in config["models"]:
        model["model"] = f"s3://{model['model']}"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def run(
    bench: Bench,
    command: Sequence[str | Path],
    *,
    log: str,
    env: dict[str, str],
    directory: Path,
    max_nbytes: int = UNLIMITED,
    is_sampled: bool = False,
) -> Usage:
    """Measure a command and everything that it starts."""
    wrapper: list[str | Path] = [sys.executable, "-I", "-S", Path(__file__).with_name("process_tree.py")]
    words: list[str | Path] = [*wrapper, bench.workdir / "tree.json", directory, str(max_nbytes), *command]
    return measure(words, log=bench.workdir / f"{log}.log", env=OFFLINE | env, is_sampled=is_sampled)


def merge_s3(
    bench: Bench, s3: S3, config: Path, *options: str, max_nbytes: int = UNLIMITED, is_sampled: bool = False
) -> Usage:
    """Merge from S3 to S3, into nothing."""
    s3.sink.clear()
    command: list[str | Path] = [bench.raymerge, "merge", config, f"s3://{OUTPUT}/merged", "-q", *options]
    usage = run(
        bench,
        command,
        log="raymerge-s3",
        env=s3.environment(),
        directory=s3.home,
        max_nbytes=max_nbytes,
        is_sampled=is_sampled,
    )
    if f"{OUTPUT}/merged/config.json" not in s3.sink.sizes():
        raise AssertionError(f"no model was written, only {s3.sink.sizes()}")
    return usage
