"""Merges that are submitted to a cluster: what is sent, what is shown, how they end, and what users do wrong."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from raymerge import merge, verify
from raymerge.cluster.errors import ClusterConnectError
from raymerge.cluster.job_client import JobClient
from raymerge.cluster.package import list_requirements, pack_files, pack_raymerge
from raymerge.pipeline.cli.options import list_arguments, takes_options
from raymerge.pipeline.options import MergeOptions
from tests.checkpoints import read_files, write_config, write_family, write_llama
from tests.commands import PATIENCE_SECONDS, Cli, run_command, start_command
from tests.servers.faults import FaultProxy
from tests.servers.ray_head import RayHead


@pytest.fixture(autouse=True)
def _no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray leaves it in the environment of a process that has started it."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead(num_cpus=2) as head:
        yield head


@pytest.fixture
def client(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> JobClient:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.job_address)
    return JobClient(head.job_address)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    family = write_family(tmp_path_factory.mktemp("family"), 1, num_layers=60, dtype=torch.bfloat16)
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in family]}


@pytest.fixture
def file(config: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(tmp_path / "config of mine.yml", config)


# on a cluster


@pytest.mark.slow
def test_the_same_bytes_as_without_a_cluster(
    client: JobClient, config: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    merge(config, tmp_path / "here", shard_size=20_000)
    out = tmp_path / "on the cluster"
    done = run_command("submit", file, out, "--shared-filesystem", "--follow", "--shard-size", "20000")
    assert done.code == 0, done.err
    assert read_files(out) == read_files(tmp_path / "here")
    job_id = done.out.split()[0]
    assert "linear of 2 models" in done.err, "as if it ran here"
    assert "{" not in done.out + done.err
    listed = run_command("jobs", "list").out
    assert f"{job_id}  SUCCEEDED" in listed
    assert str(out) in listed
    status = run_command("jobs", "status", job_id).out
    assert "exit code: 0" in status
    assert file.name in status
    logs = run_command("jobs", "logs", job_id)
    assert "Running entrypoint" in logs.err
    assert logs.out == done.out.removeprefix(f"{job_id}\n"), "the report"
    assert "raymerge_manifest.json" in logs.out


@pytest.mark.slow
def test_a_method_of_ones_own_is_sent(client: JobClient, config: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = (item["model"] for item in config["models"])
    config = {"merge_method": "clipped", "base_model": base, "models": [{"model": tuned}]}
    ops = Path(__file__).with_name("seams") / "clipped.py"
    merge(config, tmp_path / "here", shard_size=100_000, ops=str(ops))
    file = write_config(tmp_path / "merge.yml", config)
    options = "--shared-filesystem", "--follow", "--shard-size", "100000", "--ops", ops
    done = run_command("submit", file, tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert read_files(tmp_path / "out") == read_files(tmp_path / "here")


@pytest.mark.slow
def test_a_job_runs_the_code_that_was_sent(client: JobClient) -> None:
    with zipfile.ZipFile(io.BytesIO(pack_raymerge().content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["raymerge/sent.py"] = b""
    command = "python -c 'import raymerge.sent; print(open(\"a file\").read())'"
    packages = {"py_modules": pack_files(files), "working_dir": pack_files({"a file": b"its content"})}
    client.submit("code-1", command, packages, {}, {})
    lines: list[str] = []
    assert client.follow("code-1", lines.append).exit_code == 0, lines
    assert "its content" in lines


@pytest.mark.slow
def test_the_code_of_a_job_that_fails(client: JobClient, config: dict[str, Any], tmp_path: Path) -> None:
    file = write_config(tmp_path / "merge.yml", {**config, "base_model": str(tmp_path / "not there")})
    arguments = ("submit", file, tmp_path / "out", "--shared-filesystem", "--follow")
    here = run_command(*arguments)
    assert (here.code, here.out) == (2, ""), "it is planned first, and no job is made"
    assert "not there: no such directory" in here.err
    assert "; if only the cluster's machines can read it, say --no-plan" in here.err
    done = run_command(*arguments, "--no-plan")
    assert done.code == 2
    assert "not there: no such directory" in done.err
    assert "failed with exit code 2" in run_command("jobs", "status", done.out.strip()).out


def wait_for(path: Path, what: str) -> None:
    give_up = time.monotonic() + 300
    while not list(path.glob(what)):
        assert time.monotonic() < give_up, f"there is no {what} in {path}"
        time.sleep(0.05)


HELD = """
import time
from pathlib import Path

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.registry import Base, merge_op

HERE = Path({here!r})


@merge_op(title="Held", base=Base.REQUIRED, max_models=1)
def held() -> Kernel:
    \"""The model; from its fourth file on it takes minutes, until there is the file `go`.\"""
    return Elementwise(_copy, ())


def _copy(tensors, out, scratch):
    if not (HERE / "go").exists() and len(list((HERE / "out").glob("*.safetensors"))) > 3:
        time.sleep(0.3)
    out.copy_(tensors[1])
"""


@pytest.fixture
def held(config: dict[str, Any], tmp_path: Path) -> tuple[str | Path, ...]:
    """The arguments of a merge to `out` that takes minutes before there is the file `go`."""
    (tmp_path / "held.py").write_text(HELD.format(here=str(tmp_path)))
    base, tuned = (item["model"] for item in config["models"])
    merge = {"merge_method": "held", "base_model": base, "models": [{"model": tuned}]}
    file = write_config(tmp_path / "merge.yml", merge)
    return file, tmp_path / "out", "--ops", tmp_path / "held.py", "--shared-filesystem", "--shard-size", "1"


@pytest.mark.slow
def test_a_job_that_is_stopped_lets_go_and_can_be_gone_on_with(
    client: JobClient, held: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("submit", *held)
    job_id = run_command(*arguments).out.strip()
    wait_for(out, "*.safetensors")
    assert run_command("jobs", "stop", job_id).out == f"{job_id}: STOPPED\n"
    assert "Interrupted" in client.read_log(job_id), "it has tidied up, and was not killed"
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("**/*.partial*"))
    (tmp_path / "go").touch()
    again = run_command(*arguments, "--follow")
    assert again.code == 0, again.err
    assert "are finished and sound" in again.err
    verify(out)
    assert run_command("jobs", "stop", job_id).out == f"{job_id}: STOPPED\n", "it had ended already"


@pytest.mark.slow
def test_an_interrupt_leaves_the_job_alone(client: JobClient, held: tuple[str | Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_command("submit", *held, "--follow")
    wait_for(out, "*.safetensors")
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    job_id = printed.strip()
    assert (
        f"The job goes on. To see how it goes: raymerge jobs logs {job_id} --address {client.address} --follow" in said
    )
    assert f"raymerge jobs stop {job_id} --address {client.address}" in said
    (tmp_path / "go").touch()
    assert run_command("jobs", "logs", job_id, "--follow").code == 0
    verify(out)


@pytest.mark.slow
def test_a_connection_that_drops_is_made_again(head: RayHead, client: JobClient, tmp_path: Path) -> None:
    with FaultProxy(head.job_address) as proxy:
        through = JobClient(proxy.url)
        command = (
            f"for i in 1 2 3 4; do echo line $i; done; until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo line 5"
        )
        through.submit("drop-1", command, {}, {}, {})
        lines: list[str] = []
        troubles: list[str] = []

        def take(line: str) -> None:
            lines.append(line)
            if line == "line 4":
                proxy.down = True

        def go_on(trouble: str) -> None:
            troubles.append(trouble)
            proxy.down = False
            (tmp_path / "go").touch()

        assert through.follow("drop-1", take, go_on).status == "SUCCEEDED"
    assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(1, 6)]
    assert len(troubles) == 1
    assert "trying again" in troubles[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "says"), [("", "asks for a token (HTTP 401); set RAY_AUTH_TOKEN"), ("wrong", "refuses the token")]
)
def test_without_the_right_token(
    head: RayHead, token: str, says: str, file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    outcome = cli("submit", file, tmp_path / "out", "--shared-filesystem", "--address", head.job_address)
    assert outcome.code == 2
    assert says in outcome.err
    assert "wrong" not in outcome.err


@pytest.mark.slow
def test_jobs_that_are_not_there(client: JobClient, cli: Cli) -> None:
    for command in ("status", "logs", "stop"):
        outcome = cli("jobs", command, "raymerge-none")
        assert outcome.code == 2
        assert "raymerge-none" in outcome.err
        assert "`raymerge jobs list` shows those there are" in outcome.err
    client.submit("twice-1", "true", {}, {}, {})
    with pytest.raises(ClusterConnectError, match="twice-1"):
        client.submit("twice-1", "true", {}, {}, {})


# without one


def test_a_client_needs_neither_torch_nor_ray(file: Path, tmp_path: Path) -> None:
    code = """
        import sys
        sys.modules.update(dict.fromkeys(["torch", "ray"]))  # importing them fails
        from raymerge.pipeline.cli.app import main
        main()
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        "submit",
        str(file),
        "s3://bucket/out",
        "--shared-filesystem",
    ]
    done = subprocess.run([*command, "--address", "http://127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nobody answers at http://127.0.0.1:1" in done.stderr


def test_a_merge_is_planned_before_it_is_submitted(config: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    smaller = {"model": str(write_llama(tmp_path / "smaller")), "parameters": {"weight": 1}}
    file = write_config(tmp_path / "merge.yml", {**config, "models": [*config["models"], smaller]})
    arguments = ("submit", file, tmp_path / "out", "--shared-filesystem", "--address", "http://127.0.0.1:1")
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "name the layers to merge with `slices`" in outcome.err
    outcome = cli(*arguments, "--no-plan")
    assert outcome.code == 2
    assert "nobody answers at http://127.0.0.1:1" in outcome.err


def test_what_is_the_same_has_the_same_name(tmp_path: Path) -> None:
    assert pack_raymerge() == pack_raymerge()
    assert pack_files({"a": b"1"}).name == pack_files({"a": b"1"}).name
    assert len({pack_files(files).name for files in ({"a": b"1"}, {"a": b"2"}, {"b": b"1"})}) == 3
    with zipfile.ZipFile(io.BytesIO(pack_raymerge().content)) as archive:
        names = archive.namelist()
    assert {"raymerge/__init__.py", "raymerge/ops/linear.py", "raymerge/pipeline/cli/app.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert not {need.partition(">")[0] for need in list_requirements()} & {"ray", "pytest", "ruff"}
    assert [need for need in list_requirements() if need.startswith("torch")]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"memory": "2 GiB", "workers": 3, "seed": 7, "strict": True, "shard_size": "5GB"},
        {"private": False, "overwrite": True, "shared_filesystem": True, "storage": "fsspec"},
    ],
)
def test_options_arrive_as_they_were_given(values: dict[str, Any]) -> None:
    options = MergeOptions(**values, address="auto")
    arrived = []

    @takes_options
    def command(options: MergeOptions) -> None:
        arrived.append(options)

    app = typer.Typer()
    app.command()(command)
    app(list_arguments(options), standalone_mode=False)
    assert arrived == [options]


@pytest.mark.parametrize(
    ("change", "out", "options", "says"),
    [
        ({}, "s3://bucket/out", (), "paths of this machine, which the cluster does not have"),
        ({}, "out", ("--shared-filesystem",), "out: relative paths"),
        (
            {"base_model": "s3://me:hidden@bucket/a"},
            "/out",
            ("--shared-filesystem",),
            "the config has a credential in it",
        ),
        ({}, "s3://me:hidden@bucket/out", ("--shared-filesystem",), "the output has a credential in it"),
        ({"merge_method": "bogus"}, "/out", ("--shared-filesystem",), "merge_method"),
    ],
)
def test_what_must_not_be_sent(
    change: dict[str, Any],
    out: str,
    options: tuple[str, ...],
    says: str,
    config: dict[str, Any],
    tmp_path: Path,
    cli: Cli,
) -> None:
    file = write_config(tmp_path / "merge.yml", {**config, **change})
    outcome = cli("submit", file, out, *options, "--address", "http://127.0.0.1:1")
    assert outcome.code == 2
    assert says in outcome.err
    assert "hidden" not in outcome.err


class Failing(BaseHTTPRequestHandler):
    """A cluster with one job, which has failed in a way of its own, and which takes no other."""

    exit_code: object = 0

    def do_GET(self) -> None:
        job = {"submission_id": "j", "type": "SUBMISSION", "status": "FAILED", "message": "the driver was lost"}
        content = {"logs": ""} if self.path.endswith("/logs") else job | {"driver_exit_code": self.exit_code}
        self.answer(200, json.dumps(content).encode())

    def do_POST(self) -> None:
        self.answer(500, MISMATCH.encode())

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


MISMATCH = """Traceback (most recent call last):
  File "job_head.py", line 1, in submit_job
RuntimeError: Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.12.1
This process was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def test_jobs_that_fail_oddly(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        outcome = cli("jobs", "logs", "j", "--follow", "--address", address)
        assert outcome.code == 2
        assert "j failed with exit code 0: the driver was lost" in outcome.err
        with pytest.raises(
            ClusterConnectError, match=r"started with: Ray: 2.59.0 Python: 3.12.1 This .* Python: 3.11.7"
        ):
            JobClient(address).submit("j", "true", {}, {}, {})
        monkeypatch.setattr(Failing, "exit_code", "three")
        outcome = cli("jobs", "status", "j", "--address", address)
        assert outcome.code == 2
        assert "does not answer as Ray does" in outcome.err
        server.shutdown()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "http://me:hidden@127.0.0.1:9"])
def test_a_dead_proxy_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    outcome = cli("jobs", "list", "--address", "http://10.0.0.5:8265")
    assert outcome.code == 2
    assert "127.0.0.1:9, which http_proxy names; if it is reached without one" in outcome.err
    assert "add 10.0.0.5 to no_proxy" in outcome.err
    assert "hidden" not in outcome.err
    monkeypatch.setenv("no_proxy", "10.0.0.5,127.0.0.1")
    assert "proxy" not in cli("jobs", "list", "--address", "http://127.0.0.1:1").err


class NotRay(BaseHTTPRequestHandler):
    """A server of another kind, at `/elsewhere` one that sends clients on."""

    def do_GET(self) -> None:
        assert self.headers["Authorization"] is None or "elsewhere" in self.path
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "http://192.0.2.1/")
        else:
            self.send_response(200)
        body = b"[1]" if self.path.startswith("/json") else b"hi"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def not_ray() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotRay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_servers_that_are_not_ray(not_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterConnectError, match="does not answer as Ray does"):
        JobClient(not_ray).list_jobs()
    for call in (JobClient.list_jobs, lambda client: client.find_job("a"), lambda client: client.read_log("a")):
        with pytest.raises(ClusterConnectError, match="does not answer as Ray does"):
            call(JobClient(f"{not_ray}/json"))
    with pytest.raises(ClusterConnectError, match="nobody answers"):
        JobClient("http://127.0.0.1:1").follow("a", lambda line: None, lambda text: pytest.fail(text))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hidden")
    with pytest.raises(ClusterConnectError, match=r"redirects to http://192\.0\.2\.1/"):
        JobClient(f"{not_ray}/elsewhere").list_jobs()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://[::1", "is not the address of a cluster's job API"),
        ("http://head..x:8265", "nobody answers at http://head..x:8265"),
        ("me:hidden@10.0.0.5:8265", "user name or password"),
        ("10.0.0.5:6379", "is not the address of a cluster's job API"),
        ("ray://10.0.0.5:10001", "is not the address of a cluster's job API"),
        ("http://me:hidden@10.0.0.5:8265", "user name or password"),
        ("http://127.0.0.1:1", "nobody answers at http://127.0.0.1:1"),
    ],
)
def test_addresses_that_cannot_be(address: str, says: str, cli: Cli) -> None:
    outcome = cli("jobs", "list", "--address", address)
    assert outcome.code == 2
    assert says in outcome.err
    assert "hidden" not in outcome.err


def test_a_cluster_is_to_be_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    outcome = cli("jobs", "list")
    assert outcome.code == 2
    assert "--address" in outcome.err


def test_a_token_is_sent_only_where_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of some cluster\n")
    (tmp_path / "token").write_text("of this one\n")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def find() -> str | None:
        return JobClient("http://10.0.0.5:8265")._token

    assert find() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert find() == "of some cluster"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find() == "of this one"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "in the environment")
    assert find() == "in the environment"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    with pytest.raises(ClusterConnectError, match="RAY_AUTH_TOKEN holds no token"):
        find()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find() is None
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterConnectError, match="the token's file that RAY_AUTH_TOKEN_PATH names cannot be read"):
        find()
