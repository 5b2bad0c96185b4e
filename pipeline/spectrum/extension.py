"""Points that are added to those of an earlier sweep in the same directory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from raymerge.pipeline.config.document import read_documents
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import shown
from raymerge.pipeline.spectrum.names import name_models
from raymerge.pipeline.spectrum.places import locate_path
from raymerge.pipeline.spectrum.record import Parent, Point, Spectrum, choose_url


def extend(before: Spectrum | None, new: Spectrum, directory: str, *, overwrite: bool) -> Spectrum:
    """Return the record of an earlier sweep with the points of a new one.

    Points that are there already stay as they are; so do those that the new sweep does not name.

    Args:
        before: the record that is there, if any.
        new: the points that are to be there.
        directory: of both, for messages.
        overwrite: whether points are replaced, and a spectrum of another recipe is forgotten.

    Raises:
        OutputError: the earlier sweep was one of another recipe, or has a point of a name with another model.
    """
    if before is None:
        return new
    difference = next(_compare_recipes(before.config, new.config), None)
    if difference is not None:
        if overwrite:
            return new
        raise OutputError(
            f"{directory} has a spectrum of another recipe: {difference}; choose another directory (`raymerge sweep"
            " --overwrite` begins a new record in this one, and leaves models of other names where they are)"
        )
    if not overwrite and (moved := _find_moved(before, new, directory)):
        raise OutputError(moved)
    known = {point.name: point for point in before.points}
    points = dict(known)
    by_fingerprint = {point.fingerprint: point for point in before.points if point.fingerprint}
    for point in new.points:
        old = known.get(point.name)
        if old is None:
            equal = by_fingerprint.get(point.fingerprint)
            points[point.name] = point if equal is None else replace(point, url=equal.url, state=equal.state)
        elif overwrite or not old.fingerprint:
            points[point.name] = point
        elif old.fingerprint != point.fingerprint:
            raise OutputError(_explain_other(old, point, directory))
    paths = dict.fromkeys((*before.paths, *new.paths))
    parents = _join_parents(before.parents, new.parents, points)
    local = tuple(dict.fromkeys((*before.local, *new.local)))
    return replace(
        new,
        paths=tuple(paths),
        parents=parents,
        points=_part(tuple(points.values()), directory),
        started_in=new.started_in or before.started_in,
        place=new.place or before.place,
        local=local,
    )


def _find_moved(before: Spectrum, new: Spectrum, directory: str) -> str:
    """Tell whether a path of the earlier sweep means another model in this one, or none; empty if none does."""
    for path in before.local if new.started_in else ():
        there, here = (Path(locate_path(each, directory, path)) for each in (before, new))
        if there.exists() and not (here.exists() and there.samefile(here)):
            return (
                f"{directory} has a spectrum of other models: {path} was {there} there, and is"
                f" {Path(new.started_in, path)} where the sweep runs now; run it where the first one ran, or choose"
                " another directory"
            )
    return ""


def _part(points: Sequence[Point], directory: str) -> tuple[Point, ...]:
    """Return points of which none has the model of an equal one any more that has been replaced by another."""
    there = {choose_url(directory, point.name): point.fingerprint for point in points}
    return tuple(
        point
        if there.get(point.url, point.fingerprint) == point.fingerprint
        else replace(point, url=choose_url(directory, point.name), state="planned")
        for point in points
    )


def _join_parents(before: Sequence[Parent], new: Sequence[Parent], points: Collection[str]) -> tuple[Parent, ...]:
    """Return all parents, with names that neither points nor other parents have; known ones keep theirs if they can."""
    are_bases = {parent.model: parent.is_base for parent in (*before, *new)}
    taken = {name.casefold() for name in points}
    names = {parent.model: parent.name for parent in before if parent.name.casefold() not in taken}
    others = [model for model in are_bases if model not in names]
    names |= dict(zip(others, name_models(others, [*points, *names.values()]), strict=True))
    return tuple(Parent(names[model], model, is_base=is_base) for model, is_base in are_bases.items())


def _explain_other(old: Point, new: Point, directory: str) -> str:
    if dict(old.settings) != dict(new.settings):
        what = f"with other settings: {shown(dict(old.settings))} there, {shown(dict(new.settings))} here"
    else:
        what = "made with another seed, shard size, file of --ops or version, or of inputs that have changed"
    return f"{directory} has {old.name} already, {what}; choose another directory, or give --overwrite to make it again"


def _compare_recipes(old: str, new: str) -> Iterator[str]:
    """Yield where two configs differ, but for what they sweep."""
    pair = [[document.content for document in read_documents(text)] for text in (old, new)]
    if len(pair[0]) != len(pair[1]):
        yield f"{len(pair[0])} documents there, {len(pair[1])} here"
    for one, other in zip(*pair, strict=False):
        yield from _compare(
            {key: value for key, value in one.items() if key != SWEEP},
            {key: value for key, value in other.items() if key != SWEEP},
            "",
        )


def _compare(old: object, new: object, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _compare(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for k, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _compare(one, other, f"{path}[{k}]")
    elif old != new:
        yield f"{path} is {shown(old)} there, {shown(new)} here"
