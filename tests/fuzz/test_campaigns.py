"""A small part of each campaign, always the same; `python -m tests.fuzz` runs whole ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from tests.fuzz.campaign import run_campaign, write
from tests.fuzz.campaigns import CAMPAIGNS
from tests.fuzz.headers import HeaderCase, Headers

COUNTS = {"configs": 300, "headers": 5000, "hubs": 80, "manifests": 60, "models": 120, "tokenizers": 40}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAMPAIGNS)
def test_campaign(kind: str, tmp_path: Path) -> None:
    with closing(CAMPAIGNS[kind](tmp_path)) as campaign:
        counts = run_campaign(campaign, range(COUNTS[kind]), seed=1)
    assert not counts.faults, "\n\n".join(counts.faults)
    assert counts.accepted > COUNTS[kind] / 20  # mutations that leave nothing to accept find nothing


class Careless(Headers):
    """Takes every file of an even size, and fails on the others."""

    def attempt(self, case: HeaderCase) -> None:
        write(self._path, case.content)
        if len(case.content) % 2:
            raise KeyError("odd")


def test_faults_are_found(tmp_path: Path) -> None:
    counts = run_campaign(Careless(tmp_path), range(300), seed=1)
    assert counts.accepted > counts.wrongly_accepted > 0
    assert counts.tracebacks > 0
    assert "KeyError: 'odd'" in "".join(counts.faults)
    assert "the reference refuses it: Error while deserializing" in "".join(counts.faults)
