"""LoRA adapters that peft saved, applied by a merge: what peft's own merge_and_unload gives, and loadable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from raymerge import merge
from raymerge.pipeline.extraction.extract import extract_lora
from raymerge.testing import read_model
from tests.modular_models import make_gemma, make_qwen

peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=16)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, head_dim=8)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=24)),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "patterns, rsLoRA": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7, "^model.layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"down_proj": 2},
        },
    ),
    "rank 65": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 65}),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of updates": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "embedding, head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding that is the head": ("tied llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "head to save": ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "fan in, fan out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "positions": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "classifier": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "experts, inputs first": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, outputs first": ("qwen3 moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
QUICK = ("all linear",)


def save(directory: Path, kind: str, settings: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Save a model and an adapter with peft; return the name of both, and the tensors of the two merged by peft."""
    torch.manual_seed(0)
    model = MAKERS[kind]()
    model.save_pretrained(directory / "base", save_original_format=False)
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 9, "init_lora_weights": False, **settings})
    with quiet():
        tuned = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        tuned.save_pretrained(directory / "adapter")
        fresh = type(model).from_pretrained(directory / "base")
        merged = peft.PeftModel.from_pretrained(fresh, directory / "adapter").merge_and_unload()
    return f"{directory / 'base'}+{directory / 'adapter'}", merged.state_dict()


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore peft's warnings, such as those of transformers' old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_adapters_are_applied_as_by_peft(name: str, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    model, expected = save(tmp_path, kind, settings)
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for tensor, values in merged.items():
        torch.testing.assert_close(values, expected[tensor], rtol=1e-6, atol=1e-6 * float(expected[tensor].abs().max()))
    loaded = type(MAKERS[kind]()).from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(values, loaded[tensor]) for tensor, values in merged.items())


@pytest.mark.slow
def test_square_weights_lie_as_the_others_do(tmp_path: Path) -> None:
    """As peft, which goes by the module, has them, whatever the adapter says."""
    model, expected = save(tmp_path, *CASES["fan in, fan out"])
    stated = tmp_path / "adapter/adapter_config.json"
    stated.write_text(stated.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    for tensor, values in read_model(tmp_path / "out").items():
        torch.testing.assert_close(values, expected[tensor], rtol=1e-6, atol=1e-6 * float(expected[tensor].abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "tower"), [(make_qwen, "qkv"), (make_gemma, "fc1")])
def test_every_module_of_a_model_with_published_names(make: Callable[[], Any], tower: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")  # under the names of transformers 4, which the adapter does not have
    with quiet():
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", tower], init_lora_weights=False)
        tuned = peft.get_peft_model(model, lora)
        tuned.save_pretrained(tmp_path / "adapter")
        tuned.merge_and_unload().save_pretrained(tmp_path / "expected")
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/adapter"}]}, tmp_path / "out"
    )
    merged, expected = read_model(tmp_path / "out"), read_model(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    for name, values in merged.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_methods_take_models_with_adapters(tmp_path: Path) -> None:
    first, one = save(tmp_path / "one", "llama", {"target_modules": "all-linear"})
    second, two = save(tmp_path / "two", "llama", {"target_modules": ["q_proj"], "use_dora": True})
    config = {
        "merge_method": "task_arithmetic",
        "base_model": first.partition("+")[0],
        "models": [{"model": first, "parameters": {"weight": 0.4}}, {"model": second, "parameters": {"weight": 0.7}}],
    }
    merge(config, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    base = read_model(tmp_path / "one" / "base")
    for name, values in merged.items():
        expected = base[name] + 0.4 * (one[name] - base[name]) + 0.7 * (two[name] - base[name])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_layers_of_models_with_adapters_are_stacked(tmp_path: Path) -> None:
    model, expected = save(tmp_path, "llama", {"target_modules": ["q_proj"]})
    sources = [{"sources": [{"model": model, "layer_range": layers}]} for layers in ([0, 2], [1, 2])]
    merge({"merge_method": "passthrough", "slices": sources}, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for layer, origin in ((0, 0), (1, 1), (2, 1)):
        values, wanted = (f"model.layers.{k}.self_attn.q_proj.weight" for k in (layer, origin))
        torch.testing.assert_close(merged[values], expected[wanted], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("with_embeddings", [False, True])
def test_peft_loads_what_is_extracted(kind: str, with_embeddings: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                parameter.add_(torch.randn(rows, 3) @ torch.randn(3, columns), alpha=0.05)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "tuned")
    paths = str(tmp_path / "tuned"), str(tmp_path / "base")
    extract_lora(*paths, tmp_path / "adapter", rank=3, with_embeddings=with_embeddings)
    with quiet():
        fresh = type(model).from_pretrained(tmp_path / "base")
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    for name in read_model(tmp_path / "base"):  # peft does not tie a head again
        torch.testing.assert_close(merged[name], model.state_dict()[name], rtol=1e-4, atol=1e-5)
