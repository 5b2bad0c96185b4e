"""YAML read with care: plain data only, bounded in size, every refusal with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from raymerge.pipeline.errors import ConfigError

MAX_NBYTES = 2**20
"""Largest document that is read."""
MAX_NODES = 100_000
"""Most nodes that a document may have once its aliases are written out."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_KEY_TAGS = {_TAG + "str", _TAG + "merge"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that what looks like a date stays a string: it is a model's name or revision."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_document(source: Path | str | Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Return a config's YAML text, verbatim, and the mapping that it holds.

    Args:
        source: a file, YAML text, or an already parsed config (whose text is then written here).

    Raises:
        ConfigError: the file cannot be read, or the YAML is not one mapping of plain data.
    """
    if isinstance(source, Path):
        text = _read_text(source)
        return text, parse_yaml(text, where=f"{source}: ")
    text = source if isinstance(source, str) else _dump(source)
    return text, parse_yaml(text)


def parse_yaml(text: str, *, where: str = "") -> dict[str, object]:
    """Return the mapping that a YAML text holds: dicts with string keys, lists, strings, numbers, booleans, None.

    Ordinary anchors, aliases and `<<` merges are resolved.

    Args:
        text: one YAML document.
        where: put before the line number in messages.

    Raises:
        ConfigError: syntax errors, tags, duplicate keys, aliases that contain themselves or grow too large, or
            anything but one mapping.
    """
    if len(text) > MAX_NBYTES:
        raise ConfigError(f"{where}the YAML is longer than {MAX_NBYTES} bytes; this is not a merge config")
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem, error.note) if part)
        raise ConfigError(f"{where}{line}{problem}") from error
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}line {line_number}: character #x{error.character:04x} is not allowed in YAML"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}the YAML is nested too deeply") from error


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        hint = "; the config must be on this machine" if re.match("[a-z0-9]{2,}:", str(path)) else ""
        raise ConfigError(f"cannot read the config {path}: {error.strerror}{hint}") from error
    if len(data) > MAX_NBYTES:
        raise ConfigError(f"{path} is larger than {MAX_NBYTES} bytes; this is not a merge config")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _dump(config: Mapping[str, object]) -> str:
    try:
        return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"the config holds something that YAML cannot say: {error}") from error
    except RecursionError as error:
        raise ConfigError("the config contains itself, or is nested too deeply") from error


def _parse(text: str) -> dict[str, object]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError("the config is empty; it needs at least merge_method and models")
        if not isinstance(root, yaml.MappingNode):
            is_file = isinstance(root, yaml.ScalarNode) and "\n" not in text
            hint = "; text is read as YAML, pass a pathlib.Path to read a file" if is_file else ""
            raise _problem(root, f"a config is a mapping such as `merge_method: linear`, not {_kind(root)}{hint}")
        _check(root, loader, {}, set())
        document: dict[str, object] = loader.construct_document(root)
        return document
    finally:
        loader.dispose()


def _check(node: yaml.Node, loader: _Loader, counts: dict[int, int], begun: set[int]) -> int:
    """Return how many nodes there are from here on with all aliases written out.

    Args:
        node: where to begin.
        loader: makes values of scalars.
        counts: what is known already, by node identity; added to.
        begun: what is begun; those not in `counts` are what this node lies in. Added to.
    """
    if id(node) in counts:
        return counts[id(node)]
    if id(node) in begun:
        raise _problem(node, "an alias refers to what contains it")
    if node.tag not in _PLAIN_TAGS:
        tag = node.tag.replace(_TAG, "!!")
        raise _problem(node, f"the tag {tag} is not allowed; a config holds plain values only")
    begun.add(id(node))
    total = 1
    if isinstance(node, yaml.ScalarNode):
        try:
            loader.construct_object(node)
        except (ValueError, LookupError) as error:
            raise _problem(node, f"{node.value[:40]!r} is not a value of its type; put it in quotes") from error
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_check(child, loader, counts, begun) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                raise _problem(key, "a key must be a string; put it in quotes")
            if key.value in lines:
                raise _problem(key, f"the key {key.value!r} is there already, on line {lines[key.value]}; keep one")
            lines[key.value] = key.start_mark.line + 1
            total += 1 + _check(value, loader, counts, begun)
    if total > MAX_NODES:
        raise _problem(node, f"with all aliases written out there are more than {MAX_NODES} values")
    counts[id(node)] = total
    return total


def _problem(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "an empty document" if node.tag == _TAG + "null" else "a single value"
