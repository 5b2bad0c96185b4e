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


def llama_layout(
    *, hidden: int, num_layers: int, mlp: int, num_heads: int, num_kv_heads: int = 8, num_shards: int
) -> Layout:
    """Return a large LlamaForCausalLM, sparse."""
    vocab, key = 128_256, num_kv_heads * hidden // num_heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
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
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Layout(config, tensors, num_shards, is_sparse=True)


def deepseek_v3_layout() -> Layout:
    """Return DeepSeek-V3 by the names and shapes of its tensors, the scales of its FP8 weights among them, sparse.

    All are bf16: quantised checkpoints are refused.
    """
    vocab, hidden, mlp, expert_mlp = 129_280, 7_168, 18_432, 2_048
    num_layers, num_dense, num_experts = 61, 3, 256
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def add(name: str, rows: int, columns: int) -> None:
        """Add a weight that is stored in blocks of 128 x 128 with a scale for each."""
        tensors[f"{name}.weight"] = (rows, columns)
        tensors[f"{name}.weight_scale_inv"] = (-(-rows // 128), -(-columns // 128))

    def add_mlp(prefix: str, width: int) -> None:
        add(f"{prefix}.gate_proj", width, hidden)
        add(f"{prefix}.up_proj", width, hidden)
        add(f"{prefix}.down_proj", hidden, width)

    for layer in range(num_layers + 1):  # the last one predicts one more token
        prefix = f"model.layers.{layer}"
        if layer == num_layers:
            tensors |= {
                f"{prefix}.embed_tokens.weight": (vocab, hidden),
                f"{prefix}.enorm.weight": (hidden,),
                f"{prefix}.hnorm.weight": (hidden,),
                f"{prefix}.eh_proj.weight": (hidden, 2 * hidden),
                f"{prefix}.shared_head.norm.weight": (hidden,),
                f"{prefix}.shared_head.head.weight": (vocab, hidden),
            }
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.self_attn.q_a_layernorm.weight"] = (1_536,)
        tensors[f"{prefix}.self_attn.kv_a_layernorm.weight"] = (512,)
        add(f"{prefix}.self_attn.q_a_proj", 1_536, hidden)
        add(f"{prefix}.self_attn.q_b_proj", 128 * 192, 1_536)
        add(f"{prefix}.self_attn.kv_a_proj_with_mqa", 576, hidden)
        add(f"{prefix}.self_attn.kv_b_proj", 128 * 256, 512)
        add(f"{prefix}.self_attn.o_proj", hidden, 128 * 128)
        if layer < num_dense:
            add_mlp(f"{prefix}.mlp", mlp)
            continue
        tensors[f"{prefix}.mlp.gate.weight"] = (num_experts, hidden)
        tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = (num_experts,)
        for expert in range(num_experts):
            add_mlp(f"{prefix}.mlp.experts.{expert}", expert_mlp)
        add_mlp(f"{prefix}.mlp.shared_experts", expert_mlp)
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "moe_intermediate_size": expert_mlp,
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": num_dense,
        "n_routed_experts": num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": 128,
        "q_lora_rank": 1_536,
        "kv_lora_rank": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Layout(config, tensors, num_shards=163, is_sparse=True)


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
    "narrow": qwen2_layout(vocab=1_024, hidden=512, num_layers=24, mlp=2_048, num_heads=8, num_kv_heads=2),
    "deep": qwen2_layout(vocab=1_024, hidden=64, num_layers=90, mlp=128, num_heads=1, num_kv_heads=1),
    "many-small": qwen2_layout(vocab=1_024, hidden=128, num_layers=1_667, mlp=256, num_heads=2, num_kv_heads=1),
    "few-large": qwen2_layout(vocab=7_483, hidden=1_024, num_layers=16, mlp=4_096, num_heads=16, num_kv_heads=2),
    "llama-8b": llama_layout(hidden=4_096, num_layers=32, mlp=14_336, num_heads=32, num_shards=4),
    "llama-70b": llama_layout(hidden=8_192, num_layers=80, mlp=28_672, num_heads=64, num_shards=30),
    "llama-405b": llama_layout(hidden=16_384, num_layers=126, mlp=53_248, num_heads=128, num_shards=191),
    "deepseek-v3": deepseek_v3_layout(),
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


def link_family(directory: Path, name: str, count: int, num_files: int = 3) -> list[Path]:
    """Return directories of a base and `count` fine-tunes, links to the first `num_files` of a family in turn."""
    links = family_paths(directory, f"{name}-links", count)
    originals = family_paths(directory, name, num_files)
    links[0].parent.mkdir(exist_ok=True)
    for number, link in enumerate(links):
        original = originals[(number - 1) % num_files + 1 if number else 0]
        link.unlink(missing_ok=True)
        link.symlink_to(original)
    return links


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
