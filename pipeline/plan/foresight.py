"""Predicts the kernels of a merge from its config alone, so that their loops can be compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from raymerge import RaymergeError
from raymerge.ops.kernel import Kernel
from raymerge.ops.registry import Base, Op, Value
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.values import Settings, resolve

_MIDDLE = 0.5
"""Position at which gradients are evaluated: the middle of the model."""


def guess_kernels(config: MergeConfig) -> Iterator[tuple[Kernel, int]]:
    """Yield the kernels that tensors will probably have, each with its number of sources.

    Parameters are those of a tensor in the middle of the model that matches no filter. Nothing may depend on the
    prediction: errors in parameters are reported later, for real tensors.
    """
    for step in config.steps:
        yield from guess_kernels(step)
    for module in config.modules:
        if not module.is_copied:
            own = replace(config, models=module.models, slices=module.slices, parameters=module.parameters)
            yield from guess_kernels(replace(own, modules=(), steps=()))
    if config.models:
        entries = [(entry.model, entry.parameters) for entry in config.entries]
        yield from _guess(config.op, entries, config.base_model, [config.parameters])
    for part in config.slices:
        entries = [(source.model, source.parameters) for source in part.sources]
        base = part.base_model or config.base_model
        yield from _guess(config.op, entries, base, [part.parameters, config.parameters])


def _guess(
    op: Op, entries: Sequence[tuple[ModelRef, Settings]], base: ModelRef | None, shared: Sequence[Settings]
) -> Iterator[tuple[Kernel, int]]:
    values: dict[str, Value | tuple[Value, ...]] = {}
    for parameter in op.parameters:
        owners: list[Sequence[Settings]] = [shared]
        if parameter.per_model:
            owners = [[own, *shared] for model, own in entries if op.base is Base.INPUT or model != base]
        found = [value for levels in owners if (value := resolve(parameter, levels, "", _MIDDLE)) is not None]
        if len(found) < len(owners):
            return
        values[parameter.name] = tuple(found) if parameter.per_model else found[0]
    with suppress(RaymergeError):
        yield op.kernel(values), len(entries)
