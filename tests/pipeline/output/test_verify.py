"""`raymerge verify`: whatever is not as it was written is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from raymerge import merge, verify
from raymerge.pipeline.checkpoint.header import read_header
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.output.verify import find_disagreements
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import INDEX, read_files, write_llama
from tests.commands import Cli
from tests.watchers import stop_after

MANIFEST = "raymerge_manifest.json"
SHARD = "model-00002-of-00006.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    models = [{"model": str(write_llama(tmp_path / f"m{k}", k))} for k in range(2)]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    merge(config, tmp_path / "merged", shard_size=5000)
    assert (tmp_path / "merged" / SHARD).exists()
    return tmp_path / "merged"


def test_sound(out: Path, cli: Cli) -> None:
    before = read_files(out)
    report = verify(str(out), workers=3)
    files = read_files(out)
    assert files == before
    assert report.num_files == len(files) - 1  # the manifest itself
    assert report.num_tensors == 21
    assert report.nbytes == sum(len(content) for name, content in files.items() if name != MANIFEST)
    outcome = cli("verify", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{out} is sound: {report.num_files} files, 21 tensors, ")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def write_both(out: Path, name: str, content: bytes) -> None:
    """Change a file, and the manifest with it."""
    (out / name).write_bytes(content)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][name] = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest))


def write_minus_zero(out: Path) -> None:
    """Write a header with a number that is 0 to some readers of JSON, and to others no whole one."""
    content = (out / SHARD).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = content[8:start].replace(b'"data_offsets":[0,', b'"data_offsets":[-0,')
    write_both(out, SHARD, len(header).to_bytes(8, "little") + header + content[start:])


def point_elsewhere(out: Path) -> None:
    """Let index and manifest agree, and the headers disagree with both."""
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00006.safetensors"
    write_both(out, INDEX, json.dumps(index).encode())


def add_file(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")


def lose_one_and_spoil_another(out: Path) -> None:
    (out / SHARD).unlink()
    flip(out / "README.md", 3)


def list_outside_file(out: Path) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["../m0/config.json"] = manifest["files"]["config.json"]
    (out / MANIFEST).write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "last byte": (lambda out: flip(out / SHARD, -1), [f"{SHARD}: sha256 is "]),
    "first byte": (lambda out: flip(out / SHARD, 0), [f"{SHARD}: sha256 is "]),
    "shortened": (lambda out: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1]), [f"{SHARD}: ", " bytes, "]),
    "emptied": (lambda out: (out / SHARD).write_bytes(b""), [f"{SHARD}: 0 bytes, "]),
    "missing shard": (lambda out: (out / SHARD).unlink(), [f"{SHARD}: missing"]),
    "missing tokenizer": (lambda out: (out / "tokenizer_config.json").unlink(), ["tokenizer_config.json: missing"]),
    "missing index": (lambda out: (out / INDEX).unlink(), [f"{INDEX}: missing"]),
    **{
        f"extra {name}": (
            partial(add_file, name=name),
            [f"{name}: a file that the manifest does not list"],
        )
        for name in ("model-00007-of-00007.safetensors", "adapter_config.json", "sub/code.py")
    },
    "config changed": (lambda out: (out / "config.json").write_text("{}"), ["config.json: 2 bytes, "]),
    "index changed": (lambda out: flip(out / INDEX, 50), [f"{INDEX}: sha256 is "]),
    "index points elsewhere": (
        point_elsewhere,
        ["tensor 'model.norm.weight' is in model-0000"],
    ),
    "header with -0": (
        write_minus_zero,
        [f"{SHARD}: tensor ", "shape and data_offsets must be lists of non-negative integers"],
    ),
    "several": (
        lose_one_and_spoil_another,
        [f"{SHARD}: missing", "README.md: sha256 is "],
    ),
    "manifest missing": (lambda out: (out / MANIFEST).unlink(), [f"has no {MANIFEST}"]),
    "manifest cut": (lambda out: (out / MANIFEST).write_text("{"), [f"{MANIFEST} is damaged"]),
    "manifest nested": (lambda out: (out / MANIFEST).write_text("[" * 9999), [f"{MANIFEST} is damaged: it is nested"]),
    "manifest of another kind": (lambda out: (out / MANIFEST).write_text('{"files": []}'), [f"{MANIFEST} is damaged"]),
    "manifest that leads outside": (list_outside_file, ["outside the directory: ../m0/config.json"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, out: Path, cli: Cli) -> None:
    break_it, said = DAMAGES[damage]
    break_it(out)
    outcome = cli("verify", out)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"Error: {out}")
    for text in said:
        assert text in outcome.err
    unharmed = {name for name in read_files(out) if not any(name in text for text in said)}
    assert not [name for name in unharmed if f"\n  {name}:" in outcome.err]


def test_the_safetensors_library_has_a_say(out: Path, stores: Stores) -> None:
    path = out / SHARD
    storage = stores.at(str(path))
    first, *rest = read_header(storage, storage.stat(str(path)))
    assert not list(find_disagreements(path, [first, *rest]))
    for ours, said in (
        (rest, f"{first.name}: we read nothing, the safetensors library F32 "),
        ([replace(first, dtype="I32"), *rest], f"{first.name}: we read I32 "),
        ([replace(first, shape=(1, *first.shape)), *rest], f"{first.name}: we read F32 [1, "),
    ):
        (problem,) = find_disagreements(path, ours)
        assert problem.startswith(said)
    path.write_bytes(b"\2\0\0\0\0\0\0\0[]")
    assert next(find_disagreements(path, [])).startswith("the safetensors library does not open it: ")


def test_hidden_files_are_in_no_model(out: Path) -> None:
    add_file(out, ".git/HEAD")
    assert verify(out).num_tensors == 21


def test_workers(out: Path) -> None:
    with pytest.raises(ConfigError, match="workers is 0"):
        verify(out, workers=0)


def test_unfinished(out: Path, tmp_path: Path, cli: Cli) -> None:
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / "m0")}], "parameters": {"weight": 1}}
    with pytest.raises(RuntimeError, match="the driver broke"):
        merge(config, tmp_path / "half", shard_size=5000, on_event=stop_after(1))
    outcome = cli("verify", tmp_path / "half")
    assert outcome.code == 2
    assert "is unfinished; run the same `raymerge merge` again" in outcome.err
    outcome = cli("verify", tmp_path / "absent")
    assert outcome.code == 2
    assert f"{tmp_path}/absent: no such directory" in outcome.err
    outcome = cli("verify", tmp_path / "m0")
    assert outcome.code == 2
    assert "was not made by raymerge, or is not a model" in outcome.err
