"""The `search:` section of a config, which says what may vary; `pipeline/search/` reads it."""

from __future__ import annotations

from typing import Any

from raymerge.pipeline.config.node import Place

SEARCH = "search"
"""Key of the section; it is taken out before the config of a model is read."""

SEARCH_SCHEMA: dict[str, Any] = {
    "description": "Parameters that `raymerge search` varies.",
    "type": "object",
    "properties": {
        "parameters": {
            "description": "A range or a list of values for each path, such as `t: {min: 0, max: 1}`.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "anyOf": [
                    {"type": "array", "items": {}, "minItems": 2},
                    {
                        "type": "object",
                        "properties": {
                            "min": {"type": "number"},
                            "max": {"type": "number"},
                            "step": {"type": "number", "exclusiveMinimum": 0},
                            "log": {"type": "boolean"},
                        },
                        "required": ["min", "max"],
                        "additionalProperties": False,
                    },
                ]
            },
        }
    },
    "required": ["parameters"],
    "additionalProperties": False,
}


def note_search(root: Place) -> bool:
    """Note that a config is one to be searched, if it is, where that of one model is wanted."""
    section = root.get(SEARCH)
    if section.value is None:
        return False
    section.note(
        section.error(
            "this config says what may vary; `raymerge search CONFIG OUT --task TASK` tries it. To make one model,"
            " remove the section"
        )
    )
    return True
