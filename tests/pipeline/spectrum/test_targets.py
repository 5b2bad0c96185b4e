"""Directories that a sweep writes to: what is in the way there, and room for all models."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import raymerge
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.spectrum.record import RECORD
from raymerge.pipeline.spectrum.targets import check_no_model
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import write_family
from tests.pipeline.spectrum.samples import check_models, make_config


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, dtype=torch.bfloat16, vocab=400, hidden=32)


def test_what_is_in_the_way_is_found_before_anything_is_made(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family)
    for name, said in (
        ("t-0.4", "t-0.4 is a file, and the model t-0.4 goes there"),
        ("t-0.4/mine.txt", "is not empty"),
    ):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(OutputError, match=said):
            raymerge.sweep(config, out, ["t=0.2,0.4"])
        assert [path.name for path in out.iterdir()] == ["t-0.4"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / RECORD).write_text("mine")
    with pytest.raises(OutputError, match=r"spectrum.json is damaged: .*; `raymerge sweep` with --overwrite writes it"):
        raymerge.sweep(config, tmp_path / "s", ["t=0.2"])
    raymerge.sweep(config, tmp_path / "s", ["t=0.2"], overwrite=True)
    check_models(tmp_path / "s", tmp_path / "alone")


def test_all_models_need_room_together(family: tuple[Path, ...], tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        raymerge.sweep(make_config("slerp", family), place / "one", ["t=0.5"])
        with pytest.raises(OutputError, match=r"s: [\d,]+ bytes are still to be written, [\d,]+ are free in"):
            raymerge.sweep(make_config("slerp", family), place / "s", ["t=0.1:0.9:0.1"])
        assert not (place / "s").exists()
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_directory_that_is_a_model_takes_no_spectrum(family: tuple[Path, ...], tmp_path: Path) -> None:
    with open_stores() as stores:
        check_no_model(stores, str(tmp_path / "nothing"))
        with pytest.raises(OutputError, match=r"base holds a model \(config.json\); choose another directory"):
            check_no_model(stores, str(family[0]))
