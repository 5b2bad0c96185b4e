"""The tokenizer of an output: that of one model, or of one with the tokens that others have besides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import Tokenizer, make_added
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import counted

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class OutTokenizer:
    """The output's tokenizer."""

    first: Tokenizer
    """The one that it was made from."""
    vocab: Mapping[str, int] = field(repr=False)
    """The number of every token."""
    added: Mapping[str, Json] = field(repr=False)
    """Tokens that `first` does not have as added ones, each as tokenizer.json wants it, in order of their numbers."""
    stripped: frozenset[str] = field(repr=False)
    """Tokens of `first` that are left out, for the embedding has no rows for them."""
    conflicts: tuple[str, ...] = ()
    """Tokens whose flags differ between the models: the first model's hold."""

    @property
    def num_rows(self) -> int:
        """One more than the largest number."""
        return max(self.vocab.values(), default=-1) + 1

    @property
    def is_changed(self) -> bool:
        """Whether its files are others than those of `first`."""
        return bool(self.added or self.stripped)

    def dump(self) -> str:
        """Return the text of tokenizer.json."""
        content = dict(self.first.content)
        known = [entry for entry in self.first.added.values() if entry["content"] not in self.stripped]
        entries = sorted([*known, *self.added.values()], key=lambda entry: int(entry["id"]))
        content["added_tokens"] = entries
        if self.stripped:
            content["model"] = _strip(dict(content["model"]), self.stripped)
        sections = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items())
        return "{\n" + ",\n".join(sections) + "\n}\n"  # indented, it takes ten times as long


def keep_tokenizer(first: Tokenizer, num_rows: int | None = None) -> OutTokenizer:
    """Return a model's tokenizer as it is, or without the tokens that its embedding has no rows for.

    Raises:
        CheckpointError: there are such tokens in a vocabulary that is no BPE, and they cannot be left out.
    """
    stripped = frozenset(t for t, number in first.vocab.items() if num_rows is not None and number >= num_rows)
    kind = first.content["model"].get("type") or ("BPE" if "merges" in first.content["model"] else "")
    in_model = [token for token in stripped if token not in first.added]
    if in_model and kind != "BPE":
        raise CheckpointError(
            f"{first.url}: {counted(len(in_model), 'token')}, such as {min(in_model)!r}"
            f" ({first.vocab[min(in_model)]}), are beyond the {num_rows:,} rows of the embedding, and cannot be taken"
            f" out of a vocabulary of the kind {kind or 'of this file'}; name another tokenizer in `tokenizer.source`"
        )
    vocab = {token: number for token, number in first.vocab.items() if token not in stripped}
    return OutTokenizer(first, vocab, {}, stripped)


def unite(base: OutTokenizer, others: Sequence[tuple[Tokenizer, int]]) -> OutTokenizer:
    """Return a tokenizer with the tokens of others besides its own.

    New tokens get the next numbers: first the ordinary ones, model by model in order of their numbers there, then the
    added ones. They are matched as a whole, before the text is split; merges stay as they are.

    Args:
        base: to begin with.
        others: of the models, in order, base included; each with the rows of its embedding, beyond which it has none.
    """
    made = _Growing(base)
    distinct = list({(other.digest, num_rows): (other, num_rows) for other, num_rows in others}.values())
    for other, num_rows in distinct:
        for number, token in sorted((other.vocab[token], token) for token in other.vocab.keys() - made.vocab.keys()):
            if token not in other.added and number < num_rows:
                made.add(token)
    for other, num_rows in distinct:
        for number, token in sorted((other.vocab[token], token) for token in other.added):
            if number < num_rows:
                made.define(token, other.added[token])
    return made.finish()


def extend(base: OutTokenizer, tokens: Iterable[str]) -> OutTokenizer:
    """Return a tokenizer with these tokens besides its own, each matched as a whole."""
    made = _Growing(base)
    for token in tokens:
        if token not in made.vocab:
            made.add(token)
    return made.finish()


class _Growing:
    """A tokenizer that gets more tokens, one after the other."""

    def __init__(self, base: OutTokenizer) -> None:
        self._base = base
        self.vocab = dict(base.vocab)
        self._stop = base.num_rows
        self._added = dict(base.added)
        self._defined = {token: entry for token, entry in base.first.added.items() if token in base.vocab}
        self._conflicts: dict[str, None] = {}

    def add(self, token: str, flags: Mapping[str, Any] | None = None) -> None:
        """Give a token the next number, unless it has one."""
        number = self.vocab.setdefault(token, self._stop)
        self._stop = max(self._stop, number + 1)
        self._added[token] = make_added(token, number, flags)

    def define(self, token: str, flags: Json) -> None:
        """Add a token with the flags that its first model gives it."""
        first = self._defined.get(token)
        if first is None:
            self._defined[token] = flags
            self.add(token, flags)
        elif any(first.get(name) != flags.get(name) for name in _FLAGS):
            self._conflicts[token] = None

    def finish(self) -> OutTokenizer:
        """Return what it has become."""
        base = self._base
        return OutTokenizer(base.first, self.vocab, self._added, base.stripped, tuple(self._conflicts))


def _strip(model: Json, stripped: frozenset[str]) -> Json:
    """Return a BPE without some tokens, and without the merges that make them or are made of them."""
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in stripped}
    merges = []
    for merge in model["merges"] if isinstance(model.get("merges"), list) else ():
        parts = merge if isinstance(merge, list) else str(merge).split(" ")
        if stripped.isdisjoint((*map(str, parts), "".join(map(str, parts)))):
            merges.append(merge)
    model["merges"] = merges
    return model
