"""Which GPUs a process may use, without CUDA."""

from __future__ import annotations

import ctypes

import pytest

from raymerge.pipeline.engine.gpu import devices as gpus


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("2", ["2"]),
        ("3,1", ["3", "1"]),
        ("1, 0", ["1", "0"]),
        ("1,4,0", ["1"]),
        ("-1", []),
        ("GPU-6a1f,MIG-77", ["GPU-6a1f", "MIG-77"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    named: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_count_installed", lambda: 4)
    if named is None:
        monkeypatch.delenv(gpus.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(gpus.VARIABLE, named)
    assert gpus.list_gpus() == expected


def test_a_driver_that_does_not_answer_leaves_the_question_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def nvmlInit_v2(self) -> int:  # noqa: N802
            return 9

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert gpus._count_installed() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert gpus._count_installed() is None
