"""Inspections as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence

from raymerge.pipeline.checkpoint.inspection.results import FoundFile, Inspection
from raymerge.pipeline.checkpoint.inspection.stacks import Stack, Totals
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.messages import counted, escaped, listing
from raymerge.pipeline.sizes import format_nbytes

_WIDTH = 100
_MAX_OUTSIDE = 40
_MAX_FILES = 20
_LABEL_WIDTH = 12
_HARD_SPACE = "\u00a0"
"""A space at which a line must not be broken; it is printed as any other."""


def format_inspection(found: Inspection, *, with_tensors: bool = False) -> str:
    """Return an inspection as text; with `with_tensors`, a line for each tensor."""
    lines = [*_format_head(found), *_format_tensors(found)]
    if with_tensors:
        lines.append("  tensors: name, dtype, shape, size, and the bytes [start, stop) of a file")
        lines += [
            f"    {escaped(tensor.name)}  {tensor.dtype}  {_shape(tensor)}  {format_nbytes(tensor.nbytes)}"
            f"  {escaped(tensor.file.url)} {tensor.start}-{tensor.stop}"
            for tensor in found.tensors
        ]
    lines += _format_files(found)
    if found.obstacle:
        alone = " by itself" if found.weights_format == "LoRA adapter" else ""
        lines.append(f"  cannot be merged{alone}: {escaped(found.obstacle)}")
    total = f"{format_nbytes(found.read_nbytes)} of {format_nbytes(found.nbytes)}"
    lines.append(f"read {total} in {counted(found.num_reads, 'read')}")
    return "\n".join(lines)


def inspection_json(found: Inspection) -> str:
    """Return all of an inspection as JSON."""
    return json.dumps(
        {
            "url": found.url,
            "weights_format": found.weights_format,
            "architectures": list(found.architectures),
            "model_type": found.model_type,
            "config_num_layers": found.config_num_layers,
            "obstacle": found.obstacle,
            "num_files": len(found.files),
            "nbytes": found.nbytes,
            **_totals_json(found.total),
            "dtypes": {dtype: _totals_json(total) for dtype, total in found.dtypes},
            "stacks": [
                {
                    "prefix": stack.prefix,
                    "num_layers": stack.num_layers,
                    **_totals_json(stack.total),
                    "kinds": [
                        {"layers": [list(run) for run in kind.layers], "each": _totals_json(kind.each)}
                        for kind in stack.kinds
                    ],
                }
                for stack in found.stacks
            ],
            "outside": [tensor.name for tensor in found.outside],
            "embedding": found.embedding,
            "head": found.head,
            "is_tied": found.is_tied,
            "made": found.made
            and {"version": found.made.version, "method": found.made.method, "models": list(found.made.models)},
            "files": [{"name": file.name, "nbytes": file.nbytes, "role": file.role} for file in found.files],
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "nbytes": tensor.nbytes,
                    "file": tensor.file.url,
                    "start": tensor.start,
                    "stop": tensor.stop,
                }
                for tensor in found.tensors
            ],
            "read_nbytes": found.read_nbytes,
            "num_reads": found.num_reads,
        },
        indent=2,
        ensure_ascii=False,
    )


def _totals_json(total: Totals) -> dict[str, int]:
    return {
        "num_tensors": total.num_tensors,
        "num_parameters": total.num_parameters,
        "tensor_nbytes": total.nbytes,
    }


def _format_head(found: Inspection) -> Iterator[str]:
    names = ", ".join(map(escaped, found.architectures)) or "no architecture given"
    kind = f" ({escaped(found.model_type)})" if found.model_type else ""
    yield f"{names}{kind}, {found.weights_format}"
    yield _line("where", escaped(found.url))
    if found.made is not None:
        made = f"raymerge {found.made.version}, {found.made.method} of {', '.join(found.made.models)}"
        yield from _wrap("made by", escaped(made))
    weights = [file for file in found.files if file.role == "weights"]
    others = [file for file in found.files if file.role != "weights"]
    yield _line("files", f"{_files(weights)} with the tensors; {_files(others)} besides")


def _format_tensors(found: Inspection) -> Iterator[str]:
    if not found.tensors:
        return
    yield _line("tensors", _format_totals(found.total))
    for dtype, total in found.dtypes:
        yield _line(dtype, _format_totals(total), indent=4)
    for stack in found.stacks[:1]:
        yield from _format_stack(stack)
    num_layers = found.stacks[0].num_layers if found.stacks else 0
    if found.config_num_layers not in (None, num_layers):
        yield _line("", f"config.json counts {found.config_num_layers}")
    for stack in found.stacks[1:]:
        yield from _format_stack(stack)
    tying = _format_tying(found)
    if tying:
        yield _line("head", tying)
    if found.outside:
        yield "  outside of layers"
        shown = found.outside[:_MAX_OUTSIDE]
        width = max(len(escaped(tensor.name)) for tensor in shown)
        for tensor in shown:
            size = format_nbytes(tensor.nbytes)
            yield f"    {escaped(tensor.name):{min(width, 60)}}  {tensor.dtype}  {_shape(tensor)}  {size}"
        if len(found.outside) > len(shown):
            yield f"    and {len(found.outside) - len(shown):,} more; --tensors lists them"


def _format_stack(stack: Stack) -> Iterator[str]:
    first = stack.kinds[0]
    if len(stack.kinds) == 1:
        num = "1 layer" if stack.num_layers == 1 else f"{stack.num_layers} layers, all alike"
        yield _line("layers", f"{escaped(stack.prefix)}{_runs(first.layers)}: {num}; each {_format_totals(first.each)}")
        return
    num_kinds = len(stack.kinds)
    yield _line("layers", f"{escaped(stack.prefix)}: {stack.num_layers} layers of {num_kinds} kinds")
    for kind in stack.kinds[:_MAX_FILES]:
        yield from _wrap("", f"{_runs(kind.layers)}: each {_format_totals(kind.each)}", indent=4)
    if num_kinds > _MAX_FILES:
        yield _line("", f"and {num_kinds - _MAX_FILES} more kinds", indent=4)


def _format_tying(found: Inspection) -> str:
    """Say where the output head is; nothing where that cannot be told."""
    if found.is_tied is None:
        return ""
    if not found.is_tied:
        return f"{escaped(found.head)}, of its own" if found.head else "none"
    stored = f"; {escaped(found.head)} is stored too, and is the head if it has other values" if found.head else ""
    return f"tied: {escaped(found.embedding)}{stored}"


def _format_files(found: Inspection) -> Iterator[str]:
    for label, roles in (
        ("besides", ("config", "side file", "other")),
        ("not merged", ("other weights",)),
    ):
        names = [f"{escaped(file.name)} ({format_nbytes(file.nbytes)})" for file in found.files if file.role in roles]
        if names:
            names = [name.replace(" ", _HARD_SPACE) for name in names]
            yield from _wrap(label, listing(names, _MAX_FILES))


def _files(files: Sequence[FoundFile]) -> str:
    nbytes = format_nbytes(sum(file.nbytes for file in files))
    return f"{counted(len(files), 'file')}, {nbytes}" if files else "none"


def _format_totals(total: Totals) -> str:
    tensors = counted(total.num_tensors, "tensor")
    return f"{tensors}, {_format_count(total.num_parameters)} parameters, {format_nbytes(total.nbytes)}"


def _format_count(number: int) -> str:
    """Return a large number as people say it.

    >>> _format_count(70_553_706_496), _format_count(494_032_768), _format_count(9_472)
    ('70.6 billion', '494 million', '9,472')
    """
    for word, factor in (("billion", 10**9), ("million", 10**6)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g} {word}" if number < 999.5 * factor else f"{number / factor:,.0f} {word}"
    return f"{number:,}"


def _runs(runs: Sequence[tuple[int, int]]) -> str:
    """Return layer numbers as half-open runs, as in a config's `layer_range`.

    >>> _runs([(0, 3), (5, 6)])
    '[0, 3) [5, 6)'
    """
    return " ".join(f"[{start}, {stop})" for start, stop in runs)


def _shape(tensor: StoredTensor) -> str:
    return str(list(tensor.shape))


def _line(label: str, text: str, *, indent: int = 2) -> str:
    return f"{'':{indent}}{label:{_LABEL_WIDTH - indent}} {text}"


def _wrap(label: str, text: str, *, indent: int = 2) -> Iterator[str]:
    begin = _line(label, "", indent=indent)
    for line in textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_long_words=False,
        break_on_hyphens=False,
    ):
        yield line.replace(_HARD_SPACE, " ")
