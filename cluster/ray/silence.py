"""Limits of an attempt's silence, after which it counts as hung or is begun elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from raymerge.cluster.ray.attempt import Attempt
from raymerge.cluster.ray.ledger import Ledger

HANG_SECONDS = 900.0
"""Longest silence of an item at work; the longest wait for a store is less than half of it."""

ELSEWHERE_SECONDS = 30.0
"""Longest wait of an item for room on a node where it has not failed yet; then any node will do."""

PATIENCE_SECONDS = 4.0
"""Time for workers to end their items when the run is broken off, or a twin was faster."""

END_SECONDS = 30.0
"""Longest silence of an item when another has failed: it aborts what it has begun to write."""


def find_overdue(ledger: Ledger) -> list[Any]:
    """Return the streams of items that have been silent for too long, or have waited so for another node."""
    now = time.monotonic()
    return [
        stream
        for stream, attempt in ledger.running.items()
        if now - attempt.heard_at > _limit_silence(attempt, is_ending=ledger.is_ending)
    ]


def _limit_silence(attempt: Attempt, *, is_ending: bool) -> float:
    """Return for how many seconds nothing may be heard of an attempt."""
    if attempt.begun:
        return PATIENCE_SECONDS if attempt.is_beaten else END_SECONDS if is_ending else HANG_SECONDS
    if attempt.is_beaten or is_ending:  # it waits for room, perhaps for ever
        return PATIENCE_SECONDS
    return ELSEWHERE_SECONDS if attempt.elsewhere else math.inf
