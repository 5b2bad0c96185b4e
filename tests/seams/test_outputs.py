"""Three outputs that differ in one parameter: the inputs are read once, and each is what a merge of its own writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge
from raymerge.pipeline.driver import merge_variants
from raymerge.pipeline.stores.files import Buffer, ByteRange
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.checkpoints import read_files, write_family

METHODS: dict[str, tuple[str, Sequence[Any]]] = {
    "linear": ("normalize", (True, False, True)),
    "task_arithmetic": ("lambda", (0.5, 1.0, 1.5)),
    "ties": ("density", (0.2, 0.5, 0.5)),
    "dare_ties": ("rescale", (True, False, True)),
    "slerp": ("t", (0.1, 0.5, [0, 1])),
}


@pytest.mark.parametrize("method", METHODS)
def test_three_outputs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = map(str, write_family(tmp_path / "in", 2, dtype=torch.bfloat16, num_shards=2, vocab=5000))
    models = [{"model": model, "parameters": {} if method == "slerp" else {"weight": 0.7}} for model in tuned]
    config = {"merge_method": method, "models": models[: 1 if method == "slerp" else 2]}
    if method != "linear":
        config["base_model"] = base
    name, values = METHODS[method]
    configs = [{**config, "parameters": {"density": 0.6, name: value}} for value in values]
    reads: list[int] = []
    read_into = LocalStorage.read_into

    def count(storage: LocalStorage, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        reads.append(sum(piece.nbytes for piece in ranges if piece.file.url.endswith(".safetensors")))
        read_into(storage, ranges, buffers)

    monkeypatch.setattr(LocalStorage, "read_into", count)
    alone = []
    for number, one in enumerate(configs):
        reads.clear()
        merge(one, tmp_path / f"alone{number}", workers=1, shard_size="100kB", seed=3)
        alone.append(sum(reads))
    reads.clear()
    outs = [tmp_path / f"together{number}" for number in range(3)]
    merge_variants(configs, outs, workers=1, shard_size="100kB", seed=3)
    assert sum(reads) == alone[0] == alone[2] > 2 * 5000 * 16 * len(models)
    for number, out in enumerate(outs):
        files = read_files(out)
        assert len(files) > 5
        assert files == read_files(tmp_path / f"alone{number}")
