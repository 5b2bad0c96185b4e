"""A base and two fine-tunes of it for arithmetic: one answers at once, one thinks first and checks what it thought."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from training import train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SIGNS = "0123456789+-*=;#"
"""Each is one token; `#` stands before the second pass of a thought."""
MARKS = ("<pad>", "<user>", "<assistant>", "<end>", "<think>", "</think>")
MAX_STEPS = 5
"""Operations of the longest problem."""
LENGTH = 2 * MAX_STEPS + 4 + 2 * 6 * MAX_STEPS + 8
"""Tokens of the longest conversation, rounded up."""

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    name: str
    styles: tuple[int, ...]
    """How often an answer works the problem out before it is given: each is drawn as often."""
    steps: int
    learning_rate: float
    seed: int


BASE = Recipe("base", (0, 1, 1, 1), steps=900, learning_rate=4e-3, seed=1)
FINE_TUNES = (
    Recipe("answering", (0,), steps=300, learning_rate=3e-4, seed=2),
    Recipe("thinking", (2,), steps=1000, learning_rate=4e-4, seed=3),
)


@dataclass(frozen=True)
class Problem:
    """A chain of operations on digits, from left to right, of whose results only the last digit is kept."""

    text: str
    steps: tuple[str, ...]
    """One equation for each operation."""

    @property
    def answer(self) -> str:
        """The last digit."""
        return self.steps[-1][-1]

    def reply(self, passes: int) -> str:
        """Return a reply that works the problem out so many times before it answers."""
        thought = "#".join([";".join(self.steps)] * passes)
        return f"<think>{thought}</think>{self.answer}" if passes else self.answer


def make_problem(draw: random.Random, num_steps: int) -> Problem:
    """Draw a problem."""
    value = draw.randrange(10)
    text, steps = str(value), []
    for _ in range(num_steps):
        sign, other = draw.choice("+-*"), draw.randrange(10)
        result = {"+": value + other, "-": value - other, "*": value * other}[sign] % 10
        steps.append(f"{value}{sign}{other}={result}")
        text, value = f"{text}{sign}{other}", result
    return Problem(text, tuple(steps))


def draw_problems(count: int, seed: int) -> list[Problem]:
    """Draw problems of one to `MAX_STEPS` operations, as many of each."""
    draw = random.Random(seed)
    return [make_problem(draw, 1 + k % MAX_STEPS) for k in range(count)]


def train_model(recipe: Recipe, directory: Path) -> None:
    """Train one model, from the base if it is a fine-tune, and save it with its tokenizer in bfloat16."""
    torch.set_num_threads(1)  # the same numbers on any machine, and the fine-tunes do not get in each other's way
    torch.manual_seed(recipe.seed)
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    if recipe == BASE:
        model = _make_model(tokenizer)
    else:
        model = LlamaForCausalLM.from_pretrained(directory / BASE.name, dtype=torch.float32)
    draw = partial(_draw_batch, tokenizer, random.Random(recipe.seed), recipe.styles)
    train(model, recipe.name, recipe.steps, recipe.learning_rate, draw)
    model.bfloat16().save_pretrained(directory / recipe.name)
    tokenizer.save_pretrained(directory / recipe.name)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each sign and mark, and a chat template."""
    vocabulary = {token: k for k, token in enumerate((*MARKS, *SIGNS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
    )
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = TEMPLATE
    return made


def _make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _draw_batch(
    tokenizer: PreTrainedTokenizerFast, draw: random.Random, styles: tuple[int, ...], rows: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conversations as tokens, padded on the right, and their labels: the replies alone are learnt."""
    tokens = torch.full((rows, LENGTH), tokenizer.pad_token_id)
    labels = torch.full((rows, LENGTH), -100)
    longest = 0
    for row in range(rows):
        problem = make_problem(draw, draw.randint(1, MAX_STEPS))
        prompt = tokenizer.encode(f"<user>{problem.text}<assistant>", add_special_tokens=False)
        reply = tokenizer.encode(f"{problem.reply(draw.choice(styles))}<end>", add_special_tokens=False)
        stop = len(prompt) + len(reply)
        tokens[row, :stop] = torch.tensor([*prompt, *reply])
        labels[row, len(prompt) : stop] = torch.tensor(reply)
        longest = max(longest, stop)
    return tokens[:, :longest], labels[:, :longest]
