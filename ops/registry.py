"""The ops there are: each declares itself by being a function in a file of this package."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import raymerge.ops
from raymerge.ops.errors import OpParameterError, UnknownOpError
from raymerge.ops.kernel import Kernel

T = TypeVar("T", bool, int, float, str)
PerModel = Annotated[tuple[T, ...], "per model"]
"""Annotates a parameter with one value for each model; a default is written once, `(1.0,)`, and holds for all."""

Value = bool | int | float | str
"""One parameter's value; `tuple[Value, ...]` where there is one for each model."""


class Base(Enum):
    """The use that an op makes of `base_model`."""

    REQUIRED = "required"
    """Source 0 is the base; per-model parameters belong to the other sources."""
    INPUT = "an ordinary input"
    """Merged like every other model, in config order, last if it is not listed."""
    OPTIONAL = "optional"
    """Where the config names one, as if it were required; where it does not, there is none.

    The op has a per-model parameter, whose values tell by their number whether one of the sources is a base.
    """


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an op, read from its function's signature."""

    name: str
    """As in the YAML."""
    type: type[Value]
    per_model: bool
    """One value for each model (the base not counted unless it is an ordinary input), or one for the tensor."""
    default: Value | None
    """None where the config must give it."""
    choices: tuple[str, ...] = ()
    """The values that a string may have, written as `Literal["one", "other"]`; empty where any will do."""


@dataclass(frozen=True, slots=True)
class Op:
    """A merge method as declared."""

    name: str
    """As in `merge_method`."""
    title: str
    reference: str
    """A paper or page; empty where there is none."""
    base: Base
    min_models: int
    """Fewest models, the base not counted unless it is an ordinary input."""
    max_models: int | None
    """Most models, likewise; None where there is no limit."""
    parameters: tuple[Parameter, ...]
    summary: str
    """First line of the function's docstring."""
    function: Callable[..., Kernel]

    def kernel(self, parameters: Mapping[str, Value | tuple[Value, ...]]) -> Kernel:
        """Return the arithmetic for one tensor.

        Raises:
            OpParameterError: a value is not finite, or makes no sense to the op.
        """
        for name, value in parameters.items():
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(v, float) and not math.isfinite(v) for v in values):
                raise OpParameterError(f"{name} = {value} is not finite")
        return self.function(**{_python_name(name): value for name, value in parameters.items()})


_OPS: dict[str, Op] = {}


def merge_op(
    *, title: str, base: Base, reference: str = "", min_models: int = 1, max_models: int | None = None
) -> Callable[[Callable[..., Kernel]], Callable[..., Kernel]]:
    """Declare the decorated function as a merge op; its name and signature are what the YAML says."""

    def declare(function: Callable[..., Kernel]) -> Callable[..., Kernel]:
        hints = get_type_hints(function, include_extras=True)
        parameters = tuple(_make_parameter(p, hints[p.name]) for p in inspect.signature(function).parameters.values())
        _OPS[function.__name__] = Op(
            name=function.__name__,
            title=title,
            reference=reference,
            base=base,
            min_models=min_models,
            max_models=max_models,
            parameters=parameters,
            summary=(function.__doc__ or "").strip().partition("\n")[0],
            function=function,
        )
        return function

    return declare


@cache
def load_ops() -> Mapping[str, Op]:
    """Return every op by name, in alphabetical order; the packages beside them declare none."""
    for module in pkgutil.iter_modules(raymerge.ops.__path__):
        if not module.ispkg:
            importlib.import_module(f"raymerge.ops.{module.name}")
    return dict(sorted(_OPS.items()))


def find_op(name: str) -> Op:
    """Return the op of this name.

    Raises:
        UnknownOpError: there is none; the message names the nearest.
    """
    ops = load_ops()
    if name not in ops:
        near = difflib.get_close_matches(name, ops, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownOpError(f"merge_method {name!r} is unknown{hint} There are: {', '.join(ops)}")
    return ops[name]


def _python_name(name: str) -> str:
    """`lambda` is a word of the YAML and a keyword of Python."""
    return "lambda_" if name == "lambda" else name


def _make_parameter(parameter: inspect.Parameter, hint: Any) -> Parameter:
    per_model = get_origin(hint) is Annotated
    kind: type[Value] = get_args(get_args(hint)[0])[0] if per_model else hint
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return Parameter(
        name=parameter.name.rstrip("_"),
        type=str if choices else kind,
        per_model=per_model,
        default=default[0] if per_model and default is not None else default,
        choices=choices,
    )
