"""YAML read with care: plain data only, bounded in size, every refusal with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.urls import suggest_file

MAX_NBYTES = 2**20
"""Largest document that is read."""
MAX_NODES = 50_000
"""Most nodes that a document may have, also once its aliases are written out; so many take PyYAML a few seconds."""

_MAX_SHOWN = 100
"""Characters of a line that a message shows."""
_MAX_PROBLEMS = 50
"""Lines that a message shows."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_KEY_TAGS = {_TAG + "str", _TAG + "merge"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that what looks like a date stays a string: it is a model's name or revision."""

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"there are more than {MAX_NODES} values", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True, slots=True)
class Document:
    """A config as written."""

    text: str
    """Verbatim; what a parsed config comes to in YAML."""
    file: Path | None = None
    content: dict[str, object] = field(default_factory=dict)
    node: yaml.Node | None = None
    """The content as YAML has it, with the lines; None where a parsed config was given, whose lines nobody knows."""
    repeated: tuple[tuple[str, int], ...] = ()
    """Warnings of keys that are given more than once, each with its line."""

    @property
    def first_line(self) -> int | None:
        """Line where the content begins, from 1; None where a parsed config was given."""
        return self.node.start_mark.line + 1 if self.node else None

    def where(self, line: int | None, column: int | None = None, *, is_short: bool = False) -> str:
        """Return where something is, as it begins a message; if short, with the file's name alone."""
        file = self.file.name if self.file and is_short else self.file
        if line is None:
            return f"{file}: " if file else ""
        if file is None:
            return f"line {line}{f', column {column}' if column else ''}: "
        return f"{file}:{line}{f':{column}' if column else ''}: "

    def show(self, problem: str, line: int | None, column: int | None = None) -> str:
        """Return a message about a line, with the line's text."""
        message = self.where(line, column) + problem
        lines = self.text.splitlines()
        if line is None or line > len(lines) or not lines[line - 1].strip():
            return message
        written = lines[line - 1].rstrip()
        if len(written) > _MAX_SHOWN:
            written = f"{written[: _MAX_SHOWN - 3]}..."
        return f"{message}\n{line:5} | {written}"

    def show_all(self, problems: Sequence[tuple[str, int | None]]) -> str:
        """Return a message about several lines: the first problems, each with its line, and how many there are more."""
        rest = len(problems) - _MAX_PROBLEMS
        return "\n".join([self.show(*each) for each in problems[:_MAX_PROBLEMS]] + [f"and {rest:,} more"] * (rest > 0))


def read_documents(source: Path | str | Mapping[str, object], *, last_counts: bool = False) -> list[Document]:
    """Return the text and content of each document of a config: dicts with string keys, lists and plain values.

    Ordinary anchors, aliases and `<<` merges are resolved.

    Args:
        source: a file, or its name; YAML text; or an already parsed config (whose text is then written here).
        last_counts: whether the last value of a key that is given twice counts, as in mergekit, with a warning.

    Raises:
        ConfigError: the file cannot be read; syntax errors, tags, duplicate keys, aliases that contain themselves or
            grow too large; or anything but mappings of plain data.
    """
    if isinstance(source, Path) or (isinstance(source, str) and _names_file(source)):
        return _parse(Document(_read_text(Path(source)), Path(source)), last_counts)
    if isinstance(source, str):
        return _parse(Document(source), last_counts)
    return [replace(document, node=None) for document in _parse(Document(_dump(source)), last_counts)]


def _names_file(text: str) -> bool:
    """Tell whether a text is no YAML, but the name of a file of it."""
    if "\n" in text or not text.strip():
        return False
    if re.search(r"\.ya?ml$", text, re.IGNORECASE):
        return True
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _parse(document: Document, last_counts: bool) -> list[Document]:
    """Return a document for each that its text has, with its content."""
    if len(document.text) > MAX_NBYTES:
        raise _refusal(document, f"the YAML is longer than {MAX_NBYTES} bytes; this is not a merge config")
    try:
        return _construct(document, last_counts)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem, error.note) if part)
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise ConfigError(document.show(problem, line, column)) from error
    except yaml.reader.ReaderError as error:
        line = document.text.count("\n", 0, error.position) + 1
        raise _refusal(document, f"character #x{error.character:04x} is not allowed in YAML", line) from error
    except yaml.YAMLError as error:
        raise _refusal(document, str(error)) from error
    except RecursionError as error:
        raise _refusal(document, "the YAML is nested too deeply") from error


def _refusal(document: Document, problem: str, line: int | None = None) -> ConfigError:
    return ConfigError(document.where(line) + problem)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except (OSError, ValueError) as error:
        hint = "; the config must be on this machine" if re.match("[a-z0-9]{2,}:", str(path)) else ""
        why = getattr(error, "strerror", None) or "no file can have this name"
        name = str(path).encode(errors="backslashreplace").decode()
        raise ConfigError(f"cannot read the config {name}: {why}{hint or suggest_file(path)}") from error
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


def _construct(document: Document, last_counts: bool) -> list[Document]:
    loader = _Loader(_without_tabs(document.text))
    try:
        found = []
        while loader.check_node():
            root = loader.get_node()
            if root is not None and not _is_empty(root):
                found.append(_construct_one(document, loader, root, last_counts))
        if not found:
            raise _refusal(document, "the config is empty; it needs at least merge_method and models")
        return found
    finally:
        loader.dispose()


def _is_empty(root: yaml.Node) -> bool:
    """Tell whether nothing is written between two `---`."""
    return isinstance(root, yaml.ScalarNode) and root.tag == _TAG + "null" and not root.value


def _construct_one(document: Document, loader: _Loader, root: yaml.Node, last_counts: bool) -> Document:
    if not isinstance(root, yaml.MappingNode):
        is_name = document.file is None and isinstance(root, yaml.ScalarNode) and "\n" not in document.text
        hint = "; there is no file of this name either" if is_name else ""
        raise _problem(root, f"a config is a mapping such as `merge_method: linear`, not {_kind(root)}{hint}")
    repeated = _drop_repeated(root, set()) if last_counts else []
    problems: list[yaml.MarkedYAMLError] = []
    _check(root, loader, {}, set(), problems)
    if problems:
        shown = [(str(error.problem), error.problem_mark.line + 1) for error in problems if error.problem_mark]
        raise ConfigError(document.show_all(shown)) from problems[0]
    return replace(document, content=loader.construct_document(root), node=root, repeated=tuple(repeated))


def _drop_repeated(node: yaml.Node, done: set[int]) -> list[tuple[str, int]]:
    """Leave the last of the pairs of a mapping that have one key, from here on; return warnings with their lines."""
    if id(node) in done or isinstance(node, yaml.ScalarNode):
        return []
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [found for child in node.value for found in _drop_repeated(child, done)]
    last: dict[str, int] = {}
    dropped, warnings = set(), []
    for position, (key, _) in enumerate(node.value):
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
            continue
        if (first := last.get(key.value)) is not None:
            dropped.add(first)
            before, line = (each.start_mark.line + 1 for each in (node.value[first][0], key))
            warnings.append((f"{key.value}: is there already, on line {before}; the last one counts", line))
        last[key.value] = position
    node.value = [pair for position, pair in enumerate(node.value) if position not in dropped]
    return warnings + [found for _, child in node.value for found in _drop_repeated(child, done)]


def _without_tabs(text: str) -> str:
    """Return JSON without the tabs that it may be indented by, and YAML may not; in its strings there are none."""
    if "\t" not in text or not text.lstrip().startswith("{"):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


def _check(
    node: yaml.Node, loader: _Loader, counts: dict[int, int], begun: set[int], problems: list[yaml.MarkedYAMLError]
) -> int:
    """Return how many nodes there are from here on with all aliases written out.

    Args:
        node: where to begin.
        loader: makes values of scalars.
        counts: what is known already, by node identity; added to.
        begun: what is begun; those not in `counts` are what this node lies in. Added to.
        problems: what is wrong with a node; added to.

    Raises:
        yaml.MarkedYAMLError: there is no end to it.
    """
    if id(node) in counts:
        return counts[id(node)]
    if id(node) in begun:
        raise _problem(node, "an alias refers to what contains it")
    if node.tag not in _PLAIN_TAGS:
        tag = node.tag.replace(_TAG, "!!")
        problems.append(_problem(node, f"the tag {tag} is not allowed; a config holds plain values only"))
    begun.add(id(node))
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_text(node, problems)
        if node.tag in _PLAIN_TAGS:
            try:
                loader.construct_object(node)
            except (ValueError, LookupError):
                problems.append(_problem(node, f"{node.value[:40]!r} is not a value of its type; put it in quotes"))
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_check(child, loader, counts, begun, problems) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                _check_text(key, problems)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                problems.append(_problem(key, "a key must be a string; put it in quotes"))
            elif key.value in lines:
                problem = f"the key {key.value!r} is there already, on line {lines[key.value]}; keep one"
                problems.append(_problem(key, problem))
            else:
                lines[key.value] = key.start_mark.line + 1
            total += 1 + _check(value, loader, counts, begun, problems)
    if total > MAX_NODES:
        raise _problem(node, f"with all aliases written out there are more than {MAX_NODES} values")
    counts[id(node)] = total
    return total


def _check_text(node: yaml.ScalarNode, problems: list[yaml.MarkedYAMLError]) -> None:
    r"""Make characters of the pairs that JSON writes as `\ud83d\ude00`; half a pair and NUL are in no text."""
    try:
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        problems.append(_problem(node, f"{node.value[:40]!a} is not text: half of a pair of surrogates"))
        node.value = ascii(node.value)
    if "\0" in node.value:
        problems.append(_problem(node, f"{node.value[:40]!a} has a character that no name may have, \\0; remove it"))


def _problem(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "an empty document" if node.tag == _TAG + "null" else "a single value"
