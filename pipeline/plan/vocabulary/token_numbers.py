"""Warns of tokenizers that differ where the config asks for none: rows are then merged by token number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from raymerge.pipeline.checkpoint.chat_template.files import read_template
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import TOKENIZER, TOKENIZER_CONFIG
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import Tokenizer, TokenizerReader, read_object
from raymerge.pipeline.errors import CheckpointError, MemoryLimitError
from raymerge.pipeline.messages import counted, escaped, listing
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

_SHOWN = 3
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_MAX_NBYTES = 64 * 2**20


def warn_of_tokenizers(
    stores: Stores, checkpoints: Sequence[Checkpoint], allowed_mem: int, *, keeps_template: bool
) -> list[str]:
    """Return warnings of models whose tokens have other numbers than the donor's, or that end or chat otherwise.

    Files that are equal by their stores' checksums are not read, and those of equal content not parsed.

    Args:
        stores: that have the models.
        checkpoints: the donor's first.
        allowed_mem: of the merge, in bytes.
        keeps_template: whether the output gets the donor's chat template.

    Raises:
        FetchError: a store refuses or is down.
    """
    donor, *others = checkpoints
    reader = TokenizerReader(stores, allowed_mem)
    read_first = cache(lambda: reader.read(donor.model, donor.files))
    read_first_special = cache(lambda: _read_special(stores, donor.files))
    read_first_template = cache(lambda: _read_template(stores, donor))
    warnings: list[str] = []
    for other in others:
        try:
            if _may_differ(donor.files.get(TOKENIZER), other.files.get(TOKENIZER)) and not reader.are_equal(
                donor.files, other.files
            ):
                first, second = read_first(), reader.read(other.model, other.files)
                if first is not None and second is not None and first is not second:
                    warnings += _compare(str(donor.model), first, str(other.model), second)
                    reader.forget(second)
            if _may_differ(donor.files.get(TOKENIZER_CONFIG), other.files.get(TOKENIZER_CONFIG)):
                special = read_first_special(), _read_special(stores, other.files)
                warnings += _compare_special(str(donor.model), special[0], str(other.model), special[1])
            if keeps_template and read_first_template() != (template := _read_template(stores, other)):
                what = "another chat template than" if template else "no chat template, unlike"
                warnings.append(
                    f"{other.model}: {what} {donor.model}, whose the output gets; `chat_template` in the config chooses"
                )
        except (CheckpointError, MemoryLimitError) as error:
            warnings.append(f"tokenizers could not be compared: {error}")
    return warnings


def _may_differ(first: StoredFile | None, second: StoredFile | None) -> bool:
    """Return whether two files may differ, as far as their stores tell; they do not where one is missing."""
    return first is not None and second is not None and first.content_id != second.content_id


def _compare(donor: str, first: Tokenizer, other: str, second: Tokenizer) -> Iterator[str]:
    """Yield a warning of numbers that are other tokens in one model than in the other, and of tokens that one lacks."""
    tokens = {number: token for token, number in first.vocab.items()}
    mixed = [
        f"{number:,} is {escaped(tokens[number])!r} in {donor} and {escaped(token)!r} in {other}"
        for token, number in second.vocab.items()
        if tokens.get(number, token) != token
    ]
    if mixed:
        yield (
            f"{counted(len(mixed), 'row')} of embedding and head that are other tokens in one model than in the other"
            f" ({listing(mixed, _SHOWN, separator='; ')}): rows are merged by their numbers, and mix these;"
            " `tokenizer_source: union` (or `base`) merges each token with itself"
        )
    new = [token for token, number in second.vocab.items() if number not in tokens and token not in first.vocab]
    if new:
        yield (
            f"{other}: {counted(len(new), 'token')} ({listing([repr(escaped(token)) for token in new], _SHOWN)}) that"
            f" {donor} does not have, whose tokenizer the output gets; `tokenizer_source: union` keeps them"
        )


def _compare_special(donor: str, first: Mapping[str, Any], other: str, second: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning of special tokens that differ."""
    different = [
        f"{name} is {first.get(name)!r} in {donor} and {second.get(name)!r} in {other}"
        for name in _SPECIAL
        if first.get(name) != second.get(name)
    ]
    if different:
        yield f"{listing(different, len(_SPECIAL), separator='; ')}; the output gets those of {donor}"


def _read_template(stores: Stores, checkpoint: Checkpoint) -> str:
    return (read_template(stores, checkpoint) or "").strip()


def _read_special(stores: Stores, files: Mapping[str, StoredFile]) -> dict[str, Any]:
    file = files[TOKENIZER_CONFIG]
    config = read_object(file.url, bytes(stores.at(file.url).read(file.url, _MAX_NBYTES)))
    written = {name: config.get(name) for name in _SPECIAL}
    return {name: value.get("content") if isinstance(value, dict) else value for name, value in written.items()}
