"""The forms of a config: which one it is written in, and whether the sources of a slice go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymerge.pipeline.config.merge_config import SliceSource
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import counted

WHOLE = ""
"""Stands for the name of a module where `models` or `slices` are those of the whole model."""
_DEFAULT = "default"
"""mergekit's name for the only module of a model."""
_FORMS = ("models", "slices", "modules")


def find_bodies(root: Place) -> Mapping[str, Place]:
    """Return where `models` or `slices` stand: at the top level, or in each of `modules`, by the modules' names.

    Raises:
        ConfigError: there is none of them, or more than one.
    """
    _check_form(root, _FORMS)
    modules = root.get("modules")
    if not modules:
        return {WHOLE: root}
    bodies = {name: modules.get(name) for name in modules.names()}
    for body in bodies.values():
        body.check_keys(("models", "slices", "parameters"))
        _check_form(body, _FORMS[:2])
    return {WHOLE: bodies[_DEFAULT]} if bodies.keys() == {_DEFAULT} else bodies


def _check_form(place: Place, forms: Sequence[str]) -> None:
    given = [form for form in forms if place.get(form)]
    if not given:
        written = [form for form in forms if form in place.names()]
        problem = f"{written[0]} is empty" if written else "no models are given"
        error = place.error(f"{problem}; list what to merge under `models`, or layers of it under `slices`")
        raise next((near for form in forms if (near := place.misspelt(form))), error)
    if len(given) > 1:
        raise place.error(f"{' and '.join(given)} are given, and only one can be; keep one of them")


def check_lengths(place: Place, sources: Sequence[SliceSource]) -> None:
    """Refuse sources of a slice whose ranges have different lengths, as far as they are given."""
    first = next((source.layer_range for source in sources if source.layer_range), (0, 0))
    for source, where in zip(sources, place.elements(), strict=True):
        start, stop = source.layer_range or first
        if stop - start != first[1] - first[0]:
            raise where.get("layer_range").error(
                f"[{start}, {stop}] is {counted(stop - start, 'layer')}, but the first source of this slice, "
                f"[{first[0]}, {first[1]}], is {first[1] - first[0]}; give all sources of a slice the same length"
            )
