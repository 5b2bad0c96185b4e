"""Reads the tokenizers that make up the output's vocabulary, and makes the files of its own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, locate_model
from raymerge.pipeline.checkpoint.files import CONFIG, is_hidden
from raymerge.pipeline.checkpoint.model_config import Json, dump_config
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.tokenizer.files import is_of_tokenizer, rewrite_files
from raymerge.pipeline.checkpoint.tokenizer.token_ids import set_vocab_size, translate_ids
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import Tokenizer, TokenizerReader, read_object
from raymerge.pipeline.checkpoint.tokenizer.union import extend, keep_tokenizer, unite
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.sections.tokenizer import VocabularyRule
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.out_files import SideFile, Written, carry
from raymerge.pipeline.plan.vocabulary.rows import Vocabulary, has_token_rows
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

GENERATION = "generation_config.json"
_MAX_CONFIG_NBYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class PlannedVocabulary:
    """The output's vocabulary, and the model that gives the tokenizer's files (the giver)."""

    vocabulary: Vocabulary
    files: Mapping[str, StoredFile] = field(repr=False)
    """All files of the model that gives the tokenizer, by relative name."""
    giver: ModelRef
    donor: Tokenizer
    """The tokenizer of the model whose config.json the output gets."""
    is_donor: bool
    """Whether both are one model."""
    giver_config: Json
    """The giver's config.json; empty where it has none."""
    warnings: tuple[str, ...]


def plan_vocabulary(
    stores: Stores,
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    models: Sequence[Model],
    reader: TokenizerReader,
    others: Sequence[Checkpoint] = (),
) -> PlannedVocabulary | None:
    """Return the vocabulary that a config asks for; None where it does not.

    Args:
        stores: that have the models.
        config: of the merge.
        checkpoints: the donor's first.
        models: the same ones, opened.
        reader: of tokenizers.
        others: outputs of documents, which may give the tokenizer, too.

    Raises:
        CheckpointError: a model has no tokenizer, or one that is malformed or of a kind that is not read.
        ConfigError: the tokenizer's model is not there.
        MemoryLimitError: a tokenizer is too large to be read.
        FetchError: a store refuses or is down.
    """
    rule = config.vocabulary
    if rule is None:
        return None
    donor = checkpoints[0]
    found = {c.model: reader.read(c.model, c.files) for c in checkpoints}
    base = found[donor.model]
    if base is None and rule.source in ("base", "union"):
        raise CheckpointError(
            f"{rule.path}: {donor.model} has no tokenizer, which {rule.source} begins with; name a model that has one"
        )
    giver, files, giver_config = donor.model, donor.files, donor.config
    first = base
    if isinstance(rule.source, ModelRef):
        giver, files, giver_config, first = _open_giver(stores, rule, (*checkpoints, *others), reader)
    assert first is not None
    base = base or first
    tokenizers = {ref: tokenizer or base for ref, tokenizer in found.items()}
    warnings = [
        f"{ref}: no tokenizer; its tokens count as those of {donor.model if found[donor.model] else giver}"
        for ref, tokenizer in found.items()
        if tokenizer is None
    ]
    num_rows = {model.ref: _count_rows(model, rule) for model in models}
    if rule.source in ("base", "union"):
        tokens = keep_tokenizer(first, num_rows[donor.model])
        if rule.source == "union":
            tokens = unite(tokens, [(tokenizers[c.model], num_rows[c.model]) for c in checkpoints])
    else:
        tokens = keep_tokenizer(first)
    tokens = extend(tokens, (token for token, _ in rule.tokens))
    vocabulary = Vocabulary(rule, tokens, tokenizers, num_rows)
    return PlannedVocabulary(vocabulary, files, giver, base, giver == donor.model, giver_config, tuple(warnings))


def finish_files(
    stores: Stores, planned: PlannedVocabulary, side_files: Sequence[SideFile], checkpoint: Checkpoint
) -> tuple[list[SideFile], list[str], list[str]]:
    """Return the output's side files with its own tokenizer among them, warnings, and lines on what stays behind.

    Args:
        stores: that have the models.
        planned: the vocabulary.
        side_files: that the output gets of its donor.
        checkpoint: the donor's.
    """
    written, stale = rewrite_files(stores, planned.vocabulary.tokens, planned.files)
    found: dict[str, SideFile] = {}
    for file in side_files:
        if planned.is_donor or not is_of_tokenizer(file.name):
            found[file.name] = file
    if not planned.is_donor:
        found |= {name: carry(name, file) for name, file in planned.files.items() if is_of_tokenizer(name)}
    found |= {name: Written(name, text) for name, text in written.items()}
    left_out = [f"{planned.giver}: {listing(stale)}: tokens that the output does not have"] if stale else []
    for name in stale:
        found.pop(name, None)
    warnings: list[str] = []
    if not planned.is_donor and GENERATION in found:
        generation = read_object(GENERATION, _read(stores, checkpoint.files[GENERATION]))
        of_giver = dict(planned.giver_config)
        if GENERATION in planned.files:
            of_giver |= read_object(planned.files[GENERATION].url, _read(stores, planned.files[GENERATION]))
        warnings += _translate(planned, generation, of_giver, GENERATION)
        found[GENERATION] = Written(GENERATION, dump_config(generation))
    return [found[name] for name in sorted(found)], warnings, left_out


def finish_config(planned: PlannedVocabulary, config: Json) -> list[str]:
    """State the vocabulary in the output's config.json; return warnings."""
    set_vocab_size(config, planned.vocabulary.num_rows, planned.vocabulary.aligned_names())
    return [] if planned.is_donor else _translate(planned, config, planned.giver_config, CONFIG)


def _translate(planned: PlannedVocabulary, config: Json, giver: Json, name: str) -> list[str]:
    tokens = {number: token for token, number in planned.donor.vocab.items()}
    lost = translate_ids(config, giver, tokens, planned.vocabulary.tokens.vocab)
    if not lost:
        return []
    return [f"{name}: {', '.join(lost)}: no tokens of the output, so the output's says null there; set them by hand"]


def _open_giver(
    stores: Stores,
    rule: VocabularyRule,
    checkpoints: Sequence[Checkpoint],
    reader: TokenizerReader,
) -> tuple[ModelRef, Mapping[str, StoredFile], Json, Tokenizer]:
    """Return the model that gives the tokenizer, which need not be one of those that are merged."""
    assert isinstance(rule.source, ModelRef)
    for checkpoint in checkpoints:
        if checkpoint.model == rule.source:
            files, config = checkpoint.files, checkpoint.config
            break
    else:
        try:
            url = locate_model(stores, rule.source)
        except CheckpointError as error:
            raise ConfigError(f"{rule.path}: {error}; write `union`, `base`, or a model with a tokenizer") from error
        files = {name: file for name, file in stores.at(url).list(url).items() if not is_hidden(name)}
        config = read_object(files[CONFIG].url, _read(stores, files[CONFIG])) if CONFIG in files else {}
    tokenizer = reader.read(rule.source, files)
    if tokenizer is None:
        raise CheckpointError(f"{rule.path}: {rule.source} has no tokenizer; name a model that has one")
    return rule.source, files, config, tokenizer


def _count_rows(model: Model, rule: VocabularyRule) -> int:
    """Return the rows of a model's embedding."""
    shapes = {name: source.shape for name in model.view.names() if (source := model.view.find(name))}
    stated = model.width("vocab_size")
    counts = [shape[0] for name, shape in shapes.items() if has_token_rows(name, shape, shape[0] if shape else 0)]
    if not counts:
        raise ConfigError(
            f"{rule.path or 'tokenizer'}: {model.ref} has no tensor whose name tells that its rows are those of tokens,"
            f" among {counted(len(shapes), 'tensor')}; leave the tokenizer out to merge rows by their numbers"
        )
    return stated if stated in counts else max(counts)


def _read(stores: Stores, file: StoredFile) -> bytes:
    return bytes(stores.at(file.url).read(file.url, _MAX_CONFIG_NBYTES))
