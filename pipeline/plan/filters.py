"""Filters of parameters that let no tensor through, which are likely mistyped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from raymerge.pipeline.config.merge_config import MergeConfig, ModulePart
from raymerge.pipeline.config.values import Rule, Settings
from raymerge.pipeline.messages import shown


def warn_of_idle_filters(config: MergeConfig, list_names: Callable[[], Collection[str]]) -> list[str]:
    """Return a warning for each filter that is in no tensor's name.

    Args:
        config: the merge.
        list_names: returns the names of the output's tensors and of all inputs'; called where there are filters.
    """
    rules: dict[tuple[str, str], Rule] = {}
    for settings in _list_settings(config):
        for parameter, setting in settings.items():
            for rule in setting.rules:
                if rule.filter is not None:
                    rules.setdefault((parameter, rule.filter), rule)
    names = list_names() if rules else ()
    return [
        f"{parameter}: the filter {shown(pattern)} matches no tensor, so its value is not used"
        for (parameter, pattern), rule in rules.items()
        if not any(map(rule.matches, names))
    ]


def _list_settings(config: MergeConfig) -> Iterator[Settings]:
    bodies: tuple[MergeConfig | ModulePart, ...] = (config, *config.modules)
    for body in bodies:
        yield body.parameters
        yield from (entry.parameters for entry in body.models)
        for part in body.slices:
            yield part.parameters
            yield from (source.parameters for source in part.sources)
