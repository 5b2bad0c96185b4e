"""Checks of models and of whole spectra, each against its manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import raymerge
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.spectrum.verify import verify_all
from tests.checkpoints import write_family
from tests.pipeline.spectrum.samples import make_config


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """Sweep over three models; return the directory of the spectrum."""
    family = write_family(tmp_path / "models", 2, num_layers=1, dtype=torch.bfloat16)
    raymerge.sweep(make_config("slerp", family), tmp_path / "s", ["t=0.2,0.4,0.6"])
    return tmp_path / "s"


def test_every_model_of_a_spectrum_is_checked(swept: Path) -> None:
    found = dict(verify_all(str(swept)))
    assert list(found) == [str(swept / f"t-{t}") for t in (0.2, 0.4, 0.6)]
    assert len({(report.num_files, report.num_tensors) for report in found.values()}) == 1


def test_models_after_a_damaged_one_are_checked_too(swept: Path) -> None:
    weights = swept / "t-0.2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    sound: list[str] = []
    with pytest.raises(OutputError, match=rf"^1 of 3 models of {swept} cannot be used; (.|\n)*t-0\.2 is not what was"):
        sound.extend(place for place, _ in verify_all(str(swept)))
    assert sound == [str(swept / "t-0.4"), str(swept / "t-0.6")]


def test_a_model_by_itself(swept: Path) -> None:
    ((place, report),) = verify_all(str(swept / "t-0.4"))
    assert place == str(swept / "t-0.4")
    assert report.num_tensors > 0


def test_no_workers_are_refused(swept: Path) -> None:
    with pytest.raises(ConfigError, match="workers is 0; it must be 1 or more"):
        next(verify_all(str(swept), workers=0))
