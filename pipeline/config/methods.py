"""What a merge method asks of a config: parameters that it knows, a base, as many models as it takes."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.ops.errors import UnknownOpError
from raymerge.ops.registry import Base, Op, find_op, load_ops
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.values import Setting, Settings, parse_setting
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import listing, suggest


def parse_method(place: Place) -> Op:
    """Return the op that `merge_method` names.

    Raises:
        ConfigError: there is none.
    """
    if place.value is None:
        raise place.error(
            f"is missing; add it, for instance `merge_method: linear`. There are: {', '.join(load_ops())}"
        )
    try:
        return find_op(place.text())
    except UnknownOpError as error:
        raise ConfigError(str(error)) from error


def parse_settings(place: Place, op: Op, *, of_model: bool) -> Settings:
    """Return the parameters written at a place; those that have no effect there are warned about and left out.

    Args:
        place: a mapping of names to settings, or nothing.
        op: what they are for.
        of_model: whether they stand under one model, where only per-model parameters have an effect.

    Raises:
        ConfigError: a value is not of the parameter's type.
    """
    declared = {parameter.name: parameter for parameter in op.parameters}
    settings: dict[str, Setting] = {}
    for name in place.names():
        written = place.get(name)
        if name not in declared:
            written.warn(_explain_unknown(name, op))
        elif of_model and not declared[name].per_model:
            written.warn(
                f"ignored, because {op.name} has one {name!r} for all models; move it to the top-level `parameters`"
            )
        else:
            settings[name] = parse_setting(written, declared[name])
            if name == "density":
                _check_density(written, settings[name])
    return settings


def check_models(base_place: Place, place: Place, op: Op, models: Sequence[ModelRef], base: ModelRef | None) -> None:
    """Check the models of a config in `models` form against what the op takes.

    Args:
        base_place: `base_model`.
        place: `models`.
        op: the method.
        models: as listed.
        base: the base model, if the config names one.

    Raises:
        ConfigError: the op needs a base and there is none, or it takes another number of models.
    """
    if op.base is Base.REQUIRED:
        if base is None:
            example = str(models[0]) if op.max_models == 1 else "<the model that the others were fine-tuned from>"
            raise base_place.error(f"{op.name} needs a base model; add `base_model: {example}`")
        _check_count(place, op, [model for model in models if model != base])
    elif base is None or base in models:
        _check_count(place, op, models)
    else:
        advice = f"; base_model {base} counts too, because it is not listed and {op.name} takes no base: remove it"
        _check_count(place, op, [*models, base], advice)
        base_place.warn(
            f"{base} is not under `models`, so {op.name} merges it as one more model, after the others; "
            f"list it there, or remove base_model"
        )


def check_sources(base_place: Place, place: Place, op: Op, sources: Sequence[ModelRef], base: ModelRef | None) -> None:
    """Check the sources of one output slice against what the op takes.

    Args:
        base_place: `base_model` at the top.
        place: the slice's `sources`.
        op: the method.
        sources: the models as listed.
        base: the base model that holds for the slice, if any.

    Raises:
        ConfigError: the op needs a base among the sources, or takes another number of models.
    """
    if op.base is Base.INPUT:
        _check_count(place, op, sources)
        return
    if base is None:
        raise base_place.error(f"{op.name} needs a base model; add it, for instance `base_model: {sources[0]}`")
    if base not in sources:
        raise place.error(
            f"the base model {base} is not among the sources ({listing(sources)}), and {op.name} needs it in every "
            f"slice; add a source with `model: {base}` and its layer_range"
        )
    if sources.count(base) > 1:
        raise place.error(f"the base model {base} is listed {sources.count(base)} times; list it once")
    _check_count(place, op, [model for model in sources if model != base])


def _check_count(place: Place, op: Op, models: Sequence[ModelRef], advice: str = "") -> None:
    low, high = op.min_models, op.max_models
    if low <= len(models) and (high is None or len(models) <= high):
        return
    wanted = f"at least {low}" if high is None else f"exactly {low}" if low == high else f"{low} to {high}"
    besides = " besides the base" if op.base is Base.REQUIRED else ""
    given = f"{len(models) or 'none'} {'are' if len(models) > 1 else 'is'} given"
    names = f" ({listing(models)})" if models else ""
    raise place.error(f"{op.name} takes {wanted} model{'' if high == 1 else 's'}{besides}, {given}{names}{advice}")


def _explain_unknown(name: str, op: Op) -> str:
    allowed = [parameter.name for parameter in op.parameters]
    users = [other.name for other in load_ops().values() if any(name == p.name for p in other.parameters)]
    if not users:
        return f"unknown parameter, ignored; {suggest(name, allowed)}"
    has = f"its parameters are: {', '.join(allowed)}" if allowed else "it has no parameters"
    return f"ignored, because {op.name} does not use {name!r} (it belongs to {listing(users)}); {has}"


def _check_density(place: Place, setting: Setting) -> None:
    over = [value for rule in setting.rules for value in rule.values if isinstance(value, float) and value > 1]
    if over:
        place.warn(f"{max(over)} is more than 1 and keeps everything, as 1 does; densities lie between 0 and 1")
