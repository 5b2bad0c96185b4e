"""Leftovers of a task in its process, which the next one finds."""

from __future__ import annotations

from pathlib import Path

from raymerge import merge
from raymerge.ops.kernels.sparsifiers import counts
from tests.checkpoints import write_family


def test_tables_of_counts_are_freed_with_the_task(tmp_path: Path) -> None:
    """The plan of the next task does not know of them."""
    base, *tunes = map(str, write_family(tmp_path, 2))
    models = [{"model": model, "parameters": {"weight": 1, "density": 0.5}} for model in tunes]
    merge({"merge_method": "ties", "base_model": base, "models": models}, tmp_path / "out", workers=1)
    assert not counts._TABLES
