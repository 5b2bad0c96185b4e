"""The ops there are: each declares itself by being a function in a file of this package."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import raymerge.ops
from raymerge import RaymergeError
from raymerge.ops.errors import OpFileError, OpParameterError, UnknownOpError, find_line
from raymerge.ops.kernel import Kernel

T = TypeVar("T", bool, int, float, str)
PerModel = Annotated[tuple[T, ...], "per model"]
"""Annotates a parameter with one value for each model; a default is written once, `(1.0,)`, and holds for all."""


@dataclass(frozen=True, slots=True)
class Range:
    """Annotates a number with the values that make sense; others bring a warning, unless the op refuses them."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.low:g} or more" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"


Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(0)]

Value = bool | int | float | str
"""One parameter's value; `tuple[Value, ...]` where there is one for each model."""


class Base(Enum):
    """The use that an op makes of `base_model`."""

    REQUIRED = "required"
    """Source 0 is the base; per-model parameters belong to the other sources."""
    INPUT = "an ordinary input"
    """Merged like every other model, in config order, last if it is not listed."""
    OPTIONAL = "optional"
    """A base that the config may name or leave out; one that is named is used as if it were required.

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
    range: Range | None = None
    """Range of numbers that make sense; None where any does."""


Shape = tuple[int, ...]


def same_shape(shape: Shape) -> Shape | None:
    """Return the shape of statistics that have a value for each element of a tensor."""
    return shape


def gram_shape(shape: Shape) -> Shape | None:
    """Return the shape of inner products of a linear layer's inputs, by the shape of its weight, [outputs, inputs]."""
    return (shape[1], shape[1]) if len(shape) == 2 else None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Tensors that an op takes of each model besides those of the model itself, under the same names.

    They follow the models' tensors as sources: those of the first model, of the second, and so on; a required base has
    none. `Site.num_statistics` says how many there are, which is 0 for tensors that are merged without.
    """

    key: str
    """Key beside `model` in the YAML that says where they are."""
    title: str
    """Their name in the plural, for messages."""
    find_shape: Callable[[Shape], Shape | None] = same_shape
    """Returns the shape that belongs to a tensor of some shape; None where there is none. At the top level of its
    module."""
    is_whole: bool = False
    """Whether a kernel loads all elements of them at once, and is given its tensor as a single piece."""
    is_required: bool = True
    """Whether it is an error that a tensor has none; else it is merged without, and the plan says so."""


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
    details: str
    """The rest of its docstring, but for the paragraphs `Raises:` and those that follow."""
    formula: str
    """In text, of models x_i with weights w_i, the base b and d_i = x_i - b: the docstring's paragraph `Formula:`."""
    when: str
    """Cases that it serves: the paragraph `When:`."""
    not_when: str
    """Cases that others serve better: the paragraph `Not when:`."""
    source: str
    """Paper or page that describes it: the paragraph `Source:`."""
    function: Callable[..., Kernel]
    statistics: Statistics | None = None
    """Statistics of each model's tensors that it takes besides; None for most methods."""
    origin: str = ""
    """The installed package and its version, or the hash of the file, that declares it; empty for those of raymerge."""

    def kernel(self, parameters: Mapping[str, Value | tuple[Value, ...]]) -> Kernel:
        """Return the arithmetic for one tensor.

        Raises:
            OpParameterError: a value is not finite, or makes no sense to the op.
        OpFileError: the function of an op that is not raymerge's own fails.
        """
        for name, value in parameters.items():
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(v, float) and not math.isfinite(v) for v in values):
                raise OpParameterError(f"{name} = {value} is not finite")
        names = _list_names(self.function)
        try:
            kernel = self.function(**{names[name]: value for name, value in parameters.items()})
        except Exception as error:
            if not self.origin or isinstance(error, RaymergeError):
                raise
            path = self.function.__code__.co_filename
            raise OpFileError(
                f"{path}{find_line(error, path)}: {self.name}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(kernel, Kernel):
            raise OpFileError(f"{self.name} returns {kernel!r}; it must return a Kernel, such as Elementwise(...)")
        return kernel


_DECLARED: dict[str, dict[str, Op]] = {}
"""Ops by the module that declares them."""

ENTRY_POINTS = "raymerge.ops"
"""Group in which installed packages name modules that declare ops."""


def merge_op(
    *,
    title: str,
    base: Base,
    reference: str = "",
    min_models: int = 1,
    max_models: int | None = None,
    statistics: Statistics | None = None,
) -> Callable[[Callable[..., Kernel]], Callable[..., Kernel]]:
    """Declare the decorated function as a merge op; its name and signature are what the YAML says."""

    def declare(function: Callable[..., Kernel]) -> Callable[..., Kernel]:
        declared = _DECLARED.setdefault(function.__module__, {})
        before = declared.get(function.__name__)
        if before and before.function.__code__.co_firstlineno != function.__code__.co_firstlineno:
            raise TypeError(f"{function.__name__} is declared twice; rename one")
        hints = get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters.keys() - hints.keys():
            raise TypeError(
                f"parameter {name!r} of {function.__name__} has no type; write {name}: float, or another one"
            )
        parameters = tuple(_make_parameter(p, hints[p.name]) for p in inspect.signature(function).parameters.values())
        text = _read_docstring(function)
        declared[function.__name__] = Op(
            name=function.__name__,
            title=title,
            reference=reference,
            base=base,
            min_models=min_models,
            max_models=max_models,
            parameters=parameters,
            summary=next(iter(text[""]), ""),
            details="\n\n".join(text[""][1:]),
            formula=" ".join(text["Formula"]),
            when=" ".join(text["When"]),
            not_when=" ".join(text["Not when"]),
            source=" ".join(text["Source"]),
            function=function,
            statistics=statistics,
        )
        return function

    return declare


@cache
def load_ops() -> Mapping[str, Op]:
    """Return every op by name, in alphabetical order: of this package, without those beside it, and of installed ones.

    Raises:
        OpFileError: an installed package that declares ops cannot be loaded, or redefines a name.
    """
    names = (f"{raymerge.ops.__name__}.{module.name}" for module in _list_modules())
    ops = {name: op for module in names for name, op in list_declared(module).items()}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            point.load()
        except Exception as error:
            raise OpFileError(
                f"{package}: its ops ({point.value}) cannot be loaded: {type(error).__name__}: {error}; mend or"
                " uninstall it"
            ) from error
        declared = list_declared(point.module) | {
            name: op
            for module in list(_DECLARED)
            if module.startswith(f"{point.module}.")
            for name, op in list_declared(module).items()
        }
        if not declared:
            raise OpFileError(f"{package}: {point.value} declares no op, nor does a module in it that it imports")
        if taken := sorted(declared.keys() & ops.keys()):
            raise OpFileError(f"{package} declares {', '.join(taken)}, and there is one of that name; uninstall it")
        ops |= {name: replace(op, origin=package) for name, op in declared.items()}
    return dict(sorted(ops.items()))


def list_declared(module: str) -> dict[str, Op]:
    """Return the ops that a module declares, by name."""
    return dict(_DECLARED.get(module, {}))


def find_op(name: str, own: Mapping[str, Op] = MappingProxyType({})) -> Op:
    """Return the op of this name.

    Args:
        name: as in `merge_method`.
        own: ops besides those that are installed.

    Raises:
        UnknownOpError: there is none; the message names the nearest.
    """
    ops = {**load_ops(), **own}
    if name not in ops:
        near = difflib.get_close_matches(name.lower(), ops, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownOpError(f"merge_method {name!r} is unknown{hint} There are: {', '.join(ops)}")
    return ops[name]


def _list_modules() -> Iterator[pkgutil.ModuleInfo]:
    for module in pkgutil.iter_modules(raymerge.ops.__path__):
        if not module.ispkg:
            importlib.import_module(f"{raymerge.ops.__name__}.{module.name}")
            yield module


@cache
def _list_names(function: Callable[..., Kernel]) -> Mapping[str, str]:
    """Return a function's parameters by their names in the YAML: `lambda` is a keyword of Python, `lambda_` is none."""
    return {name.rstrip("_"): name for name in inspect.signature(function).parameters}


def _read_docstring(function: Callable[..., Kernel]) -> Mapping[str, Sequence[str]]:
    """Return the paragraphs of a function's docstring, each as one line, by the label that they begin with, or none."""
    found: dict[str, list[str]] = {"": [], "Formula": [], "When": [], "Not when": [], "Source": [], "Raises": []}
    for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
        line = " ".join(paragraph.split())
        label, _, text = line.partition(": ")
        found[label if label in found else ""].append(text if label in found else line)
    return found


def _make_parameter(parameter: inspect.Parameter, hint: Any) -> Parameter:
    per_model = _notes(hint) == ("per model",)
    if per_model:
        hint = get_args(get_args(hint)[0])[0]
    notes = _notes(hint)
    kind: Any = get_args(hint)[0] if notes else hint
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind not in (bool, int, float, str) and not choices:
        raise TypeError(
            f"parameter {parameter.name!r} is {kind}; it must be bool, int, float, str, Literal or PerModel"
        )
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return Parameter(
        name=parameter.name.rstrip("_"),
        type=str if choices else kind,
        per_model=per_model,
        default=default[0] if per_model and default is not None else default,
        choices=choices,
        range=next((note for note in notes if isinstance(note, Range)), None),
    )


def _notes(hint: Any) -> tuple[Any, ...]:
    """Return what `Annotated` adds to a type."""
    return hint.__metadata__ if get_origin(hint) is Annotated else ()
