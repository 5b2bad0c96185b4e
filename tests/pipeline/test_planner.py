from __future__ import annotations

import gc

import pytest

from raymerge.pipeline.planner import pause_collector


def test_the_collector_is_back_afterwards() -> None:
    with pause_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), pause_collector():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pause_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
