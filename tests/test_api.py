"""The public names of `raymerge`, and what type checkers and people are told of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline import driver


def list_checked_names() -> set[str]:
    """Return what type checkers take for public: the imports that are made for them alone."""
    tree = ast.parse(Path(raymerge.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_every_public_name_is_there() -> None:
    for name in dir(raymerge):
        assert getattr(raymerge, name) is not None
    assert raymerge.merge is driver.merge
    assert raymerge.__version__ == "0.1.0"


def test_type_checkers_know_the_same_names() -> None:
    assert list_checked_names() == set(dir(raymerge)) - {"RaymergeError", "__version__"}


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="module 'raymerge' has no attribute 'murge'"):
        raymerge.murge  # type: ignore[attr-defined]  # noqa: B018


def test_errors_have_one_ancestor() -> None:
    errors = [getattr(raymerge, name) for name in dir(raymerge) if name.endswith("Error")]
    assert len(errors) > 10
    assert all(issubclass(error, raymerge.RaymergeError) for error in errors)
