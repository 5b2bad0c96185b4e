"""Sweeps of small models, for tests of several modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raymerge
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.spectrum.record import Spectrum, locate_point, read_spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import read_files


def make_config(method: str, family: tuple[Path, ...], **more: Any) -> dict[str, Any]:
    """Return the config of a merge of a base and two fine-tunes."""
    models = family[:2] if method == "slerp" else family[1:]
    base = {} if method == "linear" else {"base_model": str(family[0])}
    return {"merge_method": method, **base, "models": [{"model": str(model)} for model in models], **more}


def read_record(directory: Path) -> Spectrum:
    """Return the record of a spectrum."""
    with open_stores() as stores:
        return read_spectrum(stores, str(directory))


def check_models(directory: Path, scratch: Path, **options: Any) -> None:
    """Compare each model of a spectrum, all files of it, with what its own config gives."""
    for point in read_record(directory).points:
        assert point.state == "complete"
        alone = scratch / point.name
        raymerge.merge(point.config, alone, MergeOptions(seed=point.seed, **options))
        assert read_files(alone) == read_files(Path(locate_point(str(directory), point))), point.name
