"""Checkpoints to measure on: Qwen2-shaped families, and sparse files that have a header and a size but no data.

`python benchmarks/checkpoints.py DIRECTORY NAME [COUNT]` makes one family; what is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHT_STD = 0.02
"""Of the base's weights."""
NOISE_STD = 1e-3
"""Of what a fine-tune adds: several bf16 ulps, and a cosine to the base that takes slerp's spherical branch."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of one shape holds; every tensor is bf16."""

    config: dict[str, Any]
    """Content of config.json."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes by name, in file order."""
    num_shards: int
    is_sparse: bool = False
    """Written as holes: no data, no space on disk."""

    def shards(self) -> list[list[str]]:
        """Return the tensor names of each shard: runs of about equal bytes, none empty."""
        total = sum(math.prod(shape) for shape in self.tensors.values())
        shards: list[list[str]] = [[] for _ in range(self.num_shards)]
        before = 0
        for name, shape in self.tensors.items():
            shards[before * self.num_shards // total].append(name)
            before += math.prod(shape)
        return [shard for shard in shards if shard]


def qwen2_layout(
    *, vocab: int, hidden: int, num_layers: int, mlp: int, num_heads: int, num_kv_heads: int, num_shards: int = 2
) -> Layout:
    """Return a Qwen2ForCausalLM of this size, embeddings tied."""
    query = num_heads * 64
    key = num_kv_heads * 64
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, mlp),
            prefix + "mlp.gate_proj.weight": (mlp, hidden),
            prefix + "mlp.up_proj.weight": (mlp, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.bias": (key,),
            prefix + "self_attn.k_proj.weight": (key, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "self_attn.q_proj.bias": (query,),
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.v_proj.bias": (key,),
            prefix + "self_attn.v_proj.weight": (key, hidden),
        }
    tensors["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return Layout(config, tensors, num_shards)


def llama_70b_layout() -> Layout:
    """Return Llama-3-70B: 723 tensors over 30 shards, sparse."""
    vocab, hidden, mlp, key = 128_256, 8_192, 28_672, 1_024
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(80):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, mlp),
            prefix + "mlp.gate_proj.weight": (mlp, hidden),
            prefix + "mlp.up_proj.weight": (mlp, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (key, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (key, hidden),
        }
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Layout(config, tensors, num_shards=30, is_sparse=True)


def big_tensor_layout() -> Layout:
    """Return a model that is hardly more than one sparse tensor of 4 GiB."""
    small = qwen2_layout(vocab=65_536, hidden=64, num_layers=1, mlp=128, num_heads=1, num_kv_heads=1)
    tensors = small.tensors | {"model.embed_tokens.weight": (65_536, 32_768)}
    return Layout(small.config, tensors, num_shards=1, is_sparse=True)


LAYOUTS = {
    "qwen2-0.5b": qwen2_layout(vocab=151_936, hidden=896, num_layers=24, mlp=4_864, num_heads=14, num_kv_heads=2),
    "small": qwen2_layout(vocab=8_192, hidden=256, num_layers=4, mlp=1_024, num_heads=4, num_kv_heads=2),
    "tiny": qwen2_layout(vocab=1_024, hidden=64, num_layers=2, mlp=128, num_heads=1, num_kv_heads=1),
    "even": qwen2_layout(vocab=8_192, hidden=1_024, num_layers=24, mlp=4_096, num_heads=16, num_kv_heads=2),
    "deep": qwen2_layout(vocab=1_024, hidden=64, num_layers=90, mlp=128, num_heads=1, num_kv_heads=1),
    "llama-70b": llama_70b_layout(),
    "big-tensor": big_tensor_layout(),
}
"""The families by name."""


def family_paths(directory: Path, name: str, count: int) -> list[Path]:
    """Return the directories of a family's base and its `count` fine-tunes, in this order."""
    return [directory / name / member for member in ("base", *(f"tune{i}" for i in range(1, count + 1)))]


def make_family(directory: Path, name: str, count: int) -> None:
    """Write the base and `count` fine-tunes, as far as they are missing."""
    layout = LAYOUTS[name]
    members = family_paths(directory, name, count)
    missing = {index: path for index, path in enumerate(members) if not path.exists()}
    partial = {index: path.with_name(path.name + ".partial") for index, path in missing.items()}
    for path in partial.values():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    if partial:
        _write_shards(layout, partial)
    for index, path in missing.items():
        partial[index].rename(path)


def make_header(layout: Layout, names: list[str]) -> bytes:
    """Return a safetensors header with its length in front, padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stop = start + 2 * math.prod(layout.tensors[name])
        header[name] = {"dtype": "BF16", "shape": layout.tensors[name], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shards(layout: Layout, paths: dict[int, Path]) -> None:
    shards = layout.shards()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        header = make_header(layout, names)
        nbytes = 2 * sum(math.prod(layout.tensors[name]) for name in names)
        with ExitStack() as stack:
            files = {i: stack.enter_context((path / file_name).open("wb")) for i, path in paths.items()}
            for file in files.values():
                file.write(header)
                if layout.is_sparse:
                    file.truncate(len(header) + nbytes)
            if not layout.is_sparse:
                for name in names:
                    for index, values in _make_values(name, layout.tensors[name], list(files)):
                        files[index].write(_to_bytes(values))
    for path in paths.values():
        (path / "config.json").write_text(json.dumps(layout.config, indent=2) + "\n")
        if len(shards) > 1:
            total = 2 * sum(math.prod(shape) for shape in layout.tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _make_values(name: str, shape: tuple[int, ...], members: list[int]) -> list[tuple[int, torch.Tensor]]:
    """Return a tensor's flat bf16 values for each member; the same whichever members are asked for."""
    import torch

    def normal(member: int, std: float) -> torch.Tensor:
        seed = zlib.crc32(f"{name}/{member}".encode())
        return torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed)).mul_(std)

    base = normal(0, WEIGHT_STD)
    if name.endswith("norm.weight"):
        base.add_(1)
    return [
        (member, (normal(member, NOISE_STD).add_(base) if member else base).to(torch.bfloat16)) for member in members
    ]


def _to_bytes(values: torch.Tensor) -> memoryview:
    import torch

    return values.view(torch.uint8).numpy().data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("name", choices=LAYOUTS)
    parser.add_argument("count", type=int, nargs="?", default=3)
    arguments = parser.parse_args()
    make_family(arguments.directory, arguments.name, arguments.count)
