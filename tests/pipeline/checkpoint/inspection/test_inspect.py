"""`raymerge inspect`: what a checkpoint consists of, from a few of its bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from raymerge import merge
from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.stores.files import Buffer, ByteRange
from raymerge.pipeline.stores.local.storage import LocalStorage
from tests.checkpoints import (
    INDEX,
    llama_config,
    llama_tensors,
    read_files,
    read_tensors,
    write_checkpoint,
    write_llama,
    write_sparse,
)
from tests.commands import Cli, run_command

if TYPE_CHECKING:
    pass


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the ranges that are read from now on."""
    sizes: list[int] = []
    read_into = LocalStorage.read_into

    def count(self: LocalStorage, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        sizes.extend(item.nbytes for item in ranges)
        read_into(self, ranges, buffers)

    monkeypatch.setattr(LocalStorage, "read_into", count)
    return sizes


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", num_layers=3, dtype=torch.bfloat16, num_shards=3)


def llama_70b() -> dict[str, tuple[int, ...]]:
    vocab, hidden, mlp, key = 128_256, 8_192, 28_672, 1_024
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(80):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"mlp.{name}.weight": (mlp, hidden) for name in ("gate_proj", "up_proj")}
        shapes |= {prefix + f"self_attn.{name}.weight": (hidden, hidden) for name in ("q_proj", "o_proj")}
        shapes |= {prefix + f"self_attn.{name}.weight": (key, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, mlp), prefix + "input_layernorm.weight": (hidden,)}
        shapes |= {prefix + "post_attention_layernorm.weight": (hidden,)}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def test_every_tensor_is_where_it_says(sharded: Path, reads: list[int]) -> None:
    before = read_files(sharded)
    found = inspect(sharded)
    tensors = read_tensors(sharded)
    assert {tensor.name for tensor in found.tensors} == tensors.keys()
    for tensor in found.tensors:
        expected = tensors[tensor.name]
        stored = (sharded / tensor.file.url).read_bytes()[tensor.start : tensor.stop]
        assert (tensor.dtype, tensor.shape) == ("BF16", tuple(expected.shape))
        assert stored == expected.view(torch.int16).numpy().tobytes()
    assert found.total.num_tensors == len(tensors) == 30
    assert found.total.num_parameters == sum(x.numel() for x in tensors.values())
    assert found.total.nbytes == 2 * found.total.num_parameters
    assert dict(found.dtypes) == {"BF16": found.total}
    assert found.nbytes == sum(path.stat().st_size for path in sharded.iterdir())
    assert (found.read_nbytes, found.num_reads) == (sum(reads), len(reads))
    assert read_files(sharded) == before


def test_what_it_is(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"not looked at")
    (sharded / "README.md").write_text("about it")
    found = inspect(str(sharded))
    assert (found.url, found.weights_format, found.obstacle) == (str(sharded), "safetensors", "")
    assert (found.architectures, found.model_type, found.config_num_layers) == (("LlamaForCausalLM",), "llama", 3)
    assert {file.name: file.role for file in found.files} == {
        "README.md": "other",
        "config.json": "config",
        "consolidated.safetensors": "other weights",
        INDEX: "config",
        "tokenizer_config.json": "side file",
        **{f"model-0000{k}-of-00003.safetensors": "weights" for k in (1, 2, 3)},
    }
    (stack,) = found.stacks
    assert (stack.prefix, stack.num_layers) == ("model.layers.", 3)
    (kind,) = stack.kinds
    assert (kind.layers, kind.each.num_tensors) == (((0, 3),), 9)
    assert stack.total.nbytes == 3 * kind.each.nbytes
    assert [tensor.name for tensor in found.outside] == [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
    ]  # fmt: skip
    assert (found.head, found.embedding, found.is_tied) == ("lm_head.weight", "model.embed_tokens.weight", False)
    assert found.made is None


def test_70b_by_less_than_a_thousandth_of_a_percent_more_than_headers(
    tmp_path: Path, reads: list[int], cli: Cli
) -> None:
    model = write_sparse(tmp_path / "70b", llama_70b(), llama_config(80), num_shards=30)
    found = inspect(model)
    assert found.total.num_tensors == 723
    assert found.total.num_parameters == 70_553_706_496
    assert found.nbytes > 141 * 10**9
    assert sum(reads) == found.read_nbytes < found.nbytes / 50_000
    assert len(reads) == found.num_reads == 32  # config, index, and one for each file
    outcome = cli("inspect", model)
    assert "723 tensors, 70.6 billion parameters, 141 GB" in outcome.out
    assert "80 layers, all alike; each 9 tensors, 856 million parameters, 1.71 GB" in outcome.out


def test_a_header_longer_than_the_first_read(tmp_path: Path, reads: list[int]) -> None:
    shapes = {f"h.{k}.{'x' * 100}": (1,) for k in range(1000)}
    found = inspect(write_sparse(tmp_path / "m", shapes, {}))
    assert (found.read_nbytes, found.num_reads) == (sum(reads), len(reads))
    assert found.num_reads == 3
    assert found.stacks[0].num_layers == 1000


def test_one_file(sharded: Path, reads: list[int], cli: Cli) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    found = inspect(path)
    assert [file.name for file in found.files] == [path.name]
    assert {tensor.file.url for tensor in found.tensors} == {path.name}
    assert found.total.num_tensors == 10
    assert len(reads) == found.num_reads == 1
    assert (found.architectures, found.is_tied) == ((), None)
    assert inspect(path.as_uri()).tensors == found.tensors
    outcome = cli("inspect", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "no architecture given, safetensors\n" in outcome.out


@pytest.mark.parametrize(
    ("config", "head", "said"),
    [
        ({"tie_word_embeddings": True}, False, "tied: model.embed_tokens.weight\n"),
        ({"tie_word_embeddings": True}, True, "lm_head.weight is stored too, and is the head if it has other values"),
        ({"tie_word_embeddings": False}, True, "lm_head.weight, of its own"),
        ({"tie_word_embeddings": None}, False, "tied: model.embed_tokens.weight\n"),
        ({"architectures": ["LlamaModel"], "tie_word_embeddings": False}, False, "  head       none\n"),
    ],
)
def test_tied(config: dict[str, Any], head: bool, said: str, tmp_path: Path, cli: Cli) -> None:
    write_llama(tmp_path / "m", head=head, **config)
    assert said in cli("inspect", tmp_path / "m").out


def test_made_by_raymerge(tmp_path: Path, cli: Cli) -> None:
    models = [{"model": str(write_llama(tmp_path / f"m{k}", k))} for k in range(2)]
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.made is not None
    assert found.made.method == "linear"
    assert found.made.models == tuple(model["model"] for model in models)
    assert ", linear of " in " ".join(cli("inspect", tmp_path / "out").out.split())
    for damaged in ("{", "[]", '{"models": [1, {"model": 2}, null]}', '{"models": 5}'):
        (tmp_path / "out" / "raymerge_manifest.json").write_text(damaged)
        assert inspect(tmp_path / "out").made is not None


def test_layers_that_config_json_does_not_count(tmp_path: Path, cli: Cli) -> None:
    shapes = {f"model.layers.{k}.w": (2, 2 + (k == 3)) for k in range(4)} | {
        f"visual.blocks.{k}.w": (2,) for k in (0, 1)
    }
    lines = cli("inspect", write_sparse(tmp_path / "m", shapes, llama_config(3))).out.splitlines()
    begin = next(k for k, line in enumerate(lines) if line.startswith("  layers "))
    assert [line[13:] for line in lines[begin : begin + 5]] == [
        "model.layers.: 4 layers of 2 kinds",
        "[0, 3): each 1 tensor, 4 parameters, 8 B",
        "[3, 4): each 1 tensor, 6 parameters, 12 B",
        "config.json counts 3",
        "visual.blocks.[0, 2): 2 layers, all alike; each 1 tensor, 2 parameters, 4 B",
    ]


def quantise(path: Path) -> None:
    tensors = {name: x.to(torch.float8_e4m3fn) if x.dim() == 2 else x for name, x in llama_tensors().items()}
    write_checkpoint(path, tensors, llama_config(quantization_config={"quant_method": "fp8"}))


def make_adapter(path: Path) -> None:
    save_file({"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"r": 2}')
    (path / "model.safetensors").unlink()


def make_gguf(path: Path) -> None:
    (path / "model.safetensors").rename(path / "q4.gguf")


def make_pickles(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def make_other_layout(path: Path) -> None:
    (path / "model.safetensors").rename(path / "consolidated.00.safetensors")


def lose_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def name_a_missing_file(path: Path) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "lost.safetensors"}}))


def state_another_tensor(path: Path) -> None:
    names = [*llama_tensors(), "b"]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))


def leave_the_directory(path: Path) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))


UNMERGEABLE: dict[str, tuple[Callable[[Path], None], str, str, int]] = {
    "quantised": (quantise, "safetensors", "quantised (config.json: quantization_config (fp8))", 21),
    "adapter": (make_adapter, "LoRA adapter", "a LoRA adapter", 1),
    "gguf": (make_gguf, "GGUF", "only GGUF (q4.gguf)", 0),
    "pickles": (make_pickles, "pickled weights", "only pickled weights (pytorch_model.bin)", 0),
    "other layout": (make_other_layout, "safetensors", "consolidated.00.safetensors; that is another layout", 21),
    "no config.json": (lose_config, "safetensors", "no config.json", 21),
    "broken config.json": (break_config, "safetensors", "not JSON", 21),
    "a file is missing": (name_a_missing_file, "safetensors", "lost.safetensors missing", 21),
    "index of another": (state_another_tensor, "safetensors", "tensor 'b' is in no file, but model.safetensors", 21),
    "index that leads out": (leave_the_directory, "safetensors", "'../secret.safetensors' leaves", 21),
}


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_cannot_be_merged(name: str, tmp_path: Path, cli: Cli) -> None:
    change, weights_format, obstacle, num_tensors = UNMERGEABLE[name]
    model = write_llama(tmp_path / "m")
    change(model)
    found = inspect(model)
    assert found.weights_format == weights_format
    assert obstacle in found.obstacle
    assert found.total.num_tensors == num_tensors
    assert {file.name for file in found.files} == {path.name for path in model.iterdir()}
    outcome = cli("inspect", model)
    assert (outcome.code, outcome.err) == (0, "")
    alone = " by itself" if weights_format == "LoRA adapter" else ""
    assert f"  cannot be merged{alone}: {found.obstacle}\n" in outcome.out
    assert weights_format in outcome.out.splitlines()[0]


def test_reads_of_a_quantised_one_are_counted_too(tmp_path: Path, reads: list[int]) -> None:
    model = write_llama(tmp_path / "m")
    quantise(model)
    found = inspect(model)
    assert (found.read_nbytes, found.num_reads) == (sum(reads), len(reads))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
    ids=["cut", "empty", "header length", "Git LFS pointer"],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], object], sharded: Path, cli: Cli) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    damage(shard)
    for url in (sharded, shard):
        with pytest.raises(CheckpointError, match=shard.name):
            inspect(url)
        outcome = cli("inspect", url)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"Error: {shard}: ")


def test_nothing_there(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for url, said in (
        ("empty", "nothing is there"),
        ("absent", "no such directory"),
        ("absent.safetensors", "no such file"),
        (str(tmp_path / "absent" / "a.safetensors"), "no such file"),
        ("file.txt", "a file, not a directory"),
        ("s3:/bucket/m", "did you mean s3://bucket/m?"),
        ("s3:bucket/m.safetensors", "did you mean s3://bucket/m.safetensors?"),
        ("a@b@c", "no `org/name@revision` either"),
        ("@main", "no `org/name@revision` either"),
    ):
        outcome = cli("inspect", url)
        assert (outcome.code, outcome.out) == (2, ""), url
        assert outcome.err.startswith("Error: ")
        assert said in outcome.err
    with pytest.raises(ConfigError):
        inspect("s3//bucket/a")


@pytest.mark.parametrize("name", ["a@b", "a+b", "a b ü", "x.safetensors"])
def test_directories_of_any_name(name: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / name)
    assert inspect(model).total.num_tensors == 21
    assert inspect(str(model)).obstacle == ""


@pytest.mark.parametrize("config", [{"architectures": 5}, {"architectures": None}, {"num_hidden_layers": "3"}, {}])
def test_odd_config(config: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    write_checkpoint(tmp_path / "m", llama_tensors(), config)
    assert cli("inspect", tmp_path / "m").code == 0


def test_as_users_run_it(sharded: Path) -> None:
    shutil.copytree(sharded, sharded.parent / "copy")
    outcome = run_command("inspect", "copy", cwd=sharded.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[1].endswith(str(sharded.parent / "copy"))
