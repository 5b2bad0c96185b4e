"""A JSON Schema of the YAML, for editors: it takes whatever `--strict` takes, and refuses most of what that refuses.

Weights that are missing, numbers of models, and what depends on the models themselves are for `plan` to tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymerge.ops.registry import Base, Op, Parameter
from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.checkpoint.dtypes import DTYPE_NAMES
from raymerge.pipeline.config.merge_config import RANDOM_GATES
from raymerge.pipeline.config.methods import takes_first_as_base
from raymerge.pipeline.config.mixture import ARCHITECTURES, GATE_MODES, MIXTURE, MIXTURE_KEYS
from raymerge.pipeline.config.sections.adapter import ADAPTER_SCHEMA, NOT_OF_ADAPTERS
from raymerge.pipeline.config.sections.chat_template import AUTO
from raymerge.pipeline.config.sections.search import SEARCH, SEARCH_SCHEMA
from raymerge.pipeline.config.sections.sweep import SWEEP, SWEEP_SCHEMA
from raymerge.pipeline.config.sections.training_run import SCHEDULES
from raymerge.pipeline.config.values import BOOLS

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NUMBER = r"^[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?$"
"""What YAML 1.1 takes for a string, and a parameter for a number: 1e-5."""
_CASES = (str.lower, str.title, str.upper)
_TITLE = {"type": ["string", "null"], "pattern": r"\S", "description": "Of the merge."}
_NAME = {"type": "string", "pattern": r"\S"}
_REVISION = {"type": ["string", "null"], "pattern": r"\S"}
_FILTER = {
    "type": ["string", "null"],
    "description": "A piece of a tensor's name, or a pattern after `glob:` or `regex:`; the first that fits counts.",
}


def make_schema(ops: Iterable[Op]) -> Schema:
    """Return the schema of configs that merge by one of these ops."""
    methods = sorted(ops, key=lambda op: op.name)
    settings = {_name_setting(p): _make_setting(p) for op in methods for p in op.parameters}
    statistics = {
        op.statistics.key: {**_ref("model"), "description": f"A file or directory of {op.statistics.title}."}
        for op in methods
        if op.statistics
    }
    parameters = {
        f"{op.name}{suffix}": _make_parameters(op, own=own) for op in methods for suffix, own in _SCOPES.items()
    }
    return {
        "$schema": _DIALECT,
        "title": "A merge by raymerge",
        "if": _IS_MIXTURE,
        "then": _ref("mixture"),
        "else": _ref("merge"),
        "$defs": {
            "model": _MODEL,
            "mixture": _MIXTURE,
            "merge": _make_merge(methods, statistics),
            **settings,
            **parameters,
        },
    }


def _make_merge(methods: Sequence[Op], statistics: Schema) -> Schema:
    """Return the schema of merges other than mixtures of experts; `statistics` are the keys of those of all methods."""
    models = _make_models(statistics)
    slices = _make_slices(statistics)
    return {
        **_object(
            {
                "name": _TITLE,
                "merge_method": {"anyOf": [{"const": op.name, "description": op.summary} for op in methods]},
                "models": {
                    "description": "Models to merge, or a pattern that finds the checkpoints of a training run.",
                    "if": {"type": "object"},
                    "then": _RUN,
                    "else": models,
                },
                "slices": slices,
                "modules": {
                    "description": "Modules of the models, such as `text_decoder`, each with its `models` or `slices`.",
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {
                        **_object({"models": models, "slices": slices, "parameters": {}}),
                        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
                    },
                },
                "copy_rest_from": {
                    "description": "Gives config.json, tokenizer, and all tensors that none of the others has.",
                    "anyOf": [{"type": "null"}, _ref("model")],
                },
                "base_model": {"$ref": "#/$defs/model", "description": "What the models were fine-tuned from."},
                "parameters": {"description": "Of the method: for all models and tensors."},
                "dtype": _make_dtype("What is written, where `out_dtype` says nothing else."),
                "out_dtype": _make_dtype("What is written."),
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
                    "anyOf": [{"type": ["boolean", "null"]}, {"type": "array", "items": _NAME}],
                },
                "integers": {
                    "description": "Tensors that are not floating-point: equal in all models, or whose are taken.",
                    "enum": ["equal", "donor", "max", "sum", None],
                },
                "adapter": ADAPTER_SCHEMA,
                "tokenizer_source": {"description": _GIVER, "anyOf": [{"type": "null"}, _ref("model")]},
                "tokenizer": _TOKENIZER,
                SWEEP: SWEEP_SCHEMA,
                SEARCH: SEARCH_SCHEMA,
            },
            "merge_method",
        ),
        "oneOf": [{"required": [form]} for form in ("models", "slices", "modules")],
        "allOf": [_make_condition(op, statistics) for op in methods],
        "if": _HAS_ADAPTER,
        "then": {"properties": {key: {"type": "null"} for key in NOT_OF_ADAPTERS}},
    }


def _object(properties: Mapping[str, Schema], *required: str) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema, description: str = "") -> Schema:
    note = {"description": description} if description else {}
    return {**note, "type": "array", "items": items, "minItems": 1}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


_PATH = _object({"path": _NAME, "revision": _REVISION}, "path")
_ADAPTER: Schema = {"description": "A LoRA adapter for the model.", "anyOf": [_NAME, _PATH, {"type": "null"}]}
_MODEL: Schema = {
    "description": "A directory, a URL, or a Hub repository, with `@revision` and `+adapter` if need be.",
    "anyOf": [_NAME, _PATH, _object({"model": {"anyOf": [_NAME, _PATH]}, "lora": _ADAPTER}, "model")],
}
_ENTRY: Schema = {"model": _ref("model"), "revision": _REVISION, "parameters": {}}
_LAYER_RANGE = {
    "description": "The first layer, and the one after the last; all layers where it is left out.",
    "type": ["array", "null"],
    "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+$"}]},
    "minItems": 2,
    "maxItems": 2,
}
_COUNT = {"type": ["integer", "null"], "minimum": 1}
_RUN = _object(
    {
        "glob": {**_NAME, "description": "Directories with a config.json, such as `s3://bucket/run/step-*`."},
        "steps": {
            "description": "The first number that a model may have, and the last.",
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        },
        "every": {**_COUNT, "description": "Of these the last, and every second, third ... before it."},
        "last": {**_COUNT, "description": "The last so many of these."},
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
_GIVER = "Whose tokenizer the output gets: `union` of all, `base`, or a model's."
_ROW: Schema = {
    "anyOf": [
        {"type": "null"},
        {"$ref": "#/$defs/model"},
        _object({"kind": {"const": "zero"}}, "kind"),
        {
            **_object(
                {
                    "kind": {"const": "model_token"},
                    "model": {"$ref": "#/$defs/model"},
                    "token": _NAME,
                    "token_id": {"type": "integer", "minimum": 0},
                },
                "kind",
                "model",
            ),
            "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
        },
    ]
}
_HAS_ADAPTER: Schema = {"required": ["adapter"], "properties": {"adapter": {"type": "object"}}}
_TOKENIZER: Schema = {
    **_object(
        {
            "source": {"description": _GIVER, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/model"}]},
            "tokens": {
                "description": "Rows of tokens in models that lack them; those that are missing are added.",
                "type": ["object", "null"],
                "propertyNames": {"minLength": 1},
                "additionalProperties": {
                    **_object({"source": _ROW, "force": {"type": ["boolean", "null"]}}),
                    "type": ["object", "null"],
                },
            },
            "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**20},
        }
    ),
    "type": ["object", "null"],
    "description": "The output's vocabulary.",
}
_SCOPES = {"": False, ".model": True}
"""Where parameters stand: for all models, or under one. By what the definitions of a method are called."""


def _make_models(statistics: Schema) -> Schema:
    return _list(_object({**_ENTRY, **statistics}, "model"))


def _make_slices(statistics: Schema) -> Schema:
    source = _object({**_ENTRY, **statistics, "layer_range": _LAYER_RANGE}, "model")
    properties = {"sources": _list(source), "base_model": _ref("model"), "merge_method": _NAME, "parameters": {}}
    return _list(_object(properties, "sources"), "Layers of models, stacked in this order.")


def _make_dtype(description: str) -> Schema:
    names = [prefix + name for prefix in ("", "torch.") for name in DTYPE_NAMES]
    return {"description": description, "enum": ["auto", *names, None]}


_PROMPTS = {"type": ["array", "null"], "items": {"type": "string"}}
_NUMBER_OR_TEXT = {"anyOf": [{"type": ["number", "null"]}, {"type": "string", "pattern": _NUMBER}]}
_EXPERT = _object(
    {
        "source_model": {**_ref("model"), "description": "The model whose MLPs become the expert."},
        "positive_prompts": {**_PROMPTS, "description": "Texts that are to choose it."},
        "negative_prompts": {**_PROMPTS, "description": "Texts that are not."},
        "residual_scale": {**_NUMBER_OR_TEXT, "description": "Factor of what it adds; default 1."},
        "noise_scale": {**_NUMBER_OR_TEXT, "description": "Standard deviation of noise on its weights; default 0."},
    },
    "source_model",
)
_IS_MIXTURE = {
    "anyOf": [{"required": [key]} for key in MIXTURE_KEYS]
    + [{"required": ["merge_method"], "properties": {"merge_method": {"const": MIXTURE}}}]
}
_MIXTURE = {
    **_object(
        {
            "name": _TITLE,
            "merge_method": {"enum": [MIXTURE, None]},
            "base_model": {**_ref("model"), "description": "The model that gives all but the experts."},
            "experts": _list(_EXPERT, "Models whose MLPs become the experts of each layer."),
            "shared_experts": {"anyOf": [{"type": "null"}, {"type": "array", "items": _EXPERT}]},
            "gate_mode": {"enum": [*GATE_MODES, None], "description": "What routers are made of; default hidden."},
            "experts_per_token": {**_COUNT, "description": "Experts that each token passes through; default 2."},
            "architecture": {
                "description": "What the mixture becomes; by default the first that fits.",
                "anyOf": [{"enum": [*ARCHITECTURES, None]}, _NAME],
            },
            "dtype": _make_dtype("What is written, where `out_dtype` says nothing else."),
            "out_dtype": _make_dtype("What is written."),
            SWEEP: SWEEP_SCHEMA,
            SEARCH: SEARCH_SCHEMA,
        },
        "base_model",
        "experts",
    ),
    "if": {"properties": {"gate_mode": {"not": {"enum": [*RANDOM_GATES]}}}},
    "then": {"properties": {"experts": {"items": {"required": ["positive_prompts"]}}}},
}


def _make_condition(op: Op, keys: Iterable[str]) -> Schema:
    """Return what holds where this op is the method; `keys` are those of all methods' statistics."""
    everywhere = {"parameters": _ref(op.name)}
    not_taken = {key: False for key in keys if op.statistics is None or key != op.statistics.key}
    of_model = {"items": {"properties": {"parameters": _ref(f"{op.name}.model"), **not_taken}}}
    extra = 0 if op.base is Base.INPUT else 1  # the base may be listed, too
    limits = {} if op.max_models is None else {"maxItems": op.max_models + extra}
    body: Schema = {
        **everywhere,
        "models": {**of_model, **limits},
        "slices": {"items": {"properties": {**everywhere, "sources": {**of_model, **limits}}}},
    }
    then: Schema = {"properties": {**body, "modules": {"additionalProperties": {"properties": body}}}}
    needed = [p.name for p in op.parameters if not p.per_model and p.default is None]
    needs_base = op.base is Base.REQUIRED and not takes_first_as_base(op)
    of_models: list[Schema] = [{"anyOf": [{"required": ["base_model"]}, _HAS_ADAPTER]}] if needs_base else []
    if needed:
        of_models.append({"required": ["parameters"], "properties": {"parameters": {"required": needed}}})
    if of_models:
        varies = {"anyOf": [{"required": [SWEEP]}, {"required": [SEARCH]}]}  # what is needed may be varied
        is_alone = {"required": ["models"], "not": varies}
        then |= {"if": is_alone, "then": {"allOf": of_models}}
    return {"if": {"properties": {"merge_method": {"const": op.name}}}, "then": then}


def _make_parameters(op: Op, *, own: bool) -> Schema:
    """Return the schema of the parameters of an op, of one model's own or of all."""
    properties = {}
    for parameter in op.parameters:
        if parameter.per_model or not own:
            given = "required" if parameter.default is None else f"default {str(parameter.default).lower()}"
            scope = "one for each model" if parameter.per_model else "one for all models"
            properties[parameter.name] = {**_ref(_name_setting(parameter)), "description": f"{scope}; {given}"}
    return {**_object(properties), "type": ["object", "null"]}


def _name_setting(parameter: Parameter) -> str:
    kind = "-or-".join(parameter.choices) or parameter.type.__name__
    return f"{kind} {parameter.range}".replace(" ", "-") if parameter.range else kind


def _make_setting(parameter: Parameter) -> Schema:
    """Return the schema of a value, a gradient over the layers, or values by filters on tensor names."""
    value = _make_value(parameter)
    values: Schema = {"anyOf": [value, {"type": "array", "items": value}]}
    rule = _object({"filter": _FILTER, "value": values}, "value")
    return {"anyOf": [*values["anyOf"], rule, {"type": "array", "items": rule}]}


def _make_value(parameter: Parameter) -> Schema:
    if parameter.type is bool:
        return {
            "anyOf": [{"type": "boolean"}, {"enum": [0, 1, *sorted({form(word) for word in BOOLS for form in _CASES})]}]
        }
    if parameter.type is str:
        return {"enum": list(parameter.choices)} if parameter.choices else {"type": "string"}
    number: Schema = {"type": "integer" if parameter.type is int else "number"}
    if parameter.range:
        number["minimum"] = parameter.range.low
        if parameter.range.high < math.inf:
            number["maximum"] = parameter.range.high
    return {"anyOf": [number, {"type": "string", "pattern": _NUMBER}]}
