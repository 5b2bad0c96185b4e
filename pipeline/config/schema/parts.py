"""Parts that all of the schema is made of: mappings, lists, references, names, numbers, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymerge.pipeline.checkpoint.dtypes import DTYPE_NAMES

Schema = dict[str, Any]

NUMBER = r"^[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?$"
"""Pattern of numbers that YAML 1.1 reads as strings, such as 1e-5."""


TITLE = {"type": ["string", "null"], "pattern": r"\S", "description": "Of the merge."}
NAME = {"type": "string", "pattern": r"\S"}
REVISION = {"type": ["string", "null"], "pattern": r"\S"}
COUNT = {"type": ["integer", "null"], "minimum": 1}


def make_object(properties: Mapping[str, Schema], *required: str) -> Schema:
    """Return the schema of a mapping with these keys and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def make_list(items: Schema, description: str = "") -> Schema:
    """Return the schema of a list that is not empty."""
    note = {"description": description} if description else {}
    return {**note, "type": "array", "items": items, "minItems": 1}


def refer(name: str) -> Schema:
    """Return a reference to a definition of the whole schema."""
    return {"$ref": f"#/$defs/{name}"}


def make_dtype(description: str) -> Schema:
    """Return the schema of a dtype."""
    names = [prefix + name for prefix in ("", "torch.") for name in DTYPE_NAMES]
    return {"description": description, "enum": ["auto", *names, None]}
