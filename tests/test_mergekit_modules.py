"""Merges module by module, against mergekit 0.1.5 in a process and an environment of its own.

`make test-mergekit` installs it and runs this. Whisper is left out: mergekit looks for its decoder under a wrong name.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from raymerge import merge
from tests.checkpoints import read_tensors, write_config
from tests.modular_models import make_qwen, make_t5, save

PEER = Path(os.environ.get("RAYMERGE_MERGEKIT", ".venv-mergekit/bin/mergekit-multi"))
PEER = PEER.absolute().with_name("mergekit-yaml")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEER.exists(), reason=f"{PEER} is not there")]


def make_gated_t5() -> Any:
    """Return a T5 of version 1.1, which is the one that mergekit knows."""
    return make_t5(feed_forward_proj="gated-gelu")


def models(*weights: tuple[str, Any]) -> dict[str, Any]:
    return {"models": [{"model": model, "parameters": {"weight": weight}} for model, weight in weights]}


VISION = {
    "merge_method": "linear",
    "modules": {
        "text_decoder": models(("a", [0.2, 0.8]), ("b", 0.5)),
        "vision_tower": {
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0.1, 1]}},
                        {"model": "b", "layer_range": [1, 3], "parameters": {"weight": 1}},
                    ]
                }
            ]
        },
        "multi_modal_projector": models(("b", 1)),
    },
}
TIES = {
    "merge_method": "ties",
    "base_model": "a",
    "parameters": {"density": 0.5},
    "modules": {name: models(("b", 0.7)) for name in ("text_decoder", "vision_tower", "multi_modal_projector")},
}
SLERP = {
    "merge_method": "slerp",
    "base_model": "a",
    "parameters": {"t": 0.3},
    "modules": {
        "encoder": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": [0, 1]}},
        "decoder": {"models": [{"model": "a"}, {"model": "b"}]},
        "shared": {"models": [{"model": "b"}]},
    },
}


@pytest.mark.parametrize(("make", "config"), [(make_qwen, VISION), (make_qwen, TIES), (make_gated_t5, SLERP)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules(make: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        save(make, tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "merge.yml", {**config, "dtype": "float32"})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # the model is written before files of a repository of the Hub are looked for, which there is none of
    subprocess.run([PEER, path, "theirs", "--no-copy-tokenizer"], env=environment, capture_output=True, check=False)
    merge(path, "ours", workers=1)
    ours, theirs = (read_tensors(Path(name)) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name
    texts = [json.loads(Path(name, "config.json").read_text()) for name in ("ours", "theirs")]
    for key in ("num_layers", "num_decoder_layers", "text_config", "vision_config"):
        assert texts[0].get(key) == texts[1].get(key)
