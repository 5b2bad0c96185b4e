"""One output tensor from its sources: parameters resolved, shapes and dtypes checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernels.copy import Identical
from raymerge.ops.kernels.integers import Accumulation
from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.config.values import Settings, resolve
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.plan.sources.adapted import join_adapted
from raymerge.pipeline.plan.types import ParameterValue, TensorMerge, Variant

COPY = "copy"
"""Stands for an op where tensors are not floating-point: all sources must be equal, and are copied."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source of an output tensor."""

    model: ModelRef
    name: str
    """The name that filters see: the tensor's in this model, also where a tied embedding stands in for it."""
    source: Source
    settings: tuple[Settings, ...]
    """Parameters given under this model, highest precedence first."""
    stored: Source | None = None
    """The source before its rows were brought into another order; None where they were not."""
    align: Callable[[Source], Source] | None = None
    """Brings statistics of `stored` into the order of `source`."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Op, base and settings that all sources of a tensor share."""

    op: Op
    base: ModelRef | None
    settings: tuple[Settings, ...]
    """Parameters of the slice and of the whole merge, highest precedence first."""
    out_dtype: str | None
    """As in a safetensors header; None where the inputs decide."""
    keep_float32: tuple[str, ...] = ()
    """Shell patterns of output tensors that stay float32 where an input has them so."""
    integers: str = "equal"
    """As in `MergeConfig`."""
    donor: ModelRef | None = None
    """The model whose config, and perhaps integers, the output gets."""
    statistics: Mapping[ModelRef, View] = field(default_factory=dict)
    """Statistics of each model, for an op that takes some."""


def make_tensor_merge(name: str, parts: Sequence[Part], scope: Scope, position: float, seed: int) -> TensorMerge:
    """Return how an output tensor comes about.

    Args:
        name: of the output tensor.
        parts: its sources in config order, at least one.
        scope: what holds for all of them.
        position: of its layer on a gradient, from 0 to 1.
        seed: of the merge.

    Raises:
        TensorMismatchError: shapes differ, or dtypes cannot be merged.
        ConfigError: a required parameter is missing.
        OpParameterError: the op refuses the parameters.
    """
    if scope.op.base is not Base.INPUT:
        parts = sorted(parts, key=lambda part: part.model != scope.base)
    _check_shapes(name, parts)
    dtypes = [part.source.dtype for part in parts]
    shape = parts[0].source.shape
    if not all(DTYPES[dtype].is_mergeable for dtype in dtypes):
        sources = _as_bytes(name, parts)
        dtype = DTYPES[dtypes[0]]
        if scope.integers in ("max", "sum") and dtype.is_within_int64:
            variant = Variant((), Accumulation(scope.integers == "sum", dtype.torch_name), seed)
            stored = tuple(part.source for part in parts)
            return TensorMerge(name, shape, dtype.name, dtype.name, scope.integers, stored, (variant,))
        if scope.integers == "donor":
            chosen = next((k for k, part in enumerate(parts) if part.model == scope.donor), 0)
            sources = (sources[chosen],)
        return TensorMerge(name, shape, dtype.name, "U8", COPY, sources, (Variant((), Identical(), seed),))
    out_dtype = scope.out_dtype or promote(dtypes)
    if (
        "F32" in dtypes
        and DTYPES[out_dtype].num_bits == 16
        and any(fnmatchcase(name, pattern) for pattern in scope.keep_float32)
    ):
        out_dtype = "F32"
    parameters = _resolve_parameters(name, parts, scope, position)
    try:
        kernel = scope.op.kernel(parameters)
    except OpParameterError as error:
        raise OpParameterError(f"{scope.op.name}, tensor {name}: {error}") from error
    sources = tuple(part.source for part in parts)
    statistics = _find_statistics(parts, scope)
    if any(part.model.adapter for part in parts) and not statistics:
        sources, kernel = join_adapted(sources, kernel)
    variant = Variant(tuple(parameters.items()), kernel, seed)
    return TensorMerge(
        name,
        shape,
        out_dtype,
        out_dtype,
        scope.op.name,
        (*sources, *statistics),
        (variant,),
        len(statistics),
        bool(statistics and scope.op.statistics and scope.op.statistics.is_whole),
    )


def promote(dtypes: Sequence[str]) -> str:
    """Return the smallest dtype that holds the values of all of these floating-point dtypes.

    >>> promote(["BF16", "BF16"]), promote(["BF16", "F16"]), promote(["F32", "BF16"])
    ('BF16', 'F32', 'F32')
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"


def _resolve_parameters(
    name: str, parts: Sequence[Part], scope: Scope, position: float
) -> Mapping[str, ParameterValue]:
    """Resolve every parameter of the op; filters on per-model parameters see the input's name, others the output's."""
    with_parameters = [part for part in parts if scope.op.base is Base.INPUT or part.model != scope.base]
    values: dict[str, ParameterValue] = {}
    for parameter in scope.op.parameters:
        if parameter.per_model:
            found = []
            for part in with_parameters:
                value = resolve(parameter, (*part.settings, *scope.settings), part.name, position)
                if value is None:
                    raise ConfigError(
                        f"{scope.op.name} needs {parameter.name!r} for model {part.model} (tensor {part.name}), and "
                        f"nothing gives it; add it under the model's `parameters`, or at the top for all models"
                    )
                found.append(value)
            values[parameter.name] = tuple(found)
        else:
            value = resolve(parameter, scope.settings, name, position)
            if value is None:
                raise ConfigError(
                    f"{scope.op.name} needs {parameter.name!r} (tensor {name}), and nothing gives it; "
                    f"add it to the top-level `parameters`"
                )
            values[parameter.name] = value
    return values


def _find_statistics(parts: Sequence[Part], scope: Scope) -> tuple[Source, ...]:
    """Return the statistics of each source that is no required base; none where the op merges such a tensor without.

    Raises:
        TensorMismatchError: a source lacks what the op needs, or others have; or a shape or dtype does not fit.
    """
    wanted = scope.op.statistics
    if wanted is None:
        return ()
    owners = [part for part in parts if scope.op.base is Base.INPUT or part.model != scope.base]
    stored = [part.stored or part.source for part in owners]
    shapes = [wanted.find_shape(source.shape) for source in stored]
    names = [part.source.name for part in owners]  # as stored, whatever a view makes of it
    found = [scope.statistics[part.model].find(name) for part, name in zip(owners, names, strict=True)]
    if not wanted.is_required and (None in shapes or not any(found)):
        return ()
    sources = []
    for part, own, name, shape, source in zip(owners, stored, names, shapes, found, strict=True):
        where = scope.statistics[part.model].ref
        if source is None:
            raise TensorMismatchError(f"{name} of {part.model} has no {wanted.title} in {where}")
        if shape != source.shape or not DTYPES[source.dtype].is_mergeable:
            expected = f"{list(shape or ())} of a floating-point dtype"
            raise TensorMismatchError(
                f"{name} is {list(own.shape)} in {part.model}, whose {wanted.title} must be {expected}; in"
                f" {where} they are {list(source.shape)}, {source.dtype}"
            )
        if part.align is not None and not wanted.is_whole:
            source = part.align(source)
        elif part.align is not None and wanted.find_shape((own.shape[0] + 1, *own.shape[1:])) != shape:
            raise TensorMismatchError(
                f"{name} of {part.model} gets rows in another order by the config's tokenizer, and {wanted.title} go by"
                " rows; leave the tokenizer out"
            )
        sources.append(source)
    return tuple(sources)


def _check_shapes(name: str, parts: Sequence[Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.source.shape != first.source.shape:
            hint = ""
            if part.source.shape[1:] == first.source.shape[1:] and len(part.source.shape) == 2:
                hint = (
                    "; if these are the rows of tokens, `tokenizer_source: union` (or `base`, or a model) in the config"
                    " says which the output has"
                )
            raise TensorMismatchError(
                f"{name} is {list(first.source.shape)} in {first.model} and {list(part.source.shape)} in "
                f"{part.model}; only tensors of one shape can be merged{hint}"
            )


def _as_bytes(name: str, parts: Sequence[Part]) -> tuple[Source, ...]:
    """Return tensors that are not floating-point as bytes, which must be the same in all sources."""
    first = parts[0]
    sources = []
    for part in parts:
        if part.source.dtype != first.source.dtype:
            raise TensorMismatchError(
                f"{name} is {first.source.dtype} in {first.model} and {part.source.dtype} in {part.model}; "
                f"tensors that are not floating-point must be the same everywhere"
            )
        if part.source.dtype.startswith(("F8", "F6", "F4")):
            raise TensorMismatchError(
                f"{name} in {part.model} is {part.source.dtype}, quantised; that is not supported yet: "
                f"convert the model to bfloat16 first"
            )
        if not isinstance(part.source, StoredTensor):
            raise TensorMismatchError(
                f"{name} in {part.model} is {part.source.dtype}, and not as the file has it: only floating-point "
                f"tensors can be made of others"
            )
        sources.append(part.source.as_bytes())
    return tuple(sources)
