"""The vocabulary of an output: which row of which model each of its tokens has, in every model that is merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.rows import MEAN, PAD, ZERO, make_row_map
from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.names import split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import Tokenizer
from raymerge.pipeline.checkpoint.tokenizer.union import OutTokenizer
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.config.sections.tokenizer import TokenRow, VocabularyRule
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.messages import counted, escaped, listing
from raymerge.pipeline.plan.sources.merged import MergedRows, MergedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMES = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|shared|lm_head|embed_out|decoder"
    r"|predictions|output|output_layer|proj_out|vocab_projector|head)\.(?:weight|bias)$"
)
"""Names of tensors that may have a row for each token."""
_SURE_NAMES = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|wte|word_embeddings|lm_head|embed_out|shared_head\.head)"
    r"\.(?:weight|bias)$"
)
"""Names of tensors that have one, within layers too, if they have enough rows: further rows are padding."""
_SHOWN = 4

FindSource = Callable[[ModelRef, str], Source | None]
"""Returns a tensor of a model by its name."""


def has_token_rows(name: str, shape: Sequence[int], num_rows: int) -> bool:
    """Tell by name and shape whether a tensor has a row for each token.

    >>> has_token_rows("model.embed_tokens.weight", (32, 8), 32), has_token_rows("model.norm.weight", (32,), 32)
    (True, False)
    """
    return _NAMES.search(name) is not None and split_name(name) is None and bool(shape) and shape[0] == num_rows


class Vocabulary:
    """The output's tokens, and their rows in each model."""

    def __init__(
        self,
        rule: VocabularyRule,
        tokens: OutTokenizer,
        tokenizers: Mapping[ModelRef, Tokenizer],
        num_rows: Mapping[ModelRef, int],
    ) -> None:
        """Look up every token in every model.

        Args:
            rule: what the config says.
            tokens: of the output.
            tokenizers: of the models; the base's for one that has none.
            num_rows: of the models' embeddings.
        """
        self.tokens = tokens
        self._numbers = np.fromiter(tokens.vocab.values(), np.int64, len(tokens.vocab))
        self.num_tokens = int(self._numbers.max(initial=-1)) + 1
        self.num_rows = -(-self.num_tokens // rule.multiple) * rule.multiple
        self._rule = rule
        self._tokenizers = tokenizers
        self._num_rows = num_rows
        self._ids: dict[tuple[str, int], NDArray[Any]] = {}
        self._aligned: dict[str, dict[ModelRef, tuple[NDArray[Any], list[ModelRef]]]] = {}
        """The model that each row comes from, for each output tensor and model."""
        self._own: dict[tuple[str, ModelRef], NDArray[Any]] = {}
        """The model's own row that each row is, or -1, for each output tensor and model."""
        self._by_number: dict[str, None] = {}
        """Output tensors with as many rows as there are tokens, and names that do not tell whether they are theirs."""

    def covers(self, name: str, refs: Sequence[ModelRef], sources: Sequence[Source | None]) -> bool:
        """Tell whether an output tensor has a row for each token."""
        found = [
            (ref, source) for ref, source in zip(refs, sources, strict=True) if source is not None and source.shape
        ]
        is_covered = len(found) == len(refs) and (
            all(has_token_rows(name, source.shape, self._num_rows[ref]) for ref, source in found)
            or (
                _SURE_NAMES.search(name) is not None
                and all(source.shape[0] >= self._count_needed(ref) for ref, source in found)
            )
        )
        if found and not is_covered:
            has_as_many = all(source.shape[0] == self._num_rows[ref] for ref, source in found)
            if has_as_many or _SURE_NAMES.search(name):
                self._by_number[name] = None
        return is_covered

    def align_statistics(self, name: str, ref: ModelRef, source: Source) -> Source:
        """Return what belongs to the elements of a tensor of a model, with the rows of `align`; zeros for all others.

        Args:
            name: of the tensor, which `align` has had.
            ref: of the model.
            source: of the shape that the tensor has in the model.
        """
        own = self._own[name, ref]
        return self._gather([(ref, source)], 0, np.where(own < 0, ZERO, 0), np.maximum(own, 0), [], pad=ZERO)

    def align(
        self, name: str, base: ModelRef | None, refs: Sequence[ModelRef], sources: Sequence[Source], find: FindSource
    ) -> list[Source]:
        """Return a tensor of each model with the rows that the output has, in its order.

        A token that a model lacks has there the row of the base, or of the only model that has it, or the mean of those
        that have it: only models that give the tensor count, as in mergekit.

        Args:
            name: of the tensor.
            base: that holds there.
            refs: of the models that give it.
            sources: theirs.
            find: for rows of models that do not give it.

        Raises:
            TensorMismatchError: the columns differ, or the tensor is not floating-point.
            ConfigError: a row is asked for that a model does not have.
        """
        parts = list(dict(zip(refs, sources, strict=True)).items())
        _check_parts(name, parts)
        ids = np.stack([self._find_ids(ref, source.shape[0]) for ref, source in parts])
        has = ids >= 0
        counts = has.sum(axis=0)
        first = has.argmax(axis=0)
        origin = np.where(counts == 0, ZERO, first).astype(np.int64)
        row = np.where(counts == 0, 0, ids[first, np.arange(self.num_tokens)]).astype(np.int64)
        positions = {ref: k for k, (ref, _) in enumerate(parts)}
        settled = counts < 2
        if base in positions:
            of_base = has[positions[base]]
            origin[of_base], row[of_base] = positions[base], ids[positions[base]][of_base]
            settled |= of_base
        means: list[list[tuple[int, int]]] = []
        for token in np.flatnonzero(~settled & ~has.all(axis=0)).tolist():
            origin[token], row[token] = MEAN, len(means)
            means.append([(k, int(ids[k, token])) for k in np.flatnonzero(has[:, token]).tolist()])
        forced = np.zeros(self.num_tokens, bool)
        for text, entry in self._rule.tokens:
            number = self.tokens.vocab[text]
            forced[number] = entry.force
            if entry.force and not settled[number] and has[:, number].all():
                origin[number], row[number] = MEAN, len(means)
                means.append([(k, int(ids[k, number])) for k in range(len(parts))])
            if entry.row is not None:
                origin[number], row[number] = self._resolve(name, text, entry.row, parts, find)
        aligned: dict[ModelRef, Source] = {}
        for own, (ref, _) in enumerate(parts[: len(ids)]):
            keeps = has[own] & ~forced
            origins = np.where(keeps, own, origin)
            rows = np.where(keeps, ids[own], row)
            aligned[ref] = self._gather(parts, own, origins, rows, means)
            self._own[name, ref] = np.where(origins == own, rows, -1)
            self._aligned.setdefault(name, {})[ref] = origins, [part for part, _ in parts]
        return [aligned[ref] for ref in refs]

    def aligned_names(self) -> list[str]:
        """Return the output tensors that have a row for each token."""
        return list(self._aligned)

    def describe(self) -> list[str]:
        """Return lines on how many rows of the first aligned tensor come from whom."""
        num_pad = self.num_rows - self.num_tokens
        padding = f", and {counted(num_pad, 'row')} of padding" if num_pad else ""
        holes = f" in {self.num_tokens:,} rows" if self.num_tokens > len(self.tokens.vocab) else ""
        lines = [f"{counted(len(self.tokens.vocab), 'token')}{holes}{padding}"]
        for ref, (origins, parts) in next(iter(self._aligned.values()), {}).items():
            counts = {k: int((origins == k).sum()) for k in (*range(len(parts)), MEAN, ZERO)}
            what = {k: f"{counts[k]:,} of {parts[k]}" for k in range(len(parts))}
            own = parts.index(ref)
            what[own] = f"{counts[own]:,} rows of its own"
            what |= {MEAN: f"{counts[MEAN]:,} means of several", ZERO: f"{counts[ZERO]:,} zeros"}
            shown = [own, *(k for k in what if k != own and counts[k])]
            lines.append(f"{ref}: {', '.join(what[k] for k in shown)}")
        return lines

    def warn(self) -> list[str]:
        """Return warnings of rows and tokens that are probably not as they were meant."""
        warnings = []
        special = {
            token for token, entry in {**self.tokens.first.added, **self.tokens.added}.items() if entry.get("special")
        }
        for name, models in self._aligned.items():
            asked = {self.tokens.vocab[token] for token, entry in self._rule.tokens if entry.row is not None}
            empty = np.logical_and.reduce([origins == ZERO for origins, _ in models.values()])
            lacking = {*np.flatnonzero(empty).tolist()} - asked
            missing = [token for token, number in self.tokens.vocab.items() if number in lacking] if lacking else []
            missing.sort(key=lambda token: token not in special)
            if missing:
                warnings.append(
                    f"{name}: {counted(len(missing), 'token')} ({_list_tokens(missing)}) in none of the models that"
                    f" give it ({listing(models)}); their rows are zeros"
                )
        beyond = {
            ref: [token for token, number in tokenizer.vocab.items() if number >= self._num_rows[ref]]
            for ref, tokenizer in self._tokenizers.items()
            if tokenizer.num_rows > self._num_rows[ref]
        }
        for ref, tokens in beyond.items():
            if tokens:
                first = max(tokens, key=lambda token: -self._tokenizers[ref].vocab[token])
                warnings.append(
                    f"{ref}: {counted(len(tokens), 'token')} ({_list_tokens(tokens)}) of its tokenizer beyond the"
                    f" {self._num_rows[ref]:,} rows of its embedding: {escaped(first)!r} has the number"
                    f" {self._tokenizers[ref].vocab[first]:,}; it counts as a model without them"
                )
        if self._by_number and any((own != np.arange(len(own))).any() for own in self._own.values()):
            warnings.append(
                f"{counted(len(self._by_number), 'tensor')} ({listing(self._by_number)}) merged row by row by number,"
                " though the numbers of tokens change: if their rows are those of tokens, the output is wrong there"
            )
        if self.tokens.conflicts:
            warnings.append(
                f"{counted(len(self.tokens.conflicts), 'added token')} with other flags in one model than in another"
                f" ({_list_tokens(self.tokens.conflicts)}); the first model's hold"
            )
        return warnings

    def _count_needed(self, ref: ModelRef) -> int:
        """Return the rows that a model needs for its tokens, as far as its embedding has any for them."""
        return min(self._tokenizers[ref].num_rows, self._num_rows[ref])

    def _find_ids(self, ref: ModelRef, num_rows: int) -> NDArray[Any]:
        """Return for each row of the output the row that a model has for its token, or -1."""
        tokenizer = self._tokenizers[ref]
        key = (tokenizer.digest, num_rows)
        if key not in self._ids:
            found = np.full(self.num_tokens, -1, np.int32)
            get = tokenizer.vocab.get
            own = np.fromiter(map(get, self.tokens.vocab, repeat(-1)), np.int64, len(self._numbers))
            found[self._numbers] = np.where(own < num_rows, own, -1)
            self._ids[key] = found
        return self._ids[key]

    def _resolve(
        self, name: str, token: str, row: TokenRow, parts: list[tuple[ModelRef, Source]], find: FindSource
    ) -> tuple[int, int]:
        """Return where a row of the config's choice comes from; its model becomes a part if it is none yet."""
        if row.model is None:
            return ZERO, 0
        part = next((k for k, (ref, _) in enumerate(parts) if ref == row.model), len(parts))
        if part == len(parts):
            source = find(row.model, name)
            if source is None:
                raise ConfigError(f"{row.path}: {row.model} has no {name}")
            parts.append((row.model, source))
            _check_parts(name, parts)
        tokenizer, num_rows = self._tokenizers[row.model], parts[part][1].shape[0]
        number = row.token_id
        if number is None:
            wanted = token if row.token is None else row.token
            number = tokenizer.vocab.get(wanted)
            if number is None:
                raise ConfigError(f"{row.path}: {row.model} has no token {escaped(wanted)!r} ({tokenizer.url})")
        if number >= num_rows:
            raise ConfigError(
                f"{row.path}: row {number:,} of {row.model} is asked for, and its {name} has {num_rows:,}"
            )
        return part, number

    def _gather(
        self,
        parts: Sequence[tuple[ModelRef, Source]],
        own: int,
        origin: NDArray[Any],
        row: NDArray[Any],
        means: Sequence[Sequence[tuple[int, int]]],
        *,
        pad: int = PAD,
    ) -> Source:
        """Return a model's tensor with the rows that are listed, and padding after them."""
        source = parts[own][1]
        num_pad = self.num_rows - self.num_tokens
        if not num_pad and (origin == own).all() and (row == np.arange(self.num_tokens)).all():
            if source.shape[0] == self.num_rows:
                return source
            if isinstance(source, StoredTensor):
                return _cut(source, self.num_rows)
        used = sorted({own, *np.flatnonzero(np.bincount(origin[origin >= 0])).tolist()})
        taken = np.unique(row[origin == MEAN]).tolist()
        used = sorted({*used, *(part for k in taken for part, _ in means[k])})
        new = {part: k for k, part in enumerate(used)}
        number = np.zeros(max(used) + 1, np.int64)
        number[used] = np.arange(len(used))
        shown = np.where(origin >= 0, number[np.maximum(origin, 0)], origin)
        if taken:
            places = np.zeros(len(means), np.int64)
            places[taken] = np.arange(len(taken))
            row = np.where(origin == MEAN, places[np.where(origin == MEAN, row, 0)], row)
        padding = np.full(num_pad, pad)
        members = tuple(parts[part][1] for part in used)
        rows = make_row_map(
            np.concatenate([shown, padding]),
            np.concatenate([row, np.zeros(num_pad, np.int64)]),
            [[(new[part], there) for part, there in means[k]] for k in taken],
        )
        shape = (self.num_rows, *source.shape[1:])
        kind = MergedRows if any(isinstance(part, MergedTensor) for part in members) else GatheredRows
        return kind(source.model, source.name, source.dtype, shape, members, rows)


def _check_parts(name: str, parts: Sequence[tuple[ModelRef, Source]]) -> None:
    """Refuse tensors whose rows do not go into one matrix."""
    first, source = parts[0]
    for ref, other in parts:
        if other.shape[1:] != source.shape[1:]:
            raise TensorMismatchError(
                f"{name} has rows of {list(source.shape[1:])} in {first} and of {list(other.shape[1:])} in {ref};"
                " models of other widths have no rows in common"
            )
        if not DTYPES[other.dtype].is_mergeable:
            raise TensorMismatchError(f"{name} in {ref} is {other.dtype}, and only floating-point rows can be merged")


def _list_tokens(tokens: Sequence[str]) -> str:
    return listing([repr(token) if token.isprintable() else ascii(token) for token in tokens], _SHOWN)


def _cut(source: StoredTensor, num_rows: int) -> StoredTensor:
    """Return the first rows of a stored tensor."""
    row_nbytes = source.nbytes // source.shape[0]
    return replace(source, shape=(num_rows, *source.shape[1:]), stop=source.start + num_rows * row_nbytes)
