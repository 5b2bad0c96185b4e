"""The `sweep:` section of a config, which describes many models; `pipeline/spectrum/` reads it."""

from __future__ import annotations

from typing import Any

from raymerge.pipeline.config.node import Place

SWEEP = "sweep"
"""Key of the section; it is taken out before the config of a model is read."""
PARTS = ("grid", "zip", "points")

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
"""Regular expression of a point's name: valid as a directory, a key and a part of a Hub repository's name."""
MAX_NAME_LENGTH = 60
"""Characters of one: a repository's name, which has the spectrum's before it, may have 96."""

_AXES: dict[str, Any] = {
    "type": ["object", "null"],
    "additionalProperties": {
        "anyOf": [{"type": ["number", "string", "boolean"]}, {"type": "array", "items": {}, "minItems": 1}]
    },
}
SWEEP_SCHEMA: dict[str, Any] = {
    "description": "Many models of this recipe, made by `raymerge sweep`.",
    "type": ["object", "null"],
    "properties": {
        "grid": {**_AXES, "description": "Values of each path, such as `t: 0.1:0.9:0.1`; all are combined."},
        "zip": {**_AXES, "description": "Values of paths that change together."},
        "points": {
            "description": "Models by name, with what each sets.",
            "type": ["object", "null"],
            "propertyNames": {"pattern": f"^{NAME}$", "maxLength": MAX_NAME_LENGTH},
            "additionalProperties": {"type": "object", "minProperties": 1},
        },
    },
    "additionalProperties": False,
    "minProperties": 1,
}


def note_sweep(root: Place) -> bool:
    """Note that a config is one of many models, if it is, where that of one is wanted."""
    section = root.get(SWEEP)
    if section.value is None:
        return False
    section.note(
        section.error(
            "this config describes many models; `raymerge sweep CONFIG OUT` makes them, and with --dry-run plans them"
            " alone. To make one, remove the section"
        )
    )
    return True
