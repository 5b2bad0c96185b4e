from __future__ import annotations

import json
from pathlib import Path

from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.search.deletion import delete_model
from raymerge.pipeline.stores.open import Stores


def test_what_a_manifest_lists_is_deleted_and_nothing_outside(tmp_path: Path, stores: Stores) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in (model / "config.json", model / "notes.txt", tmp_path / "mine", tmp_path / "other"):
        path.write_text("x")
    names = ["config.json", "gone.safetensors", "../mine", str(tmp_path / "other")]
    files = {name: {"nbytes": 1, "sha256": ""} for name in names}
    (model / MANIFEST).write_text(json.dumps({"fingerprint": "f", "nonfinite": [], "files": files}))
    delete_model(stores, str(model))
    delete_model(stores, str(model))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "model", "notes.txt", "other"]


def test_a_model_elsewhere_that_a_link_leads_to_stays(tmp_path: Path, stores: Stores) -> None:
    model = tmp_path / "mine"
    model.mkdir()
    (model / "config.json").write_text("x")
    files = {"config.json": {"nbytes": 1, "sha256": ""}}
    (model / MANIFEST).write_text(json.dumps({"fingerprint": "f", "nonfinite": [], "files": files}))
    (tmp_path / "trial-0000").symlink_to(model)
    delete_model(stores, str(tmp_path / "trial-0000"))
    assert len(list(model.iterdir())) == 2
    delete_model(stores, str(model))
    assert not model.exists()
