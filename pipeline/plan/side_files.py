"""Chooses which files besides the weights an output gets, and lists those that are left out."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import is_tokenizer
from raymerge.pipeline.checkpoint.side_files import explain_left_out, find_side_files
from raymerge.pipeline.checkpoint.views.quantised import QUANTISED_FILES
from raymerge.pipeline.checkpoint.weights import read_json
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.components import compare_fields
from raymerge.pipeline.plan.out_files import Copied, SideFile, Written, carry
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_SCHEDULER = "scheduler_config.json"
_MAX_CONFIG_NBYTES = 16 * 2**20


def gather_side_files(stores: Stores, checkpoints: Sequence[Checkpoint]) -> tuple[list[SideFile], list[str], list[str]]:
    """Return the donor's files that an output gets besides weights, warnings, and lines on the files left out."""
    donor, *others = checkpoints
    found = find_side_files(stores, donor)
    carried = [carry(name, file) for name, file in found.copied if name not in QUANTISED_FILES]
    _check_readable(stores, [file for file in carried if isinstance(file, Copied)])
    side_files: list[SideFile] = [*carried, *(Written(name, text) for name, text in found.masked)]
    warnings = _compare_components(stores, donor, others)
    warnings += [f"{donor.model}: {name} holds a credential, which the output gets as ***" for name, _ in found.masked]
    part = stores.at(donor.url).explain_part(donor.url)
    if found.missing:
        hint = f"; {part}" if part else ""
        warnings.append(f"{donor.model}: {listing(found.missing)} missing, which its configs name (auto_map){hint}")
    if part and not donor.components and not any(is_tokenizer(file.name) for file in side_files):
        warnings.append(f"{donor.model}: there is no tokenizer, so the output gets none; {part}")
    for name in found.module_weights:
        also = ", ".join(str(other.model) for other in others if name in other.files)
        unused = f"; those of {also} are not used" if also else ""
        warnings.append(f"{name}: weights of a module of its own, copied from {donor.model} and not merged{unused}")
    left_out = [*explain_left_out(donor, found.left_out, is_donor=True)]
    for other in others:
        weights = {file.url for file in other.weight_files}
        names = [name for name, file in other.files.items() if file.url not in weights]
        left_out += explain_left_out(other, names, is_donor=False)
    return side_files, warnings, left_out


def _compare_components(stores: Stores, donor: Checkpoint, others: Sequence[Checkpoint]) -> list[str]:
    """Return a warning for each scheduler whose config differs from the donor's: the same noise is then another step.

    What a model predicts, and at which noise, is said by its pipeline's scheduler alone.
    """
    warnings = []
    for component in donor.components:
        own = component.files.get(_SCHEDULER)
        for other in others if own else ():
            its = other.files.get(component.prefix + _SCHEDULER)
            if own is None or its is None or its.content_id == own.content_id:
                continue
            first, second = (read_json(stores.at(file.url), file.url, _MAX_CONFIG_NBYTES) for file in (own, its))
            if different := compare_fields(first, second):
                warnings.append(
                    f"{component.prefix}{_SCHEDULER}: {listing(different, separator='; ')} in {donor.model} and"
                    f" {other.model}; the output gets that of {donor.model}"
                )
    return warnings


def _check_readable(stores: Stores, files: Sequence[Copied]) -> None:
    """Read a byte of each local file to copy: a file that cannot be read would otherwise fail after all shards."""
    ranges = [ByteRange(file.source, 0, 1) for file in files if scheme_of(file.source.url) == "file" and file.nbytes]
    if ranges:
        stores.at(ranges[0].file.url).read_ranges(ranges)
