"""A recipe: a merge config with a `search:` section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymerge.pipeline.config.document import read_documents
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.search import SEARCH
from raymerge.pipeline.config.sweep import SWEEP
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.space import Space, parse_space
from raymerge.pipeline.search.study import Settings

Config = Path | str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is searched."""

    contents: tuple[Mapping[str, object], ...]
    """The documents of the config, without the section."""
    position: int
    """Of the document that had it."""
    space: Space
    """Empty where the recipe has no section: a soup needs none."""

    @property
    def text(self) -> str:
        """The recipe as YAML, with the space in words: equal ones are searched alike."""
        described = {path: str(dimension) for path, dimension in self.space.items()}
        return str(yaml.safe_dump_all([*self.contents, {SEARCH: described}], sort_keys=False))

    @property
    def num_models(self) -> int:
        """The number of models that the document lists."""
        models = self.contents[self.position].get("models")
        if not isinstance(models, list) or len(models) < 2:
            raise ConfigError("a soup is made of the `models` that the recipe lists; list two or more")
        return len(models)

    def compose(self, points: Mapping[str, Settings]) -> str:
        """Return the config of a sweep over some settings, by their names."""
        contents = [dict(content) for content in self.contents]
        contents[self.position][SWEEP] = {"points": {name: dict(own) for name, own in points.items()}}
        return str(yaml.safe_dump_all(contents, sort_keys=False))


def read_recipe(config: Config, *, needs_space: bool) -> Recipe:
    """Read a recipe.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds.
        needs_space: whether a recipe without a `search:` section is refused.

    Raises:
        ConfigError: it is malformed; what is wrong with the config itself shows when it is merged.
    """
    documents = read_documents(config)
    places = [Place(document.content, node=document.node) for document in documents]
    found = [k for k, place in enumerate(places) if place.get(SEARCH).value is not None]
    if len(found) > 1:
        raise ConfigError(f"{SEARCH}: {len(found)} documents have one; put all into one of them")
    if not found and needs_space:
        raise ConfigError(
            f"the recipe has no `{SEARCH}:` section; say what may vary, such as"
            f" {SEARCH}: {{parameters: {{t: {{min: 0, max: 1}}}}}}"
        )
    position = found[0] if found else len(documents) - 1
    try:
        space = parse_space(places[position].get(SEARCH)) if found else {}
    except PlaceError as error:
        raise ConfigError(documents[position].show(str(error), error.line)) from None
    if any(SWEEP in document.content for document in documents):
        raise ConfigError(f"the recipe has a `{SWEEP}:` section as well as `{SEARCH}:`; leave one")
    contents = tuple({key: value for key, value in document.content.items() if key != SEARCH} for document in documents)
    return Recipe(contents, position, space)
