"""A merge method for people."""

from __future__ import annotations

from raymerge.ops.registry import Base, Op, Parameter


def format_method(op: Op) -> str:
    """Return an op's name, what it does, what it takes, and where it comes from."""
    lines = [f"{op.name}  ({op.title})", f"    {op.summary}", f"    models: {_count(op)}"]
    lines += [f"    {_describe(parameter)}" for parameter in op.parameters]
    if op.reference:
        lines.append(f"    {op.reference}")
    return "\n".join(lines) + "\n"


def _count(op: Op) -> str:
    base = "a base and " if op.base is Base.REQUIRED else ""
    if op.max_models is None:
        return f"{base}{op.min_models} or more"
    if op.min_models == op.max_models:
        return f"{base}exactly {op.min_models}"
    return f"{base}{op.min_models} to {op.max_models}"


def _describe(parameter: Parameter) -> str:
    given = "required" if parameter.default is None else f"default {str(parameter.default).lower()}"
    scope = "for each model" if parameter.per_model else "for the tensor"
    return f"{parameter.name}: {parameter.type.__name__}, {scope}, {given}"
