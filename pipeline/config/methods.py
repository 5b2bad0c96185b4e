"""Requirements of a merge method on a config: known parameters, a base, the number of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from raymerge.ops.registry import Base, Op, Parameter
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.values import Setting, Settings, is_setting, parse_setting
from raymerge.pipeline.messages import listing, shown, suggest

_ONLY_IN_MERGEKIT = {"core_space"}
"""Methods of mergekit 0.1.5 that are not here."""


_SHARES_KEPT = ("density", "select_topk")
"""Parameters that say how much of a difference is kept."""


_FIRST_IS_BASE = ("slerp",)
"""Methods of a base and one model that stand for the same line, whichever of the two is called the base."""
_EQUAL_WEIGHTS = ("linear",)
"""Averages, for which no weights at all can only mean equal ones."""


def parse_method(place: Place, ops: Mapping[str, Op]) -> Op:
    """Return the op that a config's `merge_method` names, or that of all its slices.

    Raises:
        ConfigError: there is none.
    """
    method = place.get("merge_method")
    if method.value is None and (written := _find_method_of_slices(place)):
        method = written
        method.warn("stands for the whole merge, which has no merge_method; move it to the top level")
    if method.value is None:
        problem = f"is missing; add it, for instance `merge_method: linear`. There are: {', '.join(ops)}"
        raise place.missing("merge_method", problem)
    name = method.text()
    if name not in ops:
        if name in _ONLY_IN_MERGEKIT:
            raise method.error(f"mergekit has {name}, and raymerge not yet. It has: {', '.join(ops)}")
        raise method.error(f"{name!r} is unknown; {suggest(name, ops)}")
    return ops[name]


def _find_method_of_slices(place: Place) -> Place | None:
    """Return where the first slice names its method, if all name the same one."""
    slices = place.get("slices")
    found = [part.get("merge_method") for part in (slices.elements() if isinstance(slices.value, list) else ())]
    return found[0] if found and all(other.value == found[0].value for other in found) and found[0] else None


def check_method_of_slice(place: Place, op: Op) -> None:
    """Warn of a method of a slice's own, which has no effect."""
    method = place.get("merge_method")
    if method.value is not None and method.value != op.name:
        method.warn(
            f"has no effect, in mergekit neither: {op.name} merges all slices; merge by itself what needs another"
            " method"
        )


def takes_first_as_base(op: Op) -> bool:
    """Tell whether the first model is the base where none is given."""
    return op.name in _FIRST_IS_BASE


def lacks_all_weights(op: Op, uses: Sequence[Use]) -> bool:
    """Tell whether a config of an average has no weights, and no word that may have been meant for them."""
    has_none = not any("weight" in settings for use in uses for settings in use.levels)
    is_misspelt = any(_find_misplaced(place, "weight") for use in uses for place in use.places)
    return op.name in _EQUAL_WEIGHTS and bool(uses) and has_none and not is_misspelt


def parse_settings(place: Place, op: Op, ops: Mapping[str, Op], *, of_model: bool) -> Settings:
    """Return the parameters written at a place; those that have no effect there are warned about and left out.

    Args:
        place: a mapping of names to settings, or nothing.
        op: what they are for.
        ops: all that there are, by name.
        of_model: whether they stand under one model, where only per-model parameters have an effect.

    Raises:
        ConfigError: it is no mapping. That a value is not of the parameter's type is noted.
    """
    declared = {parameter.name: parameter for parameter in op.parameters}
    settings: dict[str, Setting] = {}
    for name in place.names():
        written = place.get(name)
        if name not in declared:
            written.warn_unknown(_explain_unknown(name, op, ops))
            if not is_setting(written.value):
                written.note(
                    written.error(f"{shown(written.value)} is no value of a parameter; is it one level too low?")
                )
        elif of_model and not declared[name].per_model:
            written.warn(
                f"ignored, because {op.name} has one {name!r} for all models; move it to the top-level `parameters`"
            )
        else:
            setting = written.attempt(partial(parse_setting, parameter=declared[name]))
            settings[name] = setting or Setting(())
            _check_range(written, settings[name], declared[name])
    return settings


@dataclass(frozen=True, slots=True)
class Use:
    """Something that needs values of an op's parameters: a model, or a slice, or the whole merge."""

    places: tuple[Place, ...]
    """Nodes that may have its `parameters`, the nearest first."""
    levels: tuple[Settings, ...]
    """Parameters given there."""
    model: ModelRef | None = None


def check_given(op: Op, uses: Sequence[Use], *, per_model: bool) -> None:
    """Note which parameters the op needs and nothing gives, or which keys were probably meant for them.

    Args:
        op: the method.
        uses: whatever needs the parameters.
        per_model: which of the op's parameters to look at.
    """
    for name in (p.name for p in op.parameters if p.per_model is per_model and p.default is None):
        lacking = []
        for use in uses:
            if any(name in settings for settings in use.levels):
                continue
            errors = [error for place in use.places if (error := _find_misplaced(place, name)) is not None]
            if not errors:
                lacking.append(use)
            for error in errors[:1]:
                use.places[0].note(error)
        if lacking and per_model:
            models = listing(dict.fromkeys(use.model for use in lacking))
            problem = f"{op.name} needs {name!r} for {models}, and nothing gives it; add it under the model's"
            place = lacking[0].places[0].get("parameters")
            place.note(place.error(f"{problem} `parameters`, or at the top for all models"))
        elif lacking:
            place = lacking[0].places[-1].get("parameters")
            cause = lacking[0].places[-1].misspelt("parameters")
            advice = str(cause) if cause else "add it to the top-level `parameters`"
            place.note(place.error(f"{op.name} needs {name!r}, and nothing gives it; {advice}"))


def check_statistics(
    root: Place, op: Op, uses: Sequence[Use], given: Mapping[ModelRef, ModelRef], base: ModelRef | None
) -> None:
    """Note which models lack the statistics that the op needs of each.

    Args:
        root: the config.
        op: the method.
        uses: the models, one or several times each.
        given: where the statistics of each are.
        base: the base model, if the config names one.
    """
    if op.statistics is None:
        return
    key, title = op.statistics.key, op.statistics.title
    needed = f"{op.name} needs the {title} of each model"
    places: dict[ModelRef, Place] = {}
    for use in uses:
        place = use.places[0]
        if use.model is not None and use.model not in given and place.get(key).value is None:  # else that is wrong
            places.setdefault(use.model, place)
    for model, place in places.items():
        if isinstance(place.value, dict) and "model" not in place.value:
            problem = f"{needed}, and a pattern names none; list the models, each with `{key}: ...`"
            place.note(place.error(problem))
            return
        problem = f"is missing: {needed}; give its file or directory, such as `{key}: {model}-{key}.safetensors`"
        place.note(place.missing(key, problem))
    if op.base is Base.INPUT and base is not None and base not in given and base not in places:
        place = root.get("base_model")
        place.note(place.error(f"{needed}, and this one is merged, too; list it under `models`, with `{key}: ...`"))


def _find_misplaced(place: Place, parameter: str) -> PlaceError | None:
    """Return the error about a key that gives a parameter under another name, or one level too high."""
    written = place.get(parameter)
    if written.path in place.findings.unknown:
        return written.error("unknown key; it is a parameter; move it under `parameters`")
    return place.get("parameters").misspelt(parameter)


def check_models(root: Place, place: Place, op: Op, models: Sequence[ModelRef], base: ModelRef | None) -> None:
    """Check the models of a config in `models` form against what the op takes.

    Args:
        root: the config.
        place: its `models`.
        op: the method.
        models: as listed.
        base: the base model, if the config names one.

    Raises:
        ConfigError: the op needs a base and there is none, or it takes another number of models.
    """
    base_place = root.get("base_model")
    if op.base is not Base.INPUT and base is not None:
        is_listed = op.base is Base.OPTIONAL and base in models
        advice = "; remove base_model to merge it as one of the models" if is_listed else ""
        _check_count(place, op, [model for model in models if model != base], advice, besides=" besides the base")
    elif op.base is Base.REQUIRED:
        example = str(models[0]) if op.max_models == 1 else "<the model that the others were fine-tuned from>"
        raise root.missing(
            "base_model",
            f"{op.name} needs a base model; add `base_model: {example}`; or, if the models are LoRA adapters that are"
            " to become one, `adapter: {}`",
        )
    elif base is None or base in models:
        _check_count(place, op, models)
    else:
        advice = f"; base_model {base} counts too, because it is not listed and {op.name} takes no base: remove it"
        _check_count(place, op, [*models, base], advice)
        base_place.warn(
            f"{base} is not under `models`, so {op.name} merges it as one more model, after the others; "
            f"list it there, or remove base_model"
        )


def check_sources(root: Place, place: Place, op: Op, sources: Sequence[ModelRef], base: ModelRef | None) -> None:
    """Check the sources of one output slice against what the op takes.

    Args:
        root: the config.
        place: the slice's `sources`.
        op: the method.
        sources: the models as listed.
        base: the base model that holds for the slice, if any.

    Raises:
        ConfigError: the op needs a base among the sources, or takes another number of models.
    """
    if op.base is Base.INPUT or (op.base is Base.OPTIONAL and base is None):
        _check_count(place, op, sources)
        return
    if base is None:
        problem = f"{op.name} needs a base model; add it, for instance `base_model: {sources[0]}`"
        raise root.missing("base_model", problem)
    if base not in sources:
        or_not = ", or remove base_model" if op.base is Base.OPTIONAL else ""
        raise place.error(
            f"the base model {base} is not among the sources ({listing(sources)}), and {op.name} needs it in every "
            f"slice; add a source with `model: {base}` and its layer_range{or_not}"
        )
    if sources.count(base) > 1:
        raise place.error(f"the base model {base} is listed {sources.count(base)} times; list it once")
    _check_count(place, op, [model for model in sources if model != base], besides=" besides the base")


def _check_count(place: Place, op: Op, models: Sequence[ModelRef], advice: str = "", besides: str = "") -> None:
    low, high = op.min_models, op.max_models
    if low <= len(models) and (high is None or len(models) <= high):
        return
    wanted = f"at least {low}" if high is None else f"exactly {low}" if low == high else f"{low} to {high}"
    given = f"{len(models) or 'none'} {'are' if len(models) > 1 else 'is'} given"
    names = f" ({listing(models)})" if models else ""
    raise place.error(f"{op.name} takes {wanted} model{'' if high == 1 else 's'}{besides}, {given}{names}{advice}")


def _explain_unknown(name: str, op: Op, ops: Mapping[str, Op]) -> str:
    allowed = [parameter.name for parameter in op.parameters]
    users = [other.name for other in ops.values() if any(name == p.name for p in other.parameters)]
    if not users:
        return f"unknown parameter, ignored; {suggest(name, allowed)}"
    has = f"its parameters are: {', '.join(allowed)}" if allowed else "it has no parameters"
    return f"ignored, because {op.name} does not use {name!r} (it belongs to {listing(users)}); {has}"


def _check_range(place: Place, setting: Setting, parameter: Parameter) -> None:
    """Warn about a number that makes no sense, or leaves nothing to merge."""
    limits = parameter.range
    values = [value for rule in setting.rules for value in rule.values if isinstance(value, int | float)]
    outside = [value for value in values if limits and not limits.low <= value <= limits.high]
    if limits and outside:
        percent = f"; did you mean {outside[0] / 100:g}?" if limits.high == 1 and 10 <= outside[0] <= 100 else ""
        place.warn(f"{outside[0]:g} is not {limits}{percent}")
    if parameter.name in _SHARES_KEPT and values and not any(values):
        place.warn(f"0 keeps nothing, so that what {'the model' if parameter.per_model else 'models'} changed is lost")
