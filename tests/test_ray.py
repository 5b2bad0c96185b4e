"""Merges on real Ray clusters: the same bytes, and what is lost on the way is made again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from raymerge import OnEvent, Planned, Retried, merge, verify
from raymerge.cluster.errors import ClusterConnectError, ResourceError, WorkerLostError
from raymerge.cluster.ray.actors import ActorRunner
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import Node, RaySession, connect_ray, start_ray
from raymerge.cluster.runner import Report
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import Gpus, ShardTask
from raymerge.pipeline.runners import check_reach, count_slots, make_runner, run_shard
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import read_files, write_config, write_family
from tests.cluster.runner_contract import even, nothing
from tests.commands import PATIENCE_SECONDS, Cli, run_command, start_program
from tests.holding import start_held
from tests.servers.ray_head import RayHead
from tests.watchers import Keep, on


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, num_layers=8, dtype=torch.bfloat16, num_shards=2)


@pytest.fixture(scope="module")
def config(family: tuple[Path, ...]) -> dict[str, Any]:
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in family[1:]]
    return {"merge_method": "ties", "base_model": str(family[0]), "models": models, "parameters": {"density": 0.5}}


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "merged"
    merge(config, out, shard_size=1, workers=1)
    return read_files(out)


def test_the_same_bytes_from_the_command_line(
    config: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "merge.yml", config)
    done = run_command("merge", file, tmp_path / "out", "--ray", "--workers", "2", "--shard-size", "1")
    assert done.code == 0, done.err
    assert read_files(tmp_path / "out") == undisturbed
    assert "Started" not in done.err, "Ray speaks through us"


@pytest.mark.slow
def test_nothing_of_ray_is_left_after_an_interrupt(config: dict[str, Any], tmp_path: Path) -> None:
    file, out = write_config(tmp_path / "merge.yml", config), tmp_path / "out"
    arguments = ("merge", file, out, "--ray", "--workers", "1", "--shard-size", "1")
    process = start_held(tmp_path / "hold", 3, *arguments)
    directories = wait_for(lambda: find_directories(process.pid))
    wait_for(lambda: list(out.glob("*.safetensors")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, said
    assert "run the same command again to go on" in said
    assert not (out / "model.safetensors.index.json").exists()
    wait_for(lambda: not any(find_processes(directory) for directory in directories))
    assert not any(Path(directory).exists() for directory in directories)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("127.0.0.1:1", "nobody answers at 127.0.0.1:1"),
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is not the address of a cluster"),
        ("ray://127.0.0.1:10001", "ray://127.0.0.1:10001 is not the address of a cluster"),
    ],
)
def test_auto_with_a_dead_address_in_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, says: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(ClusterConnectError, match=f"RAY_ADDRESS names the cluster that `auto` means: {says}"):
        connect_ray("auto", {}).__enter__()


@pytest.mark.slow
def test_what_a_killed_run_leaves_of_ray_is_swept_by_the_next(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory where no other test's run sweeps."""
    file = write_config(tmp_path / "merge.yml", config)
    parent = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    monkeypatch.setattr("raymerge.cluster.directory._PARENT", parent)
    code = "import pathlib, sys; from raymerge.cluster import directory; from raymerge.pipeline.cli.app import main\n"
    code += "directory._PARENT = pathlib.Path(sys.argv.pop(1)); main()"
    arguments = ("merge", file, tmp_path / "out", "--ray", "--workers", "1", "--shard-size", "1")
    process = start_program("-c", code, parent, *arguments)
    (left,) = wait_for(lambda: find_directories(process.pid))
    process.send_signal(signal.SIGSTOP)
    with start_ray(1):
        assert Path(left).exists(), "another run's, which is alive"
    process.kill()
    process.communicate()
    wait_for(lambda: not find_processes(left))
    assert Path(left).exists()
    with start_ray(1):
        assert not Path(left).exists()
    parent.rmdir()


def find_directories(pid: int) -> set[str]:
    """Return the temporary directories of the Rays that a process has started."""
    found = (
        re.search(r"/tmp/(rm-\w+/)?raymerge-\w+", command) for each, command in list_commands() if is_child(each, pid)
    )
    return {match[0] for match in found if match}


def find_processes(text: str) -> list[int]:
    return [pid for pid, command in list_commands() if text in command]


def list_commands() -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")))
    return found


def is_child(pid: int, of: int) -> bool:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == of
    return False


def wait_for(look: Callable[[], Any]) -> Any:
    """Return what a look finds, once it finds something."""
    give_up = time.monotonic() + 300
    while not (found := look()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_ray_is_gone_after_a_start_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> tuple[Node, ...]:
        raise KeyboardInterrupt

    monkeypatch.setattr("raymerge.cluster.ray.session.list_nodes", interrupt)
    with pytest.raises(KeyboardInterrupt), start_ray(1):
        pass
    assert not ray.is_initialized()


# clusters of several machines


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without processors."""
    directory = tempfile.mkdtemp(prefix="rm-", dir="/tmp")
    Path(directory, "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", directory)  # where the cluster notes its address, whatever its temp_dir
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": f"{directory}/ray"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def die_once(stores: Stores, task: ShardTask, report: Report, *, directory: Path, **more: Any) -> ShardResult:
    """Have the worker of the first shard killed once."""
    if "-00001-" in task.file and not (directory / "died").exists():
        (directory / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run_shard(stores, task, report, **more)


@pytest.mark.slow
def test_the_report_names_machines_and_retries(
    cluster: Cluster, config: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("raymerge.pipeline.execution.run_shard", partial(die_once, directory=tmp_path))
    hosts = ["127.0.0.2", "127.0.0.3"]
    for host in hosts:
        cluster.add_node(num_cpus=1, node_ip_address=host)
    cluster.wait_for_nodes()
    out, keep = tmp_path / "out", Keep()
    report = merge(config, out, shard_size=1, address=cluster.address, shared_filesystem=True, on_event=keep)
    assert (tmp_path / "died").exists()
    assert read_files(out) == undisturbed
    retries = [(event.reason, event.count) for event in keep.list(Retried)]
    assert list(report.faults) == retries
    assert [
        (reason in {f"ray: shard: its worker died (on {host})" for host in hosts}, count) for reason, count in retries
    ] == [(True, 1)]
    assert [host.host for host in report.hosts] == hosts
    assert sum(host.num_shards for host in report.hosts) == report.num_shards
    assert min(host.num_shards for host in report.hosts) > 0
    assert report.slowest is not None
    assert report.slowest.host in hosts


def power_off(cluster: Cluster, node: Any) -> OnEvent:
    """Kill a node when the first shard is finished."""
    nodes = [node]
    return on(ShardResult, lambda _: cluster.remove_node(nodes.pop(), False) if nodes else None)


@pytest.mark.slow
def test_a_node_that_is_powered_off(
    cluster: Cluster, config: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    out = tmp_path / "out"
    merge(config, out, shard_size=1, address=cluster.address, on_event=power_off(cluster, nodes[0]))
    assert read_files(out) == undisturbed
    verify(out)


@pytest.mark.slow
def test_a_method_of_ones_own_on_two_nodes(cluster: Cluster, family: tuple[Path, ...], tmp_path: Path) -> None:
    """It goes with the tasks: the file is gone when they are unpickled."""
    config = {"merge_method": "clipped", "base_model": str(family[0]), "models": [{"model": str(family[1])}]}
    ops = Path(shutil.copy(Path(__file__).with_name("seams") / "clipped.py", tmp_path / "mine.py"))
    merge(config, tmp_path / "here", shard_size=1, workers=1, ops=str(ops))
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    on_plan = on(Planned, lambda _: ops.unlink())
    report = merge(config, tmp_path / "out", shard_size=1, address=cluster.address, ops=str(ops), on_event=on_plan)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "here")
    assert report.num_shards > 2


def fail_at_first(item: int, report: Report, *, directory: Path) -> tuple[int, str]:
    """Fail once for each item; return on which node it fared better, and on which not."""
    mark, node_id = directory / str(item), ray.get_runtime_context().get_node_id()
    if not mark.exists():
        mark.write_text(node_id)
        raise OSError(f"no way to the store of {item}")
    return item, "the same" if mark.read_text() == node_id else "another"


@pytest.mark.slow
def test_what_fails_on_one_node_is_done_on_another(cluster: Cluster, tmp_path: Path) -> None:
    work = partial(fail_at_first, directory=tmp_path)
    items = list(range(6))
    with connect_ray(cluster.add_node(num_cpus=1) and cluster.address, {}):
        with pytest.raises(OSError, match="no way to the store of 0"):
            list(RayRunner(1, retry_on=(OSError,)).run(work, [0], even("a"), nothing))
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        reasons: list[str] = []
        runner = RayRunner(1, retry_on=(OSError,), on_retry=reasons.append)
        assert sorted(runner.run(work, items[1:], even(items[1:]), nothing)) == [(i, "another") for i in items[1:]]
        assert sorted(reason.partition(" (on ")[0] for reason in reasons) == [
            f"OSError: no way to the store of {i}" for i in items[1:]
        ]
        with pytest.raises(OSError, match="no way to the store of 7"):
            list(RayRunner(1).run(work, [7], even("a"), nothing))


def occupy() -> None:
    time.sleep(600)


@pytest.mark.slow
def test_what_fails_where_no_other_node_has_room_is_done_there(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.cluster.ray.silence.ELSEWHERE_SECONDS", 1.0)
    with connect_ray(cluster.add_node(num_cpus=1) and cluster.address, {}):
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        occupied = ray.remote(num_cpus=1)(occupy).remote()
        runner = RayRunner(1, retry_on=(OSError,))
        work = partial(fail_at_first, directory=tmp_path)
        assert list(runner.run(work, [0], even("a"), nothing)) == [(0, "the same")]
        ray.cancel(occupied, force=True)


@pytest.mark.slow
def test_a_cluster_without_workers_is_refused(cluster: Cluster, config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClusterConnectError, match="no node with processors"):
        merge(config, tmp_path / "out", address=cluster.address)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_node_is_left(
    cluster: Cluster, config: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("raymerge.cluster.ray.runner.LONELY_SECONDS", 3.0)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    out = tmp_path / "out"
    with pytest.raises(WorkerLostError, match=r"no node of the cluster has had .* in the last 3 s.*run the same"):
        merge(config, out, shard_size=1, address=cluster.address, on_event=power_off(cluster, node))
    assert not (out / "model.safetensors.index.json").exists()
    merge(config, out, shard_size=1)
    assert read_files(out) == undisturbed


@pytest.mark.slow
def test_a_head_that_dies(config: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    file, out = write_config(tmp_path / "merge.yml", config), tmp_path / "out"
    with RayHead(num_cpus=1) as head:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
        arguments = ("merge", file, out, "--shard-size", "1", "--address", head.address)
        process = start_held(tmp_path / "hold", 3, *arguments, env=token)
        give_up = time.monotonic() + 300
        while not list(out.glob("*.safetensors")):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        head.kill_books()
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, said
    assert "the head of the Ray cluster has not answered at" in said
    assert "run the same command again" in said
    assert not (out / "model.safetensors.index.json").exists()
    merge(config, out, shard_size=1)
    assert read_files(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("token", [{"RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}])
def test_a_cluster_that_asks_for_another_token(token: dict[str, str], config: dict[str, Any], tmp_path: Path) -> None:
    file = write_config(tmp_path / "merge.yml", config)
    with RayHead(num_cpus=1) as head:
        done = run_command(
            "merge", file, tmp_path / "out", "--address", head.address, env={"RAY_AUTH_MODE": "token", **token}
        )
    assert done.code == 2
    assert f"the Ray cluster at {head.address} asks for a token, and was given none or another one" in done.err
    assert not (tmp_path / "out").exists()


# what users do wrong


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "nobody answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "give host and port of its head"),
        ("somewhere", "give host and port of its head"),
        (f"{'x' * 70}:6379", "nobody answers at"),
    ],
)
def test_no_cluster_at_the_address(config: dict[str, Any], address: str, says: str, tmp_path: Path, cli: Cli) -> None:
    file = write_config(tmp_path / "merge.yml", config)
    outcome = cli("merge", file, tmp_path / "out", "--address", address)
    assert outcome.code == 2
    assert says in outcome.err
    assert not (tmp_path / "out").exists()


def test_ray_here_and_elsewhere(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave one"):
        merge(config, tmp_path / "out", ray=True, address="127.0.0.1:6379")


def test_a_password_in_what_the_cluster_is_told(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hidden@hub.example.org")
    with pytest.raises(ConfigError, match="HF_ENDPOINT has a password in it") as caught:
        merge(config, tmp_path / "out", address="127.0.0.1:6379")
    assert "hidden" not in str(caught.value)


def test_options_for_a_cluster_that_is_not_named(config: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    file = write_config(tmp_path / "merge.yml", config)
    assert "give its --address too" in cli("merge", file, tmp_path / "out", "--shared-filesystem").err
    outcome = cli("merge", file, tmp_path / "out", "--ray", "--dry-run")
    assert outcome.code == 2
    assert "leave the options for Ray out" in outcome.err


@pytest.mark.parametrize(("num_workers", "num_slots"), [(8, 12), (4, 6), (3, 3), (1, 1)])
def test_workers_of_one_machine_are_limited(num_workers: int, num_slots: int) -> None:
    nodes = (Node("10.0.0.5", 8, 2**34), Node("10.0.0.6", 4, 2**34))
    runner = make_runner(Stores(), num_workers, ["s3://bucket/out"], RaySession("10.0.0.4", nodes))
    assert isinstance(runner, RayRunner)
    assert runner.num_slots == num_slots == count_slots(num_workers, RaySession("10.0.0.4", nodes))


@pytest.mark.parametrize(("num_workers", "num_slots"), [(8, 10), (4, 5), (1, 1)])
def test_workers_of_one_gpu_are_limited(num_workers: int, num_slots: int) -> None:
    nodes = (Node("10.0.0.5", 8, 2**34, 4), Node("10.0.0.6", 4, 2**34, 1), Node("10.0.0.7", 8, 2**34))
    session = RaySession("10.0.0.4", nodes).with_gpus()
    assert session.nodes == nodes[:2]
    with pytest.raises(ResourceError, match="the work needs GPUs, and no node of the cluster has one; do without"):
        RaySession("10.0.0.4", nodes[2:]).with_gpus()
    runner = make_runner(Stores(), num_workers, ["s3://bucket/out"], session, Gpus(4, 2**34))
    assert isinstance(runner, ActorRunner)
    assert runner.num_slots == num_slots


@pytest.mark.slow
def test_a_cluster_without_gpus_is_refused_before_anything_runs(
    config: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    with pytest.raises(ResourceError, match="the work needs GPUs, and no node of the cluster has one; do without"):
        merge(config, tmp_path / "out", address=cluster.address, shared_filesystem=True, gpu_memory="4GiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_actors_get_shards_and_say_what_they_lack(config: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1, num_gpus=1)
    with pytest.raises(ConfigError, match=r"--gpu-memory asks for a GPU on .* or leave --gpu-memory out"):
        merge(config, tmp_path / "out", address=cluster.address, shared_filesystem=True, gpu_memory="4GiB")


def test_paths_of_this_machine_on_others(config: dict[str, Any], tmp_path: Path) -> None:
    nodes = (Node("10.0.0.5", 1, 2**34),)
    session = RaySession("10.0.0.4", nodes)
    with pytest.raises(ConfigError, match=r"/models/a: paths of this machine.*--shared-filesystem"):
        check_reach(Stores(), ["s3://bucket/out", "/models/a"], session, shared_filesystem=False)
    check_reach(Stores(), ["s3://bucket/out", "/models/a"], session, shared_filesystem=True)
    check_reach(Stores(), ["/out", "/models/a"], RaySession("10.0.0.5", nodes), shared_filesystem=False)
    with pytest.raises(ConfigError, match="gathered on one machine"):
        check_reach(Stores(), ["hf://me/merged", "s3://bucket/a"], session, shared_filesystem=True)
    with pytest.raises(ConfigError, match="only this process has it"):
        check_reach(Stores(), ["memory://out"], session, shared_filesystem=False)
