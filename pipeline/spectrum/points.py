"""The points of a sweep, each with a config of its own that is read and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import yaml

from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Op, load_ops
from raymerge.pipeline.config.document import Document, read_documents
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.config.sections.training_run import FindModels
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import counted, find_near, shown
from raymerge.pipeline.spectrum.paths import SEED, Methods, parse_path, set_value
from raymerge.pipeline.spectrum.variations import describe, parse_section, parse_sets

_METHOD = "merge_method"
_SHOWN = 3
"""Points whose mistakes a message shows."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One model that a sweep is to make."""

    name: str
    settings: Mapping[str, object]
    """The value at each path that is varied."""
    config: MergeConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """The values that a sweep varies, and the points that come of it."""

    text: str
    """The YAML as given."""
    paths: tuple[str, ...]
    """In the order given."""
    points: tuple[SweepPoint, ...]


def make_points(
    config: FilePath | str | Mapping[str, Any],
    sets: Sequence[str] | Mapping[str, object],
    seed: int,
    *,
    strict: bool = False,
    own: OwnOps | None = None,
    find: FindModels | None = None,
) -> Recipe:
    """Return the points of a sweep, with their configs checked.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds; with a `sweep:` section or without.
        sets: `--set` options, which go in the place of the section; see `parse_sets`.
        seed: of points that set none.
        strict: refuse what otherwise gives a warning.
        own: ops besides those that are installed.
        find: finds models by a pattern.

    Raises:
        ConfigError: nothing is varied, a path or value is wrong, or the config of a point is; it names the point.
    """
    documents = read_documents(config)
    position, section = _find_section(documents)
    document = documents[position]
    try:
        variations = parse_sets(sets) if sets else parse_section(section)
    except PlaceError as error:
        raise ConfigError(document.show(str(error), error.line)) from None
    contents = [{key: value for key, value in document.content.items() if key != SWEEP} for document in documents]
    chosen = [value for each in variations for path, value in each.settings.items() if path.text == _METHOD]
    methods = find_methods([contents[position].get(_METHOD), *chosen], own)
    load = partial(load_config, strict=strict, own=own, find=find)
    points, problems = [], []
    for variation in variations:
        own_contents = [_copy(content) for content in contents]
        own_seed = seed
        for path, value in variation.settings.items():
            try:
                if path.text == SEED and SEED not in methods.parameters:
                    own_seed = _check_seed(value)
                else:
                    set_value(own_contents[position], path, value, methods)
            except ConfigError as error:
                raise ConfigError(document.show(str(error), path.line) if path.line else str(error)) from None
        settings = {path.text: value for path, value in variation.settings.items()}
        try:
            loaded = load(
                own_contents[0] if len(own_contents) == 1 else yaml.safe_dump_all(own_contents, sort_keys=False)
            )
        except ConfigError as error:
            where = document.where(variation.line, is_short=True) if variation.line else ""
            problems.append(f"{where}{variation.name} ({describe(variation)}): {error}")
            continue
        points.append(SweepPoint(variation.name, settings, loaded, own_seed))
    if problems:
        raise ConfigError(explain(problems, len(variations)))
    paths = dict.fromkeys(path.text for variation in variations for path in variation.settings)
    return Recipe(documents[0].text, tuple(paths), tuple(points))


def explain(problems: Sequence[str], num_points: int) -> str:
    """Return a message on the points that cannot be made."""
    if num_points == 1:
        return problems[0]
    rest = len(problems) - _SHOWN
    more = f"\nand {counted(rest, 'point')} more" if rest > 0 else ""
    return f"{len(problems)} of {counted(num_points, 'point')} cannot be made:\n" + "\n".join(problems[:_SHOWN]) + more


def _find_section(documents: Sequence[Document]) -> tuple[int, Place]:
    """Return which document a sweep varies, and its `sweep:` section.

    That is the one with a section, or else the one that gives the output: without a name, or the last.
    """
    roots = [Place(document.content, node=document.node) for document in documents]
    found = [k for k, root in enumerate(roots) if root.get(SWEEP).value is not None]
    if len(found) > 1:
        raise ConfigError(f"{SWEEP}: {len(found)} documents have one; put all into one of them")
    nameless = [k for k, root in enumerate(roots) if root.get("name").value is None]
    position = (found or nameless or [len(roots) - 1])[0]
    return position, roots[position].get(SWEEP)


def find_methods(names: Collection[object], own: OwnOps | None) -> Methods:
    """Return the methods with some names, those that are known.

    Args:
        names: as the config has them.
        own: ops besides those that are installed.
    """
    found = [op for name, op in _list_ops(own).items() if name in names]
    parameters = {parameter.name: parameter for op in found for parameter in op.parameters}
    shared = {name for name, parameter in parameters.items() if not parameter.per_model}
    return Methods(tuple(op.name for op in found), parameters.keys(), shared)


def _list_ops(own: OwnOps | None) -> dict[str, Op]:
    return {**load_ops(), **(own.ops if own else {})}


def check_paths(
    document: Document,
    content: Mapping[str, object],
    values: Mapping[str, Sequence[object]],
    lines: Mapping[str, int | None],
    own: OwnOps | None,
) -> None:
    """Make sure that a config has all the paths that are to be set.

    Args:
        document: that messages show.
        content: the config.
        values: some that each path is to have; of `merge_method` all.
        lines: of the document, for each path.
        own: ops besides those that are installed.

    Raises:
        ConfigError: paths name nothing, or methods are unknown; it names all of them.
    """
    chosen = values.get(_METHOD, ())
    methods = find_methods([content.get(_METHOD), *chosen], own)
    problems = []
    for name in chosen:
        if name not in methods.names:
            near = find_near(str(name), list(_list_ops(own)))
            hint = f"did you mean {near!r}?" if near else "`raymerge methods` lists those that are known"
            problems.append((f"{_METHOD}: there is no method {shown(name)}; {hint}", lines[_METHOD]))
    trial = _copy(content)
    for text, own_values in values.items():
        if text == SEED and SEED not in methods.parameters:
            continue
        try:
            set_value(trial, parse_path(text), own_values[0], methods)  # in order: one may make the place of the next
        except ConfigError as error:
            problems.append((str(error), lines[text]))
    if problems:
        raise ConfigError(document.show_all(problems))


def _check_seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{SEED}: {value!r} is given; a seed is a whole number, 0 or more")
    return value


def _copy(value: Any) -> Any:
    """Return plain data in which nothing is shared: what aliases of YAML stand for is written out."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
