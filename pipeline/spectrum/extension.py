"""Points that are added to those of an earlier sweep in the same directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raymerge.pipeline.config.document import read_documents
from raymerge.pipeline.config.sweep import SWEEP
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import shown
from raymerge.pipeline.spectrum.record import Point, Spectrum


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
            f"{directory} has a spectrum of another recipe: {difference}; choose another directory, or give --overwrite"
        )
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
    parents = {parent.model: parent for parent in (*before.parents, *new.parents)}
    return replace(new, paths=tuple(paths), parents=tuple(parents.values()), points=tuple(points.values()))


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
