from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, resolve_model, resolve_models
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

SHARDS = {
    "model-00001-of-00002.safetensors": {"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(5)},
}
WEIGHT_MAP = {tensor: file for file, tensors in SHARDS.items() for tensor in tensors}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "org" / "sharded"
    path.mkdir(parents=True)
    for name, tensors in SHARDS.items():
        safetensors.torch.save_file(tensors, path / name)
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": 72}, "weight_map": WEIGHT_MAP})
    write_json(path / "config.json", {"model_type": "llama"})
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "single"
    path.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, path / "model.safetensors")
    write_json(path / "config.json", {"model_type": "llama"})
    return path


def resolve(path: Path | str, *, trust_headers: bool = False) -> Checkpoint:
    return resolve_model(Stores(), ModelRef(str(path)), trust_headers=trust_headers)


def names(checkpoint: Checkpoint) -> list[str]:
    return [Path(file.url).relative_to(checkpoint.url).as_posix() for file in checkpoint.weight_files]


def test_sharded(sharded: Path) -> None:
    checkpoint = resolve(sharded)
    assert checkpoint.model == ModelRef(str(sharded))
    assert checkpoint.url == str(sharded)
    assert checkpoint.config == {"model_type": "llama"}
    assert names(checkpoint) == sorted(SHARDS)
    assert [file.nbytes for file in checkpoint.weight_files] == [(sharded / name).stat().st_size for name in SHARDS]
    assert checkpoint.weight_map == WEIGHT_MAP
    assert checkpoint.files.keys() == {*SHARDS, "config.json", "model.safetensors.index.json"}


def test_single(single: Path) -> None:
    checkpoint = resolve(single)
    assert names(checkpoint) == ["model.safetensors"]
    assert checkpoint.weight_map is None


def test_several_in_the_order_given(single: Path, sharded: Path) -> None:
    models = [ModelRef(str(sharded)), ModelRef(str(single)), ModelRef(str(sharded))]
    assert [checkpoint.model for checkpoint in resolve_models(Stores(), models)] == models


def test_a_single_file_beside_a_complete_index_is_another_model(sharded: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, sharded / "model.safetensors")
    refuse(
        sharded,
        "two models: model.safetensors, which transformers loads, and the 2 files .model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors. that model.safetensors.index.json names, .* or give --trust-headers to take",
    )
    checkpoint = resolve(sharded, trust_headers=True)
    assert names(checkpoint) == ["model.safetensors"]
    assert (checkpoint.index, checkpoint.weight_map) == ("", None)
    (warning,) = checkpoint.warnings
    assert "--trust-headers is given" in warning


@pytest.mark.parametrize("num_missing", [1, 2])
def test_an_index_whose_shards_are_gone_is_of_an_earlier_save(sharded: Path, num_missing: int) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, sharded / "model.safetensors")
    for name in list(SHARDS)[:num_missing]:
        (sharded / name).unlink()
    checkpoint = resolve(sharded)
    assert names(checkpoint) == ["model.safetensors"]
    (warning,) = checkpoint.warnings
    assert "model-00001-of-00002.safetensors" in warning
    assert "model.safetensors is taken, as transformers does, and" in warning


def test_an_index_of_the_single_file(single: Path) -> None:
    write_json(single / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}})
    checkpoint = resolve(single)
    assert names(checkpoint) == ["model.safetensors"]
    assert (checkpoint.weight_map, checkpoint.warnings) == ({"a": "model.safetensors"}, ())


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refuse(sharded, "index.json is missing beside 2 shards .*download .* or give --trust-headers to go by what")
    checkpoint = resolve(sharded, trust_headers=True)
    assert names(checkpoint) == sorted(SHARDS)
    assert "the tensors are those that the shards hold" in checkpoint.warnings[0]
    (sharded / "model-00003-of-00003.safetensors").write_bytes(b"x")
    for trust in (False, True):
        refuse(
            sharded,
            "is missing, and so are model-00001-of-00003.safetensors, model-00002-of-00003.safetensors",
            trust_headers=trust,
        )
    for number in (1, 2):
        (sharded / f"model-{number:05d}-of-00003.safetensors").write_bytes(b"x")
    refuse(sharded, "shards of two models: .*-of-00003.*; .*-of-00002.*Delete those", trust_headers=True)


def test_a_file_of_weights_that_config_json_names(sharded: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, sharded / "other.safetensors")
    write_json(sharded / "config.json", {"transformers_weights": "other.safetensors"})
    checkpoint = resolve(sharded)
    assert names(checkpoint) == ["other.safetensors"]
    assert checkpoint.config == {}, "the output's files have names of their own"
    (sharded / "model.safetensors.index.json").rename(sharded / "other.safetensors.index.json")
    write_json(sharded / "config.json", {"transformers_weights": "other.safetensors.index.json"})
    assert resolve(sharded).index == "other.safetensors.index.json"
    for name, message in (
        ("gone.safetensors", "gone.safetensors is missing, which config.json names"),
        ("../x.safetensors", "leaves the model's directory"),
        ("config.json", "which is not a .safetensors file"),
    ):
        write_json(sharded / "config.json", {"transformers_weights": name})
        refuse(sharded, message)


@pytest.mark.parametrize("how", ["relative", "dot", "home", "url"])
def test_ways_to_name_a_directory(single: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(single.parent)
    monkeypatch.setenv("HOME", str(single.parent))
    path = {"relative": "single", "dot": "./single/", "home": "~/single", "url": single.as_uri()}[how]
    checkpoint = resolve(path)
    assert checkpoint.url == str(single)
    assert checkpoint.model.path == path


def test_weights_may_be_links_to_anywhere(sharded: Path, tmp_path: Path) -> None:
    for path in list(sharded.glob("model*")):
        (sharded / path.name).rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert names(resolve(sharded)) == sorted(SHARDS)


# what cannot be merged


def refuse(path: Path | str, message: str, *, trust_headers: bool = False) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(path, trust_headers=trust_headers)
    return str(caught.value)


def test_no_such_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "missing", "no such directory")
    refuse("./missing", "no such directory")
    refuse("missing", "no such directory")


def test_a_file_instead_of_a_directory(single: Path) -> None:
    refuse(single / "model.safetensors", "a file, not a directory; give the directory")


def test_a_revision_of_a_directory(single: Path) -> None:
    (warning,) = resolve_model(Stores(), ModelRef(str(single), "main")).warnings
    assert f"{single} is a directory, and a directory has no revisions; it is taken as it is" in warning


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    refuse(single, "no config.json")


def test_an_empty_directory(tmp_path: Path) -> None:
    refuse(tmp_path, "nothing is there")


def test_an_unfinished_merge(tmp_path: Path) -> None:
    (tmp_path / ".raymerge").mkdir()
    (tmp_path / ".raymerge/plan.json").write_text("{}")
    refuse(tmp_path, "an unfinished merge; run it again to finish it")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON in UTF-8"),
        (b"{", "not JSON in UTF-8"),
        (b"\xff", "not JSON in UTF-8"),
        (b"[]", "a JSON list, an object is expected"),
        (b"3", "a JSON int, an object is expected"),
        (b'{"a":"\\ud800"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "not JSON in UTF-8: it is nested too deeply"),
        (b'{"a":' + b"9" * 5_000 + b"}", "not JSON in UTF-8"),
    ],
    ids=["empty", "cut", "not UTF-8", "list", "number", "lone surrogate", "deep", "nested", "5,000 digits"],
)
def test_malformed_json(sharded: Path, name: str, content: bytes, message: str) -> None:
    (sharded / name).write_bytes(content)
    refuse(sharded, f"{name}: {message}.*; download the checkpoint again")


def test_huge_json(sharded: Path) -> None:
    os.truncate(sharded / "config.json", 17 * 2**20)
    refuse(sharded, "config.json: 17,825,792 bytes, at most 16,777,216 are expected")
    os.truncate(sharded / "config.json", 0)
    write_json(sharded / "config.json", {})
    os.truncate(sharded / "model.safetensors.index.json", 2**30)
    refuse(sharded, "index.json: 1,073,741,824 bytes, at most 536,870,912 are expected")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must be a mapping"),
        ({"weight_map": {}}, "weight_map must be a mapping of tensor to file, and not empty"),
        ({"weight_map": ["a"]}, "weight_map must be a mapping"),
        ({"weight_map": None}, "weight_map must be a mapping"),
        ({"weight_map": {"a": 1}}, r"weight_map\['a'\] is 1, not the name of a file"),
        ({"weight_map": {"a": None}}, r"weight_map\['a'\] is None"),
        ({"weight_map": {"a": "config.json"}}, "'config.json', which is not a .safetensors file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "which is not a .safetensors file"),
    ],
)
def test_malformed_index(sharded: Path, index: Any, message: str) -> None:
    write_json(sharded / "model.safetensors.index.json", index)
    refuse(sharded, f"model.safetensors.index.json: .*{message}")


@pytest.mark.parametrize(
    "name",
    ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "./x.safetensors", "a//x.safetensors", "..",
     "", "C:/x.safetensors", "..\\x.safetensors", "s3://bucket/x.safetensors", "a\n.safetensors", "a\0.safetensors"],
)  # fmt: skip
def test_an_index_that_leaves_its_directory(sharded: Path, name: str) -> None:
    write_json(sharded / "model.safetensors.index.json", {"weight_map": {"a": name}})
    refuse(sharded, "file name .* (leaves the model's directory|control characters)")


def test_missing_shards(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refuse(sharded, "model-00002-of-00002.safetensors missing, of 2 files that model.safetensors.index.json")
    assert "00001" not in message
    (sharded / "model-00002-of-00002.safetensors").symlink_to("gone")
    refuse(sharded, "model-00002-of-00002.safetensors missing")


def test_a_shard_of_0_bytes(sharded: Path) -> None:
    os.truncate(sharded / "model-00002-of-00002.safetensors", 0)
    refuse(sharded, "model-00002-of-00002.safetensors: 0 bytes; download the checkpoint again")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights: neither model.safetensors nor model.safetensors.index.json"),
        (["pytorch_model.bin"], r"only pickled weights \(pytorch_model.bin\).*safe_serialization=True"),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"], "only pickled weights"),
        (["model.pth"], "only pickled weights"),
        (["q4.gguf"], r"only GGUF \(q4.gguf\).*gguf_file="),
        (["consolidated.safetensors", "params.json"], r"but consolidated.safetensors; that is another layout"),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], "index.json is missing, and so are model-00002-of"),
        (["adapter_model.safetensors", "adapter_config.json"], "a LoRA adapter .*MODEL[+]ADAPTER"),
        (["adapter_model.bin"], "a LoRA adapter"),
        (["tf_model.h5"], "no weights"),
        ([f"{i}.bin" for i in range(9)], r"only pickled weights \(0.bin, 1.bin, 2.bin and 6 more\)"),
    ],
)
def test_other_kinds_of_weights(single: Path, files: list[str], message: str) -> None:
    (single / "model.safetensors").unlink()
    for name in files:
        (single / name).write_bytes(b"x")
    refuse(single, message)
