"""The schema of models: those that are named, lists and slices of them, the checkpoints of a training run."""

from __future__ import annotations

from raymerge.pipeline.config.schema.parts import COUNT, NAME, REVISION, Schema, make_list, make_object, refer
from raymerge.pipeline.config.sections.training_run import SCHEDULES

_PATH = make_object({"path": NAME, "revision": REVISION}, "path")
_ADAPTER: Schema = {"description": "A LoRA adapter for the model.", "anyOf": [NAME, _PATH, {"type": "null"}]}
MODEL: Schema = {
    "description": "A directory, a URL, or a Hub repository, with `@revision` and `+adapter` if need be.",
    "anyOf": [NAME, _PATH, make_object({"model": {"anyOf": [NAME, _PATH]}, "lora": _ADAPTER}, "model")],
}
_ENTRY: Schema = {"model": refer("model"), "revision": REVISION, "parameters": {}}
_LAYER_RANGE = {
    "description": "The first layer, and the one after the last; all layers where it is left out.",
    "type": ["array", "null"],
    "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+$"}]},
    "minItems": 2,
    "maxItems": 2,
}
RUN = make_object(
    {
        "glob": {**NAME, "description": "Directories with a config.json, such as `s3://bucket/run/step-*`."},
        "steps": {
            "description": "The first number that a model may have, and the last.",
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        },
        "every": {**COUNT, "description": "Of these the last, and every second, third ... before it."},
        "last": {**COUNT, "description": "The last so many of these."},
        "schedule": {"enum": [*SCHEDULES, None], "description": "Which weights they have."},
        "decay": {
            "description": "For `exponential`.",
            "type": ["number", "null"],
            "exclusiveMinimum": 0,
            "maximum": 1,
        },
    },
    "glob",
)


def make_models(statistics: Schema) -> Schema:
    """Return the schema of `models`; `statistics` are the keys of those of all methods."""
    return make_list(make_object({**_ENTRY, **statistics}, "model"))


def make_slices(statistics: Schema) -> Schema:
    """Return the schema of `slices`; `statistics` are the keys of those of all methods."""
    source = make_object({**_ENTRY, **statistics, "layer_range": _LAYER_RANGE}, "model")
    properties = {"sources": make_list(source), "base_model": refer("model"), "merge_method": NAME, "parameters": {}}
    return make_list(make_object(properties, "sources"), "Layers of models, stacked in this order.")
