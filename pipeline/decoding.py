"""JSON values as typed dataclasses; whoever wrote them, nothing of another type gets in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_MAX_NUMBER = 2**63
"""Larger ones are not ours."""
_MAX_DEPTH = 100


def parse_json(content: str | bytes) -> Any:
    """Parse JSON from an untrusted source.

    Raises:
        ValueError: it is none, or is nested more deeply than what goes through it could follow.
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def is_deep(value: Any) -> bool:
    """Tell whether a parsed JSON value is nested more deeply than what goes through it could follow."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def is_decodable(number: float) -> bool:
    """Tell whether `decode` takes a number: it is finite, and not out of reason."""
    return abs(number) < _MAX_NUMBER


def decode(value: Any, kind: Any) -> Any:
    """Return a parsed JSON value as one of a type: a dataclass, tuple, mapping, literal, optional or plain one, or any.

    A field that is missing has its default; what is no field is left out. `object` is any value.

    Raises:
        TypeError: it is none, or out of reason.
        KeyError: a field without a default is missing.
        ValueError: a tuple has another length.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(value, kind)
    if isinstance(kind, UnionType):
        wanted, _ = get_args(kind)
        return None if value is None else decode(value, wanted)
    if get_origin(kind) is Literal and type(value) is str and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and type(value) is list:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(decode(item, wanted) for item, wanted in zip(value, kinds, strict=True))
    if get_origin(kind) is Mapping and type(value) is dict:
        return {decode(name, get_args(kind)[0]): decode(item, get_args(kind)[1]) for name, item in value.items()}
    if type(value) in (int, float) and not is_decodable(value):
        raise TypeError("out of reason")
    if kind is float and type(value) is int:
        return float(value)
    if kind is object:
        return value
    if type(value) is not kind:
        raise TypeError(f"{value!r} is given, {kind} is needed")
    return value


def _decode_fields(value: Any, kind: type) -> Any:
    if type(value) is not dict:
        raise TypeError(f"{value!r} is given, an object is needed")
    hints = get_type_hints(kind)
    given = {
        field.name: decode(value[field.name], hints[field.name])
        for field in fields(kind)
        if field.name in value or (field.default is MISSING and field.default_factory is MISSING)
    }
    return kind(**given)
