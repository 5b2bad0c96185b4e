"""Inputs that cannot be merged: one clear error, exit code 2, and nothing left that looks like a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import (
    INDEX,
    llama_config,
    llama_tensors,
    read_files,
    write_checkpoint,
    write_config,
    write_llama,
)
from tests.commands import Cli, Outcome, run_command

SHARD = "model-00002-of-00003.safetensors"

Damage = Callable[[Path], object]
"""Spoils a file."""


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two equal-shaped models: `one` in one file, `two` in three."""
    return [write_llama(tmp_path / "one", 1), write_llama(tmp_path / "two", 2, num_shards=3)]


def linear(models: list[Path]) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}


def assert_refused(outcome: Outcome, out: Path, *named: str | Path) -> None:
    """One block on stderr that names these things; no traceback, and no model."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("Error") == 1
    assert "Traceback" not in outcome.err
    assert "\n\n" not in outcome.err
    for text in named:
        assert str(text) in outcome.err
    assert not list(out.glob("config.json")) + list(out.glob("*.index.json"))


def refuse_text(cli: Cli, tmp_path: Path, text: str, *named: str | Path) -> None:
    (tmp_path / "merge.yml").write_text(text)
    for command in (("plan",), ("merge",)):
        out = tmp_path / "out"
        target = [out, "-q"] if command == ("merge",) else []
        assert_refused(cli(*command, tmp_path / "merge.yml", *target), out, *named)
        assert not out.exists()


def refuse(cli: Cli, tmp_path: Path, config: Mapping[str, Any], *named: str | Path) -> None:
    refuse_text(cli, tmp_path, write_config(tmp_path / "merge.yml", config).read_text(), *named)


def patch_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a header and leave the tensors' bytes."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    header.pop("__metadata__", None)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])


def put_length(length: int) -> Damage:
    return lambda path: path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def put_json(text: bytes) -> Damage:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))


def put_field(field: str, value: object) -> Damage:
    def change(header: dict[str, Any]) -> None:
        header["model.norm.weight"][field] = value

    return lambda path: patch_header(path, change)


def overlap(path: Path) -> None:
    """Let a tensor begin where the one before it does."""

    def change(header: dict[str, Any]) -> None:
        ordered = sorted(header.values(), key=lambda entry: int(entry["data_offsets"][0]))
        first, second = next((a, b) for a, b in pairwise(ordered) if a["shape"] == b["shape"])
        second["data_offsets"] = first["data_offsets"]

    patch_header(path, change)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "past the end"),
    "truncated in the header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "the file has 100 bytes"),
    "truncated in the length": (lambda path: path.write_bytes(b"\x01\x00"), "2 bytes are too few"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "bytes after the last tensor": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "after the last tensor"),
    "header length 0": (put_length(0), "0 bytes long"),
    "header length 2^63": (put_length(2**63), "9,223,372,036,854,775,808"),
    "header length 2^64-1": (put_length(2**64 - 1), "18,446,744,073,709,551,615"),
    "header length past the end": (put_length(1_000_000), "1,000,000 bytes long"),
    "not UTF-8": (put_json(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "not JSON": (put_json(b'{"a": '), "not JSON"),
    "not an object": (put_json(b"[]"), "not an object"),
    "nested": (put_json(b"[" * 100_000), "nested too deeply"),
    "no fields": (put_json(b'{"a": {}}'), "dtype, shape and data_offsets"),
    "twice": (put_json(b'{"a": 1, "a": 1}'), "there twice"),
    "overlap": (overlap, "overlaps"),
    "out of range": (put_field("data_offsets", [10**6, 10**6 + 64]), "past the end"),
    "negative": (put_field("data_offsets", [-64, 0]), "non-negative"),
    "reversed": (put_field("data_offsets", [64, 0]), "not [start, stop]"),
    "wrong byte count": (put_field("shape", [17]), "takes 68 bytes"),
    "huge": (put_field("shape", [2**40, 2**40]), "too large"),
    "unknown dtype": (put_field("dtype", "F12"), "'F12' is unknown"),
    "Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(damage: str, models: list[Path], tmp_path: Path, cli: Cli) -> None:
    break_file, said = DAMAGES[damage]
    break_file(models[0] / "model.safetensors")
    refuse(cli, tmp_path, linear(models), models[0] / "model.safetensors", said)


def test_damaged_shard(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    path = models[1] / SHARD
    path.write_bytes(path.read_bytes()[:-10])
    refuse(cli, tmp_path, linear(models), path, "past the end")


def test_missing_files(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    for path, said in [
        (models[1] / SHARD, "missing, of 3 files"),
        (models[0] / "model.safetensors", "no weights"),
        (models[0] / "config.json", "no config.json"),
    ]:
        content = path.read_bytes()
        path.unlink()
        refuse(cli, tmp_path, linear(models), path.parent, path.name, said)
        path.write_bytes(content)


def test_missing_model(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    refuse(cli, tmp_path, linear([models[0], tmp_path / "absent"]), tmp_path / "absent", "no such directory")
    refuse(cli, tmp_path, linear([models[0], models[1] / SHARD]), models[1] / SHARD, "a file, not a directory")


def test_missing_config(tmp_path: Path, cli: Cli) -> None:
    outcome = cli("merge", tmp_path / "absent.yml", tmp_path / "out")
    assert_refused(outcome, tmp_path / "out", tmp_path / "absent.yml", "No such file")
    assert_refused(cli("merge", tmp_path, tmp_path / "out"), tmp_path / "out", tmp_path, "Is a directory")


@pytest.mark.parametrize("outside", ["../one/model.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_index_that_names_a_file_outside(outside: str, models: list[Path], tmp_path: Path, cli: Cli) -> None:
    index = json.loads((models[1] / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = outside
    (models[1] / INDEX).write_text(json.dumps(index))
    refuse(cli, tmp_path, linear(models), models[1] / INDEX, outside, "leaves the model's directory")


def test_index_that_disagrees_with_the_headers(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    good = json.loads((models[1] / INDEX).read_text())["weight_map"]
    name = next(name for name in good if good[name] == SHARD)
    other = SHARD.replace("2-of", "1-of")
    for weight_map, said in [
        (good | {"extra.weight": SHARD}, ("'extra.weight' is in no file", SHARD)),
        (good | {name: other}, (f"{name!r} is in {SHARD}", f"says {other}")),
        ({k: v for k, v in good.items() if k != name}, (f"{name!r} is in {SHARD}", "says no file")),
    ]:
        (models[1] / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refuse(cli, tmp_path, linear(models), models[1] / INDEX, *said)


@pytest.mark.parametrize("text", ["", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_index_that_is_none(text: str, models: list[Path], tmp_path: Path, cli: Cli) -> None:
    (models[1] / INDEX).write_text(text)
    refuse(cli, tmp_path, linear(models), models[1] / INDEX)


def test_config_json_that_is_none(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    (models[1] / "config.json").write_bytes(b"\xff")
    refuse(cli, tmp_path, linear(models), models[1] / "config.json")


def test_tensors_of_different_shapes(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    other = write_checkpoint(tmp_path / "other", llama_tensors(vocab=40), llama_config())
    named = ("model.embed_tokens.weight", "[32, 16]", models[0], "[40, 16]", other)
    refuse(cli, tmp_path, linear([models[0], other]), *named)


def test_name_that_a_terminal_would_obey(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    write_checkpoint(models[0], llama_tensors(1) | {"a\x1b[31m": torch.ones(2)}, llama_config())
    refuse(cli, tmp_path, linear(models), r"'a\x1b[31m' is in", "but not in")


def test_different_layer_counts(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    other = write_llama(tmp_path / "other", num_layers=3)
    refuse(cli, tmp_path, linear([models[0], other]), models[0], "2 layers", other, "has 3", "`slices`")


def test_tensor_that_one_model_lacks(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    tensors = llama_tensors() | {"model.extra.bias": torch.zeros(3)}
    other = write_checkpoint(tmp_path / "other", tensors, llama_config())
    refuse(cli, tmp_path, linear([models[0], other]), "model.extra.bias", models[0], other)


def test_quantised_tensors(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    tensors = {name: x.to(torch.float8_e4m3fn) if x.dim() == 2 else x for name, x in llama_tensors().items()}
    other = write_checkpoint(tmp_path / "other", tensors, llama_config())
    refuse(cli, tmp_path, linear([other]), "F8_E4M3", other, "not supported yet")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights(name: str, models: list[Path], tmp_path: Path, cli: Cli) -> None:
    (models[0] / "model.safetensors").unlink()
    (models[0] / name).write_bytes(b"\x80\x04.")
    refuse(cli, tmp_path, linear(models), models[0], name, "save_pretrained('OUT', safe_serialization=True)")


def test_configs(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    one, two = map(str, models)
    entries = [{"model": one}, {"model": two}]
    three = [*entries, {"model": str(write_llama(tmp_path / "three", 3))}]
    with_t = {"parameters": {"t": 0.5}}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"merge_method": "nearswap", "models": entries, **with_t}, ["base_model", "nearswap needs a base"]),
        ({"merge_method": "ties", "models": entries, "parameters": {"weight": 1}}, ["base_model"]),
        ({"merge_method": "slerp", "base_model": one, "models": three, **with_t}, ["slerp takes", "2 are given"]),
        ({"merge_method": "slerp", "base_model": one, "models": entries}, ["slerp needs 't'"]),
        ({"merge_method": "linear", "models": []}, ["models", "empty"]),
        ({"merge_method": "linear"}, ["models"]),
        ({"models": entries}, ["merge_method"]),
        ({"merge_method": "sleep", "models": entries}, ["'sleep'", "did you mean 'slerp'"]),
        ({"merge_method": "multislerp", "models": entries}, ["multislerp needs 'weight'", one]),
        ({"merge_method": "linear", "models": entries, "dtype": "bfloat"}, ["dtype", "'bfloat'", "bfloat16"]),
        ({"merge_method": "linear", "models": [entries[0], entries[0]]}, ["models[1].model", one]),
        (
            {"merge_method": "linear", "models": entries, "tokenizer_source": "union", "tokenizer": {}},
            ["tokenizer_source", "only one can be"],
        ),
    ]
    for config, named in cases:
        refuse(cli, tmp_path, config, *named)


def test_weights(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    def entries(*weights: object) -> list[dict[str, Any]]:
        return [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]

    for value in (float("nan"), float("inf"), "nan", "heavy", None, [0.5, float("nan")], {"filter": "mlp"}):
        refuse(cli, tmp_path, {"merge_method": "linear", "models": entries(1, value)}, "models[1].parameters.weight")
    refuse(cli, tmp_path, {"merge_method": "linear", "models": entries(1, -1)}, "1.0, -1.0 sum to 0", "normalize")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: !!python/object/apply:os.system ['true']\n", "!!python/object/apply:os.system"),
        ("merge_method: !custom x\n", "!custom"),
        (BOMB, "aliases"),
        ("a: &a [*a]\n", "an alias refers to what contains it"),
        ("[" * 1000, "nested too deeply"),
        ("merge_method: linear\nmerge_method: slerp\n", "merge_method: is there already, on line 1"),
        ("merge_method: [\n", "merge.yml:2:1: "),
        ("", "empty"),
        ("just text", "mapping"),
        ("a: 1\n---\nb: 2\n", "merge_method: is missing"),
        ("merge_method: lin\x00ear\n", "merge.yml:1: "),
    ],
)
def test_yaml(text: str, said: str, tmp_path: Path, cli: Cli) -> None:
    refuse_text(cli, tmp_path, text, tmp_path / "merge.yml" if "empty" not in said else "empty", said)


def test_in_a_process_of_its_own(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "model.safetensors").write_bytes(b"short")
    config = write_config(tmp_path / "merge.yml", linear(models))
    before = read_files(tmp_path)
    assert_refused(run_command("merge", config, tmp_path / "out"), tmp_path / "out", "5 bytes are too few")
    assert read_files(tmp_path) == before
