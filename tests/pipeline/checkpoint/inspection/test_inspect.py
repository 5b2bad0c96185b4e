"""`raymerge inspect`: what a checkpoint consists of, from a few of its bytes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from raymerge import merge
from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from raymerge.pipeline.checkpoint.inspection.stacks import split_stacks
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.cli.formats import format_inspection, inspection_json
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
from tests.pipeline.plan.layouts import Layout, bare, llama, stored_tensors

if TYPE_CHECKING:
    from tests.servers.hub import HubServer
    from tests.servers.s3 import S3Server


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


def found_tensors(layout: Layout) -> list[StoredTensor]:
    return list(stored_tensors("m", layout).values())


STACKS: dict[str, tuple[Layout, int | None, list[tuple[str, list[list[tuple[int, int]]]]], int]] = {
    "llama": (llama(3), 3, [("model.layers.", [[(0, 3)]])], 3),
    "layers past the counted ones": (llama(3, past=1), 3, [("model.layers.", [[(0, 4)]])], 3),
    "no layers": (bare(["a", "b.weight"]), None, [], 2),
    "one layer": (bare(["h.0.w", "wte"]), 1, [("h.", [[(0, 1)]])], 1),
    "from the middle": (bare(["h.7.w", "h.8.w", "h.9.w"]), None, [("h.", [[(7, 10)]])], 0),
    "with a gap": (bare(["h.0.w", "h.1.w", "h.3.w"]), None, [("h.", [[(0, 2), (3, 4)]])], 0),
    "a sequence of modules": (bare(["mlp.0.weight", "mlp.2.weight"]), None, [], 2),
    "dense, then experts": (
        bare(["h.0.a", "h.1.e.0.a", "h.1.e.1.a", "h.2.e.0.a", "h.2.e.1.a", "h.3.a"]), 4,
        [("h.", [[(0, 1), (3, 4)], [(1, 3)]])], 0,
    ),
    "same names, other shapes": (
        Layout({"h.0.w": (2, 2), "h.1.w": (2, 3), "h.2.w": (2, 2)}), None,
        [("h.", [[(0, 1), (2, 3)], [(1, 2)]])], 0,
    ),
    "same shapes, other dtypes": (
        Layout({"h.0.w": (2,), "h.1.w": (2,)}, dtypes={"h.1.w": "F32"}), None, [("h.", [[(0, 1)], [(1, 2)]])], 0,
    ),
    "two stacks, the counted one first": (
        bare([*(f"a.blocks.{k}.w" for k in range(2)), *(f"z.layers.{k}.w" for k in range(3))]), 3,
        [("z.layers.", [[(0, 3)]]), ("a.blocks.", [[(0, 2)]])], 0,
    ),
    "numbers of two digits": (bare(f"h.{k}.w" for k in range(12)), 12, [("h.", [[(0, 12)]])], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name: str) -> None:
    layout, count, expected, num_outside = STACKS[name]
    tensors = found_tensors(layout)
    stacks, outside = split_stacks(tensors, count)
    assert [(s.prefix, [list(kind.layers) for kind in s.kinds]) for s in stacks] == expected
    assert len(outside) == num_outside
    assert sum(stack.total.num_tensors for stack in stacks) + len(outside) == len(tensors)


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


def test_names_cannot_command_the_terminal(tmp_path: Path, cli: Cli) -> None:
    tensors = {"a\x1b[31m": torch.ones(1), "h.0.b\n": torch.ones(1)}
    write_checkpoint(tmp_path / "m", tensors, {"architectures": ["X\x1b[2J"], "model_type": 5})
    outcome = cli("inspect", tmp_path / "m", "--tensors")
    assert "\x1b" not in outcome.out
    assert "'a\\x1b[31m'" in outcome.out


@pytest.mark.parametrize("config", [{"architectures": 5}, {"architectures": None}, {"num_hidden_layers": "3"}, {}])
def test_odd_config(config: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    write_checkpoint(tmp_path / "m", llama_tensors(), config)
    assert cli("inspect", tmp_path / "m").code == 0


def test_tensors(sharded: Path, cli: Cli) -> None:
    found = inspect(sharded)
    outcome = cli("inspect", sharded, "--tensors")
    for tensor in found.tensors:
        line = f"    {tensor.name}  BF16  {list(tensor.shape)}  "
        assert any(
            text.startswith(line) and text.endswith(f"  {tensor.file.url} {tensor.start}-{tensor.stop}")
            for text in outcome.out.splitlines()
        )
    assert "start" not in cli("inspect", sharded).out


TOP = {
    "url", "weights_format", "architectures", "model_type", "config_num_layers", "obstacle", "num_files", "nbytes",
    "num_tensors", "num_parameters", "tensor_nbytes", "dtypes", "stacks", "outside", "embedding", "head", "is_tied",
    "made", "files", "tensors", "read_nbytes", "num_reads",
}  # fmt: skip
TOTALS = {"num_tensors", "num_parameters", "tensor_nbytes"}


def test_json(tmp_path: Path, cli: Cli) -> None:
    """The keys are a promise to whoever reads them: new ones may come, none may go."""
    models = [{"model": str(write_llama(tmp_path / f"m{k}", k))} for k in range(2)]
    out = tmp_path / "out"
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, out, shard_size=5000)
    outcome = cli("inspect", out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    value = json.loads(outcome.out)
    found = inspect(out)
    assert outcome.out == inspection_json(found) + "\n"
    assert value.keys() == TOP
    assert value["made"].keys() == {"version", "method", "models"}
    assert value["made"]["models"] == [model["model"] for model in models]
    assert {key for total in value["dtypes"].values() for key in total} == TOTALS
    (stack,) = value["stacks"]
    assert stack.keys() == {"prefix", "num_layers", "kinds"} | TOTALS
    assert stack["kinds"] == [
        {"layers": [[0, 2]], "each": {"num_tensors": 9, "num_parameters": 2592, "tensor_nbytes": 10368}}
    ]
    assert {key for file in value["files"] for key in file} == {"name", "nbytes", "role"}
    assert len(value["tensors"]) == value["num_tensors"] == 21
    for tensor in value["tensors"]:
        assert tensor.keys() == {"name", "dtype", "shape", "nbytes", "file", "start", "stop"}
        assert (out / tensor["file"]).stat().st_size >= tensor["stop"] == tensor["start"] + tensor["nbytes"]
    assert value["nbytes"] == sum(file["nbytes"] for file in value["files"])


def test_lines_are_of_a_width_for_people(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", num_shards=3)
    for k in range(30):
        (model / f"extra_{k}.json").write_text("{}")
    text = format_inspection(inspect(model))
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    assert "and 13 more" in " ".join(text.split())
    assert lines[-1].startswith("read ")


def test_no_credential_is_shown(tmp_path: Path, cli: Cli) -> None:
    model = write_llama(tmp_path / "hf_abcdefgh12345678")
    (model / "raymerge_manifest.json").write_text('{"models": [{"model": "https://h/a?sig=abcdef"}]}')
    for arguments in ([], ["--json"], ["--tensors"]):
        outcome = cli("inspect", model, *arguments)
        assert "sig=***" in outcome.out
        assert "abcdef" not in outcome.out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process is led to, as one who may write."""
    from tests.servers.hub import HubServer

    with HubServer(tmp_path / "hub") as server:
        server.add_token("hf_writer", user="me", can_write=["me"])
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        yield server


def test_on_the_hub(hub: HubServer, sharded: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    hub.create_repo("me/model", private=True)
    hub.upload("me/model", {path.name: path for path in sharded.iterdir()})
    local, found = inspect(sharded), inspect("me/model")
    assert re.fullmatch("hf://me/model@[0-9a-f]{40}", found.url)
    assert found.tensors == local.tensors
    assert found.read_nbytes == local.read_nbytes
    hub.move_branch("me/model", "a/b", hub.get_head("me/model"))
    branch = ("me/model@a/b", "hf://me/model@a/b", "hf://me/model@a%2Fb")
    for url in ("hf://me/model", "me/model@main", "hf://me/model@main", found.url, *branch):
        assert inspect(url) == found
    name = "model-00002-of-00003.safetensors"
    for url in (f"me/model/{name}", f"hf://me/model@main/{name}", f"{found.url}/{name}"):
        file = inspect(url)
        assert file.url == f"{found.url}/{name}"
        assert file.tensors == inspect(sharded / name).tensors
    for absent in ("me/absent", "me/model@absent", f"hf://me/model/absent-{name}", f"me/model/absent-{name}"):
        outcome = cli("inspect", absent)
        assert (outcome.code, outcome.out) == (2, "")
        assert "absent" in outcome.err


@pytest.mark.parametrize("storage", ["auto", "fsspec"])
def test_in_a_bucket(
    storage: Literal["auto", "fsspec"], sharded: Path, bucket: str, s3_server: S3Server, cli: Cli
) -> None:
    for path in sharded.iterdir():
        s3_server.client().put_object(Bucket=bucket, Key=f"a b/{path.name}", Body=path.read_bytes())
    url = f"s3://{bucket}/a b"
    found, local = inspect(url, storage=storage), inspect(sharded)
    assert found == dataclasses.replace(local, url=url)
    file = inspect(f"{url}/model-00002-of-00003.safetensors", storage=storage)
    assert file.tensors == tuple(t for t in local.tensors if t.file.url == "model-00002-of-00003.safetensors")
    outcome = cli("inspect", f"{url}/", "--storage", storage)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"  where      {url}\n" in outcome.out
    for absent in (f"s3://{bucket}/absent", f"{url}/absent.safetensors"):
        outcome = cli("inspect", absent, "--storage", storage)
        assert (outcome.code, outcome.out) == (2, "")
        assert absent in outcome.err


def test_one_file_on_the_web(sharded: Path, cli: Cli) -> None:
    from tests.servers.static import NginxServer

    name = "model-00002-of-00003.safetensors"
    with NginxServer(sharded.parent) as server:
        url = f"{server.endpoint}/{sharded.name}/{name}?X-Amz-Signature=abcdef"
        found = inspect(url)
        assert found.tensors == inspect(sharded / name).tensors
        assert found.files[0].name == name
        outcome = cli("inspect", url)
        assert outcome.code == 0
        assert "?X-Amz-Signature=***\n" in outcome.out
        assert "abcdef" not in outcome.out
        outcome = cli("inspect", url.replace("00002", "00009"))
        assert (outcome.code, outcome.out) == (2, "")
        assert "abcdef" not in outcome.err


def test_as_users_run_it(sharded: Path) -> None:
    shutil.copytree(sharded, sharded.parent / "copy")
    outcome = run_command("inspect", "copy", cwd=sharded.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[1].endswith(str(sharded.parent / "copy"))
