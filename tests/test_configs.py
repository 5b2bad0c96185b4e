"""Every config that is shipped: planned on models of the real shapes, and run on small ones of the same depth.

Adapters, pipelines and sweeps have tests of their own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raymerge import merge, plan, verify
from tests.checkpoints import add_noise, read_tensors, write_checkpoint, write_sparse
from tests.tokenized_models import TEXTS, byte_level, write_tokenizer

ROOT = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(ROOT.glob("*.y*ml"))
KINDS = ("documents", "mixtures", "multimodal", "statistics", "tokenizers")
"""Directories of configs whose models need more than weights."""


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes of a Llama-like model."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocab: int
    tied: bool = False
    num_blocks: int = 0
    """Of the vision tower, if there is one."""

    def shapes(self, *, small: bool) -> dict[str, tuple[int, ...]]:
        """Return each tensor's shape; the small ones keep names and depth only."""
        head_dim = 4 if small else self.hidden // self.num_heads
        hidden, kv = (8, 4) if small else (self.hidden, self.num_kv_heads * head_dim)
        intermediate, vocab = (12, 24) if small else (self.intermediate, self.vocab)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for k in range(self.num_layers):
            prefix = f"model.layers.{k}."
            for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
                if self.model_type.startswith("qwen2"):
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
            shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (intermediate, hidden)
            shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        width = 8 if small else 1280
        for k in range(self.num_blocks):
            shapes[f"visual.blocks.{k}.attn.qkv.weight"] = (3 * width, width)
        if self.num_blocks:
            shapes["visual.merger.mlp.2.weight"] = (hidden, 4 * width)
        return shapes

    def config(self, rope_theta: float) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "tie_word_embeddings": self.tied,
            "rope_theta": rope_theta,
            "torch_dtype": "bfloat16",
            **({"vision_config": {"depth": self.num_blocks}} if self.num_blocks else {}),
        }


ARCHITECTURES = [
    (r"Qwen/Qwen2\.5-(Coder-)?0\.5B", Architecture("qwen2", 24, 896, 4864, 14, 2, 151_936, tied=True), 1e6),
    (r"Qwen/Qwen2\.5-(Coder-)?1\.5B", Architecture("qwen2", 28, 1536, 8960, 12, 2, 151_936, tied=True), 1e6),
    (r"Qwen/Qwen2\.5-(Coder-)?3B", Architecture("qwen2", 36, 2048, 11_008, 16, 2, 151_936, tied=True), 1e6),
    (r"Qwen/Qwen2\.5-(Coder-)?7B", Architecture("qwen2", 28, 3584, 18_944, 28, 4, 152_064), 1e6),
    (r"Qwen/Qwen2\.5-VL-7B", Architecture("qwen2_5_vl", 28, 3584, 18_944, 28, 4, 152_064, num_blocks=32), 1e6),
    (r"deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", Architecture("qwen2", 28, 3584, 18_944, 28, 4, 152_064), 1e4),
    (
        r"mistralai/Mistral-7B|HuggingFaceH4/zephyr-7b|Intel/neural-chat-7b|teknium/OpenHermes|WizardLM/WizardMath-7B",
        Architecture("mistral", 32, 4096, 14_336, 32, 8, 32_000),
        1e4,
    ),
]


def find_models(node: object) -> set[str]:
    """Return every model that a config names."""
    if isinstance(node, list):
        return {model for element in node for model in find_models(element)}
    if not isinstance(node, Mapping):
        return set()
    own = {node[key] for key in ("model", "base_model", "source_model") if isinstance(node.get(key), str)}
    return own.union(*(find_models(value) for value in node.values()))


def describe(model: str) -> tuple[Architecture, dict[str, Any]]:
    for pattern, architecture, rope_theta in ARCHITECTURES:
        if re.match(pattern, model):
            return architecture, architecture.config(rope_theta)
    raise AssertionError(f"say in ARCHITECTURES which shapes {model} has")


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One config; models are written at the relative paths that it names."""
    monkeypatch.chdir(tmp_path)
    path: Path = request.param
    return path


def test_there_are_configs() -> None:
    methods = {yaml.safe_load(path.read_text())["merge_method"] for path in CONFIGS}
    assert {"linear", "slerp", "task_arithmetic", "ties", "dare_ties", "passthrough"} <= methods


def test_real_shapes_are_planned(config: Path) -> None:
    written = yaml.safe_load(config.read_text())
    for model in find_models(written):
        architecture, config_json = describe(model)
        shapes = architecture.shapes(small=False)
        write_sparse(Path(model), shapes, config_json, num_shards=4)
    the_plan = plan(config, memory="1GiB", workers=2)
    assert the_plan.num_workers == 2
    assert all(task.projected_mem <= task.num_shares * 2**29 for task in the_plan.tasks)
    assert not the_plan.dropped or "slices" in written
    out = {merge.name: merge for task in the_plan.tasks for merge in task.merges}
    if giver := written.get("copy_rest_from") or written.get("models", [{}])[0].get("model"):
        architecture = describe(giver)[0]
        assert {name: merge.shape for name, merge in out.items()} == architecture.shapes(small=False)
    assert {merge.out_dtype for merge in out.values()} == {"BF16"}
    assert the_plan.total_nbytes == 2 * sum(math.prod(merge.shape) for merge in out.values())


def test_small_models_of_the_same_depth_are_merged(config: Path, tmp_path: Path) -> None:
    written = yaml.safe_load(config.read_text())
    generator = torch.Generator().manual_seed(0)
    for number, model in enumerate(sorted(find_models(written))):
        architecture, config_json = describe(model)
        shapes = architecture.shapes(small=True)
        tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
        write_checkpoint(Path(model), add_noise(tensors, number), config_json)
    merge(config, "merged")
    verify(str(tmp_path / "merged"))
    merged = read_tensors(tmp_path / "merged")
    assert all(bool(x.isfinite().all()) for x in merged.values())
    num_layers = json.loads((tmp_path / "merged" / "config.json").read_text())["num_hidden_layers"]
    layers = {int(name.split(".")[2]) for name in merged if ".layers." in name}
    assert layers == set(range(num_layers))


@pytest.mark.parametrize(
    "path", [p for kind in KINDS for p in sorted(ROOT.glob(f"{kind}/*.yml"))], ids=lambda p: p.stem
)
def test_configs_of_every_kind(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documents = list(yaml.safe_load_all(path.read_text()))
    for number, model in enumerate(sorted(find_models(documents) - {each.get("name") for each in documents})):
        write_stand_in(model, number)
    for entry in documents[-1].get("models", []):
        if file := entry.get("fisher"):
            Path(file).parent.mkdir(exist_ok=True)
            save_file({name: x.float().abs() for name, x in read_tensors(Path(entry["model"])).items()}, file)
    assert not [warning for warning in plan(path).warnings if "unknown" in warning or "ignored" in warning]
    merge(path, "merged", workers=1)
    verify(str(tmp_path / "merged"))
    assert all(bool(x.isfinite().all()) for x in read_tensors(tmp_path / "merged").values())


def write_stand_in(model: str, number: int) -> None:
    """Write a small model of the same depth with a tokenizer; OpenHermes has tokens more than the others."""
    architecture, config_json = describe(model)
    tokenizer = byte_level(TEXTS[0], 300)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"] * ("OpenHermes" in model))
    shapes = architecture.shapes(small=True)
    for name in shapes.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        shapes[name] = (tokenizer.get_vocab_size(), *shapes[name][1:])
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    write_checkpoint(Path(model), tensors, config_json | sizes | {"vocab_size": tokenizer.get_vocab_size()})
    write_tokenizer(Path(model), tokenizer)


def test_rope_theta_of_qwen_and_deepseek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own pair; its weights mean different things, and the plan says so."""
    monkeypatch.chdir(tmp_path)
    names = ("Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    config = next(path for path in CONFIGS if find_models(yaml.safe_load(path.read_text())) == set(names))
    for name in names:
        architecture, config_json = describe(name)
        write_sparse(tmp_path / name, architecture.shapes(small=False), config_json)
    warning = next(text for text in plan(config).warnings if "rope_theta" in text)
    assert f"{names[0]}: 1000000.0" in warning
    assert f"{names[1]}: 10000.0" in warning
    assert f"the output gets {names[0]}'s" in warning


def test_filters_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """t of each tensor, as the slerp with filters asks for it: interpolated over the 32 layers, 0 outside of them."""
    monkeypatch.chdir(tmp_path)
    config = next(path for path in CONFIGS if path.stem == "slerp-filters")
    for model in find_models(yaml.safe_load(config.read_text())):
        architecture, config_json = describe(model)
        write_sparse(tmp_path / model, architecture.shapes(small=True), config_json)
    t = {merge.name: dict(merge.variants[0].parameters)["t"] for task in plan(config).tasks for merge in task.merges}
    assert t["model.embed_tokens.weight"] == t["lm_head.weight"] == t["model.layers.7.input_layernorm.weight"] == 0.5
    for layer, attention in ((0, 0.0), (31, 1.0), (16, 0.3 + 0.4 * (16 / 31 * 4 - 2))):
        assert t[f"model.layers.{layer}.self_attn.q_proj.weight"] == pytest.approx(attention)
    for layer, mlp in ((0, 1.0), (31, 0.0), (16, 0.7 - 0.4 * (16 / 31 * 4 - 2))):
        assert t[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(mlp)
