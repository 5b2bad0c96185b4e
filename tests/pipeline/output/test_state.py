"""The files of a merged model: which there are, what they say, and in which order they appear."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import raymerge
from raymerge import merge, plan
from tests.checkpoints import (
    INDEX,
    add_noise,
    llama_config,
    llama_tensors,
    read_files,
    read_tensors,
    write_checkpoint,
    write_llama,
)

MANIFEST = "raymerge_manifest.json"
FIGURES = "raymerge_figures.parquet"
TEXT = """# A comment, and a string with `ticks` ``` and a snowman \N{SNOWMAN}.
merge_method: linear
models:
  - model: org/one
    parameters: {weight: 0.5}
  - model: ./two
    parameters: {weight: 5e-1}
dtype: bfloat16
"""
SIDE_FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": bytes(range(256)) * 40,
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_custom.py": b"class Model: ...\n",
    "preprocessor_config.json": b'{"picture": "assets/deep/picture.png", "empty": "empty.txt"}',
    "empty.txt": b"",
    "assets/deep/picture.png": b"\x89PNG",
}
NOT_COPIED = {
    "README.md": b"another card",
    "mergekit_config.yml": b"another config",
    MANIFEST: b"another manifest",
    "pytorch_model.bin": b"pickled",
    "train.py": b"",
    "original/consolidated.00.pth": b"pickled",
    ".gitattributes": b"",
    ".cache/huggingface/download/x.metadata": b"",
}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, reached by relative paths; the first looks like one of the Hub's."""
    monkeypatch.chdir(tmp_path)
    one = write_llama(tmp_path / "org" / "one", 1, 3, torch.bfloat16, num_shards=2)
    write_llama(tmp_path / "two", 2, 3, torch.bfloat16)
    write_files(one, SIDE_FILES | NOT_COPIED)
    return tmp_path


@pytest.fixture
def out(inputs: Path) -> Path:
    """The model merged of both."""
    (inputs / "merge.yml").write_text(TEXT)
    merge(Path("merge.yml"), "merged", shard_size="5kB", workers=2)
    return inputs / "merged"


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_which_files_there_are(out: Path) -> None:
    shards = {path.name for path in out.glob("*.safetensors")}
    num_shards = len(shards)
    assert num_shards > 3
    assert shards == {f"model-{k:05d}-of-{num_shards:05d}.safetensors" for k in range(1, num_shards + 1)}
    ours = {"config.json", "tokenizer_config.json", INDEX, MANIFEST, FIGURES, "README.md", "mergekit_config.yml"}
    assert read_files(out).keys() == shards | ours | SIDE_FILES.keys()
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


def test_side_files_are_copied(out: Path) -> None:
    found = read_files(out)
    for name, content in SIDE_FILES.items():
        assert found[name] == content
    assert found["mergekit_config.yml"].decode() == TEXT


def test_index(out: Path) -> None:
    index = read_json(out / INDEX)
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found.update(dict.fromkeys(shard.keys(), path.name))
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in read_tensors(out).values())


def test_shards_stay_below_their_size_and_hold_tensors_in_natural_order(out: Path) -> None:
    order = []
    for path in sorted(out.glob("*.safetensors")):
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        order += sorted(tensors, key=lambda name: int(tensors[name]["data_offsets"][0]))
        assert len(tensors) == 1 or max(entry["data_offsets"][1] for entry in tensors.values()) <= 5000
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)


def test_small_outputs_are_one_file_without_index(inputs: Path) -> None:
    merge(TEXT, inputs / "single")
    assert [path.name for path in (inputs / "single").glob("*.safetensors*")] == ["model.safetensors"]
    shards = plan(TEXT, shard_size=1).tasks
    assert [len(task.merges) for task in shards] == [1] * len(shards)


def test_config_json(out: Path) -> None:
    donor, config = read_json(out.parent / "org/one/config.json"), read_json(out / "config.json")
    assert config == donor | {"torch_dtype": "bfloat16"}
    assert list(config) == list(donor)


def test_card(out: Path) -> None:
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "mergekit", "raymerge"]}
    assert TEXT.strip() in body
    assert "./two" in body


def test_manifest(out: Path) -> None:
    manifest = read_json(out / MANIFEST)
    files = read_files(out)
    del files[MANIFEST]
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert {name: file["nbytes"] for name, file in manifest["files"].items()} == {
        name: len(content) for name, content in files.items()
    }
    assert manifest["raymerge"] == raymerge.__version__
    assert (manifest["seed"], manifest["method"], manifest["config"]) == (0, "linear", TEXT)
    assert manifest["models"] == [{"model": "org/one", "revision": None}, {"model": "./two", "revision": None}]
    assert manifest["inputs"] == [
        {"model": model, "file": name, "nbytes": (out.parent / model / name).stat().st_size}
        for model, name in [
            ("./two", "model.safetensors"),
            ("org/one", "model-00001-of-00002.safetensors"),
            ("org/one", "model-00002-of-00002.safetensors"),
        ]
    ]
    assert str(out.parent) not in (out / MANIFEST).read_text()


def test_its_name_does_not_matter(out: Path) -> None:
    merge(Path("merge.yml"), "another", shard_size="5kB")
    assert read_files(out) == read_files(out.parent / "another")


def test_what_makes_it_loadable_comes_last(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, appeared = [], []
    replace, link = Path.replace, Path.hardlink_to

    def spy(self: Path, target: Path) -> Path:
        opened.append(self.relative_to(inputs / "merged").as_posix())
        appeared.append(Path(target).relative_to(inputs / "merged").as_posix())
        return replace(self, target)

    def spy_on_link(self: Path, target: Path) -> None:
        opened.append(target.relative_to(inputs / "merged").as_posix())
        appeared.append(self.relative_to(inputs / "merged").as_posix())
        link(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    monkeypatch.setattr(Path, "hardlink_to", spy_on_link)
    merge(TEXT, inputs / "merged", shard_size="5kB", workers=1)
    assert {name.partition("/")[0] for name in opened} == {".raymerge"}
    names = [name for name in appeared if not name.startswith(".raymerge/")]
    assert set(names) == read_files(inputs / "merged").keys()
    assert names[-2:] == ["config.json", INDEX]
    shards = [name.endswith(".safetensors") for name in names]
    assert shards == sorted(shards, reverse=True)
    for name in names:
        if name.endswith(".safetensors"):
            assert appeared.index(f".raymerge/{name}.json") > appeared.index(name)


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True), (False, False)])
def test_tie_flag(tied: tuple[bool, bool], tmp_path: Path) -> None:
    base = llama_tensors(0, head=False)
    for k, is_tied in enumerate(tied):
        tensors = add_noise(base, k)
        if not is_tied:
            tensors["lm_head.weight"] = add_noise({"": tensors["model.embed_tokens.weight"]}, 9)[""]
        write_checkpoint(tmp_path / f"m{k}", tensors, llama_config(tie_word_embeddings=is_tied))
    models = [{"model": str(tmp_path / f"m{k}"), "parameters": {"weight": 0.5}} for k in range(2)]
    report = merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    merged, config = read_tensors(tmp_path / "out"), read_json(tmp_path / "out" / "config.json")
    assert config["tie_word_embeddings"] is all(tied)
    assert ("lm_head.weight" in merged) is not all(tied)
    if not all(tied):
        heads = [
            read_tensors(tmp_path / f"m{k}")["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
            for k, is_tied in enumerate(tied)
        ]
        torch.testing.assert_close(merged["lm_head.weight"], (heads[0] + heads[1]) / 2)
    warned = any("tie_word_embeddings" in warning for warning in report.warnings)
    assert warned is (tied == (True, False))
