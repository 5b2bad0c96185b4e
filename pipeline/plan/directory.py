"""The files of an output besides its shards: its donor's, its own tokenizer and chat template, and config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.plan.out_files import SideFile, Written
from raymerge.pipeline.plan.side_files import gather_side_files
from raymerge.pipeline.plan.vocabulary.chat_template import set_chat_template
from raymerge.pipeline.plan.vocabulary.token_numbers import warn_of_tokenizers
from raymerge.pipeline.plan.vocabulary.tokenizers import PlannedVocabulary, finish_files
from raymerge.pipeline.stores.open import Stores


@dataclass(frozen=True, slots=True)
class Directory:
    """Side files of an output."""

    files: tuple[SideFile, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Lines on files of the models that are not among them."""


def gather_files(
    stores: Stores,
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    planned: PlannedVocabulary | None,
    allowed_mem: int,
) -> Directory:
    """Return the files that go along with the weights: those of the donor, with the output's tokenizer.

    Args:
        stores: of the inputs.
        config: of the merge.
        checkpoints: its models, the donor first.
        planned: the output's vocabulary, where the config asks for one.
        allowed_mem: of the merge, in bytes.

    Raises:
        RaymergeError: a file cannot be read, or is malformed.
    """
    donor = checkpoints[0]
    donors = [donor, *(checkpoint for checkpoint in checkpoints if checkpoint.url != donor.url)]
    files, warnings, left_out = gather_side_files(stores, donors)
    if planned is None:
        keeps_template = config.chat_template is None
        warnings += warn_of_tokenizers(stores, donors, allowed_mem, keeps_template=keeps_template)
    else:
        files, more, more_left_out = finish_files(stores, planned, files, donor)
        left_out += more_left_out
        warnings += [*planned.warnings, *planned.vocabulary.warn(), *more]
    return Directory(tuple(files), tuple(warnings), (), tuple(left_out))


def finish_directory(
    stores: Stores,
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    planned: PlannedVocabulary | None,
    gathered: Directory,
    written: Sequence[Written],
) -> Directory:
    """Return all side files: what was gathered, with the chat template that the config asks for, and configs.

    Args:
        stores: of the inputs.
        config: of the merge.
        checkpoints: its models, the donor first.
        planned: as for `gather_files`.
        gathered: what that has returned.
        written: config.json, or those of the components of a pipeline.

    Raises:
        ConfigError: the chat template does not work.
    """
    files: Sequence[SideFile] = gathered.files
    warnings, notes = list[str](), list[str]()
    if config.chat_template is not None:
        are_donors = planned is None or planned.is_donor
        files, warnings, notes = set_chat_template(
            stores, config.chat_template, checkpoints, files, are_donors=are_donors
        )
    return Directory((*files, *written), tuple(warnings), tuple(notes))
