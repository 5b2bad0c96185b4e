from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from raymerge.pipeline.checkpoint.checkpoint import resolve_models
from raymerge.pipeline.checkpoint.header import TensorEntry, read_header
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.table import SCHEMA, index_tensors, list_tensors, read_table
from raymerge.pipeline.errors import CheckpointError, FetchError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage

Shards = dict[str, dict[str, torch.Tensor]]

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


def write_model(path: Path, shards: Shards, weight_map: dict[str, str] | None = None) -> ModelRef:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, path / name)
    if set(shards) != {"model.safetensors"}:
        written = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map or written}))
    return ModelRef(str(path))


@pytest.fixture
def models(tmp_path: Path) -> list[ModelRef]:
    sharded = {
        ONE: {"b": torch.full((2, 3), 7.0), "a": torch.zeros(4, dtype=torch.bfloat16)},
        TWO: {"c": torch.arange(5), "scalar": torch.tensor(2.0), "empty": torch.zeros(3, 0)},
    }
    single = {"model.safetensors": {"ü": torch.ones(2, dtype=torch.float16)}}
    return [write_model(tmp_path / "sharded", sharded), write_model(tmp_path / "single", single)]


def read_models(models: list[ModelRef]) -> pa.Table:
    """Return the table of some models, whose headers and index agree."""
    checkpoints = resolve_models(Stores(), models)
    table = read_table(Stores(), {str(c.model): c.weight_files for c in checkpoints})
    tensors = list_tensors(table)
    for checkpoint in checkpoints:
        index_tensors(checkpoint, tensors.get(str(checkpoint.model), []))
    return table


def test_many_answers_are_waited_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(16, timeout=120)

    def meet(storage: Storage, file: StoredFile, check: Callable[..., None]) -> tuple[TensorEntry, ...]:
        together.wait()
        return read_header(storage, file, check)

    monkeypatch.setattr("raymerge.pipeline.checkpoint.table.read_header", meet)
    shards = {f"model-{k:05d}-of-00016.safetensors": {f"w{k}": torch.zeros(1)} for k in range(1, 17)}
    assert read_models([write_model(tmp_path / "a", shards)]).num_rows == 16


def test_rows(models: list[ModelRef]) -> None:
    checkpoints = resolve_models(Stores(), models)
    index = read_table(Stores(), {str(c.model): c.weight_files for c in checkpoints})
    assert index.schema == SCHEMA
    assert index.num_rows == 6
    rows = index.to_pylist()
    assert [row["model"] for row in rows] == [str(models[0])] * 5 + [str(models[1])]
    assert [Path(row["file"]).name for row in rows] == [ONE] * 2 + [TWO] * 3 + ["model.safetensors"]
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {"a", "b", "c", "scalar", "empty", "ü"}
    b = by_name["b"]
    assert (b["dtype"], b["shape"], b["stop"] - b["start"]) == ("F32", [2, 3], 24)
    content = Path(b["file"]).read_bytes()
    assert len(content) == b["file_nbytes"]
    assert torch.frombuffer(bytearray(content[b["start"] : b["stop"]]), dtype=torch.float32).eq(7).all()
    assert b["etag"] == checkpoints[0].weight_files[0].etag
    assert by_name["empty"]["shape"] == [3, 0]
    assert by_name["scalar"]["shape"] == []
    for one, other in pairwise(rows):
        assert one["file"] != other["file"] or one["stop"] == other["start"]


def test_stored_tensors(models: list[ModelRef]) -> None:
    checkpoints = resolve_models(Stores(), models)
    index = read_table(Stores(), {str(c.model): c.weight_files for c in checkpoints})
    tensors = list_tensors(index)
    assert list(tensors) == [str(model) for model in models]
    expected = {
        row["name"]: StoredTensor(
            model=row["model"],
            name=row["name"],
            dtype=row["dtype"],
            shape=tuple(row["shape"]),
            file=StoredFile(row["file"], row["file_nbytes"], row["etag"]),
            start=row["start"],
            stop=row["stop"],
        )
        for row in index.to_pylist()
    }
    assert {tensor.name: tensor for listed in tensors.values() for tensor in listed} == expected
    sharded = {tensor.name: tensor for tensor in tensors[str(models[0])]}
    assert sharded["a"].file == checkpoints[0].weight_files[0]
    assert sharded["a"].file is sharded["b"].file
    assert all(type(size) is int for tensor in sharded.values() for size in tensor.shape)


def test_stored_tensors_of_a_part_of_a_table(models: list[ModelRef], tmp_path: Path) -> None:
    index = read_models(models)
    whole = list_tensors(index)
    cut = list_tensors(pa.concat_tables([index.slice(1, 2), index.slice(3, 3)]))
    assert sum(map(len, cut.values())) == 5
    assert all(tensor in whole[model] for model in cut for tensor in cut[model])
    pyarrow.parquet.write_table(index, tmp_path / "index.parquet")
    assert list_tensors(pyarrow.parquet.read_table(tmp_path / "index.parquet")) == whole


def test_no_checkpoints() -> None:
    index = read_table(Stores(), {})
    assert index.schema == SCHEMA
    assert list_tensors(index) == {}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": TWO, "x": ONE}, "tensor 'x' is in no file, but .*index.json says {ONE}"),
        ({"a": TWO, "b": ONE}, "tensor 'a' is in .*{ONE}, but .*index.json says {TWO}"),
        ({"a": ONE, "b": TWO, "dropped": None}, "tensor 'c' is in .*{TWO}, but .*index.json says no file"),
    ],
)
def test_index_and_headers_disagree(tmp_path: Path, weight_map: dict[str, str | None], message: str) -> None:
    shards: Shards = {ONE: {"a": torch.ones(1)}, TWO: {"b": torch.ones(1)}}
    if "dropped" in weight_map:
        shards[TWO]["c"] = torch.ones(1)
    model = write_model(tmp_path / "m", shards, {name: file for name, file in weight_map.items() if file})
    with pytest.raises(CheckpointError, match=message.format(ONE=ONE, TWO=TWO) + ".*--trust-headers"):
        read_models([model])
    tensors, (warning,) = trust_headers(model)
    assert {name: Path(tensor.file.url).name for name, tensor in tensors.items()} == {
        name: file for file, held in shards.items() for name in held
    }
    assert "the headers decide" in warning


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    shards: Shards = {ONE: {"a": torch.ones(1), "b": torch.ones(1)}, TWO: {"a": torch.full((1,), 2.0)}}
    model = write_model(tmp_path / "m", shards, {"a": ONE, "b": ONE, "c": TWO})
    with pytest.raises(CheckpointError, match=f"tensor 'a' is in two files, {ONE} and {TWO}"):
        read_models([model])
    tensors, (warning,) = trust_headers(model)
    assert Path(tensors["a"].file.url).name == TWO, "loaders read the files in order, and the last one stays"
    assert f"tensor 'a' is in two files, {ONE} and {TWO}" in warning


def trust_headers(model: ModelRef) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return a model's tensors as the headers have them, and the warnings."""
    (checkpoint,) = resolve_models(Stores(), [model], trust_headers=True)
    table = read_table(Stores(), {str(model): checkpoint.weight_files})
    return index_tensors(checkpoint, list_tensors(table)[str(model)])


@pytest.mark.parametrize(
    ("nbytes", "message"),
    [(-1, "past the end; the file has"), (+1, "bytes after the last tensor"), (-150, "bytes long")],
)
def test_a_shard_of_another_length(models: list[ModelRef], nbytes: int, message: str) -> None:
    path = Path(models[0].path) / ONE
    os.truncate(path, path.stat().st_size + nbytes)
    with pytest.raises(CheckpointError, match=f"{ONE}: .*{message}.*download it again"):
        read_models(models)


def test_a_shard_that_changes_in_between(models: list[ModelRef]) -> None:
    checkpoints = resolve_models(Stores(), models)
    safetensors.torch.save_file({"ü": torch.zeros(2, dtype=torch.float16)}, Path(models[1].path) / "model.safetensors")
    with pytest.raises(FetchError, match=r"single/model.safetensors: changed since the plan was made"):
        read_table(Stores(), {str(c.model): c.weight_files for c in checkpoints})
