"""The name of the machine that this process runs on."""

from __future__ import annotations

import socket

_names: list[str] = []


def name_host(name: str) -> None:
    """Give this machine the name by which the driver knows it."""
    _names[:] = [name]


def find_host() -> str:
    """Return this machine's name: the one that it was given, or its own."""
    return _names[0] if _names else socket.gethostname()
