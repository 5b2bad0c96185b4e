from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hosts import Network, skip_without_hosts

SERVE = "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"


@pytest.fixture
def network() -> Iterator[Network]:
    skip_without_hosts()
    with Network() as network:
        yield network


def fetch(address: str) -> list[str]:
    """Return a command that prints how many bytes a file of a host has."""
    url = f"http://{address}:8000/file"
    return ["python", "-c", f"import urllib.request as u; print(len(u.urlopen({url!r}, timeout=3).read()))"]


def test_hosts_know_each_other_and_nobody_else(network: Network) -> None:
    head, worker = network.add_host("head"), network.add_host("worker")
    for host, other in ((head, worker), (worker, head)):
        assert host.run("hostname").out.strip() == host.name
        look_up = f"import socket; print(socket.gethostbyname({other.name!r}))"
        assert host.run("python", "-c", look_up).out.strip() == other.address
    (head.tmp / "mine").touch()
    with tempfile.NamedTemporaryFile(dir="/tmp") as ours:
        seen = [set(host.run("ls").out.split()) for host in (head, worker)]
        assert ["mine" in names for names in seen] == [True, False]
        assert not any(Path(ours.name).name in names for names in seen)
    assert "unreachable" in head.run("python", "-c", "import socket; socket.create_connection(('8.8.8.8', 53))").err


@pytest.mark.slow
def test_a_host_is_cut_off_limited_and_switched_off(network: Network, tmp_path: Path) -> None:
    head, worker = network.add_host("head"), network.add_host("worker")
    (worker.tmp / "file").write_bytes(bytes(4_000_000))
    server = worker.start("python", "-c", SERVE, log=tmp_path / "log")
    give_up = time.monotonic() + 20
    while (outcome := head.run(*fetch("worker"))).code and time.monotonic() < give_up:
        time.sleep(0.1)
    assert outcome.out == "4000000\n"
    worker.limit(2_000_000)
    start = time.monotonic()
    assert subprocess.run(fetch(worker.address), check=True, capture_output=True).stdout == b"4000000\n"
    assert time.monotonic() - start > 1.5
    worker.cut_off()
    assert "timed out" in head.run(*fetch("worker")).err
    worker.reconnect()
    assert head.run(*fetch("worker")).out == "4000000\n"
    assert len(worker.pids("serve_forever")) == 1
    assert head.pids("serve_forever") == []
    worker.power_off()
    assert server.wait() != 0
    assert "refused" in head.run(*fetch("worker")).err
    worker.power_on()
    assert "file" not in worker.run("ls").out.split(), "its /tmp is as new"


def test_hosts_that_come_later_do_not_disturb(network: Network) -> None:
    head = network.add_host("head")
    with socket.create_server((network.address, 0)) as server:
        connect = ["python", "-c", f"import socket; socket.create_connection({server.getsockname()!r}, 3)"]
        assert head.run(*connect).code == 0
        for number in range(6):
            network.add_host(f"later-{number}")
            assert head.run(*connect).code == 0


def test_a_command_is_killed(network: Network, tmp_path: Path) -> None:
    host = network.add_host("host")
    process = host.start("sleep", "1000", log=tmp_path / "log")
    while not (pids := host.pids("sleep")):
        time.sleep(0.01)
    host.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{pids[0]}").exists()


def test_nothing_is_left(tmp_path: Path) -> None:
    skip_without_hosts()
    with Network() as other:
        host = other.add_host("host")
        process = host.start("sleep", "1000", log=tmp_path / "log")
    assert process.wait() != 0
    assert not host.etc.exists()
    assert not host.tmp.exists()
    assert host.etc.name not in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
    assert not list(Path("/sys/class/net").glob(f"{host.etc.name.partition('-')[0]}-*"))
