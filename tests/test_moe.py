"""Mixtures of experts from dense models: what is written, and that transformers makes of it what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from raymerge import CheckpointError, ConfigError, MemoryLimitError, TensorMismatchError, merge, plan
from raymerge.pipeline.plan.forms import gates
from raymerge.testing import merge_in_every_way
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import MANIFEST, read_tensors
from tests.mixtures import BEGIN, make_config, make_tokenizer, write_family

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def load(directory: Path) -> Any:
    """Load a model that needs no tensor besides those that are stored, and has a place for each."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


def run(model: Any, *tokens: int) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def test_random_mixtral(tmp_path: Path) -> None:
    models = write_family(tmp_path, "mistral")
    merged = merge_in_every_way(make_config(models), tmp_path / "out")
    base, *experts = (load_file(model / "model.safetensors") for model in models)
    for name, tensor in merged.items():
        before, _, rest = name.partition(".block_sparse_moe.")
        if not rest:
            assert torch.equal(tensor, base[name])
        elif rest == "gate.weight":
            assert tensor.shape == (2, 48)
            assert 0.8 < tensor.std() < 1.2
        else:
            _, number, own, _ = rest.split(".")
            assert torch.equal(tensor, experts[int(number)][f"{before}.mlp.{PROJECTIONS[own]}.weight"])
    routers = [merged[f"model.layers.{k}.block_sparse_moe.gate.weight"] for k in range(2)]
    assert not torch.equal(*routers)
    model = load(tmp_path / "out" / "plenty")
    config = json.loads((tmp_path / "out" / "plenty" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 2, 2)
    assert config["sliding_window"] == 8
    assert model.generate(torch.tensor([[BEGIN, 5, 9]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert (tmp_path / "out" / "plenty" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "mixtral"), ("mistral", "mixtral"), ("llama", "qwen"), ("qwen2", "qwen"), ("qwen3", "")],
)
def test_a_mixture_of_copies_does_what_its_base_does(tmp_path: Path, family: str, architecture: str) -> None:
    [base] = write_family(tmp_path, family, 1)
    config = make_config([base, base, base, base], architecture=architecture or None)
    if architecture == "qwen":
        config["shared_experts"] = [{"source_model": str(base), "residual_scale": 0}]
    merge(config, tmp_path / "out")
    tokens = (BEGIN, *range(3, 60))
    expected, found = (run(load(directory), *tokens) for directory in (base, tmp_path / "out"))
    assert torch.allclose(found, expected, atol=1e-5)


def test_shared_expert(tmp_path: Path) -> None:
    models = write_family(tmp_path, "qwen2", 4, torch.bfloat16)
    config = make_config(models[:3], gate_mode="cheap_embed", dtype="bfloat16")
    shared = {"source_model": str(models[3]), "positive_prompts": ["about a dragon"], "residual_scale": 0.5}
    merge(config | {"shared_experts": [shared]}, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    source = load_file(models[3] / "model.safetensors")
    for projection, factor in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0.5)):
        expected = source[f"model.layers.1.mlp.{projection}.weight"] * factor
        assert torch.equal(merged[f"model.layers.1.mlp.shared_expert.{projection}.weight"], expected)
    assert merged["model.layers.1.mlp.shared_expert_gate.weight"].shape == (1, 48)
    assert "lm_head.weight" not in merged
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    model = load(tmp_path / "out")
    assert model.config.shared_expert_intermediate_size == 64
    assert model.config.tie_word_embeddings


class DeepseekMlp(torch.nn.Module):
    """Experts as DeepSeek-MoE has them (Dai et al. 2024, equations 9 to 11), with the chosen gates made to sum to 1."""

    def __init__(self, tensors: dict[str, torch.Tensor], num_chosen: int) -> None:
        super().__init__()
        self.tensors = tensors
        self.num_chosen = num_chosen

    def expert(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.tensors[f"{prefix}.{name}.weight"] for name in PROJECTIONS.values())
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self.tensors["gate.weight"].T).softmax(-1)
        chosen = scores >= scores.topk(self.num_chosen).values[..., -1:]
        weights = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
        experts = [self.expert(f"experts.{k}", x) * weights[..., k : k + 1] for k in range(weights.shape[-1])]
        return torch.stack(experts).sum(0) + self.expert("shared_experts", x)


def test_deepseek(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama", 2)
    config = make_config([models[0], *models[:1] * 3], architecture="deepseek")
    merge(config | {"shared_experts": [{"source_model": str(models[1]), "residual_scale": 0}]}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["DeepseekForCausalLM"], "deepseek")
    assert (written["n_routed_experts"], written["n_shared_experts"], written["moe_intermediate_size"]) == (3, 1, 64)
    merged = read_tensors(tmp_path / "out")
    base = load(models[0])
    tokens = (BEGIN, *range(3, 60))
    expected = run(base, *tokens)
    for k, layer in enumerate(base.model.layers):
        prefix = f"model.layers.{k}.mlp."
        own = {name.removeprefix(prefix): tensor for name, tensor in merged.items() if name.startswith(prefix)}
        layer.mlp = DeepseekMlp(own, written["num_experts_per_tok"])
    assert torch.allclose(run(base, *tokens), expected, atol=1e-5)
    load_result = base.load_state_dict(merged, strict=False)
    assert not load_result.missing_keys
    assert all(".mlp." in name for name in load_result.unexpected_keys)


def test_cheap_embed(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama", dtype=torch.bfloat16)
    config = make_config(models, gate_mode="cheap_embed", dtype="float32")
    config["experts"][0]["negative_prompts"] = ["tell me a story"]
    merge(config, tmp_path / "out")
    embedding = load_file(models[0] / "model.safetensors")["model.embed_tokens.weight"].double()
    tokenizer = make_tokenizer()

    def look(*texts: str) -> torch.Tensor:
        ids = [token for text in texts for token in tokenizer.encode(f"<s>{text}", add_special_tokens=False).ids]
        assert BEGIN in ids
        return torch.nn.functional.normalize(embedding[ids].sum(0), dim=0)

    rows = [look("solve the equation", "calculate the sum") - look("tell me a story"), look("write a python function")]
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    merged = read_tensors(tmp_path / "out")
    for layer in range(2):
        assert torch.allclose(merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double(), expected)


@pytest.mark.slow  # transformers is imported in a process of its own
def test_hidden(tmp_path: Path) -> None:
    models = write_family(tmp_path, "mistral", dtype=torch.bfloat16)
    config = make_config(models, gate_mode="hidden", dtype="float32")
    config["experts"][1]["negative_prompts"] = ["tell me a story"]
    planned = plan(config)
    assert "pass" in planned.notes[0]
    merge(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["fingerprint"] == planned.fingerprint
    base, tokenizer = load(models[0]), make_tokenizer()

    def look(layer: int, *texts: str) -> torch.Tensor:
        found = []
        for text in texts:
            ids = tokenizer.encode(f"<s>{text}", add_special_tokens=False).ids
            states = base(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
            found.append(states[-1])
        return torch.stack(found).mean(0)

    merged = read_tensors(tmp_path / "out")
    for layer in range(2):
        rows = [
            look(layer, "solve the equation", "calculate the sum"),
            look(layer, "write a python function") - look(layer, "tell me a story"),
        ]
        expected = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        assert torch.allclose(merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"], expected, atol=1e-5)


def test_hidden_states_take_memory_that_is_planned(tmp_path: Path) -> None:
    config = make_config(write_family(tmp_path, "llama"), gate_mode="hidden")
    with pytest.raises(MemoryLimitError, match=r"gate_mode: hidden_last: \d+MiB are needed .* give --memory"):
        plan(config, memory="1MiB")


def test_noise_and_residual_scale(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama")
    config = make_config(models, gate_mode="uniform_random")
    config["experts"][0] |= {"noise_scale": 0.1, "residual_scale": 0.5}
    merged = merge_in_every_way(config, tmp_path / "out")
    source = load_file(models[1] / "model.safetensors")
    prefix = "model.layers.0."
    noises = []
    for own, projection in PROJECTIONS.items():
        found = merged[f"{prefix}block_sparse_moe.experts.0.{own}.weight"]
        scale = 0.5 if own == "w2" else 1
        noises.append(found / scale - source[f"{prefix}mlp.{projection}.weight"])
        assert 0.09 < noises[-1].std() < 0.11
        assert abs(noises[-1].mean()) < 0.01
    assert not torch.allclose(noises[0], noises[1])
    assert torch.equal(
        merged[f"{prefix}block_sparse_moe.experts.1.w2.weight"],
        load_file(models[2] / "model.safetensors")[f"{prefix}mlp.down_proj.weight"],
    )
    gate = merged[f"{prefix}block_sparse_moe.gate.weight"]
    assert gate.abs().max() < 48**-0.5
    assert gate.std() > 0.5 * 48**-0.5


def test_the_seed_decides(tmp_path: Path) -> None:
    config = make_config(write_family(tmp_path, "llama"))
    for seed in (0, 1):
        merge(config, tmp_path / f"out{seed}", seed=seed)
    first, second = (read_tensors(tmp_path / f"out{seed}") for seed in (0, 1))
    assert [name for name in first if not torch.equal(first[name], second[name])] == [
        f"model.layers.{k}.block_sparse_moe.gate.weight" for k in range(2)
    ]


def test_the_plan_tells_what_is_left_out(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama")
    found = plan(make_config(models))
    assert [line.partition(": ")[0] for line in found.dropped[:3]] == [str(model) for model in models]
    assert "make way for those of the experts" in found.dropped[0]
    assert "an expert gives its MLPs" in found.dropped[1]
    assert found.method == "moe"
    assert found.warnings == ()


def change(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama", 2)
    [qwen] = write_family(tmp_path, "qwen2", 1)
    with pytest.raises(TensorMismatchError, match=r"experts\[1\]: .*qwen20 is of the family qwen2, and Mixtral"):
        plan(make_config([*models, qwen]))
    tensors = load_file(models[1] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:, :40].contiguous()}, models[1] / "model.safetensors")
    with pytest.raises(TensorMismatchError, match=rf"experts\[0\]: {name} is \[64, 40\] in .*\[64, 48\] is needed"):
        plan(make_config([models[0], models[1]], experts_per_token=1))
    save_file(tensors | {name: tensors[name] > 0}, models[1] / "model.safetensors")
    with pytest.raises(TensorMismatchError, match=rf"experts\[0\]: {name} is BOOL in .*, and a floating-point"):
        plan(make_config([models[0], models[1]], experts_per_token=1))
    save_file({k: v for k, v in tensors.items() if k != name}, models[1] / "model.safetensors")
    with pytest.raises(TensorMismatchError, match=f"{name} is not in "):
        plan(make_config([models[0], models[1]], experts_per_token=1))
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    save_file(kept, models[1] / "model.safetensors")
    change(models[1], num_hidden_layers=1)
    with pytest.raises(TensorMismatchError, match=r"llama1 has 1 layer, and .*llama0 has 2"):
        plan(make_config([models[0], models[1]], experts_per_token=1))


def test_what_no_mixture_has_a_place_for(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama", 2)
    config = make_config([models[0], *models])
    with pytest.raises(ConfigError, match=r"of the family llama.*\n  Qwen3-MoE is made of qwen3 models"):
        plan(config | {"architecture": "qwen3"})
    shared = {"source_model": str(models[1])}
    with pytest.raises(ConfigError, match="Mixtral has no shared experts; take 1 out of `shared_experts`"):
        plan(config | {"architecture": "mixtral", "shared_experts": [shared]})
    with pytest.raises(ConfigError, match="Qwen2-MoE needs one shared expert"):
        plan(config | {"architecture": "qwen"})
    tensors = load_file(models[0] / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}, models[0] / "model.safetensors")
    with pytest.raises(ConfigError, match=r"Mixtral has no place for self_attn\.o_proj\.bias"):
        plan(config)
    change(models[0], model_type="gemma2")
    with pytest.raises(ConfigError, match="of the family gemma2"):
        plan(config)


def test_prompts_need_a_tokenizer_that_fits(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama")
    config = make_config(models, gate_mode="cheap_embed")
    tensors = load_file(models[0] / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:9].clone()}, models[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"makes token \d+ of a prompt, and model.embed_tokens.weight has 9 rows"):
        plan(config)
    save_file(tensors | {name: tensors[name] * float("nan")}, models[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its embedding makes NaN or infinity of the prompts of"):
        plan(config)
    (models[0] / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the tokenizers library cannot use it"):
        plan(config)
    (models[0] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, and routers are made of prompts"):
        plan(config)
    assert plan(config | {"gate_mode": "random"})


def test_an_expert_may_be_another_merge(tmp_path: Path) -> None:
    models = write_family(tmp_path, "llama")
    average = {
        "name": "average",
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1}} for model in models[1:]],
        "dtype": "float32",
    }
    mixture = make_config([models[0], models[1], "average"])
    merge(yaml.safe_dump_all([average, mixture]), tmp_path / "out")
    merge(average, tmp_path / "average")
    merge(make_config([models[0], models[1], tmp_path / "average"]), tmp_path / "expected")
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_expert_may_have_an_adapter(tmp_path: Path) -> None:
    [base, other] = write_family(tmp_path, "llama", 2)
    module = "model.layers.1.mlp.down_proj"
    factors = draw_factors(module, 48, 64)
    adapter = write_adapter(tmp_path / "adapter", factors)
    merge(make_config([base, f"{base}+{adapter}", other]), tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    stored = load_file(base / "model.safetensors")
    update = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"] * 2  # lora_alpha 4, rank 2
    prefix = "model.layers.1.block_sparse_moe.experts.0."
    assert torch.allclose(found[f"{prefix}w2.weight"], stored[f"{module}.weight"] + update, atol=1e-5)
    assert torch.equal(found[f"{prefix}w1.weight"], stored["model.layers.1.mlp.gate_proj.weight"])


def test_experts_are_checked_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_family(tmp_path, "llama", 2)
    [qwen] = write_family(tmp_path, "qwen2", 1)
    (models[0] / "tokenizer.json").unlink()
    with pytest.raises(TensorMismatchError, match="of the family qwen2"):
        plan(make_config([*models, qwen], gate_mode="cheap_embed"))
    monkeypatch.setattr(gates, "_NOTABLE_NBYTES", 100)
    with pytest.raises(MemoryLimitError, match=r"routers of 2 experts take \d+MiB, and .* are allowed"):
        plan(make_config([*models, models[1]]), memory=500)
