"""Merge methods as a table, as a page each, and as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.registry import Base, Op, Parameter, Value
from raymerge.pipeline.messages import counted

_WIDTH = 100
_TABLE_WIDTH = 200
"""Width of the output where stdout is no terminal."""
_SHAPE = (4096, 8209)
"""Shape of the matrix for which cost and memory are told."""
_BASES = {Base.REQUIRED: "required", Base.OPTIONAL: "optional", Base.INPUT: "none"}
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MODELS = ("org/first-tune", "org/second-tune", "org/third-tune")
_HELD = {
    "blocks": "a block of each tensor at a time",
    "rows": "a block of whole rows of each tensor at a time",
    "tensor": "the whole tensor at a time",
}


@dataclass(frozen=True)
class Demand:
    """The cost of a method for a large matrix of as many models as its example has, as its kernel declares it."""

    passes: int
    """Looks at the inputs, to measure something before they are merged."""
    is_compiled: bool
    """Whether compiled loops merge it on CPUs; else torch does."""
    held: str
    """The unit that is merged together: `blocks`, `rows` for blocks of whole rows, or the whole `tensor`."""
    scratch: int
    """Blocks that are needed besides the result."""
    scratch_per_model: int
    """Further ones for one more model."""


def measure_demand(op: Op) -> tuple[str, Demand]:
    """Return the family of an op's kernel, and what this demands with the values of the example."""
    num_models = _count_example(op)
    sizes = range(num_models, num_models + 1 + (op.max_models is None))
    sites = [
        Site("w", _SHAPE, size + extra + (op.base is Base.REQUIRED), 0, extra)
        for size in sizes
        for extra in [size if op.statistics else 0]
    ]
    kernels = [op.kernel(_example_values(op, size)) for size in sizes]
    scratch = [kernel.num_scratch(site) for kernel, site in zip(kernels, sites, strict=True)]
    grid = kernels[0].grid(sites[0])
    return kernels[0].family, Demand(
        passes=kernels[0].num_passes(sites[0]),
        is_compiled=bool(kernels[0].loop_dtypes),
        held="tensor" if grid == sites[0].num_elements else "blocks" if grid == BLOCK_ELEMENTS else "rows",
        scratch=scratch[0],
        scratch_per_model=scratch[-1] - scratch[0],
    )


def format_table(ops: Iterable[Op]) -> str:
    """Return a line for each op, under its family."""
    width = shutil.get_terminal_size((_TABLE_WIDTH, 0)).columns
    head = "method", "models", "base", "passes", "memory", "on CPUs"
    families: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for op in ops:
        family, demand = measure_demand(op)
        high = "+" if op.max_models is None else "" if op.max_models == op.min_models else f"-{op.max_models}"
        how = "compiled" if demand.is_compiled else "torch"
        cells = op.name, f"{op.min_models}{high}", _BASES[op.base], str(demand.passes), demand.held, how
        families.setdefault(family, []).append((cells, op.summary))
    rows = [cells for family in families.values() for cells, _ in family]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def write(cells: Sequence[str], summary: str) -> str:
        line = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        room = max(20, width - len(line) - 4)
        return f"  {line}  {textwrap.shorten(summary, room, placeholder=' ...')}"

    lines = [write(head, "what it does")]
    for family, members in sorted(families.items()):
        lines += ["", family, *(write(cells, summary) for cells, summary in members)]
    return "\n".join([*lines, "", "`raymerge methods NAME` tells more about one."])


def format_page(op: Op) -> str:
    """Return what there is to know of an op: what it computes, takes and costs, when to use it, and a YAML to copy."""
    family, demand = measure_demand(op)
    lines = [f"{op.name}  ({op.title})", *_wrap(op.summary)]
    for paragraph in op.details.split("\n\n") if op.details else ():
        lines += ["", *_wrap(paragraph)]
    measured = (
        f"looks at the inputs {counted(demand.passes, 'time')} before it merges them"
        if demand.passes
        else "merges at once"
    )
    scratch = f"{demand.scratch} blocks of scratch" + (
        f", {demand.scratch_per_model} more for each further model" if demand.scratch_per_model else ""
    )
    facts = {
        "formula": op.formula,
        "when": op.when,
        "not when": op.not_when,
        "models": _count_models(op) + (f", with {op.statistics.title} of each" if op.statistics else ""),
        "family": family,
        "cost": f"{measured}, {_describe_speed(family, demand)}",
        "memory": f"{_HELD[demand.held]}; {scratch}",
        "source": op.source,
        "": op.reference,
    }
    lines.append("")
    for label, text in facts.items():
        if text:
            lines += _wrap(text, f"  {label:10}")
    if op.parameters:
        lines += ["", "  parameters"]
        size = max(len(parameter.name) for parameter in op.parameters)
        lines += [f"    {parameter.name:{size}}  {_describe(parameter)}" for parameter in op.parameters]
    lines += ["", "  example", textwrap.indent(make_example(op), "    ")]
    return "\n".join(lines)


def _describe_speed(family: str, demand: Demand) -> str:
    if family == "matrices":
        return "by torch, and solves or decomposes each matrix: minutes for 100 million parameters on a few cores"
    return "by compiled loops on CPUs" if demand.is_compiled else "by torch, several times as slow as linear"


def methods_json(ops: Iterable[Op]) -> str:
    """Return the same for machines: a list with an object for each op."""
    return json.dumps([_as_json(op) for op in ops], indent=2, ensure_ascii=False)


def make_example(op: Op) -> str:
    """Return a YAML that merges by an op, to be copied."""
    config: dict[str, Any] = {"merge_method": op.name}
    if op.base is Base.REQUIRED:
        config["base_model"] = "org/base"
    values = {p: _example_value(p) for p in op.parameters if p.default != _example_value(p)}
    own = {parameter.name: value for parameter, value in values.items() if parameter.per_model}
    shared = {parameter.name: value for parameter, value in values.items() if not parameter.per_model}
    models = _MODELS[: _count_example(op)]
    config["models"] = [
        {
            "model": model,
            **({op.statistics.key: f"{model.partition('/')[2]}.safetensors"} if op.statistics else {}),
            **({"parameters": dict(own)} if own else {}),
        }
        for model in models
    ]
    if shared:
        config["parameters"] = shared
    return yaml.safe_dump(config | {"dtype": "bfloat16"}, sort_keys=False)


def _as_json(op: Op) -> Mapping[str, Any]:
    family, demand = measure_demand(op)
    return {
        "name": op.name,
        "title": op.title,
        "family": family,
        "summary": op.summary,
        "details": op.details,
        "formula": op.formula,
        "when": op.when,
        "not_when": op.not_when,
        "base": _BASES[op.base],
        "min_models": op.min_models,
        "max_models": op.max_models,
        "statistics": op.statistics.key if op.statistics else None,
        "cost": asdict(demand),
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.type.__name__,
                "per_model": parameter.per_model,
                "default": parameter.default,
                "choices": list(parameter.choices) or None,
                "range": parameter.range and [parameter.range.low, _finite(parameter.range.high)],
            }
            for parameter in op.parameters
        ],
        "source": op.source,
        "reference": op.reference,
        "example": make_example(op),
    }


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _count_example(op: Op) -> int:
    return min(max(2, op.min_models), op.max_models or len(_MODELS))


def _example_value(parameter: Parameter) -> Value:
    """Return a value that does something: the default, unless there is none or it is a share of all."""
    share = parameter.range if parameter.range and parameter.range.high == 1 else None
    if parameter.default is None or (share and parameter.default == share.high):
        return next(iter(parameter.choices), 0.5 if share or parameter.type is float else parameter.type(1))
    return parameter.default


def _example_values(op: Op, num_models: int) -> Mapping[str, Value | tuple[Value, ...]]:
    values = {parameter.name: _example_value(parameter) for parameter in op.parameters}
    per_model = {parameter.name for parameter in op.parameters if parameter.per_model}
    return {name: (value,) * num_models if name in per_model else value for name, value in values.items()}


def _count_models(op: Op) -> str:
    base = {Base.REQUIRED: "a base and ", Base.OPTIONAL: "a base or none, and ", Base.INPUT: ""}[op.base]
    if op.max_models is None:
        return f"{base}{op.min_models} or more"
    if op.min_models == op.max_models:
        return f"{base}exactly {op.min_models}"
    return f"{base}{op.min_models} to {op.max_models}"


def _describe(parameter: Parameter) -> str:
    kind = " or ".join(parameter.choices) or _TYPES[parameter.type]
    if parameter.range:
        kind += f", {parameter.range}"
    given = "required" if parameter.default is None else f"default {str(parameter.default).lower()}"
    return f"{kind}; {given}; one {'for each model' if parameter.per_model else 'for all models'}"


def _wrap(text: str, label: str = "  ") -> Sequence[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
