"""Servers that run in a process of their own, on a port of this machine."""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from tests.servers import ServerFailedError, ServerProcess

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(url: str) -> bool:
    """Return whether a server answers a GET."""
    try:
        OPENER.open(url, timeout=5).close()
    except urllib.error.URLError:
        return False
    return True


class LocalServer(ABC):
    """A server with a process and a directory of its own, until `stop`."""

    endpoint: str
    """URL of the server."""
    _process: ServerProcess

    def __init__(self, prefix: str) -> None:
        """Make its directory, whose name begins with `prefix`."""
        self._directory = Path(tempfile.mkdtemp(prefix=prefix))

    def start(self) -> None:
        """Start it, once more if someone takes the port in the meantime."""
        try:
            self._start()
        except ServerFailedError:
            self._start()

    @abstractmethod
    def _start(self) -> None:
        """Start it on a free port, and wait until it answers."""

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used."""
        return self._process.cpu_seconds()

    def stop(self) -> None:
        """End the server."""
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
