"""The examples in docstrings say what the code does."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import raymerge

EXTRAS = {"inspect_worker": "inspect_ai", "vllm_worker": "vllm"}
ABSENT = [
    f"raymerge.pipeline.evaluation.generation.{name}" for name, library in EXTRAS.items() if find_spec(library) is None
]
"""Modules that import an extra which need not be installed for tests."""
MODULES = [
    module.name
    for module in pkgutil.walk_packages(raymerge.__path__, "raymerge.")
    if not module.name.endswith("__main__") and module.name not in ABSENT  # the former runs the command line
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(bool(test.examples) for tests in found for test in tests) > 30
