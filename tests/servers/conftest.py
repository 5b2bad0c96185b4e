"""A Hub for its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hub import HubServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a writer, a reader and a stranger, and `me/model`."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        hub.add_token("hf_reader", user="friend", can_read=["me/closed", "me/gated"])
        hub.add_token("hf_stranger", user="stranger", can_write=["stranger"])
        hub.create_repo("me/model")
        yield hub
