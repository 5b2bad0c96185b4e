"""A model's tokenizer as its files have it: the number of each token, and which tokens are matched as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from raymerge.pipeline.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG, is_tokenizer
from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.decoding import is_deep
from raymerge.pipeline.errors import CheckpointError, MemoryLimitError
from raymerge.pipeline.messages import counted, escaped, listing, shown
from raymerge.pipeline.sizes import format_memory
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.open import Stores

SPECIAL_TOKENS = "special_tokens_map.json"

_MAX_NBYTES = 512 * 2**20
_PIECE_NBYTES = 2**22
_PARSED = 8
"""Memory of a parsed tokenizer.json, as a multiple of its size. Measured with 150,000 and 1,000,000 tokens: 4 to 7."""
_UNITED = 12
"""Memory of each of several tokenizers with the rows that it is mapped to, likewise. Measured with 8 of 150,000: 11."""
_NOTABLE_NBYTES = 256 * 2**20
_MAX_ID = 2**31 - 1
_MAX_HOLES = 2**16
"""Numbers below the largest that no token has, besides as many as there are tokens: each takes a row."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
_PROBLEMS = 3


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """One model's tokenizer."""

    url: str
    """The file that says it."""
    content: Json = field(repr=False)
    """tokenizer.json, parsed."""
    vocab: Mapping[str, int] = field(repr=False)
    """The number of every token, added ones included."""
    added: Mapping[str, Json] = field(repr=False)
    """Tokens that are matched before the text is split, each with the flags that tokenizer.json has of it."""
    digest: str
    """Equal for two tokenizers only if their files are."""

    @property
    def num_rows(self) -> int:
        """The rows that an embedding needs for it: one more than its largest number."""
        return max(self.vocab.values(), default=-1) + 1


class TokenizerReader:
    """Reads tokenizers; models that have equal files share one."""

    def __init__(self, stores: Stores, allowed_mem: int) -> None:
        """Read from these stores.

        Args:
            stores: that have the models.
            allowed_mem: of the merge, in bytes, which a file may not exceed by itself.
        """
        self._stores = stores
        self._allowed_mem = allowed_mem
        self._known: dict[str, Tokenizer] = {}
        self._known_nbytes: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}

    def are_equal(self, first: Mapping[str, StoredFile], second: Mapping[str, StoredFile]) -> bool:
        """Tell whether two models have tokenizers of equal files, which are read in pieces, and parsed by none.

        Args:
            first: files of a model's directory, by relative name; there is a tokenizer among them.
            second: likewise.

        Raises:
            CheckpointError: a tokenizer_config.json is malformed.
            FetchError: the store refuses or is down.
        """
        nbytes = first[TOKENIZER].nbytes
        if nbytes != second[TOKENIZER].nbytes or nbytes > _MAX_NBYTES:  # larger ones are refused unread
            return False
        if self._hash(first[TOKENIZER]) != self._hash(second[TOKENIZER]):
            return False
        return self._read_later(first) == self._read_later(second)

    def read(self, model: ModelRef, files: Mapping[str, StoredFile]) -> Tokenizer | None:
        """Return a model's tokenizer; None where it has no file of one.

        Args:
            model: for messages.
            files: of its directory, by relative name.

        Raises:
            CheckpointError: it has only files of a kind that is not read here, or they are malformed.
            MemoryLimitError: reading it takes more than the merge may.
            FetchError: the store refuses or is down.
        """
        if TOKENIZER not in files:
            self._check_absent(model, files)
            return None
        file = files[TOKENIZER]
        needed = _PARSED * file.nbytes
        if file.nbytes > _MAX_NBYTES or needed > max(self._allowed_mem, _NOTABLE_NBYTES):
            raise MemoryLimitError(
                f"{file.url}: {file.nbytes:,} bytes, which take {format_memory(needed)} to read, and"
                f" {format_memory(min(self._allowed_mem, _PARSED * _MAX_NBYTES))} are allowed;"
                f" give --memory {format_memory(needed)} or more, up to {format_memory(_PARSED * _MAX_NBYTES)}"
            )
        raw = self._read(file)
        more = self._read_later(files)
        digest = sha256(raw + json.dumps(more, sort_keys=True).encode()).hexdigest()
        if digest not in self._known:
            self._check_all_fit(file)
            self._known[digest] = _parse(file.url, raw, more, digest)
            self._known_nbytes[digest] = file.nbytes
        return self._known[digest]

    def forget(self, tokenizer: Tokenizer) -> None:
        """Keep a tokenizer no longer for other models with equal files."""
        self._known.pop(tokenizer.digest, None)
        self._known_nbytes.pop(tokenizer.digest, None)

    def _check_all_fit(self, file: StoredFile) -> None:
        needed = _UNITED * (sum(self._known_nbytes.values()) + file.nbytes)
        if self._known and needed > max(self._allowed_mem, _NOTABLE_NBYTES):
            raise MemoryLimitError(
                f"{file.url}: with {counted(len(self._known), 'tokenizer')} of other models it takes"
                f" {format_memory(needed)} to compare them, and {format_memory(self._allowed_mem)} are allowed;"
                f" give --memory {format_memory(needed)} or more"
            )

    def _read_later(self, files: Mapping[str, StoredFile]) -> dict[str, Json]:
        file = files.get(TOKENIZER_CONFIG)
        return {} if file is None else list_later_tokens(read_object(file.url, self._read(file)))

    def _hash(self, file: StoredFile) -> bytes:
        if file.url not in self._digests:
            found, storage = sha256(), self._stores.at(file.url)
            buffer = memoryview(bytearray(min(file.nbytes, _PIECE_NBYTES)))
            for start in range(0, file.nbytes, _PIECE_NBYTES):
                stop = min(start + _PIECE_NBYTES, file.nbytes)
                storage.read_into([ByteRange(file, start, stop)], [buffer[: stop - start]])
                found.update(buffer[: stop - start])
            self._digests[file.url] = found.digest()
        return self._digests[file.url]

    def _read(self, file: StoredFile) -> bytes:
        return bytes(self._stores.at(file.url).read(file.url, _MAX_NBYTES))

    def _check_absent(self, model: ModelRef, files: Mapping[str, StoredFile]) -> None:
        others = [name for name in files if is_tokenizer(name) and "/" not in name and name != TOKENIZER_CONFIG]
        if others:
            raise CheckpointError(
                f"{model}: no {TOKENIZER}, but {listing(others)}, a tokenizer of a kind that is not read here; make one"
                " of it by transformers (with sentencepiece or tiktoken installed), and put it beside the weights:"
                ' python -c "from transformers import AutoTokenizer as T;'
                f" T.from_pretrained('{model.path}').save_pretrained('tokenizer')\""
            )


def read_object(url: str, content: bytes | str) -> Json:
    """Return a JSON object of a tokenizer's file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(content)
        if _SURROGATE.search(content if isinstance(content, bytes) else content.encode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()  # escaped pairs are text; a half can be written nowhere
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{url}: not JSON in UTF-8: {error}; save the tokenizer again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{url}: {shown(value)} is there, an object is needed; save the tokenizer again")
    return value


def list_later_tokens(config: Json) -> dict[str, Json]:
    """Return the tokens that tokenizer_config.json has loaders add to tokenizer.json, by content."""
    decoder = config.get("added_tokens_decoder")
    found = {}
    for entry in decoder.values() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[entry["content"]] = entry
    return found


def _parse(url: str, raw: bytes, more: Mapping[str, Json], digest: str) -> Tokenizer:
    content = read_object(url, raw)
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{url}: `model` is missing; save the tokenizer again")
    if is_deep({**content, "model": None, "added_tokens": None}):
        raise CheckpointError(f"{url}: nested too deeply to be a tokenizer")
    vocab = _read_vocab(url, model)
    added = _read_added(url, content)
    problems = []
    for token, entry in added.items():
        number = entry["id"]
        if vocab.setdefault(token, number) != number:
            problems.append(f"{escaped(token)!r} is {vocab[token]} in `model.vocab` and {number} in `added_tokens`")
    if problems:
        raise CheckpointError(f"{url}: {listing(problems, _PROBLEMS, separator='; ')}; save the tokenizer again")
    _check_ids(url, vocab)
    stop = max(vocab.values(), default=-1) + 1
    later = {}
    for token, entry in more.items():
        if token not in vocab:  # as loaders do, whatever number is given there
            vocab[token], stop = stop, stop + 1
            later[token] = make_added(token, vocab[token], entry)
    return Tokenizer(url, content, vocab, {**added, **later}, digest)


def make_added(token: str, number: int, flags: Mapping[str, Any] | None = None) -> Json:
    """Return an entry of `added_tokens`: with these flags, or those of an ordinary word."""
    flags = flags or {}
    return {
        "id": number,
        "content": token,
        "single_word": flags.get("single_word") is True,
        "lstrip": flags.get("lstrip") is True,
        "rstrip": flags.get("rstrip") is True,
        "normalized": flags.get("normalized", True) is True,
        "special": flags.get("special") is True,
    }


def _read_vocab(url: str, model: Json) -> dict[str, int]:
    vocab = model.get("vocab")
    kind = model.get("type")
    if kind is not None and kind not in _KINDS:
        raise CheckpointError(f"{url}: model.type is {shown(kind)}; known are {', '.join(_KINDS)}")
    if isinstance(vocab, dict):
        for token, number in vocab.items():
            if type(number) is not int or not 0 <= number <= _MAX_ID:
                raise CheckpointError(
                    f"{url}: token {escaped(token)!r} has the number {shown(number)}; a whole number from 0 is needed"
                )
        return dict(vocab)
    if isinstance(vocab, list):
        found: dict[str, int] = {}
        for number, entry in enumerate(vocab):
            if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
                raise CheckpointError(f"{url}: model.vocab[{number}] is {shown(entry)}; [token, score] is needed")
            found.setdefault(entry[0], number)
        return found
    raise CheckpointError(f"{url}: model.vocab is missing; save the tokenizer again")


def _read_added(url: str, content: Json) -> dict[str, Json]:
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{url}: added_tokens is {shown(entries)}; a list is needed")
    found: dict[str, Json] = {}
    for position, entry in enumerate(entries):
        token, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or type(number) is not int or not 0 <= number <= _MAX_ID:
            raise CheckpointError(f"{url}: added_tokens[{position}] is {shown(entry)}; a content and an id are needed")
        found.setdefault(token, entry)
    return found


def _check_ids(url: str, vocab: Mapping[str, int]) -> None:
    """Refuse tokens that share a number, whose row nobody could tell, and numbers far beyond that of tokens."""
    largest = max(vocab, key=vocab.__getitem__, default="")
    if vocab and vocab[largest] > 2 * len(vocab) + _MAX_HOLES:
        raise CheckpointError(
            f"{url}: {counted(len(vocab), 'token')}, and {escaped(largest)!r} has the number {vocab[largest]:,}, for"
            " which an embedding would need as many rows; save the tokenizer again"
        )
    if len(set(vocab.values())) == len(vocab):
        return
    seen: dict[int, str] = {}
    shared = []
    for token, number in vocab.items():
        if (other := seen.setdefault(number, token)) is not token:
            shared.append(f"{escaped(other)!r} and {escaped(token)!r} are both {number}")
    raise CheckpointError(
        f"{url}: {counted(len(shared), 'number')} of more than one token: {listing(shared, _PROBLEMS)};"
        " save the tokenizer again"
    )
