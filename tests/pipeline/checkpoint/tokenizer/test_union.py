"""Vocabularies of several tokenizers, against the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import Tokenizer as Read
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import TokenizerReader
from raymerge.pipeline.checkpoint.tokenizer.union import extend, keep_tokenizer, unite
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores, open_stores
from tests.tokenized_models import KINDS, TEXTS, byte_level, unigram, write_tokenizer

LINES = [" ".join(TEXTS), "<s>foo bar </s><|im_start|>fox", "Größe 漢字 😀\n\n  the", ""]


def read(directory: Path, stores: Stores | None = None) -> Read:
    with open_stores() as opened:
        stores = stores or opened
        files = stores.at(str(directory)).list(str(directory))
        found = TokenizerReader(stores, 2**30).read(ModelRef(str(directory)), files)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_union_has_all_tokens_and_the_library_reads_it(kind: str, tmp_path: Path) -> None:
    first, second = KINDS[kind](TEXTS[0]), KINDS[kind](TEXTS[1])
    second.add_special_tokens(["<|im_start|>"])
    second.add_tokens([AddedToken("foo bar", lstrip=True)])
    for name, tokenizer in (("first", first), ("second", second)):
        write_tokenizer(tmp_path / name, tokenizer)
    one, two = read(tmp_path / "first"), read(tmp_path / "second")
    united = unite(keep_tokenizer(one), [(one, one.num_rows), (two, two.num_rows)])
    merged = Tokenizer.from_str(united.dump())
    before, other = first.get_vocab(), second.get_vocab()
    found = merged.get_vocab()
    assert found == dict(united.vocab)
    assert found.keys() == before.keys() | other.keys()
    assert {token: found[token] for token in before} == before
    new = [token for token in sorted(other, key=lambda token: other[token]) if token not in before]
    assert [found[token] for token in new] == list(range(len(before), len(before) + len(new)))
    added = merged.get_added_tokens_decoder()
    assert added[found["foo bar"]].lstrip
    assert added[found["<|im_start|>"]].special

    before_or_added = Tokenizer.from_str(first.to_str())
    before_or_added.add_tokens([AddedToken(token, normalized=True) for token in new[:-2]])
    before_or_added.add_special_tokens(["<|im_start|>"])
    before_or_added.add_tokens([AddedToken("foo bar", lstrip=True)])
    for line in LINES:
        assert merged.encode(line).tokens == before_or_added.encode(line).tokens


def test_new_words_of_one_model_may_be_special_in_another(tmp_path: Path) -> None:
    first, second, third = byte_level(TEXTS[0]), byte_level(TEXTS[1]), byte_level(TEXTS[1])
    word = min(set(second.get_vocab()) - set(first.get_vocab()))
    own = min(set(first.get_vocab()) - set(second.get_vocab()))
    third.add_special_tokens([word, own])
    for name, tokenizer in (("1", first), ("2", second), ("3", third)):
        write_tokenizer(tmp_path / name, tokenizer)
    tokenizers = [read(tmp_path / name) for name in "123"]
    united = unite(keep_tokenizer(tokenizers[0]), [(each, each.num_rows) for each in tokenizers])
    added = Tokenizer.from_str(united.dump()).get_added_tokens_decoder()
    assert added[united.vocab[word]].special
    assert added[united.vocab[own]].special
    assert united.vocab[own] == first.get_vocab()[own]


def test_first_definition_of_an_added_token_holds(tmp_path: Path) -> None:
    first, second = byte_level(TEXTS[0]), byte_level(TEXTS[0])
    first.add_special_tokens(["<x>"])
    second.add_tokens([AddedToken("<x>", rstrip=True)])
    for name, tokenizer in (("1", first), ("2", second)):
        write_tokenizer(tmp_path / name, tokenizer)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    united = unite(keep_tokenizer(one), [(one, one.num_rows), (two, two.num_rows)])
    assert united.conflicts == ("<x>",)
    assert not united.is_changed


def test_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXTS[0], 300)
    write_tokenizer(tmp_path, tokenizer)
    one = read(tmp_path)
    num_rows = tokenizer.get_vocab_size() - 4
    kept = keep_tokenizer(one, num_rows)
    smaller = Tokenizer.from_str(kept.dump())
    assert smaller.get_vocab() == {token: k for token, k in tokenizer.get_vocab().items() if k < num_rows}
    assert max(smaller.encode(" ".join(TEXTS)).ids) < num_rows
    assert smaller.decode(smaller.encode(TEXTS[0]).ids) == TEXTS[0]
    other = byte_level(TEXTS[0], 300)
    write_tokenizer(tmp_path / "other", other)
    two = read(tmp_path / "other")
    assert dict(unite(kept, [(one, num_rows), (two, two.num_rows)]).vocab) == tokenizer.get_vocab()
    assert dict(unite(kept, [(one, num_rows), (two, num_rows)]).vocab) == smaller.get_vocab()


def test_unigrams_cannot_lose_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, unigram(TEXTS[0]))
    one = read(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 2 tokens, such as .* beyond the .* rows"):
        keep_tokenizer(one, one.num_rows - 2)


def test_tokens_that_the_config_names_are_added(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(TEXTS[0]))
    one = read(tmp_path)
    extended = extend(keep_tokenizer(one), ["<new>", "<s>", "<other>"])
    assert [extended.vocab[token] for token in ("<new>", "<s>", "<other>")] == [one.num_rows, 0, one.num_rows + 1]
    assert json.loads(extended.dump())["added_tokens"][-1]["content"] == "<other>"


@pytest.mark.parametrize(
    ("token", "number", "message"),
    [
        ("far", 2**31 - 1, "'far' has the number 2,147,483,647, for which an embedding would need as many rows"),
        ("twin", 0, "'<s>' and 'twin' are both 0"),
        ("\ud800", 300, "not JSON in UTF-8: 'utf-8' codec can't encode"),
    ],
)
def test_tokens_that_no_embedding_can_have(token: str, number: int, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level(TEXTS[0]))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"][token] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)
