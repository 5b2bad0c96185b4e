"""The models that are to be evaluated: those of a spectrum, or any others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from raymerge import RaymergeError
from raymerge.pipeline.checkpoint.checkpoint import locate_model
from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG, CONFIG, PIPELINE
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import CheckpointError, ConfigError, FetchError
from raymerge.pipeline.evaluation.adapters import find_base, plan_sum
from raymerge.pipeline.messages import find_near, listing
from raymerge.pipeline.output.state import OutputState, check_state
from raymerge.pipeline.spectrum.places import list_places, locate_ref, parse_ref
from raymerge.pipeline.spectrum.record import (
    EVALUATIONS,
    RECORD,
    Point,
    Spectrum,
    has_spectrum,
    locate_point,
    read_spectrum,
)
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_ODD = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True, slots=True)
class Planned:
    """A model that is merged for the evaluation."""

    directory: str
    """Directory of the spectrum that has it; empty if none does."""
    spectrum: Spectrum
    point: Point
    base: str | None = None
    """The model that it is applied to if it comes out as an adapter; by default the one that the adapter names."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is to be evaluated."""

    name: str
    """Unique among them."""
    url: str
    """Its directory, absolute; empty for a point that is merged for the evaluation and deleted after it."""
    shown: str
    """As the user or the record calls it."""
    planned: Planned | None = None
    """Such a point; also a model with an adapter, which is applied by a merge."""
    fingerprint: str = ""
    """Fingerprint of the plan that makes it; empty if that is not known."""
    parts: tuple[str, ...] = ()
    """The directories of model and adapter: what they hold tells which model it is."""
    error: str = ""
    """Why it cannot be evaluated; empty otherwise."""
    is_parent: bool = False
    """Whether it is one of a spectrum."""

    @property
    def same(self) -> str:
        """The identity of a model that is to be merged: equal for two that are one."""
        return "" if self.planned is None else self.fingerprint or self.planned.point.config


@dataclass(frozen=True, slots=True)
class Subjects:
    """All of them, and where their results go by default."""

    models: tuple[Subject, ...]
    out: str
    skipped: tuple[str, ...] = ()
    """Points that failed to be made, or are gone, with the reasons."""
    has_spectrum: bool = False
    """Whether they are those of one spectrum."""


def find_subjects(
    stores: Stores, given: Sequence[str], only: Sequence[str] | None = None, base: str | None = None
) -> Subjects:
    """Return the models that are meant.

    Args:
        stores: that have them.
        given: directories, URLs or Hub repositories of models, or of spectra: their points and parents.
        only: the names of those that are meant; by default all.
        base: the model that adapters go with; by default the one that each of them names.

    Raises:
        RaymergeError: one of those given is not there; nothing is evaluated then.
    """
    if not given:
        raise ConfigError("no model is given: a spectrum's directory, or directories, URLs or Hub names of models")
    models: list[Subject] = []
    skipped: list[str] = []
    outs = []
    has_spectrum = False
    for name in dict.fromkeys(given):
        url = stores.at(name).absolute(name)
        if _is_spectrum(stores, url):
            found, failed = _list_spectrum(stores, url, read_spectrum(stores, url), only, base)
            models += found
            skipped += failed
            has_spectrum = len(given) == 1
            outs.append(f"{url}/{EVALUATIONS}" if scheme_of(url) not in ("hf", "http", "https") else "")
        else:
            models.append(_find_model(stores, parse_ref(name), None, base))
            outs.append("")
    if not models:
        raise ConfigError(f"{', '.join(given)}: no point could be made: {listing(skipped)}")
    out = outs[0] if len(set(outs)) == 1 and outs[0] else stores.at(EVALUATIONS).absolute(EVALUATIONS)
    return Subjects(_make_unique(models), out, tuple(skipped), has_spectrum)


def _is_spectrum(stores: Stores, url: str) -> bool:
    try:
        return has_spectrum(stores, url)
    except CheckpointError:  # no such repository: the model's own error says more
        return False


def _list_spectrum(
    stores: Stores, url: str, spectrum: Spectrum, only: Sequence[str] | None, base: str | None
) -> tuple[list[Subject], list[str]]:
    """Return the models of a spectrum, and why others have none."""
    names = [point.name for point in spectrum.points] + [parent.name for parent in spectrum.parents]
    for name in only or ():
        if name not in names:
            near = find_near(name, names)
            raise ConfigError(f"{url} has no model {name}; " + (f"did you mean {near}?" if near else listing(names)))
    found, failed = [], []
    locate = partial(locate_ref, spectrum, url)
    for point in spectrum.sorted_points:
        if only is not None and point.name not in only:
            continue
        where = locate_point(url, point)
        if point.state == "failed":
            failed.append(f"{point.name}: {point.error}")
        elif point.state == "planned" and not _is_made(stores, where, point.fingerprint):
            planned = Planned(url, spectrum, point, base)
            found.append(Subject(point.name, "", where, planned, point.fingerprint))
        elif _is_model(stores, where):
            found.append(Subject(point.name, where, where, fingerprint=point.fingerprint))
        elif _has(stores, where, ADAPTER_CONFIG):
            found.append(_try_model(stores, ModelRef(where), point.name, base, locate))
        else:
            failed.append(f"{point.name}: its model is no longer in {where}; run the sweep again to make it")
    parents = [parent for parent in spectrum.parents if only is None or parent.name in only]
    for each in parents:
        ref = parse_ref(each.model)
        parent = _try_model(stores, locate(ref), each.name, base, locate)
        error = parent.error and f"{parent.error}{_tell_move(spectrum, url, ref)}"
        found.append(replace(parent, is_parent=True, error=error))
    return found, failed


def _tell_move(spectrum: Spectrum, url: str, ref: ModelRef) -> str:
    """Return where else a parent was looked for that is not there; empty where there is no other place."""
    paths = [part.path for part in (ref, ref.adapter) if part is not None and part.path in spectrum.local]
    tried = [list_places(spectrum, url, path) for path in paths]
    places = [place for each in tried if not any(Path(one).exists() for one in each) for place in each[1:]]
    if not places:
        return ""
    return f"; the spectrum has moved, and {listing(places)} is not there either: move the parents along with it"


def _is_model(stores: Stores, url: str) -> bool:
    return _has(stores, url, CONFIG) or _has(stores, url, PIPELINE)


def _has(stores: Stores, url: str, name: str) -> bool:
    try:
        stores.at(url).stat(f"{url}/{name}")
    except FileNotFoundError:
        return False
    return True


def _is_made(stores: Stores, url: str, fingerprint: str) -> bool:
    """Tell whether the model of a plan is complete: a sweep may have been interrupted before it noted that."""
    try:
        return check_state(stores, url, fingerprint, overwrite=False) is OutputState.COMPLETE
    except RaymergeError:
        return False


def _try_model(
    stores: Stores, ref: ModelRef, called: str, base: str | None, locate: Callable[[ModelRef], ModelRef]
) -> Subject:
    """Return a model of a spectrum; one that is not there says so, and the others are evaluated."""
    try:
        return _find_model(stores, ref, called, base, locate)
    except (CheckpointError, ConfigError, FetchError) as error:
        return Subject(called, "", str(ref), error=str(error))


def _find_model(
    stores: Stores,
    ref: ModelRef,
    called: str | None,
    base: str | None,
    locate: Callable[[ModelRef], ModelRef] = lambda ref: ref,
) -> Subject:
    """Return a model, or an adapter with its base.

    Args:
        stores: that have it.
        ref: which it is.
        called: its name; by default the last part of its path.
        base: see `find_subjects`.
        locate: returns where a base is that an adapter names.

    Raises:
        RaymergeError: it is not there.
    """
    called = called or _ODD.sub("-", re.split(r"[/\\]", str(ref).rstrip("/"))[-1]).strip("-.") or "model"
    if ref.adapter is not None:
        return _apply(stores, ref.without_adapter, ref.adapter, called)
    url = locate_model(stores, ref)
    if _is_model(stores, url):
        return Subject(called, url, str(ref))
    if not _has(stores, url, ADAPTER_CONFIG):
        raise CheckpointError(f"{ref}: no {CONFIG} and no {RECORD} there; it is neither a model nor a spectrum")
    named = find_base(stores, url, base)
    try:
        return _apply(stores, named if base else locate(named), ref, called)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"{ref}: a LoRA adapter, and its {ADAPTER_CONFIG} names a base that is not here: {error}; give it as --base"
        ) from error


def _apply(stores: Stores, base: ModelRef, adapter: ModelRef, called: str) -> Subject:
    """Return a model with an adapter."""
    parts = locate_model(stores, base), locate_model(stores, adapter)
    planned = Planned("", *plan_sum(called, base, adapter))
    return Subject(called, "", str(replace(base, adapter=adapter)), planned, parts=parts)


def _make_unique(models: Sequence[Subject]) -> tuple[Subject, ...]:
    unique: dict[str, Subject] = {}
    for model in models:
        names = (model.name, *(f"{model.name}-{number}" for number in range(2, len(models) + 2)))
        name = next(name for name in names if name not in unique)
        unique[name] = replace(model, name=name)
    return tuple(unique.values())
