"""Whether adapters go together: made for one model, with updates of the same shapes."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.checkpoint.adapters.modules import names_other_model
from raymerge.pipeline.checkpoint.adapters.updates import ModuleUpdate, Updates
from raymerge.pipeline.errors import TensorMismatchError


def check_updates(each: Sequence[Updates]) -> list[str]:
    """Return warnings of adapters that probably do not go together.

    Raises:
        TensorMismatchError: a module has another shape in one adapter than in another, is an embedding in one alone, or
            weights lie in another way (fan_in_fan_out).
    """
    first = each[0]
    warnings = []
    seen: dict[str, tuple[Updates, ModuleUpdate]] = {}
    for updates in each:
        for module, update in updates.modules.items():
            other, before = seen.setdefault(module, (updates, update))
            if update.layout != before.layout:
                raise TensorMismatchError(
                    f"{module} is {_show(before)} in {other.ref} and {_show(update)} in {updates.ref}: the adapters are"
                    f" for different models{_say_bases(other, updates)}"
                )
        config = updates.adapter.config
        if config.is_transposed != first.adapter.config.is_transposed:
            raise TensorMismatchError(
                f"fan_in_fan_out is {str(first.adapter.config.is_transposed).lower()} in {first.ref} and"
                f" {str(config.is_transposed).lower()} in {updates.ref}: the adapters are for different models"
                f"{_say_bases(first, updates)}"
            )
        if names_other_model(config.base, first.adapter.config.base):
            warnings.append(
                f"{updates.ref} was trained on {config.base!r:.200}, and {first.ref} on"
                f" {first.adapter.config.base!r:.200}; merge adapters of one model only"
            )
        known = {module for other in each if other is not updates for module in other.modules}
        if known and updates.modules and known.isdisjoint(updates.modules):
            example, there = next(iter(updates.modules)), min(known)
            warnings.append(
                f"{updates.ref} has no module in common with the other adapters: it changes {example}, and they change"
                f" {there}"
            )
    return warnings


def _show(update: ModuleUpdate) -> str:
    outputs, inputs, is_embedding = update.layout
    what = " of an embedding" if is_embedding else ""
    return f"{[*outputs[:1], *inputs]}{what}"


def _say_bases(one: Updates, other: Updates) -> str:
    bases = one.adapter.config.base, other.adapter.config.base
    return f", {bases[0]!r:.200} and {bases[1]!r:.200}" if all(bases) and bases[0] != bases[1] else ""
