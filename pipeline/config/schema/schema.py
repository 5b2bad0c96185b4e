"""A JSON Schema of the YAML, for editors: it takes whatever `--strict` takes, and refuses most of what that refuses.

Weights that are missing, numbers of models, and what depends on the models themselves are for `plan` to tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raymerge.ops.registry import Op
from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.config.schema.methods import (
    HAS_ADAPTER,
    SCOPES,
    make_condition,
    make_parameters,
    make_setting,
    name_setting,
)
from raymerge.pipeline.config.schema.mixture import IS_MIXTURE, MIXTURE_SCHEMA
from raymerge.pipeline.config.schema.models import MODEL, RUN, make_models, make_slices
from raymerge.pipeline.config.schema.parts import NAME, TITLE, Schema, make_dtype, make_object, refer
from raymerge.pipeline.config.schema.vocabulary import GIVER, TOKENIZER
from raymerge.pipeline.config.sections.adapter import ADAPTER_SCHEMA, NOT_OF_ADAPTERS
from raymerge.pipeline.config.sections.chat_template import AUTO
from raymerge.pipeline.config.sections.search import SEARCH, SEARCH_SCHEMA
from raymerge.pipeline.config.sections.sweep import SWEEP, SWEEP_SCHEMA

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_schema(ops: Iterable[Op]) -> Schema:
    """Return the schema of configs that merge by one of these ops."""
    methods = sorted(ops, key=lambda op: op.name)
    settings = {name_setting(p): make_setting(p) for op in methods for p in op.parameters}
    statistics = {
        op.statistics.key: {**refer("model"), "description": f"A file or directory of {op.statistics.title}."}
        for op in methods
        if op.statistics
    }
    parameters = {
        f"{op.name}{suffix}": make_parameters(op, own=own) for op in methods for suffix, own in SCOPES.items()
    }
    return {
        "$schema": _DIALECT,
        "title": "A merge by raymerge",
        "if": IS_MIXTURE,
        "then": refer("mixture"),
        "else": refer("merge"),
        "$defs": {
            "model": MODEL,
            "mixture": MIXTURE_SCHEMA,
            "merge": _make_merge(methods, statistics),
            **settings,
            **parameters,
        },
    }


def _make_merge(methods: Sequence[Op], statistics: Schema) -> Schema:
    """Return the schema of merges other than mixtures of experts; `statistics` are the keys of those of all methods."""
    models = make_models(statistics)
    slices = make_slices(statistics)
    return {
        **make_object(
            {
                "name": TITLE,
                "merge_method": {"anyOf": [{"const": op.name, "description": op.summary} for op in methods]},
                "models": {
                    "description": "Models to merge, or a pattern that finds the checkpoints of a training run.",
                    "if": {"type": "object"},
                    "then": RUN,
                    "else": models,
                },
                "slices": slices,
                "modules": {
                    "description": "Modules of the models, such as `text_decoder`, each with its `models` or `slices`.",
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {
                        **make_object({"models": models, "slices": slices, "parameters": {}}),
                        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
                    },
                },
                "copy_rest_from": {
                    "description": "Gives config.json, tokenizer, and all tensors that none of the others has.",
                    "anyOf": [{"type": "null"}, refer("model")],
                },
                "base_model": {"$ref": "#/$defs/model", "description": "What the models were fine-tuned from."},
                "parameters": {"description": "Of the method: for all models and tensors."},
                "dtype": make_dtype("What is written, where `out_dtype` says nothing else."),
                "out_dtype": make_dtype("What is written."),
                "chat_template": {
                    "description": "`auto` for the one that most models have, a name, a file, or text in Jinja.",
                    "anyOf": [
                        {"enum": [AUTO, *BUILTIN, None]},
                        {"type": "string", "pattern": r"\.(jinja|jinja2|j2)\s*$"},
                        {"type": "string", "minLength": 20, "pattern": r"\{"},
                    ],
                },
                "keep_float32": {
                    "description": "Keep float32: of tensors that models have in it on purpose, or by shell patterns.",
                    "anyOf": [{"type": ["boolean", "null"]}, {"type": "array", "items": NAME}],
                },
                "integers": {
                    "description": "Tensors that are not floating-point: equal in all models, or whose are taken.",
                    "enum": ["equal", "donor", "max", "sum", None],
                },
                "adapter": ADAPTER_SCHEMA,
                "tokenizer_source": {"description": GIVER, "anyOf": [{"type": "null"}, refer("model")]},
                "tokenizer": TOKENIZER,
                SWEEP: SWEEP_SCHEMA,
                SEARCH: SEARCH_SCHEMA,
            },
            "merge_method",
        ),
        "oneOf": [{"required": [form]} for form in ("models", "slices", "modules")],
        "allOf": [make_condition(op, statistics) for op in methods],
        "if": HAS_ADAPTER,
        "then": {"properties": {key: {"type": "null"} for key in NOT_OF_ADAPTERS}},
    }
