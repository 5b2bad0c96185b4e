"""A recipe: a merge config with a `search:` section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raymerge.ops.own import OwnOps
from raymerge.pipeline.config.document import Document, read_documents
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.reader import KEYS
from raymerge.pipeline.config.sections.search import SEARCH
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import find_near
from raymerge.pipeline.search.space import Space, first_values, parse_space
from raymerge.pipeline.search.study import Settings
from raymerge.pipeline.spectrum.points import check_paths, find_methods

Config = Path | str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe that is searched."""

    contents: tuple[Mapping[str, object], ...]
    """The documents of the config, without the section."""
    position: int
    """Position of the document that had it."""
    space: Space
    """Empty where the recipe has no section: a soup needs none."""
    document: Document = field(compare=False, repr=False)
    """The one that had the section."""

    @property
    def text(self) -> str:
        """The recipe as YAML, with the space in words: equal ones are searched alike."""
        described = {path: str(dimension) for path, dimension in self.space.items()}
        return str(yaml.safe_dump_all([*self.contents, {SEARCH: described}], sort_keys=False))

    def find_line(self, path: str) -> int | None:
        """Return the line that gives a path its values; None where nobody knows."""
        root = Place(self.document.content, node=self.document.node)
        return root.get(SEARCH).get("parameters").get(path).line

    @property
    def num_models(self) -> int:
        """The number of models that the document lists."""
        models = self.contents[self.position].get("models")
        if not isinstance(models, list) or len(models) < 2:
            raise ConfigError("a soup is made of the `models` that the recipe lists; list two or more")
        return len(models)

    def compose(self, points: Mapping[str, Settings]) -> str | Mapping[str, object]:
        """Return the config of a sweep over some settings, by their names; as YAML if it has several documents.

        One document stays without lines, which messages would name, and the user's file has other ones.
        """
        contents = [dict(content) for content in self.contents]
        contents[self.position][SWEEP] = {"points": {name: dict(own) for name, own in points.items()}}
        return contents[0] if len(contents) == 1 else str(yaml.safe_dump_all(contents, sort_keys=False))


def read_recipe(config: Config, *, is_soup: bool, own: OwnOps | None = None) -> Recipe:
    """Read a recipe.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds.
        is_soup: whether models are averaged, which needs no `search:` section, and a method with weights.
        own: ops besides those that are installed.

    Raises:
        ConfigError: the section is malformed, or names paths that the config does not have; what else is wrong with
            the config shows when it is merged.
    """
    documents = read_documents(config)
    places = [Place(document.content, node=document.node) for document in documents]
    found = [k for k, place in enumerate(places) if place.get(SEARCH).value is not None]
    if len(found) > 1:
        raise ConfigError(f"{SEARCH}: {len(found)} documents have one; put all into one of them")
    if not found and not is_soup:
        raise _explain_missing(documents)
    position = found[0] if found else len(documents) - 1
    try:
        space = parse_space(places[position].get(SEARCH)) if found else {}
    except PlaceError as error:
        raise ConfigError(documents[position].show(str(error), error.line)) from None
    if any(SWEEP in document.content for document in documents):
        raise ConfigError(f"the recipe has a `{SWEEP}:` section as well as `{SEARCH}:`; leave one")
    contents = tuple({key: value for key, value in document.content.items() if key != SEARCH} for document in documents)
    if is_soup:
        _check_soup(contents[position], own)
    recipe = Recipe(contents, position, space, documents[position])
    values = {path: first_values(dimension) for path, dimension in space.items()}
    lines = {path: recipe.find_line(path) for path in space}
    check_paths(documents[position], contents[position], values, lines, own)
    return recipe


def _explain_missing(documents: Sequence[Document]) -> ConfigError:
    for document in documents:
        unknown = [key for key in document.content if key not in KEYS]
        if near := find_near(SEARCH, unknown):
            line = Place(document.content, node=document.node).get(near).line
            return ConfigError(document.show(f"{near}: unknown key; did you mean {SEARCH!r}?", line))
    return ConfigError(
        f"the recipe has no `{SEARCH}:` section; say what may vary, such as"
        f" {SEARCH}: {{parameters: {{t: {{min: 0, max: 1}}}}}}"
    )


def _check_soup(content: Mapping[str, object], own: OwnOps | None) -> None:
    methods = find_methods([content.get("merge_method")], own)
    if methods.names and "weight" not in {*methods.parameters} - {*methods.shared}:
        raise ConfigError(
            f"a soup averages models by a weight for each, and {methods.describe()}; write merge_method: linear, or"
            " take another sampler"
        )
