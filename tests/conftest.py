"""What every test may use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from raymerge.pipeline.cli.app import main
from raymerge.pipeline.stores.open import Stores, open_stores
from tests.commands import Cli, Outcome
from tests.servers.fixtures import bucket, s3_server  # noqa: F401

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read by huggingface_hub when it is imported; what tests Xet starts a process
with suppress(ValueError):  # not in the main thread
    # Commands inherit signals that are ignored, as SIGINT in the background and SIGHUP under nohup, but no handlers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # how long an example takes says nothing while other tests run
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # the machine's other cores may be busy, and waiting for them takes longer than the work


@pytest.fixture(autouse=True)
def draw_the_same_numbers() -> None:
    """Have a test draw the same random tensors in every run."""
    torch.manual_seed(0)


@pytest.fixture
def stores() -> Iterator[Stores]:
    """Storages that are built in the test's own environment."""
    with open_stores() as stores:
        yield stores


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, through its entry point."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["raymerge", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, out, err)

    return run
