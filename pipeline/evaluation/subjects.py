"""The models that are to be evaluated: those of a spectrum, or any others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raymerge.pipeline.checkpoint.checkpoint import locate_model
from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG, CONFIG, PIPELINE
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import parse_model_ref
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.messages import find_near, listing
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
class Subject:
    """A model that is to be evaluated."""

    name: str
    """Unique among them."""
    url: str
    """Its directory, absolute; empty for a point that is merged for the evaluation and deleted after it."""
    shown: str
    """As the user or the record calls it."""
    point: Point | None = None
    """Such a point; also a model with an adapter, which is applied by a merge."""
    directory: str = ""
    """Of the spectrum that has it."""

    @property
    def same(self) -> str:
        """What tells whether two such points are one model."""
        return "" if self.point is None else self.point.fingerprint or self.point.config


@dataclass(frozen=True, slots=True)
class Subjects:
    """All of them, and where their results go by default."""

    models: tuple[Subject, ...]
    out: str
    skipped: tuple[str, ...] = ()
    """Points that failed to be made, or are gone, with the reasons."""


def find_subjects(stores: Stores, given: Sequence[str], only: Sequence[str] | None = None) -> Subjects:
    """Return the models that are meant.

    Args:
        stores: that have them.
        given: directories, URLs or Hub repositories of models, or of spectra: their points and parents.
        only: the names of those that are meant; by default all.

    Raises:
        RaymergeError: one is not there; nothing is evaluated then.
    """
    if not given:
        raise ConfigError("no model is given: a spectrum's directory, or directories, URLs or Hub names of models")
    models: list[Subject] = []
    skipped: list[str] = []
    outs = []
    for name in dict.fromkeys(given):
        url = stores.at(name).absolute(name)
        if _is_spectrum(stores, url):
            spectrum = read_spectrum(stores, url)
            found, failed = _list_spectrum(stores, url, spectrum, only)
            models += found
            skipped += failed
            outs.append(f"{url}/{EVALUATIONS}" if scheme_of(url) not in ("hf", "http", "https") else "")
        else:
            models.append(_find_model(stores, name, None))
            outs.append("")
    if not models:
        raise ConfigError(f"{', '.join(given)}: no point could be made: {listing(skipped)}")
    out = outs[0] if len(set(outs)) == 1 and outs[0] else stores.at(EVALUATIONS).absolute(EVALUATIONS)
    return Subjects(_make_unique(models), out, tuple(skipped))


def _is_spectrum(stores: Stores, url: str) -> bool:
    try:
        return has_spectrum(stores, url)
    except CheckpointError:  # no such repository: the model's own error says more
        return False


def _list_spectrum(
    stores: Stores, url: str, spectrum: Spectrum, only: Sequence[str] | None
) -> tuple[list[Subject], list[str]]:
    found, failed = [], []
    names = [point.name for point in spectrum.points] + [parent.name for parent in spectrum.parents]
    for name in only or ():
        if name not in names:
            near = find_near(name, names)
            raise ConfigError(f"{url} has no model {name}; " + (f"did you mean {near}?" if near else listing(names)))
    for point in spectrum.points:
        if only is not None and point.name not in only:
            continue
        where = locate_point(url, point)
        if point.state == "failed":
            failed.append(f"{point.name}: {point.error}")
        elif point.state == "planned":
            found.append(Subject(point.name, "", where, point, url))
        elif _has(stores, where, ADAPTER_CONFIG):
            failed.append(f"{point.name}: {_explain_adapter(where)}")
        elif not _has(stores, where, CONFIG) and not _has(stores, where, PIPELINE):
            failed.append(f"{point.name}: its model is no longer in {where}; run the sweep again to make it")
        else:
            found.append(Subject(point.name, where, where))
    parents = [parent for parent in spectrum.parents if only is None or parent.name in only]
    for parent in parents:
        try:
            found.append(_find_model(stores, parent.model, parent.name))
        except CheckpointError as error:
            raise CheckpointError(
                f"{parent.name}, a parent of {url}: {error}. Local paths of parents start where the sweep was run: run"
                " this there, or name the models to evaluate with --only"
            ) from error
    return found, failed


def _has(stores: Stores, url: str, name: str) -> bool:
    try:
        stores.at(url).stat(f"{url}/{name}")
    except FileNotFoundError:
        return False
    return True


def _explain_adapter(name: str) -> str:
    return f"a LoRA adapter, which is evaluated with its base: `raymerge eval BASE+{name}`"


def _find_model(stores: Stores, name: str, called: str | None) -> Subject:
    ref = parse_model_ref(Place(name, "MODEL"))
    called = called or _ODD.sub("-", re.split(r"[/\\]", str(ref).rstrip("/"))[-1]).strip("-.") or "model"
    if ref.adapter is not None:
        return Subject(called, "", str(ref), Point(called, "", {}, _make_config(ref), "", "planned", ""))
    url = locate_model(stores, ref)
    if not _has(stores, url, CONFIG):
        if _has(stores, url, ADAPTER_CONFIG):
            raise ConfigError(f"{name}: {_explain_adapter(name)}")
        raise CheckpointError(f"{name}: no {CONFIG} and no {RECORD} there; it is neither a model nor a spectrum")
    return Subject(called, url, str(ref))


def _make_config(ref: ModelRef) -> str:
    """Return the config of a merge that applies an adapter."""
    return f"merge_method: passthrough\nmodels: [{{model: {str(ref)!r}}}]\n"


def _make_unique(models: Sequence[Subject]) -> tuple[Subject, ...]:
    unique: dict[str, Subject] = {}
    for model in models:
        names = (model.name, *(f"{model.name}-{number}" for number in range(2, len(models) + 2)))
        name = next(name for name in names if name not in unique)
        unique[name] = replace(model, name=name)
    return tuple(unique.values())
