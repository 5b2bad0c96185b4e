"""Paths of a config that a sweep sets: `t`, `weight[1]`, `t[mlp]`, `slices[0].parameters.t`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from raymerge.pipeline.config.mixture import EXPERT_KEYS, MIXTURE_KEYS
from raymerge.pipeline.config.reader import KEYS
from raymerge.pipeline.config.sections.training_run import RUN_KEYS
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import counted, find_near, listing, shown

SEED = "seed"
"""The one path that is no place of the config, but an option of the merge."""

Content = dict[str, object]

_STEP = re.compile(
    r"""\.?(?P<key>[A-Za-z_][\w-]*) | \[(?P<index>\d+)\]
    | \[(?P<quote>["'])(?P<quoted>.+?)(?P=quote)\] | \[(?P<filter>[^"'].*?)\](?=\.|\[|$)""",
    re.VERBOSE,
)
_EVERYTHING = ("*", "default")
"""Filters that stand for the rule without one."""

_KEYS_BELOW: dict[str, Collection[str]] = {
    "": (*KEYS, *MIXTURE_KEYS, "architecture"),
    "models": RUN_KEYS,
    "models[]": ("model", "revision", "parameters"),
    "slices[]": ("sources", "base_model", "parameters"),
    "sources[]": ("model", "revision", "layer_range", "parameters"),
    "experts[]": EXPERT_KEYS,
    "shared_experts[]": EXPERT_KEYS,
    "modules{}": ("models", "slices", "parameters"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "adapter": ("rank", "merge"),
}
"""Keys that need not be there to be set, by the key that they stand under."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A step to the value for the tensors that a filter lets through."""

    pattern: str


Step = str | int | Filter


@dataclass(frozen=True, slots=True)
class Path:
    """A place of a config, as it is written and in steps."""

    text: str
    steps: tuple[Step, ...]
    line: int | None = field(default=None, compare=False)
    """Line of the YAML that names it, from 1; None if none does."""

    @property
    def label(self) -> str:
        """The path as names of points have it.

        >>> [parse_path(text).label for text in ("parameters.t", "models[1].parameters.weight", "weight[1]", "t[mlp]")]
        ['t', 'weight1', 'weight1', 't.mlp']
        """
        steps = [step for step in self.steps if step != "parameters"]
        if steps[0] == "models" and len(steps) == 3 and isinstance(steps[2], str):
            steps = [steps[2], steps[1]]
        label = ""
        for step in steps:
            name = step.pattern if isinstance(step, Filter) else str(step)
            label += name if isinstance(step, int) or not label else f".{name}"
        return label


def parse_path(text: str, line: int | None = None) -> Path:
    """Return the path that a text writes, on a line of the YAML if that is known.

    Raises:
        ConfigError: it is none.
    """
    steps: list[Step] = []
    position = 0
    while match := _STEP.match(text, position):
        if match["key"] and text[position] != "." and steps:
            break
        if text[position] == "." and not steps:
            break
        key, index = match["key"], match["index"]
        steps.append(key or (int(index) if index else Filter(match["quoted"] or match["filter"])))
        position = match.end()
    if not steps or not isinstance(steps[0], str) or position < len(text):
        raise ConfigError(
            f"{text!r} is no path of a config; write t, weight[1] for that of models[1], t[mlp] for tensors with mlp in"
            " their names, or a path such as slices[0].parameters.t"
        )
    return Path(text, tuple(steps), line)


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods that points of a sweep may have, and what may be set of them."""

    names: tuple[str, ...]
    parameters: Collection[str]
    """All names that the methods' parameters have."""
    shared: Collection[str]
    """Names of parameters that have one value for all models."""

    def describe(self) -> str:
        """Name the methods with their parameters, for messages."""
        takes = "takes" if len(self.names) == 1 else "take"
        return f"{listing(self.names, separator=' and ')} {takes} {listing(self.parameters, 12) or 'no parameters'}"


def set_value(content: Content, path: Path, value: object, methods: Methods) -> None:
    """Set the value at a path of a config.

    A parameter by itself is set for the whole merge: what models and slices give of their own is removed. With a number
    it is that of one model, or of one source in each slice.

    Args:
        content: the config; changed.
        path: where.
        value: what is to be there.
        methods: that are swept.

    Raises:
        ConfigError: the path names nothing.
    """
    name, *rest = path.steps
    if isinstance(name, str) and name not in content and name in methods.parameters:
        _set_parameter(content, path, name, rest, value, methods)
        return
    if isinstance(name, str) and name not in content and name not in _KEYS_BELOW[""]:
        raise _names_nothing(path, name, "", methods, [*content, *methods.parameters, SEED], _KEYS_BELOW[""])
    _set_below(content, path, list(path.steps), value, methods)


def _set_parameter(content: Content, path: Path, name: str, rest: list[Step], value: object, methods: Methods) -> None:
    own = list(_list_own(content))
    if rest and isinstance(rest[0], int) and name not in methods.shared:
        index, *rest = rest
        lists = _list_entries(content, path)
        merged = [each for each in lists if len(each[1]) > 1] or lists  # one model alone may be copied
        for where, entries in merged if index else lists:
            if not isinstance(index, int) or index >= len(entries):
                raise ConfigError(f"{path.text}: {where} has {counted(len(entries), 'model')}, counted from 0")
            entry = entries[index]
            if not isinstance(entry, dict):
                raise ConfigError(f"{path.text}: {where}[{index}] is no mapping with a `model`")
            _set_below(_enter(entry, path), path, [name, *rest], value, methods)
        return
    if rest:
        if isinstance(rest[0], int) and not _is_list(content, name):
            raise ConfigError(f"{path.text}: {_explain_number(name, methods)}")
        others = [where for where, settings in own if name in settings]
        if others:
            raise ConfigError(f"{path.text}: {others[0]} has a {name} of its own; write {others[0]}.{path.text}")
    else:
        for _, settings in own:
            settings.pop(name, None)
    _set_below(_enter(content, path), path, [name, *rest], value, methods)


def _is_list(content: Content, name: str) -> bool:
    """Tell whether a parameter has several values in the config, which have numbers."""
    settings = content.get("parameters")
    return isinstance(settings, dict) and isinstance(settings.get(name), list)


def _explain_number(name: str, methods: Methods) -> str:
    each = next((other for other in methods.parameters if other not in methods.shared), None)
    example = f"; {each}[1] is for a parameter of each model" if each else ""
    return f"{name} is one value for all models{example}: leave the number out"


def _enter(entry: Content, path: Path) -> Content:
    """Return the parameters of an entry, which get a place if they have none."""
    if entry.get("parameters") is None:
        entry["parameters"] = {}
    settings = entry["parameters"]
    if not isinstance(settings, dict):
        raise ConfigError(f"{path.text}: `parameters` is {shown(settings)}, and a mapping is needed")
    return settings


def _list_bodies(content: Content) -> list[tuple[str, Content]]:
    """Return where models or slices stand, at the top or in each module, with their paths."""
    modules = content.get("modules")
    if not isinstance(modules, dict):
        return [("", content)]
    return [(f"modules.{name}.", body) for name, body in modules.items() if isinstance(body, dict)]


def _list_own(content: Content) -> Iterator[tuple[str, Content]]:
    """Yield the parameters that stand below the top level, with their paths."""
    places: list[tuple[str, object]] = []
    for prefix, body in _list_bodies(content):
        places += [] if body is content else [(prefix.removesuffix("."), body)]
        for key in ("models", "slices"):
            entries = body.get(key)
            for k, entry in enumerate(entries if isinstance(entries, list) else ()):
                places.append((f"{prefix}{key}[{k}]", entry))
                sources = entry.get("sources") if isinstance(entry, dict) else None
                for j, source in enumerate(sources if isinstance(sources, list) else ()):
                    places.append((f"{prefix}{key}[{k}].sources[{j}]", source))
    for where, entry in places:
        if isinstance(entry, dict) and isinstance(entry.get("parameters"), dict):
            yield f"{where}.parameters", entry["parameters"]


def _list_entries(content: Content, path: Path) -> list[tuple[str, list[object]]]:
    """Return the lists of models: that of the config, or the sources of each slice."""
    found: list[tuple[str, list[object]]] = []
    for prefix, body in _list_bodies(content):
        models, slices = body.get("models"), body.get("slices")
        if isinstance(models, list):
            found.append((f"{prefix}models", models))
        elif isinstance(slices, list):
            found += [
                (f"{prefix}slices[{k}].sources", part["sources"])
                for k, part in enumerate(slices)
                if isinstance(part, dict) and isinstance(part.get("sources"), list)
            ]
    if found:
        return found
    raise ConfigError(f"{path.text}: the config lists no models that have numbers; leave the number out")


def _set_below(node: object, path: Path, steps: list[Step], value: object, methods: Methods) -> None:
    """Go down from a node by some steps, and set what is there."""
    place = ""
    where = ""
    for position, step in enumerate(steps):
        is_last = position == len(steps) - 1
        if isinstance(step, Filter) or (not is_last and isinstance(steps[position + 1], Filter)):
            if isinstance(step, Filter) or not isinstance(node, dict) or position + 2 != len(steps):
                raise ConfigError(f"{path.text}: a filter belongs after a parameter, at the end, such as t[mlp]")
            rule = steps[position + 1]
            assert isinstance(rule, Filter)
            _check_key(node, path, str(step), where, place, methods)
            node[str(step)] = _set_rule(node.get(str(step)), path, rule.pattern, value)
            return
        if isinstance(step, int):
            if not isinstance(node, list):
                raise ConfigError(f"{path.text}: {where or 'the config'} is no list")
            if step >= len(node):
                raise ConfigError(f"{path.text}: {where} has {len(node)} entries, counted from 0")
        else:
            if node is None or not isinstance(node, dict):
                raise ConfigError(f"{path.text}: {where} is {shown(node)}, and has no {step!r}")
            _check_key(node, path, step, where, place, methods)
        if is_last:
            node[step] = value  # type: ignore[index]
            return
        if step == "parameters" and isinstance(node, dict):
            node = _enter(node, path)
        else:
            node = node[step] if isinstance(node, list) else node.get(step)  # type: ignore[index]
        if place == "modules":
            place = "modules{}"
        else:
            place = f"{place.removesuffix('[]')}[]" if isinstance(step, int) else str(step)
        where = f"{where}[{step}]" if isinstance(step, int) else f"{where}.{step}".removeprefix(".")


def _check_key(node: Content, path: Path, key: str, where: str, place: str, methods: Methods) -> None:
    of_method = place == "parameters"
    allowed: Collection[str] = methods.parameters if of_method else _KEYS_BELOW.get(place, ())
    if key not in node and key not in allowed and not (not where and key in methods.parameters):
        raise _names_nothing(path, key, where, methods if of_method else None, [*node, *allowed])


def _names_nothing(
    path: Path, key: str, where: str, methods: Methods | None, known: Collection[str], others: Collection[str] = ()
) -> ConfigError:
    near = find_near(key, dict.fromkeys(known)) or find_near(key, others)
    said = f"{path.text}: {where or 'the config'} has no {key!r}"
    if near:
        said += f"; did you mean {path.text.replace(key, near, 1)!r}?"
    elif methods is None or not methods.names:
        said += f"; there are {listing(dict.fromkeys(known), 12)}" if known else ", and nothing else can be set there"
    if methods is not None and methods.names:
        said += f"{'' if near else ';'} {methods.describe()}"
    return ConfigError(said)


def _set_rule(written: object, path: Path, pattern: str, value: object) -> object:
    """Return a parameter with the value of one filter set; a filter that is not there goes before the general value."""
    rules = (
        written if isinstance(written, list) and written and all(isinstance(rule, dict) for rule in written) else None
    )
    if isinstance(written, dict):
        rules = [written]
    if rules is None:
        rules = [] if written is None else [{"value": written}]
    wanted = (None, "*") if pattern in _EVERYTHING else (pattern,)
    for rule in rules:
        if rule.get("filter") in wanted:
            rule["value"] = value
            return rules
    filters = [str(rule["filter"]) for rule in rules if rule.get("filter") is not None]
    if near := find_near(pattern, filters):
        raise ConfigError(f"{path.text}: there is no filter {pattern!r}; did you mean {near!r}?")
    general = [k for k, rule in enumerate(rules) if rule.get("filter") in (None, "*")]
    new: Content = {"value": value} if pattern in _EVERYTHING else {"filter": pattern, "value": value}
    rules.insert(general[0] if general else len(rules), new)
    return rules
