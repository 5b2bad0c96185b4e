"""Small dense models with a tokenizer, to make mixtures of experts of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

BEGIN = 1
"""The token with which texts begin."""
CORPUS = ["solve the equation and calculate the sum", "write a python function", "tell me a story about a dragon"]
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": BEGIN,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, **SIZES),
    "mistral": lambda size: MistralConfig(vocab_size=size, **SIZES, sliding_window=8),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, **SIZES, tie_word_embeddings=True),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, **SIZES, head_dim=16),
}


def make_tokenizer(family: str = "") -> Tokenizer:
    """Return a tokenizer that puts a space before a text's first word, as Mistral's does; one of bytes for Qwen."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if family.startswith("qwen"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_family(directory: Path, family: str, num_models: int = 3, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write a base and its fine-tunes, in directories of their own."""
    tokenizer = make_tokenizer(family)
    config: PreTrainedConfig = FAMILIES[family](tokenizer.get_vocab_size())
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    written = []
    for number in range(num_models):
        if number:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        written.append(directory / f"{family}{number}")
        model.save_pretrained(written[-1])
        tokenizer.save(str(written[-1] / "tokenizer.json"))
        settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
        (written[-1] / "tokenizer_config.json").write_text(settings)
    return written


def make_config(models: Sequence[Path | str], **keys: Any) -> dict[str, Any]:
    """Return a mixture whose base is the first model, and its experts the others."""
    prompts = [["solve the equation", "calculate the sum"], ["write a python function"], ["tell me a story"]]
    experts = [{"source_model": str(model), "positive_prompts": prompts[k % 3]} for k, model in enumerate(models[1:])]
    return {"base_model": str(models[0]), "gate_mode": "random", "experts": experts, **keys}
