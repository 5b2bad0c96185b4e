"""Small checkpoints whose bytes never change: their values come from PCG64's raw bits by exact arithmetic."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Model = tuple[Tensors, dict[str, Any], int]
"""Tensors, config.json, and in how many files they are stored."""

HIDDEN, VOCAB, NUM_LAYERS = 16, 40, 4


def draw(label: str, shape: tuple[int, ...], size: float = 0.1) -> torch.Tensor:
    """Return float32 values that follow from the label alone: sums of four 16-bit numbers, nearly normal."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    words = np.random.PCG64(seed).random_raw(math.prod(shape))
    sums = np.asarray(words).view(np.uint16).reshape(-1, 4).astype(np.float64).sum(1) - 2 * 65535
    return torch.from_numpy((sums * (size / 2**15)).astype(np.float32)).reshape(shape)


def llama(
    label: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    num_layers: int = NUM_LAYERS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    head: bool = True,
    bias: bool = False,
) -> Tensors:
    """Return the weights of a small Llama, or with biases of a small Qwen."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for k in range(num_layers):
        prefix = f"model.layers.{k}."
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (hidden + 8, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, hidden + 8)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {
        name: (draw(f"{label} {name}", shape) + ("norm" in name)).to(dtype).contiguous()
        for name, shape in shapes.items()
    }


def tune(tensors: Mapping[str, torch.Tensor], label: str, size: float = 0.02) -> Tensors:
    """Return a fine-tune: every weight moved a little; integers stay."""
    return {
        name: (x.float() + draw(f"{label} {name}", tuple(x.shape), size)).to(x.dtype) if x.is_floating_point() else x
        for name, x in tensors.items()
    }


def config(num_layers: int = NUM_LAYERS, **changes: Any) -> dict[str, Any]:
    """Return a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN + 8,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | changes


def with_odds(tensors: Tensors) -> Tensors:
    """Return a model with what else checkpoints hold: integers, buffers, scalars, empty tensors, unusual values."""
    odd = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": draw("inv_freq", (4,)),
        "model.layers.1.self_attn.position_ids": torch.arange(12),
        "model.layers.1.mlp.active": torch.tensor([True, False, True]),
        "model.layers.2.mlp.table": torch.arange(7, dtype=torch.uint8),
        "model.layers.2.mlp.scale": draw("scale", ()),
        "model.layers.3.mlp.empty": torch.zeros((0, 4), dtype=torch.bfloat16),
        "model.layers.3.mlp.unusual": torch.tensor([0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, 1e-8]),
        "visual.patch_embed.weight": draw("patch", (3, 2, 2, 5)).half(),
    }
    return tensors | odd


def gpt2(label: str) -> Tensors:
    """Return the weights of a small GPT-2, whose head is its embedding and whose masks are stored."""
    tensors = {"wte.weight": draw(f"{label} wte", (VOCAB, HIDDEN)), "wpe.weight": draw(f"{label} wpe", (24, HIDDEN))}
    for k in range(3):
        tensors[f"h.{k}.attn.c_attn.weight"] = draw(f"{label} {k} attn", (HIDDEN, 3 * HIDDEN))
        tensors[f"h.{k}.attn.bias"] = torch.ones(24, 24).tril().reshape(1, 1, 24, 24)
        tensors[f"h.{k}.ln_1.weight"] = draw(f"{label} {k} ln", (HIDDEN,)) + 1
    return tensors | {"ln_f.weight": draw(f"{label} ln_f", (HIDDEN,)) + 1}


def with_experts(label: str) -> Tensors:
    """Return a model with four experts in each of its two layers."""
    tensors = llama(label, num_layers=2)
    for layer in range(2):
        for k in range(4):
            name = f"model.layers.{layer}.mlp.experts.{k}.up_proj.weight"
            tensors[name] = draw(f"{label} {name}", (8, HIDDEN)).bfloat16()
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = draw(f"{label} gate {layer}", (4, HIDDEN))
    return tensors


def with_prediction_layer(tensors: Tensors) -> Tensors:
    """Return a model with a fifth layer that predicts a second token, as DeepSeek-V3 stores it."""
    last = f"model.layers.{NUM_LAYERS - 1}."
    extra = {name.replace(last, f"model.layers.{NUM_LAYERS}."): x for name, x in tensors.items() if last in name}
    return tensors | tune(extra, "mtp") | {f"model.layers.{NUM_LAYERS}.eh_proj.weight": draw("eh", (16, 32)).bfloat16()}


def _tuned(base: Callable[[], Model], label: str, num_files: int = 1, **changes: Any) -> Callable[[], Model]:
    def make() -> Model:
        tensors, config_json, _ = base()
        return tune(tensors, label), config_json | changes, num_files

    return make


def _family(name: str, base: Callable[[], Model], *num_files: int) -> dict[str, Callable[[], Model]]:
    """Return a base and a fine-tune for each number of files: `NAME`, `NAME-1`, `NAME-2`, ..."""
    return {name: base} | {f"{name}-{k}": _tuned(base, f"{name}-{k}", n) for k, n in enumerate(num_files, start=1)}


def _in_dtype(dtype: torch.dtype) -> Callable[[], Model]:
    name = str(dtype).removeprefix("torch.")
    return lambda: (llama(name, dtype), config(torch_dtype=name), 1)


def _mixed() -> Model:
    dtypes = {"norm": torch.float32, "mlp": torch.float16}
    tensors = llama("mixed")
    for name, x in tensors.items():
        tensors[name] = x.to(next((dtype for word, dtype in dtypes.items() if word in name), x.dtype))
    return tensors, config(), 2


TIED: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
MTP: dict[str, Any] = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
PER_LAYER: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "mlp_only_layers": [1, 3],
    "sliding_window": 8,
}

MODELS: dict[str, Callable[[], Model]] = {
    **_family("base", lambda: (llama("base"), config(), 3), 1, 2, 1),
    **_family("f32", _in_dtype(torch.float32), 1, 2),
    **_family("f16", _in_dtype(torch.float16), 1),
    **_family("f64", _in_dtype(torch.float64), 1),
    **_family("mixed", _mixed, 1),
    **_family("tied", lambda: (llama("tied", head=False, bias=True), config(**TIED), 1), 1, 2),
    "tied-stored": lambda: (llama("stored", bias=True), config(**TIED), 1),
    "untied": lambda: (llama("untied", bias=True), config(**TIED | {"tie_word_embeddings": False}), 1),
    "silent": lambda: (llama("silent", head=False, bias=True), _without(config(**TIED), "tie_word_embeddings"), 1),
    **_family("padded", lambda: (llama("padded", vocab=48), config(), 1), 1),
    **_family("odd", lambda: (with_odds(llama("odd")), config(), 2), 1),
    **_family("gpt2", lambda: (gpt2("gpt2"), config(3, **TIED | {"model_type": "gpt2"}), 1), 1),
    **_family("moe", lambda: (with_experts("moe"), config(2, model_type="mixtral"), 1), 1),
    **_family("mtp", lambda: (with_prediction_layer(llama("mtp")), config(**MTP), 1), 1),
    **_family("deep", lambda: (llama("deep", num_layers=6), config(6), 1), 1),
    **_family("kinds", lambda: (llama("kinds"), config(**PER_LAYER), 1), 1),
    **_family("one", lambda: (llama("one", num_layers=1), config(1), 1), 1),
    "theta": _tuned(lambda: (llama("base"), config(), 1), "theta", rope_theta=1e6),
    **_family("big", lambda: (llama("big", num_layers=2, hidden=40, vocab=30_001), config(2), 1), 1, 2),
}
"""Every model that the cases name, by its directory."""


def _without(config_json: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config_json.items() if name != key}


PUBLIC = {
    r"Qwen2\.5-(Coder-)?0\.5B": (24, True, True),
    r"Qwen2\.5-(Coder-)?3B": (36, True, True),
    r"Qwen2\.5-7B|R1-Distill-Qwen-7B": (28, True, False),
    r"Mistral-7B|zephyr-7b|neural-chat-7b": (32, False, False),
}
"""Layers, biases and tied heads of the models in configs/, by a pattern of their names."""


def make_public(name: str) -> Model:
    """Return a small model with the depth, the biases and the head of a public one."""
    num_layers, bias, tied = next(found for pattern, found in PUBLIC.items() if re.search(pattern, name))
    family = f"{num_layers} {bias} {tied}"
    tensors = tune(llama(family, num_layers=num_layers, hidden=8, vocab=24, head=not tied, bias=bias), name)
    kind = "qwen2" if bias else "mistral"
    return tensors, config(num_layers, model_type=kind, tie_word_embeddings=tied, hidden_size=8, vocab_size=24), 1


def write_models(directory: Path, public: Iterable[str]) -> None:
    """Write every model of `MODELS`, and small ones for the public names of the shipped configs."""
    for name, make in MODELS.items():
        _write(directory / name, *make())
    for name in public:
        _write(directory / name, *make_public(name))


def _write(directory: Path, tensors: Tensors, config_json: Mapping[str, Any], num_files: int) -> None:
    directory.mkdir(parents=True)
    for name, content in {
        "config.json": config_json,
        "generation_config.json": {"temperature": 0.6},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "of": directory.name},
    }.items():
        (directory / name).write_text(json.dumps(content))
    files = [f"model-{k:05d}-of-{num_files:05d}.safetensors" for k in range(1, num_files + 1)]
    files = files if num_files > 1 else ["model.safetensors"]
    for k, file in enumerate(files):
        save_file(dict(list(tensors.items())[k::num_files]), directory / file, metadata={"format": "pt"})
    if num_files > 1:
        weight_map = {name: files[k % num_files] for k, name in enumerate(tensors)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
