"""Units of a merge: whole models, or components of diffusers pipelines by rules that the plan prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.config.merge_config import MergeConfig, ModelEntry
from raymerge.pipeline.errors import CheckpointError, ConfigError, TensorMismatchError
from raymerge.pipeline.messages import listing, shown

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Part:
    """Networks that are merged with each other: one of each model."""

    checkpoints: tuple[Checkpoint, ...]
    """Whole models, or one component of each pipeline, the donor's first; the donor's alone where it is copied."""
    is_copied: bool = False
    """Whether the output gets the donor's tensors as they are, because not all pipelines have the component."""

    @property
    def prefix(self) -> str:
        """The component's directory and a slash; empty for whole models."""
        return self.checkpoints[0].prefix

    @property
    def stem(self) -> str:
        """Stem of the output's files of weights there, before the number of a shard."""
        return self.checkpoints[0].stem

    def configure(self, config: MergeConfig) -> MergeConfig:
        """Return the merge of these networks."""
        if not self.is_copied:
            return config
        entry = ModelEntry(self.checkpoints[0].model, {})
        return replace(config, op=find_op("passthrough"), models=(entry,), base_model=None, parameters={}, steps=())


@dataclass(frozen=True, slots=True)
class Parts:
    """All that is merged, part by part."""

    merged: tuple[Part, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """The components that are merged, and those that are copied."""
    left_out: tuple[str, ...] = ()
    """A line for each component that is not in the output."""


def pair_components(config: MergeConfig, checkpoints: Sequence[Checkpoint]) -> Parts:
    """Return what is merged with what: models as a whole, pipelines component by component.

    The output is a pipeline like the donor. What diffusers itself has networks for, the denoiser and the VAE, must be
    in all pipelines; any other component that one of them lacks, such as a safety checker or the third text encoder of
    Stable Diffusion 3, is the donor's as it is.

    Args:
        config: of the merge.
        checkpoints: the donor first.

    Raises:
        CheckpointError: pipelines and single models are to be merged with each other.
        ConfigError: the config asks for what is done with language models only.
        TensorMismatchError: the pipelines are not of one kind.
    """
    donor, *others = checkpoints
    pipelines = [each for each in checkpoints if each.components]
    if not pipelines:
        return Parts((Part(tuple(checkpoints)),))
    if single := next((each for each in checkpoints if not each.components), None):
        raise CheckpointError(
            f"{pipelines[0].model} is a diffusers pipeline and {single.model} a single model; merge pipelines with each"
            f" other, or name the component's directory, as {pipelines[0].model}/{pipelines[0].networks[0].prefix[:-1]}"
        )
    for each in (config, *config.steps):
        _check_config(each)
    found = {each.model: {part.prefix: part for part in each.networks} for each in checkpoints}
    parts, copied, warnings = [], [], list[str]()
    for component in donor.networks:
        prefix, name = component.prefix, component.prefix[:-1]
        same = [found[other.model].get(prefix) for other in others]
        lacking = [other for other, part in zip(others, same, strict=True) if part is None]
        _check_classes(donor, others, name)
        if lacking:
            _check_optional(donor, lacking[0], name)
            copied.append(f"{name} (not in {lacking[0].model})")
            parts.append(Part((component,), is_copied=True))
        else:
            part = Part((component, *(each for each in same if each)))
            parts.append(part)
            warnings += _compare_networks(part)
    left_out = []
    for other in others:
        extra = [prefix[:-1] for prefix in found[other.model] if prefix not in found[donor.model]]
        for name in extra:
            _check_optional(other, donor, name)
        if extra:
            left_out.append(f"{other.model}: {listing(extra)}: no component of {donor.model}, which the output is like")
    merged = [part.prefix[:-1] for part in parts if not part.is_copied]
    copied += [part.prefix[:-1] for part in donor.components if not part.weight_files]
    notes = [f"components merged: {listing(merged, len(merged))}; from {donor.model}: {listing(copied, len(copied))}"]
    return Parts(tuple(parts), tuple(warnings), tuple(notes), tuple(left_out))


def _check_config(config: MergeConfig) -> None:
    """Refuse what is done with language models only."""
    beyond = {
        "slices": config.slices,
        "modules": config.modules,
        "copy_rest_from": config.copy_rest_from,
        "a mixture of experts": config.mixture,
        "a tokenizer": config.vocabulary,
        "a chat template": config.chat_template,
        "statistics": config.statistics,
    }
    for what, is_there in beyond.items():
        if is_there:
            raise ConfigError(
                f"{what} and diffusers pipelines do not go together; leave it out, or merge a component by itself: name"
                " its directory in place of the pipeline"
            )


def _check_classes(donor: Checkpoint, others: Sequence[Checkpoint], name: str) -> None:
    """Refuse components of one name that are different networks."""
    own = donor.config[name]
    for other in others:
        its = other.config.get(name) or []
        if _is_there(other, name) and its != own:
            raise TensorMismatchError(
                f"{name} is {'.'.join(map(str, own))} in {donor.model} and {'.'.join(map(str, its))} in {other.model};"
                " only pipelines of one kind can be merged"
            )


def _check_optional(owner: Checkpoint, lacking: Checkpoint, name: str) -> None:
    """Refuse that one pipeline has a denoiser or VAE that another lacks."""
    library, kind = owner.config[name]
    if library == "diffusers":
        raise TensorMismatchError(
            f"{name} ({kind}) is in {owner.model}, but not in {lacking.model}, which has"
            f" {listing([part.prefix[:-1] for part in lacking.networks])}; only pipelines of one kind can be merged"
        )


def _is_there(pipeline: Checkpoint, name: str) -> bool:
    return any(part.prefix == f"{name}/" for part in pipeline.components)


def _compare_networks(part: Part) -> Iterator[str]:
    """Yield a warning for each network of diffusers whose config.json says something else than the donor's."""
    donor, *others = part.checkpoints
    if "_class_name" not in donor.config:
        return  # those of transformers are compared by the fields that matter
    for other in others:
        if different := compare_fields(donor.config, other.config):
            yield (
                f"{donor.prefix}config.json: {listing(different, _SHOWN, separator='; ')} in {donor.model} and"
                f" {other.model}; the output gets that of {donor.model}"
            )


def compare_fields(own: Mapping[str, Any], its: Mapping[str, Any]) -> list[str]:
    """Return each field that two configs state differently; those with an underscore first say where files are from.

    >>> compare_fields({"a": 1, "b": 2, "_class_name": "A"}, {"a": 2, "c": 3, "_class_name": "B"})
    ['a is 1 and 2']
    """
    return [
        f"{name} is {shown(value)} and {shown(its[name])}"
        for name, value in own.items()
        if not name.startswith("_") and name in its and its[name] != value
    ]
