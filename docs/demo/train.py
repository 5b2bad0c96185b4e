"""Three small language models, trained from what any Python brings along: a base, and its fine-tunes on two texts."""

from __future__ import annotations

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training import train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

WINDOW = 128
"""Bytes that a model sees at once."""
HOLD_OUT = 8
"""Every eighth piece of a text is kept from training."""


@dataclass(frozen=True)
class Text:
    """One kind of text."""

    training: str
    held_out: str


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    name: str
    texts: tuple[str, ...]
    """What it sees, in equal parts."""
    steps: int
    learning_rate: float
    seed: int


BASE = Recipe("base", ("code", "prose"), steps=300, learning_rate=5e-3, seed=1)
FINE_TUNES = (
    Recipe("code", ("code",), steps=200, learning_rate=1e-3, seed=2),
    Recipe("prose", ("prose",), steps=200, learning_rate=1e-3, seed=3),
)


def read_texts() -> dict[str, Text]:
    """Return the two kinds of text: Python code without docstrings and comments, and English prose about Python."""
    return {"code": _split(_read_code()), "prose": _split(_read_prose())}


def train_model(recipe: Recipe, directory: Path) -> None:
    """Train one model, from the base if that is there, and save it with its tokenizer in bfloat16."""
    torch.set_num_threads(1)  # the same numbers on any machine, and the fine-tunes do not get in each other's way
    torch.manual_seed(recipe.seed)
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    texts = read_texts()
    sources = [torch.tensor(tokenizer.encode(texts[name].training)) for name in recipe.texts]
    if recipe is BASE:
        model = _make_model(len(tokenizer))
    else:
        model = LlamaForCausalLM.from_pretrained(directory / BASE.name, dtype=torch.float32)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.stack([_draw_window(sources[row % len(sources)]) for row in range(8)])
        return batch, batch

    train(model, recipe.name, recipe.steps, recipe.learning_rate, draw)
    model.bfloat16().save_pretrained(directory / recipe.name)
    tokenizer.save_pretrained(directory / recipe.name)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _make_model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
    )
    return LlamaForCausalLM(config)


def _draw_window(tokens: torch.Tensor) -> torch.Tensor:
    start = int(torch.randint(len(tokens) - WINDOW, (1,)))
    return tokens[start : start + WINDOW]


def _read_code() -> list[str]:
    """Return files of the standard library, 600 kB of them."""
    pieces: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
        pieces.append(ast.unparse(tree) + "\n")
        if sum(map(len, pieces)) > 600_000:
            break
    return pieces


def _read_prose() -> list[str]:
    """Return the paragraphs of the language reference that pydoc shows, without its examples and grammar."""
    paragraphs = (paragraph for _, topic in sorted(topics.items()) for paragraph in topic.split("\n\n"))
    prose = (p for p in paragraphs if len(p) > 60 and not p.startswith("  ") and "::=" not in p)
    return [p.replace("\n", " ") + "\n" for p in dict.fromkeys(prose)]


def _split(pieces: list[str]) -> Text:
    return Text(
        training="".join(piece for i, piece in enumerate(pieces) if i % HOLD_OUT),
        held_out="".join(pieces[::HOLD_OUT]),
    )
