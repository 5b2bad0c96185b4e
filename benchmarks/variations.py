"""LoRA adapters, and tokenizers whose tokens have other numbers, to go with the benchmarks' models.

`python benchmarks/variations.py DIRECTORY adapters NAME COUNT RANK` writes adapters for all linear layers of a family;
`... vocabularies NAME COUNT` gives its fine-tunes tokenizers of one vocabulary, shuffled. What is there is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from checkpoints import LAYOUTS, family_paths, make_family

FACTOR_STD = 0.02
"""Standard deviation of both factors of an adapter."""
NUM_OWN = 500
"""Tokens that each shuffled vocabulary has alone; all others are common."""


def adapter_paths(directory: Path, name: str, count: int, rank: int) -> list[Path]:
    """Return the directories of a family's adapters."""
    return [directory / f"{name}-adapters" / f"rank{rank}-{number}" for number in range(count)]


def vocabulary_paths(directory: Path, name: str, count: int) -> list[Path]:
    """Return the directories of fine-tunes with shuffled vocabularies, whose weights are links to the family's."""
    return [directory / f"{name}-vocabularies" / f"tune{number}" for number in range(1, count + 1)]


def make_adapters(directory: Path, name: str, count: int, rank: int) -> None:
    """Write adapters in bfloat16 for every linear layer, as peft names them."""
    import torch
    from safetensors.torch import save_file

    base = family_paths(directory, name, 0)[0]
    layers = {
        tensor: shape for tensor, shape in LAYOUTS[name].tensors.items() if "_proj.weight" in tensor and len(shape) == 2
    }
    targets = sorted({tensor.split(".")[-2] for tensor in layers})
    for number, path in enumerate(adapter_paths(directory, name, count, rank)):
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        factors = {}
        for tensor, (rows, columns) in layers.items():
            for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.randn(shape, generator=generator).mul_(FACTOR_STD).to(torch.bfloat16)
                factors[f"base_model.model.{tensor.removesuffix('.weight')}.lora_{letter}.weight"] = values
        save_file(factors, path / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base),
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
        }
        (path / "adapter_config.json").write_text(json.dumps(config))


def make_vocabularies(directory: Path, name: str, count: int) -> None:
    """Give fine-tunes tokenizers that have nearly all tokens in common, under other numbers; the first one's stay."""
    make_family(directory, name, count)
    vocab_size = LAYOUTS[name].config["vocab_size"]
    for number, path in enumerate(vocabulary_paths(directory, name, count), start=1):
        if (path / "tokenizer.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        for file in family_paths(directory, name, count)[number].iterdir():
            if file.suffix == ".safetensors":
                (path / file.name).symlink_to(file)
            else:
                shutil.copy(file, path)
        tokens = [f"t{k}" for k in range(vocab_size - NUM_OWN)] + [f"own{number}.{k}" for k in range(NUM_OWN)]
        if number > 1:
            random.Random(number).shuffle(tokens)
        (path / "tokenizer.json").write_text(json.dumps(_describe(tokens)))


def _describe(tokens: list[str]) -> dict[str, Any]:
    """Return a tokenizer of whole words."""
    model = {"type": "WordLevel", "vocab": {token: k for k, token in enumerate(tokens)}, "unk_token": tokens[0]}
    parts = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
        **dict.fromkeys(parts),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("what", choices=("adapters", "vocabularies"))
    parser.add_argument("name", choices=LAYOUTS)
    parser.add_argument("count", type=int)
    parser.add_argument("rank", type=int, nargs="?", default=16)
    arguments = parser.parse_args()
    if arguments.what == "adapters":
        make_adapters(arguments.directory, arguments.name, arguments.count, arguments.rank)
    else:
        make_vocabularies(arguments.directory, arguments.name, arguments.count)
