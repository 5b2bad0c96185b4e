"""Tiny models with real tokenizers of every kind, trained by the `tokenizers` library."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.checkpoints import llama_config, llama_tensors, write_checkpoint

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "something else entirely was written there, and then them",
    "a third language model splits its other words in another way",
)
SPECIAL = ("<s>", "</s>")
WIDTH = 16


def byte_level(text: str, size: int = 290) -> Tokenizer:
    """Return a byte-level BPE, as those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def byte_fallback(text: str, size: int = 330) -> Tokenizer:
    """Return a BPE of characters that falls back on bytes, as SentencePiece's of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *SPECIAL, *(f"<0x{k:02X}>" for k in range(256))]
    tokenizer.train_from_iterator(
        [text] * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(content))


def unigram(text: str, size: int = 60) -> Tokenizer:
    """Return a Unigram model, as SentencePiece's of T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def word_piece(text: str, size: int = 60) -> Tokenizer:
    """Return a WordPiece, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


KINDS: dict[str, Callable[[str], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
    "Unigram": unigram,
    "WordPiece": word_piece,
}


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **config: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(stated))


def write_tokenized(
    directory: Path,
    seed: int,
    tokenizer: Tokenizer,
    *,
    more_rows: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    width: int = WIDTH,
    **config: Any,
) -> Path:
    """Write a tiny Llama with a tokenizer, whose embedding has a row for each token, and perhaps more."""
    vocab = tokenizer.get_vocab_size() + more_rows
    tensors = llama_tensors(seed, dtype=dtype, head=not tied, vocab=vocab, hidden=width)
    stated = llama_config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, head_dim=width // 2, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=tied, torch_dtype=str(dtype).removeprefix("torch."), **config,
    )  # fmt: skip
    write_checkpoint(directory, tensors, stated)
    write_tokenizer(directory, tokenizer)
    return directory


def write_family(directory: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> list[Path]:
    """Write three models whose byte-level tokenizers differ in ordinary and in added tokens."""
    first, second, third = (byte_level(text, size) for text, size in zip(TEXTS, (280, 290, 285), strict=True))
    first.add_special_tokens(["<pad>"])
    second.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    second.add_tokens(["foo bar"])
    third.add_special_tokens(["<|im_start|>"])
    third.add_tokens([AddedToken("<pad>", lstrip=True)])
    return [
        write_tokenized(directory / name, seed, tokenizer, dtype=dtype, tied=tied)
        for seed, (name, tokenizer) in enumerate(zip("abc", (first, second, third), strict=True))
    ]


def read_vocab(directory: Path) -> dict[str, int]:
    """Return the tokens of a model, as the `tokenizers` library reads them."""
    vocab: dict[str, int] = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    return vocab


def align(
    rows: Sequence[torch.Tensor], vocabs: Sequence[dict[str, int]], out: dict[str, int], base: int | None
) -> list[torch.Tensor]:
    """Return each model's rows in another vocabulary, token by token as mergekit's documentation has it."""
    aligned = [torch.zeros(len(out), *matrix.shape[1:]) for matrix in rows]
    for token, number in out.items():
        own = [
            matrix[vocab[token]].float() if vocab.get(token, len(matrix)) < len(matrix) else None
            for matrix, vocab in zip(rows, vocabs, strict=True)
        ]
        there = [row for row in own if row is not None]
        default = torch.stack(there).mean(0) if there else torch.zeros(rows[0].shape[1:])
        if base is not None and (of_base := own[base]) is not None:
            default = of_base
        for matrix, row in zip(aligned, own, strict=True):
            matrix[number] = default if row is None else row
    return aligned


SCRIPTS = ("abcdefghijklmnopqrstuvwxyz", "абвгдежзиклмнопрстуфхцчшщыэюя", "αβγδεζηθικλμνξοπρστυφχψω", "कखगघचछजझटठडढणत")
DENSE = ((0x4E00, 0x9FA5), (0xAC00, 0xD7A3))
"""Ranges of characters that are words, or nearly, each."""


def draw_words(number: int, seed: int) -> list[str]:
    """Return different words of several scripts, every other one after a space."""
    draw = random.Random(seed)
    parts = [["".join(draw.choices(script, k=draw.randint(1, 3))) for _ in range(300)] for script in SCRIPTS]
    words: dict[str, None] = {}
    while len(words) < number:
        word = "".join(draw.choices(draw.choice(parts), k=draw.randint(1, 4)))
        dense = "".join(chr(draw.randint(*draw.choice(DENSE))) for _ in range(draw.randint(1, 2)))
        words |= {f" {word}": None, word: None, dense: None}
    return list(words)[:number]


def large_byte_level(words: Sequence[str], added: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE whose tokens are the bytes, the beginnings of words in order, and special ones."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    signs = [chr(byte if byte in printed else next(others)) for byte in range(0x100)]
    vocab = {sign: number for number, sign in enumerate(signs)}
    merges: list[tuple[str, str]] = []
    for word in words:
        encoded = "".join(signs[byte] for byte in word.encode())
        for stop in range(2, len(encoded) + 1):
            if encoded[:stop] not in vocab:
                vocab[encoded[:stop]] = len(vocab)
                merges.append((encoded[: stop - 1], encoded[stop - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def write_large_pair(home: Path) -> list[str]:
    """Write two models of more than 150,000 tokens, nearly all of which have other numbers; return words of both."""
    words = draw_words(33_500, 0)
    first, second = words[:32_500], words[1000:]
    random.Random(1).shuffle(second)
    for seed, (name, own, special) in enumerate((("a", first, "<pad>"), ("b", second, "<|im_start|>"))):
        write_tokenized(home / name, seed, large_byte_level(own, (*SPECIAL, special)), width=8)
    return words


def draw_lines(number: int, words: Sequence[str], seed: int) -> list[str]:
    """Return lines of words, numbers and marks."""
    draw = random.Random(seed)
    marks = [",", ".", "!", "\n", "  ", "(", "12", "3456", "😀", "é", "//", "==", "<s>"]
    return [" ".join(draw.choice(words if draw.random() < 0.8 else marks) for _ in range(12)) for _ in range(number)]
