from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.evaluation import digests
from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.stores.open import Stores
from tests.tokenized_models import TEXTS, byte_level, write_tokenized


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the weights count as large."""
    monkeypatch.setattr(digests, "_SMALL_NBYTES", 10_000)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    models = [{"model": str(write_tokenized(tmp_path / name, k, byte_level(TEXTS[0])))} for k, name in enumerate("ab")]
    raymerge.merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_models_weights_are_not_read(tmp_path: Path, stores: Stores, merged: Path) -> None:
    found = Digests(stores, str(tmp_path / "out"))
    first = found.measure(str(merged))
    for path in merged.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    (merged / MANIFEST).touch()
    assert Digests(stores, str(tmp_path / "out")).measure(str(merged)) == first


@pytest.mark.parametrize("is_moved", [False, True])
def test_weights_that_were_changed_after_the_merge_are_hashed(
    tmp_path: Path, stores: Stores, merged: Path, *, is_moved: bool
) -> None:
    first = Digests(stores, str(tmp_path / "out")).measure(str(merged))
    [path] = merged.glob("*.safetensors")
    other = tmp_path / "other" if is_moved else path
    other.write_bytes(bytes(path.stat().st_size))
    if is_moved:  # by which it keeps its age
        os.utime(other, (1e9, 1e9))
        other.replace(path)
    assert Digests(stores, str(tmp_path / "out")).measure(str(merged)) != first


def test_a_copy_without_its_manifest_and_card_is_the_same_model(tmp_path: Path, stores: Stores, merged: Path) -> None:
    copy = shutil.copytree(merged, tmp_path / "copy")
    for name in (MANIFEST, "README.md"):
        (copy / name).unlink()
    found = Digests(stores, str(tmp_path / "out"))
    assert found.measure(str(copy)) == found.measure(str(merged))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_what_decides_answers_counts(tmp_path: Path, stores: Stores, merged: Path, name: str) -> None:
    found = Digests(stores, str(tmp_path / "out"))
    first = found.measure(str(merged))
    with (merged / name).open("a") as file:
        file.write(" ")
    assert found.measure(str(merged)) != first


def test_a_content_is_hashed_once(tmp_path: Path, stores: Stores) -> None:
    model = write_tokenized(tmp_path / "model", 1, byte_level(TEXTS[0]))
    found = Digests(stores, str(tmp_path / "out"))
    first = found.measure(str(model))
    [kept] = (tmp_path / "out" / ".digests").glob("*.json")
    assert found.measure(str(model)) == first
    kept.write_text(kept.read_text().replace('"value": "', '"value": "0'))
    assert found.measure(str(model)) != first, "the content is not read again"
