"""The schema of methods: their parameters, and what follows from the choice of one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from raymerge.ops.registry import Base, Op, Parameter
from raymerge.pipeline.config.methods import takes_first_as_base
from raymerge.pipeline.config.schema.parts import NUMBER, Schema, make_object, refer
from raymerge.pipeline.config.sections.search import SEARCH
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.config.values import BOOLS

_CASES = (str.lower, str.title, str.upper)
_FILTER = {
    "type": ["string", "null"],
    "description": "A piece of a tensor's name, or a pattern after `glob:` or `regex:`; the first that fits counts.",
}
HAS_ADAPTER: Schema = {"required": ["adapter"], "properties": {"adapter": {"type": "object"}}}
SCOPES = {"": False, ".model": True}
"""Whether parameters are those of one model, by the suffix of a method's definition."""


def make_condition(op: Op, keys: Iterable[str]) -> Schema:
    """Return the schema of configs whose method is this op; `keys` are those of all methods' statistics."""
    everywhere = {"parameters": refer(op.name)}
    not_taken = {key: False for key in keys if op.statistics is None or key != op.statistics.key}
    of_model = {"items": {"properties": {"parameters": refer(f"{op.name}.model"), **not_taken}}}
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
    of_models: list[Schema] = [{"anyOf": [{"required": ["base_model"]}, HAS_ADAPTER]}] if needs_base else []
    if needed:
        of_models.append({"required": ["parameters"], "properties": {"parameters": {"required": needed}}})
    if of_models:
        varies = {"anyOf": [{"required": [SWEEP]}, {"required": [SEARCH]}]}  # what is needed may be varied
        is_alone = {"required": ["models"], "not": varies}
        then |= {"if": is_alone, "then": {"allOf": of_models}}
    return {"if": {"properties": {"merge_method": {"const": op.name}}}, "then": then}


def make_parameters(op: Op, *, own: bool) -> Schema:
    """Return the schema of the parameters of an op, of one model's own or of all."""
    properties = {}
    for parameter in op.parameters:
        if parameter.per_model or not own:
            given = "required" if parameter.default is None else f"default {str(parameter.default).lower()}"
            scope = "one for each model" if parameter.per_model else "one for all models"
            properties[parameter.name] = {**refer(name_setting(parameter)), "description": f"{scope}; {given}"}
    return {**make_object(properties), "type": ["object", "null"]}


def name_setting(parameter: Parameter) -> str:
    """Return the name of the definition that all parameters of its type, choices and range share."""
    kind = "-or-".join(parameter.choices) or parameter.type.__name__
    return f"{kind} {parameter.range}".replace(" ", "-") if parameter.range else kind


def make_setting(parameter: Parameter) -> Schema:
    """Return the schema of a value, a gradient over the layers, or values by filters on tensor names."""
    value = _make_value(parameter)
    values: Schema = {"anyOf": [value, {"type": "array", "items": value}]}
    rule = make_object({"filter": _FILTER, "value": values}, "value")
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
    return {"anyOf": [number, {"type": "string", "pattern": NUMBER}]}
