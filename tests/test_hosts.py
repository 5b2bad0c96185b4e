"""Merges on a Ray cluster of several machines, from and to S3, and what befalls these machines meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import read_files, write_config, write_family
from tests.commands import run_command
from tests.servers.hosts import skip_without_hosts
from tests.servers.ray_hosts import RayHosts

pytestmark = pytest.mark.slow

BUCKET = "models"
SPEED = 2_000_000
"""Bytes per second through a worker's cable, so that a shard takes some seconds."""
SHARD = ("--shard-size", "1500kB")
MAX_PARTITION_SECONDS = 120.0
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    skip_without_hosts()
    with RayHosts(num_workers=2) as hosts:
        for worker in hosts.workers:
            worker.limit(SPEED)
        yield hosts


@pytest.fixture(scope="module")
def local(hosts: RayHosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a merge of the same models writes on this machine; they are on S3, and their config is on the head."""
    directory = tmp_path_factory.mktemp("local")
    family = write_family(directory, 2, num_layers=8, dtype=torch.bfloat16, num_shards=2, hidden=256, vocab=512)
    hosts.s3.create_bucket(BUCKET)
    for model in family:
        for name, content in read_files(model).items():
            hosts.s3.client().put_object(Bucket=BUCKET, Key=f"{model.name}/{name}", Body=content)
    models = [{"model": f"s3://{BUCKET}/{model.name}", "parameters": {"weight": 0.5}} for model in family[1:]]
    merge = {"merge_method": "ties", "base_model": f"s3://{BUCKET}/{family[0].name}", "models": models}
    config = write_config(hosts.head.tmp / "merge.yml", merge | {"parameters": {"density": 0.5}})
    done = run_command("merge", config, directory / "out", *SHARD, env=hosts.environment)
    assert done.code == 0, done.err
    return read_files(directory / "out")


@pytest.fixture(scope="module")
def undisturbed(hosts: RayHosts, local: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the seconds that a merge on the cluster takes when nothing happens; it has the bytes of the local one."""
    process, log = begin(hosts, "undisturbed", tmp_path_factory.mktemp("undisturbed"))
    start = time.monotonic()
    assert "Failures" not in finish(process, log)
    seconds = time.monotonic() - start
    assert read_objects(hosts, "undisturbed") == local
    return seconds


def begin(hosts: RayHosts, name: str, directory: Path) -> tuple[subprocess.Popen[str], Path]:
    log = directory / "log"
    return hosts.start_merge(f"s3://{BUCKET}/{name}", *SHARD, log=log), log


def finish(process: subprocess.Popen[str], log: Path) -> str:
    """Return what a merge has said when it has succeeded."""
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    return log.read_text()


def read_objects(hosts: RayHosts, name: str) -> dict[str, bytes]:
    keys = [key for key in hosts.s3.keys_of(BUCKET) if key.startswith(f"{name}/")]
    client = hosts.s3.client()
    return {key.removeprefix(f"{name}/"): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_the_bytes_of_a_local_merge(hosts: RayHosts, undisturbed: float) -> None:
    done = hosts.head.run("raymerge", "verify", f"s3://{BUCKET}/undisturbed", env=hosts.environment)
    assert done.code == 0, done.err
    assert "is sound" in done.out


def test_a_worker_that_is_killed(hosts: RayHosts, local: dict[str, bytes], tmp_path: Path) -> None:
    process, log = begin(hosts, "killed", tmp_path)
    for pid in hosts.wait_for_work(hosts.workers[0], SPEED):
        os.kill(pid, signal.SIGKILL)
    assert "1 x ray: shard: its worker died" in finish(process, log)
    assert read_objects(hosts, "killed") == local


def test_a_driver_that_is_killed(hosts: RayHosts, local: dict[str, bytes], tmp_path: Path) -> None:
    process, log = begin(hosts, "resumed", tmp_path)
    while not re.search(r"safetensors: .* MB in ", log.read_text()):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    hosts.wait_for_work(hosts.workers[0], SPEED // 2)
    hosts.head.kill(process)
    process, log = begin(hosts, "resumed", tmp_path)
    assert "shards are finished and sound; going on with the rest" in finish(process, log)
    assert read_objects(hosts, "resumed") == local


def test_a_machine_that_is_powered_off_and_replaced(hosts: RayHosts, local: dict[str, bytes], tmp_path: Path) -> None:
    lost = hosts.workers[0]
    process, log = begin(hosts, "replaced", tmp_path)
    hosts.wait_for_work(lost, SPEED)
    hosts.workers[1].limit(SPEED // 20)  # it would be done with all before the other is back
    lost.power_off()
    lost.power_on()
    hosts.join(lost)
    hosts.wait_for_work(lost, SPEED)
    hosts.workers[1].limit(SPEED)
    assert re.search(r"1 x ray: shard: its (node|worker) died", finish(process, log))
    assert read_objects(hosts, "replaced") == local


def test_a_machine_that_is_silently_cut_off(
    hosts: RayHosts, local: dict[str, bytes], undisturbed: float, tmp_path: Path
) -> None:
    start = time.monotonic()
    process, log = begin(hosts, "partition", tmp_path)
    hosts.wait_for_work(hosts.workers[0], SPEED)
    hosts.workers[0].cut_off()
    assert "1 x ray: shard: its node died" in finish(process, log)
    cost = time.monotonic() - start - undisturbed
    print(f"a merge of {undisturbed:.1f} s took {cost:.1f} s more")
    assert cost < MAX_PARTITION_SECONDS
    assert read_objects(hosts, "partition") == local
