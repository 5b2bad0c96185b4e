"""A task file: YAML with the items in it or in a file of JSON lines, or such a file alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raymerge.pipeline.config.document import Document, read_documents
from raymerge.pipeline.config.findings import TooManyError
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.tasks.answers import (
    CHECKS,
    EXTRACTIONS,
    Check,
    Extraction,
    Markers,
    letter_of,
)
from raymerge.pipeline.evaluation.tasks.fields import LETTERS, explain_answer, fill_prompt, is_number
from raymerge.pipeline.messages import counted, shown, suggest
from raymerge.pipeline.patterns import compile_pattern
from raymerge.pipeline.urls import suggest_file

KEYS = (
    "name", "system", "prompt", "answer", "items", "shots", "extract", "check", "tolerance", "case_sensitive",
    "thinking", "template", "benchmark", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "stop",
)  # fmt: skip
_TASK_ID = re.compile(r"\w[\w.-]*")
_NOT_DIGESTED = ("name", "sampling", "benchmark")
_ARGUMENTS = ("regex", "after", "json")
_MAX_NBYTES = 2**30
_DEFAULT_MAX_NEW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    name: str
    """Its id, unique in the task."""
    messages: tuple[tuple[str, str], ...]
    """Role and content of each message: the system prompt, examples, the question."""
    expected: object
    """The right answer, a string, or a list of them."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings by which answers are sampled."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = _DEFAULT_MAX_NEW_TOKENS
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file, checked."""

    name: str
    items: tuple[Item, ...]
    extraction: Extraction
    check: Check
    markers: Markers | None
    """None where thinking is not looked at."""
    template: Mapping[str, object] = field(default_factory=dict)
    """Variables for the chat template."""
    sampling: Sampling = Sampling()
    benchmark: tuple[str, str] | None = None
    """Data set and task id of the Hub's leaderboard that its results belong to."""

    @property
    def digest(self) -> str:
        """Hash of everything that decides a sample and its score, but for the model and the sampling."""
        content = {name: value for name, value in asdict(self).items() if name not in _NOT_DIGESTED}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_task_file(path: Path) -> TaskFile:
    """Read a task file.

    Raises:
        ConfigError: it is none; every mistake that was found, with its line.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{suggest_file(path)}")
    if path.suffix in (".jsonl", ".ndjson"):
        return _read(Place({"items": path.name}), path, Document(""))
    if path.suffix.lower() not in (".yml", ".yaml"):
        raise ConfigError(f"{path}: a task is a .yml file, or a .jsonl file with a prompt and an answer on each line")
    document, *others = read_documents(path)
    _refuse_other_formats(path, document.content)
    if others:
        raise ConfigError(f"{path}: a task file has one document, and this one has {len(others) + 1}")
    return _read(Place(document.content, node=document.node), path, document)


def _read(root: Place, path: Path, document: Document) -> TaskFile:
    """Read a task from its mapping; raises ConfigError with every mistake."""
    task = None
    with suppress(TooManyError):
        try:
            task = _Reader(root, path).read()
        except PlaceError as error:
            root.note(error)
    if root.findings.errors or task is None:
        raise ConfigError(root.findings.explain(document))
    return task


def _refuse_other_formats(path: Path, content: Mapping[str, object]) -> None:
    if "doc_to_text" in content or "dataset_path" in content or "output_type" in content:
        raise ConfigError(
            f"{path}: a task of lm-eval; give --task lm-eval:{content.get('task', path.stem)}"
            f" --include-path {path.parent or '.'}"
        )
    if "merge_method" in content:
        raise ConfigError(f"{path}: a merge config, not a task; a task has `items` with prompts and answers")


class _Reader:
    """Reads a task, and goes on after a mistake, which is noted."""

    def __init__(self, root: Place, path: Path) -> None:
        self._root = root
        self._path = path

    def read(self) -> TaskFile:
        root = self._root
        root.findings.unknown.update(key for key in root.names() if key not in KEYS)
        name = root.get("name").attempt(lambda place: place.text()) if root.get("name") else None
        rows = root.get("items").attempt(self._read_rows) or []
        check = root.get("check").attempt(lambda place: self._read_check(place, rows)) or Check("exact")
        extraction = root.get("extract").attempt(lambda place: self._read_extraction(place, check))
        items = self._make_items(rows, check)
        sampling = self._read_sampling()
        self._note_unknown()
        return TaskFile(
            name=name or self._path.stem,
            items=tuple(items),
            extraction=extraction or Extraction("text"),
            check=check,
            markers=root.get("thinking").attempt(_read_markers),
            template=root.get("template").attempt(_read_mapping) or {},
            sampling=sampling,
            benchmark=root.get("benchmark").attempt(_read_benchmark),
        )

    def _note_unknown(self) -> None:
        """Note the keys that have no meaning, but for those that were meant for one that is missed."""
        noted = {finding.message.partition(": ")[0] for finding in self._root.findings.errors}
        for key in sorted(self._root.findings.unknown - noted):
            place = self._root.get(key)
            hint = "give the option --limit in its place" if key == "limit" else suggest(key, KEYS)
            place.note(place.error(f"unknown key; {hint}"))

    def _read_rows(self, place: Place) -> list[tuple[Place, dict[str, Any]]]:
        """Return the fields of each item, with the place that messages name."""
        if isinstance(place.value, str):
            return self._read_lines(place)
        if place.value is None:
            raise self._root.missing("items", "missing: a list with a prompt and an answer each, or a .jsonl file")
        rows = []
        for each in place.elements():
            if isinstance(each.value, dict):
                rows.append((each, each.value))
            else:
                each.note(each.error(f"{shown(each.value)} is given, a mapping with prompt and answer is needed"))
        if not rows and not self._root.findings.errors:
            raise place.error("there are no items")
        return rows

    def _read_lines(self, place: Place) -> list[tuple[Place, dict[str, Any]]]:
        path = self._path.parent / str(place.value)
        try:
            if path.stat().st_size > _MAX_NBYTES:
                raise place.error(f"{path} has more than {_MAX_NBYTES:,} bytes")
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise place.error(f"{path} cannot be read: {why}{suggest_file(path)}") from error
        rows = []
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise place.error(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(value, dict):
                raise place.error(f"{path}:{number}: {shown(value)} is given, an object is needed")
            rows.append((Place(value, f"{path}:{number}", place.findings), value))
        if not rows:
            raise place.error(f"{path} has no items")
        return rows

    def _make_items(self, rows: Sequence[tuple[Place, dict[str, Any]]], check: Check) -> list[Item]:
        root = self._root
        template = root.get("prompt").attempt(lambda place: place.text()) if root.get("prompt") else None
        field_name = str(root.get("answer").value or "answer")
        start = [("system", root.get("system").text())] if root.get("system") else []
        for shot in root.get("shots").elements() if root.get("shots") else ():
            fields = shot.value if isinstance(shot.value, dict) else {}
            try:
                start.append(("user", fill_prompt(template or "{prompt}", fields)))
                start.append(("assistant", str(fields[field_name])))
            except KeyError as error:
                shot.note(shot.error(f"{error.args[0]!r} is missing"))
        items: list[Item] = []
        names: set[str] = set()
        mistakes: dict[tuple[str, str], list[Place]] = {}
        for number, (place, fields) in enumerate(rows):
            name = str(fields.get("id", number))
            if name in names:
                place.note(place.error(f"the id {name!r} is there already; ids are unique"))
            names.add(name)
            try:
                prompt = fill_prompt(template or "{prompt}", fields)
            except KeyError as error:
                lacking = f"{error.args[0]!r} is missing", suggest(str(error.args[0]), list(fields))
                mistakes.setdefault(lacking, []).append(place)
                continue
            expected = fields.get(field_name)
            if expected is None or expected == []:
                lacking = f"no answer: {field_name!r} is missing", suggest(field_name, list(fields))
                mistakes.setdefault(lacking, []).append(place)
                continue
            if why := explain_answer(expected, fields, check):
                place.note(place.error(why))
                continue
            if check.how == "choice":
                expected = letter_of(expected, fields.get("choices", LETTERS))
            items.append(Item(name, (*start, ("user", prompt)), expected))
        for (problem, hint), places in mistakes.items():
            others = f", and so in {counted(len(places) - 1, 'other item')}" if len(places) > 1 else ""
            places[0].note(places[0].error(f"{problem}{others}; {hint}"))
        return items

    def _read_check(self, place: Place, rows: Sequence[tuple[Place, dict[str, Any]]]) -> Check:
        how = place.value
        if how is None:
            field_name = str(self._root.get("answer").value or "answer")
            are_numbers = all(is_number(fields.get(field_name)) for _, fields in rows)
            has_choices = all("choices" in fields for _, fields in rows)
            how = "choice" if has_choices else "numeric" if are_numbers else "exact"
        if how not in CHECKS:
            raise place.error(f"{shown(how)} is no way to check an answer; {suggest(str(how), CHECKS)}")
        tolerance = self._number("tolerance", 0.0, 0, 1e9)
        sensitive = self._root.get("case_sensitive")
        if sensitive.value not in (None, True, False):
            sensitive.note(sensitive.error(f"{shown(sensitive.value)} is given, true or false is needed"))
        return Check(how, float(tolerance), bool(sensitive.value))

    def _read_extraction(self, place: Place, check: Check) -> Extraction:
        value = place.value
        if value is None:
            return Extraction({"numeric": "number", "choice": "choice"}.get(check.how, "text"))
        if isinstance(value, str):
            if value in EXTRACTIONS:
                return Extraction(value)
            ways = suggest(value, [*EXTRACTIONS, *_ARGUMENTS])
            raise place.error(f"{shown(value)} is no way to find an answer; {ways}")
        if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _ARGUMENTS:
            raise place.error(
                f"{shown(value)} is given; write one of {', '.join(EXTRACTIONS)}, or {{regex: ...}}, {{after: ...}} or"
                " {json: ...}"
            )
        [how] = value
        argument = place.get(how).text()
        if how == "regex":
            _compile(place.get(how), argument)
        return Extraction(how, argument)

    def _read_sampling(self) -> Sampling:
        stop = self._root.get("stop")
        stops = [stop.value] if isinstance(stop.value, str) else stop.value or []
        if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
            stop.note(stop.error(f"{shown(stop.value)} is given, a string or a list of strings is needed"))
            stops = []
        return Sampling(
            samples=int(self._number("samples", 1, 1, 100_000, whole=True)),
            temperature=float(self._number("temperature", 0.0, 0, 100)),
            top_p=float(self._number("top_p", 1.0, 1e-6, 1)),
            top_k=int(self._number("top_k", 0, 0, 10**9, whole=True)),
            max_new_tokens=int(self._number("max_new_tokens", _DEFAULT_MAX_NEW_TOKENS, 1, 10**7, whole=True)),
            seed=int(self._number("seed", 0, 0, 2**62, whole=True)),
            stop=tuple(stops),
        )

    def _number(self, key: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
        place = self._root.get(key)
        value = place.value
        if value is None:
            return default
        kind = "a whole number" if whole else "a number"
        if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:  # type: ignore[operator]
            place.note(place.error(f"{shown(value)} is given, {kind} from {low:g} to {high:g} is needed"))
            return default
        return value  # type: ignore[return-value]


def _compile(place: Place, pattern: str) -> None:
    try:
        compile_pattern(pattern)
    except ValueError as error:
        raise place.error(
            f"{shown(pattern)} is no regular expression of RE2, which has no look-around or back-references: {error}"
        ) from error


def _read_markers(place: Place) -> Markers | None:
    match place.value:
        case None:
            return Markers()
        case False:
            return None
        case [str() as start, str() as end] if start and end:
            return Markers(start, end)
    raise place.error(f"{shown(place.value)} is given; write [<think>, </think>], or false not to look at it")


def _read_benchmark(place: Place) -> tuple[str, str] | None:
    match place.value:
        case None:
            return None
        case {"dataset": str() as dataset, "task": str() as task} if "/" in dataset and _TASK_ID.fullmatch(task):
            return dataset, task
    raise place.error(f"{shown(place.value)} is given; write {{dataset: org/name, task: id}}, as the Hub has them")


def _read_mapping(place: Place) -> dict[str, object]:
    place.names()
    return dict(place.value) if isinstance(place.value, dict) else {}
