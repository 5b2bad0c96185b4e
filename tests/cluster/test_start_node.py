"""The script that every node of a job runs, under schedulers that are played by the test, on machines of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from raymerge import merge, verify
from tests.checkpoints import read_files, write_config, write_family
from tests.commands import run_command
from tests.servers.hosts import Host, Network, skip_without_hosts

pytestmark = pytest.mark.slow

OPTIONS = (
    "--shared-filesystem",
    "--shard-size",
    "1",
    "--memory",
    "256MiB",
    "--nodes",
    "2",
    "--cpus",
    "1",
    "--setup",
    "",
)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    skip_without_hosts()
    with Network() as network:
        for name in ("one", "two"):
            network.add_host(name)
        yield network


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory that all hosts have, unlike /tmp."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def config(shared: Path) -> Path:
    models = write_family(shared, 2, num_layers=12, dtype=torch.bfloat16, num_shards=2)
    document = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models[1:]],
    }
    return write_config(shared / "merge.yml", document)


@pytest.fixture(scope="module")
def undisturbed(config: Path, shared: Path) -> dict[str, bytes]:
    merge(config, shared / "undisturbed", shard_size=1)
    return read_files(shared / "undisturbed")


BATCH_OPTIONS = ("--image", "registry.test/raymerge:1", "--execution-role", "arn:aws:iam::210987654321:role/raymerge")


def write_manifest(kind: str, config: Path, out: Path, *options: str) -> str:
    more = BATCH_OPTIONS if kind == "aws-batch" else ()
    done = run_command("manifest", kind, config, out, *OPTIONS, *more, *options)
    assert done.code == 0, done.err
    return done.out


def check_that_nothing_is_left(*hosts: Host) -> None:
    for host in hosts:
        deadline = time.monotonic() + 60
        while host.pids("ray") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [Path(f"/proc/{pid}/cmdline").read_text() for pid in host.pids("ray")], host.name
        assert not [path.name for path in host.tmp.iterdir() if path.name.startswith("raymerge-")], host.name


# srun: what it is to start is written down, and done by the test
SRUN = """\
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
pathlib.Path(here, "new").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
pathlib.Path(here, "new").rename(here / "request")
while not (here / "answer").exists():
    time.sleep(0.1)
sys.exit(int((here / "answer").read_text()))
"""


def test_under_slurm(
    network: Network, config: Path, undisturbed: dict[str, bytes], shared: Path, tmp_path: Path
) -> None:
    one, two = network.hosts
    out = shared / "slurm"
    (tmp_path / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames one,two" ] && printf "one\\ntwo\\n"')
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    (tmp_path / "job.sh").write_text(write_manifest("slurm", config, out))
    env = {
        "PATH": f"{tmp_path}:{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_JOB_NUM_NODES": "2",
    }
    with subprocess.Popen(["bash", tmp_path / "job.sh"], env=env) as script:
        while not (tmp_path / "request").exists():
            assert script.poll() is None
            time.sleep(0.1)
        arguments, environment = json.loads((tmp_path / "request").read_text())
        command = [argument for argument in arguments if not argument.startswith("--")]
        tasks = [
            host.start(*command, log=tmp_path / host.name, env=environment | {"SLURM_NODEID": str(number)})
            for number, host in enumerate((one, two))
        ]
        codes = [tasks[0].wait(600)]
        ended = time.monotonic()
        codes.append(tasks[1].wait(120))
        assert time.monotonic() - ended < 60  # and not the quarter of an hour in which nodes wait for each other
        (tmp_path / "answer").write_text(str(max(codes)))
    logs = {host.name: (tmp_path / host.name).read_text() for host in (one, two)}
    assert codes == [0, 0], logs
    assert "2 of 2 nodes are there" in logs["one"]
    assert script.returncode == 0
    assert read_files(out) == undisturbed
    check_that_nothing_is_left(one, two)
    token = environment["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert not any(token in text for text in (*logs.values(), (tmp_path / "job.sh").read_text()))


@contextmanager
def start_batch(
    definition: str, host: Host, log: Path, *, main: Host, num_nodes: int = 2, patience: int = 60
) -> Iterator[subprocess.Popen[str]]:
    """Have the container of one node run as AWS Batch does."""
    properties = yaml.safe_load(definition)["nodeProperties"]
    container = properties["nodeRangeProperties"][0]["container"]
    variables = {
        **{each["name"]: each["value"] for each in container["environment"]},
        **{each["name"]: "0123456789abcdef" * 4 for each in container["secrets"]},
        "AWS_BATCH_JOB_NODE_INDEX": "0" if host is main else "1",
        "AWS_BATCH_JOB_MAIN_NODE_INDEX": str(properties["mainNode"]),
        "AWS_BATCH_JOB_NUM_NODES": str(num_nodes),
        "RAYMERGE_JOIN_SECONDS": str(patience),
    }
    if host is not main:
        variables["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"] = main.address
    process = host.start(*container["command"], log=log, env=variables)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_under_batch_a_main_node_that_is_powered_off(
    network: Network, config: Path, undisturbed: dict[str, bytes], shared: Path, tmp_path: Path
) -> None:
    one, two = network.hosts
    out = shared / "batch"
    definition = write_manifest("aws-batch", config, out)
    with (
        start_batch(definition, one, tmp_path / "1", main=one),
        start_batch(definition, two, tmp_path / "2", main=one) as child,
    ):
        while not list(out.glob("model-*.safetensors")):
            assert child.poll() is None, (tmp_path / "2").read_text()
            time.sleep(0.02)
        one.power_off()
        assert child.wait(300) == 0, (tmp_path / "2").read_text()
    assert not (out / "model.safetensors.index.json").exists(), "the merge was too fast for this test"
    check_that_nothing_is_left(two)
    one.power_on()

    # the next attempt, for which a third machine does not come
    with (
        start_batch(definition, one, tmp_path / "1", main=one, num_nodes=3, patience=5) as head,
        start_batch(definition, two, tmp_path / "2", main=one, num_nodes=3) as child,
    ):
        assert head.wait(600) == 0, (tmp_path / "1").read_text()
        assert child.wait(300) == 0, (tmp_path / "2").read_text()
    assert "2 of 3 nodes are there, and no more after 5 s" in (tmp_path / "1").read_text()
    assert read_files(out) == undisturbed
    verify(str(out))
    check_that_nothing_is_left(one, two)


def test_a_job_that_is_cancelled_ends_with_the_code_of_the_merge(
    network: Network, config: Path, shared: Path, tmp_path: Path
) -> None:
    one, _ = network.hosts
    definition = write_manifest("aws-batch", config, shared / "cancelled")
    with start_batch(definition, one, tmp_path / "1", main=one, num_nodes=1) as head:
        while "linear of 2 models" not in (tmp_path / "1").read_text():
            assert head.poll() is None, (tmp_path / "1").read_text()
            time.sleep(0.05)
        (script,) = one.pids("export RAYMERGE_IS_HEAD=")
        os.kill(script, signal.SIGTERM)
        assert head.wait(300) == 130, (tmp_path / "1").read_text()
    check_that_nothing_is_left(one)


def test_a_child_without_a_main_node(network: Network, config: Path, shared: Path, tmp_path: Path) -> None:
    one, two = network.hosts
    definition = write_manifest("aws-batch", config, shared / "never")
    with start_batch(definition, two, tmp_path / "2", main=one, patience=1) as child:
        assert child.wait(300) == 1
    assert f"nobody answers at {one.address}:6379" in (tmp_path / "2").read_text()
