"""Machines of their own for tests: each has an address, a host name, processes and a /tmp, on a network of their own.

They are namespaces of this machine with a link to a bridge, and have its files but for /tmp and /dev/shm. Needs root
and iproute2: see `skip_without_hosts`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import pytest

from tests.commands import Outcome
from tests.servers import children_of

_ROOT = Path(__file__).resolve().parents[2]

_NUM_NETWORKS = 512
"""Of 256 addresses each in 198.18.0.0/15, which is set aside for measuring networks."""

# The init of the host becomes a `cat`, for which the kernel reaps what nobody waits for: a process that has ended and
# is not reaped seems alive. It ends, and all processes of the host with it, when its standard input does: with the
# process that has started it, whatever ends that.
_INIT = r"""
set -e
name=$1 tmp=$2
shift 2
hostname "$name"
for visible; do
    mkdir -p "$tmp/${visible#/tmp/}"
    mount --bind "$visible" "$tmp/${visible#/tmp/}"
done
mount --rbind "$tmp" /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
echo ready
exec env --ignore-signal=CHLD cat
"""


def skip_without_hosts() -> None:
    """Skip the test where this machine cannot make namespaces."""
    tools = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount", "hostname", "bash")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"hosts of the test need {', '.join(missing)}, which this machine has not")
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "true"], check=False)
    if os.geteuid() != 0 or probe.returncode:
        pytest.skip("hosts of the test are namespaces, which need root with all its rights")


class Network:
    """A bridge with hosts on it. This process has an address there as well, and may serve them and be their client."""

    def __init__(self) -> None:
        self._number = _claim_bridge()
        self._bridge = f"rm{self._number}"
        self._directory = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))  # short, for the sockets in it
        self.address = self._address_of(1)
        """Of this process."""
        self.hosts: list[Host] = []
        try:
            _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.stop()
            raise

    def add_host(self, name: str) -> Host:
        """Return a new host, which is on, and which the others know by its name."""
        number = len(self.hosts) + 2
        tmp = self._directory / name
        tmp.mkdir()
        host = Host(name, self._address_of(number), f"{self._bridge}-{number}", tmp)
        self.hosts.append(host)
        host.connect(self._bridge)
        lines = ["127.0.0.1 localhost", *(f"{each.address} {each.name}" for each in self.hosts)]
        for each in self.hosts:
            (each.etc / "hosts").write_text("\n".join(lines) + "\n")
        host.power_on()
        return host

    def stop(self) -> None:
        """Switch all hosts off and remove whatever there was of them."""
        for host in self.hosts:
            host.remove()
        _ip("link", "delete", self._bridge)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _address_of(self, number: int) -> str:
        return f"198.{18 + self._number // 256}.{self._number % 256}.{number}"


class Host:
    """A machine; made by `Network.add_host`."""

    def __init__(self, name: str, address: str, namespace: str, tmp: Path) -> None:
        self.name = name
        self.address = address
        self.tmp = tmp
        """Its /tmp, as this process sees it. It is also its home directory."""
        self.etc = Path("/etc/netns", namespace)
        """What it has in place of the files of the same names in /etc."""
        self._namespace = namespace
        self._link = namespace
        """This side's end of its cable."""
        self._init: subprocess.Popen[str] | None = None

    def connect(self, bridge: str) -> None:
        """Give the host its cable and its address."""
        self.etc.mkdir(parents=True)
        (self.etc / "resolv.conf").touch()  # nobody to ask for names, so that no name is waited for
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _ip("link", "set", self._link, "master", bridge, "up")
        _ip("-netns", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-netns", self._namespace, "link", "set", link, "up")

    def power_on(self) -> None:
        """Start the host, with nothing running and an empty /tmp."""
        shutil.rmtree(self.tmp)
        self.tmp.mkdir()
        self.tmp.chmod(0o1777)
        self.reconnect()
        visible = {path for path in (str(_ROOT), sys.prefix, sys.base_prefix) if path.startswith("/tmp/")}
        namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
        init = ["bash", "-c", _INIT, "init", self.name, str(self.tmp), *sorted(visible)]
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, *namespaces, *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._init.stdout
        if self._init.stdout.readline() != "ready\n":
            raise HostFailedError(f"{self.name} does not start: {self._init.communicate()[1]}")

    def power_off(self) -> None:
        """End all processes of the host at once. Its connections are closed: see `cut_off` for silence."""
        if self._init is None:
            return
        if self._init.poll() is None:
            os.kill(self._pid(), signal.SIGKILL)
        self._init.communicate()  # the kernel tells of the end of an init when all others of the host have ended
        self._init = None

    def cut_off(self) -> None:
        """Pull the cable: nobody hears of it, and whoever sends to the host or from it waits."""
        _ip("link", "set", self._link, "down")

    def reconnect(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self._link, "up")

    def is_connected(self) -> bool:
        """Tell whether the cable is plugged in."""
        return Path(f"/sys/class/net/{self._link}/operstate").read_text() == "up\n"

    def limit(self, nbytes_per_second: int) -> None:
        """Have the cable carry no more than this, in each direction."""
        shape = f"root tbf rate {8 * nbytes_per_second}bit burst {max(nbytes_per_second // 100, 2**16)} latency 50ms"
        _run("tc", "qdisc", "replace", "dev", self._link, *shape.split())
        _run("tc", "-netns", self._namespace, "qdisc", "replace", "dev", "eth0", *shape.split())

    def start(self, *command: str | Path, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command in the host's /tmp, and return what waits for its end; `kill` kills it.

        Args:
            command: program and arguments; the programs of this Python's environment are found first.
            log: what it says is added to this file.
            env: added to PATH and HOME, which is all that it gets else.
        """
        with log.open("a") as output:
            return self._start(command, env, output, subprocess.STDOUT)

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 600) -> Outcome:
        """Run a command in the host's /tmp to its end; see `start`."""
        with self._start(command, env, subprocess.PIPE, subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return Outcome(process.returncode, out, err)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kill a command, which then leaves nothing behind that seems alive, and wait for its end."""
        for pid in children_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()

    def pids(self, pattern: str) -> list[int]:
        """Return the processes of the host, by the numbers that they have here, whose command line has a text in it.

        There are none where it is off.
        """
        if self._init is None:
            return []
        namespace = Path(f"/proc/{self._pid()}/ns/pid").readlink()
        found: list[int] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "ns/pid").readlink() == namespace and pattern in (process / "cmdline").read_text():
                    found.append(int(process.name))
            except OSError:  # it has ended
                continue
        return found

    def received_nbytes(self) -> int:
        """Return how many bytes have come through the cable since the host was made."""
        return int(Path(f"/sys/class/net/{self._link}/statistics/tx_bytes").read_text())

    def remove(self) -> None:
        """Switch the host off and remove its network."""
        self.power_off()
        for arguments in (("link", "delete", self._link), ("netns", "delete", self._namespace)):
            subprocess.run(["ip", *arguments], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.etc, ignore_errors=True)

    def _start(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None, out: IO[str] | int, err: int
    ) -> subprocess.Popen[str]:
        enter = ["nsenter", f"--target={self._pid()}", "--net", "--pid", "--mount", "--uts"]
        return subprocess.Popen(
            [*enter, "env", "--chdir=/tmp", "setpriv", "--pdeathsig=KILL", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            env={"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "HOME": "/tmp", **(env or {})},
        )

    def _pid(self) -> int:
        """Return the number that the host's init has here."""
        assert self._init, f"{self.name} is off"
        if not (children := children_of(self._init.pid)):
            raise HostFailedError(f"{self.name} has ended")
        return children[0]


class HostFailedError(Exception):
    """A host did not start, or ended by itself."""


def _claim_bridge() -> int:
    """Make a bridge with a number that no other test has, and return it."""
    for number in range(_NUM_NETWORKS):
        # With an address of its own: else it takes one of its hosts', another when hosts come, and these would go on
        # sending to the former.
        address = f"02:00:00:00:{number // 256:02x}:{number % 256:02x}"
        command = ["ip", "link", "add", f"rm{number}", "address", address, "type", "bridge"]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode == 0:
            return number
        if "File exists" not in made.stderr:
            raise HostFailedError(made.stderr)
    raise HostFailedError(f"{_NUM_NETWORKS} bridges are there already; remove what tests have left behind")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise HostFailedError(f"{' '.join(command)}: {done.stderr.strip()}")
