"""Which of a donor's files an output gets, and what is said of the others."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from raymerge import merge, plan, verify
from raymerge.pipeline.checkpoint.checkpoint import resolve_model
from raymerge.pipeline.checkpoint.files import is_of_model, is_tokenizer
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.side_files import SideFiles, find_side_files
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import llama_config, llama_tensors, read_files, write_checkpoint, write_llama

DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
TOKENIZERS = ["qwen.tiktoken", "sentencepiece.bpe.model", "source.spm", "spiece.model", "tekken.json", "tokenizer.json",
              "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "vocab.json", "vocab.txt"]  # fmt: skip
TOKEN = "hf_" + "a1B2" * 9


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "single"
    path.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def find(path: Path) -> SideFiles:
    stores = Stores()
    return find_side_files(stores, resolve_model(stores, ModelRef(str(path))))


def copied(path: Path) -> list[str]:
    return [name for name, _ in find(path).copied]


def write(directory: Path, files: dict[str, Any]) -> None:
    """Write files: text, bytes, or what JSON says of anything else."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_what_a_model_is_made_of(single: Path) -> None:
    parts = ["LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md", "MODEL_LICENSE", "added_tokens.json",
             "additional_chat_templates/rag.jinja", "chat_template.jinja", "chat_template.json",
             "config_sentence_transformers.json", "configuration.json", "configuration_x.py", "generation_config.json",
             "merges.txt", "modeling_x.py", "preprocessor_config.json", "processor_config.json", "qwen.tiktoken",
             "sentence_bert_config.json", "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json",
             "spiece.model", "tekken.json", "tokenization_x.py", "tokenizer.json", "tokenizer.model",
             "tokenizer.model.v3", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
             "vocab.txt"]  # fmt: skip
    others = ["adapter_config.json", "all_results.json", "notes.md", "checkpoint-500/tokenizer.json", "data.parquet",
              "checkpoint-notes.txt", "deepspeed_config.json", "docs/x.txt", "events.out.tfevents.1", "id_rsa",
              "runs/Jan01/x", "train.py", "trainer_state.json", "training_config.json", "wandb/run.wandb", "x.lock",
              "onnx/model.onnx_data_1", "optimizer.pt", "model.gguf", "openvino/openvino_model.xml"]  # fmt: skip
    unsaid = ["README.md", "mergekit_config.yml", "raymerge_manifest.json", ".gitattributes", ".env", ".cache/x/y",
              "__pycache__/modeling_x.pyc", "pytorch_model.bin.index.json"]  # fmt: skip
    write(single, dict.fromkeys([*parts, *others, *unsaid], "{}"))
    found = find(single)
    assert [name for name, _ in found.copied] == sorted(parts)
    assert all(file.url == f"{single}/{name}" and file.nbytes == 2 for name, file in found.copied)
    assert sorted(found.left_out) == sorted(others)
    assert (found.module_weights, found.masked) == ((), ())
    assert [name for name in parts if is_tokenizer(name)] == TOKENIZERS


def test_files_that_configs_and_code_name(single: Path) -> None:
    named = {
        "config.json": {"auto_map": {"AutoModel": "custom.Model", "AutoConfig": "other/repo--remote.Config"}},
        "custom.py": "from .deeper import thing\nfrom . import sibling\nimport train",
        "deeper.py": "NAMES = {'vocab_file': 'words.bin.txt', \"font\": \"assets/Sim.ttf\"}",
        "sibling.py": "",
        "remote.py": "",
        "words.bin.txt": "",
        "tokenizer_config.json": {"vocab_file": "deep/own.voc", "name_or_path": "/home/me/checkpoint-7/"},
        "deep/own.voc": "",
    }
    write(single, {**named, "train.py": "", "unnamed.txt": "", "checkpoint-7/tokenizer.json": "{}"})
    assert copied(single) == sorted(named.keys() - {"config.json"})


def test_every_file_that_transformers_saves() -> None:
    """The names stand in its tokenizers, and among its constants."""
    root = Path(transformers.__file__).parent
    names = set(re.findall(r'_NAME = "([\w.-]+\.\w+)"', (root / "utils" / "__init__.py").read_text()))
    for path in root.rglob("tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r":\s*[\"']([^\"']+)[\"']", table))
    assert {"vocab-src.json", "sentencepiece.bpe.model", "tokenizer_config.json"} <= names
    assert {name for name in names if not is_of_model(name)} == {"modelcard.json"}


def test_code_that_is_missing(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling_x.Model", "AutoTokenizer": ["tokenization_x.Slow", None], "A": "org/b--other.C"}
    model = write_llama(tmp_path / "a", auto_map=auto_map)
    write(model, {"modeling_x.py": ""})
    (warning,) = plan(passthrough(model)).warnings
    assert warning == f"{model}: tokenization_x.py missing, which its configs name (auto_map)"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "modules.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1]", "3", "null", '"x"', "[" * 100_000, '{"auto_map": [[1]]}', "\xff"]
)
def test_odd_json_is_copied_as_it_is(name: str, text: str, single: Path) -> None:
    write(single, {name: text.encode("latin-1"), "other.txt": ""})
    if name == "modules.json" and text[:2] in ("", "{", "[[", "\xff"):
        with pytest.raises(CheckpointError, match=r"modules\.json: not JSON"):
            find(single)
    else:
        assert copied(single) == [name]


ODD_NAMES = ["a\nb", "a\\b", "c:d", "a\x1b[0m", os.fsdecode(b"\xff.txt")]


def test_files_of_odd_names_stay_behind(single: Path) -> None:
    for name in (*ODD_NAMES, "q\n.gguf"):
        (single / name).touch()
    weights, others = plan(passthrough(single)).dropped
    assert weights.endswith("neither merged nor copied: 'q\\n.gguf' (0 B)")
    assert all(part in others for part in (r"'a\nb'", r"'a\x1b[0m'", r"a\b (", "c:d (", r"'\udcff.txt'"))
    assert (weights + others).isprintable()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_that_cannot_be_written_elsewhere(single: Path, name: str) -> None:
    write(single, {"tokenizer_config.json": {"vocab_file": name}})
    (single / name).touch()
    with pytest.raises(CheckpointError, match=r"rename it") as caught:
        find(single)
    assert str(caught.value).isprintable()


def test_secrets_are_never_copied(single: Path) -> None:
    names = ["id_rsa", "keys/server.pem", "hf_token.txt", "api_key.json", "aws_credentials_config.json", "secrets.json",
             "client_secret_config.json", "env", "prod.env", "github_token", "service_account.json"]  # fmt: skip
    write(single, dict.fromkeys(names, "x") | {"tokenizer_config.json": {"files": names, "path": "keys"}})
    assert copied(single) == ["tokenizer_config.json"]
    lines = [line for line in plan(passthrough(single)).dropped if "looks like a secret, never copied" in line]
    assert len(lines) == 1
    assert all(name.partition("/")[0] in lines[0] for name in names)


def test_credentials_in_large_configs_are_masked(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    words = {str(number): {"content": "x" * 100} for number in range(25_000)}
    text = json.dumps({"added_tokens_decoder": words, "auth_token": "hf_0123456789abcdefghij"})
    (model / "tokenizer_config.json").write_text(text)
    config = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    merge(config, tmp_path / "out")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {"added_tokens_decoder": words, "auth_token": "***"}
    os.truncate(model / "tokenizer_config.json", 65 * 2**20)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 68\.2 MB are too many to look for credentials"):
        plan(config)


def test_credentials_in_configs_are_masked(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "a", use_auth_token=TOKEN, auth_token=True, text_config={"hub": [f"x {TOKEN}"]})
    write(model, {"tokenizer_config.json": {"use_auth_token": TOKEN, "bos_token": "<s>"}, "vocab.json": {"<s>": 0}})
    report = merge(passthrough(model), tmp_path / "out")
    assert all(TOKEN.encode() not in content for content in read_files(tmp_path / "out").values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["use_auth_token"], config["auth_token"]) == ("***", True)
    assert config["text_config"] == {"hub": ["x hf_***"]}
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {"use_auth_token": "***", "bos_token": "<s>"}
    assert report.warnings == (
        f"{model}: config.json holds a credential, which no output gets",
        f"{model}: tokenizer_config.json holds a credential, which the output gets as ***",
    )


def passthrough(*models: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)} for model in models]}


def write_embedder(path: Path, seed: int, weights: str = "model.safetensors") -> Path:
    tensors = {name.removeprefix("model."): x for name, x in llama_tensors(seed, head=False).items()}
    write_checkpoint(path, tensors, llama_config(architectures=["LlamaModel"]))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling"}, DENSE]
    write(path, {"modules.json": modules, "1_Pooling/config.json": {}, "2_Dense/config.json": {"in_features": 16}})
    safetensors.torch.save_file({"linear.weight": torch.full((4, 16), float(seed))}, path / "2_Dense" / weights)
    write(path, {"onnx/model.onnx": "x", "onnx/model.onnx_data_1": "x" * 1000, "onnx/config.json": {}})
    return path


def test_modules_with_weights_are_part_of_the_model(tmp_path: Path) -> None:
    a, b = write_embedder(tmp_path / "a", 1), write_embedder(tmp_path / "b", 2)
    config = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (a, b)]}
    report = merge(config, tmp_path / "out")
    found = read_files(tmp_path / "out")
    assert found["2_Dense/model.safetensors"] == (a / "2_Dense" / "model.safetensors").read_bytes()
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"} <= found.keys()
    assert not any("onnx" in name for name in found)
    (warning,) = report.warnings
    assert warning == (
        f"2_Dense/model.safetensors: weights of a module of its own, copied from {a} and not merged;"
        f" those of {b} are not used"
    )
    assert any(f"{a}: weights that" in line and "onnx/ (2 files, 1 kB)" in line for line in plan(config).dropped)
    for name, shard_size in (("out", None), ("sharded", "5kB")):
        merge(config, tmp_path / name, shard_size=shard_size)
        assert verify(tmp_path / name).num_tensors == len(llama_tensors(head=False))
    assert merge(passthrough(tmp_path / "sharded"), tmp_path / "again").num_shards == 1


def test_words_that_happen_to_be_directories(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "a", talker={"kind": "speech"}, _name_or_path="output", aux={"codec_dir": "codec"})
    for name in ("llama", "speech", "talker", "output", "codec", "query_0_Static"):
        write(model, {f"{name}/model.safetensors": b"x", f"{name}/config.json": {}})
    write(model, {"router_config.json": {"structure": {"query": ["query_0_Static"]}}})
    found = find(model)
    assert found.module_weights == ("codec/model.safetensors", "query_0_Static/model.safetensors")
    assert {name.partition("/")[0] for name in found.left_out} == {"llama", "speech", "talker", "output"}


def test_pickled_weights_of_a_module_are_copied_where_there_are_no_others(tmp_path: Path) -> None:
    model = write_embedder(tmp_path / "a", 1, "pytorch_model.bin")
    assert find(model).module_weights == ("2_Dense/pytorch_model.bin",)
    write(model, {"2_Dense/model.safetensors": b"x"})
    assert find(model).module_weights == ("2_Dense/model.safetensors",)


def test_a_module_without_its_weights(tmp_path: Path) -> None:
    model = write_embedder(tmp_path / "a", 1)
    (model / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"modules.json names 2_Dense \(Dense\), whose weights are missing"):
        plan(passthrough(model))


def test_what_stays_behind_is_named(tmp_path: Path) -> None:
    donor, other = write_llama(tmp_path / "a", 1), write_llama(tmp_path / "b", 1)
    for model in (donor, other):
        write(model, {"train.py": "x", "wandb/a/b": "xy", "wandb/c": "z", "optimizer.pt": "1234", "q/model.gguf": "1"})
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in (donor, other)]
    weights = (
        "weights that are not part of the checkpoint, neither merged nor copied: optimizer.pt (4 B), q/ (1 file, 1 B)"
    )
    assert plan({"merge_method": "linear", "models": models}).dropped == (
        f"{donor}: {weights}",
        f"{donor}: not part of a model, not copied: train.py (1 B), wandb/ (2 files, 3 B)",
        f"{other}: {weights}",
    )


@pytest.fixture
def snapshot(tmp_path: Path, single: Path) -> Path:
    """A model in the Hub's cache, with a side file in a directory of its own."""
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (single / "1_Pooling").mkdir()
    (single / "1_Pooling" / "config.json").write_text("{}")
    (single / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    for k, path in enumerate(sorted(path for path in single.rglob("*") if path.is_file())):
        blob = tmp_path / "hub" / "blobs" / f"{k}"
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        link = snapshot / path.relative_to(single)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_as_in_a_hub_cache(snapshot: Path, tmp_path: Path) -> None:
    assert copied(snapshot) == ["1_Pooling/config.json", "modules.json"]
    (tmp_path / "link").symlink_to(snapshot)
    assert copied(tmp_path / "link") == ["1_Pooling/config.json", "modules.json"]


def test_links_within_a_model(single: Path) -> None:
    (single / "vocab.json").write_text("{}")
    (single / "added_tokens.json").symlink_to("vocab.json")
    assert copied(single) == ["added_tokens.json", "vocab.json"]


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("kind", ["single", "snapshot"])
def test_links_out_of_a_model(name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(kind)
    (tmp_path / "secret.json").write_text("{}")
    link = model / name
    link.parent.mkdir(exist_ok=True)
    (model / "modules.json").unlink(missing_ok=True)
    (model / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(tmp_path / "secret.json", link.parent))
    with pytest.raises(CheckpointError, match=f"{link}: a link to {tmp_path}/secret.json, outside .*replace the link"):
        find(model)
