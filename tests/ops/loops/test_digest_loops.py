"""SHA-256 of several messages at once, compiled and in Python, beside hashlib's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raymerge.ops.loops.digest_loops import (
    BLOCK_NBYTES,
    FIRST_STATE,
    MAX_MESSAGES,
    ORDER,
    compress,
    has_instructions,
    take_blocks,
)

COMPILED = pytest.param(compress, marks=pytest.mark.skipif(not has_instructions(), reason="no instructions for SHA"))


@pytest.mark.parametrize("function", [COMPILED, take_blocks])
@pytest.mark.parametrize("num_messages", range(1, MAX_MESSAGES + 1))
def test_digests_are_those_of_hashlib(function: Callable[..., Any], num_messages: int) -> None:
    """The message has whole blocks, the last of them padding, and is taken in several calls."""
    generator = np.random.default_rng(num_messages)
    num_blocks = 6
    length = num_blocks * BLOCK_NBYTES - 9
    messages = [generator.bytes(length) for _ in range(num_messages)]
    padded = [np.frombuffer(text + b"\x80" + (8 * length).to_bytes(8, "big"), np.uint8) for text in messages]
    addresses = np.array([text.ctypes.data for text in padded], np.int64)
    states = np.array([FIRST_STATE] * num_messages, np.uint32)
    done = 0
    for count in (1, 0, 3, 2):
        function(addresses + done * BLOCK_NBYTES, states, count)
        done += count
    assert done == num_blocks
    digests = [state[list(ORDER)].astype(">u4").tobytes() for state in states]
    assert digests == [hashlib.sha256(text).digest() for text in messages]
