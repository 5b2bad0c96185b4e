"""Safetensors headers: a strict parser for files from anywhere, and the header of the files we write.

A file is 8 bytes (the length of the JSON, little-endian), the JSON, and the tensors' bytes back to back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isinf, prod
from typing import Any, NoReturn

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.decoding import is_deep
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.seam import Storage

MAX_HEADER_NBYTES = 100_000_000
"""Longest JSON that is read; the safetensors library has the same limit."""

_LENGTH_NBYTES = 8
FIRST_READ_NBYTES = 8 * 1024
"""More than most headers have; a second read is rarer than bytes read in vain."""
_MAX_ELEMENTS = 2**63 - 1
_MAX_RANK = 64
_MAX_DIGITS = 300
_DOWNLOAD = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as its header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file, not in the data section, of the first byte."""
    stop: int
    """Offset after the last byte: the tensor is [start, stop) of the file."""


def read_header(
    storage: Storage, file: StoredFile, check: Callable[[StoredFile, int], None] = lambda file, num_tensors: None
) -> tuple[TensorEntry, ...]:
    """Return the tensors of a file in the order in which they lie there.

    Args:
        storage: that has it.
        file: to read.
        check: called with the number of tensors that the header seems to have, before memory is taken for them.

    Raises:
        CheckpointError: the file is not a well-formed safetensors file of the size that its header says.
        FetchError: it could not be read, or has changed.
    """
    data = _read_start(storage, file)
    check(file, data.count(b'"data_offsets"'))
    return parse_header(data, file)


def read_metadata(storage: Storage, file: StoredFile) -> dict[str, str]:
    """Return what a header holds besides tensors.

    Raises:
        CheckpointError: the header is malformed.
        FetchError: it could not be read, or has changed.
    """
    data = _read_start(storage, file)
    data_start = _LENGTH_NBYTES + _json_nbytes(data, file)
    metadata = _parse_json(bytes(memoryview(data)[_LENGTH_NBYTES:data_start]), file).get("__metadata__")
    _check_metadata(metadata, file)
    return metadata or {}


def _read_start(storage: Storage, file: StoredFile) -> bytearray:
    """Return a file's first bytes, with the whole header among them."""
    data = bytearray(min(file.nbytes, FIRST_READ_NBYTES))
    storage.read_into([ByteRange(file, 0, len(data))], [memoryview(data)])
    missing = _LENGTH_NBYTES + _json_nbytes(data, file) - len(data)
    if missing > 0:
        rest = bytearray(missing)
        storage.read_into([ByteRange(file, len(data), len(data) + missing)], [memoryview(rest)])
        data += rest
    return data


def parse_header(data: bytes | bytearray, file: StoredFile) -> tuple[TensorEntry, ...]:
    """Return the tensors of a file in the order in which they lie there.

    Stricter than the safetensors library: a name or key that occurs twice is refused, as is an entry that is an array,
    and more than 64 dimensions.

    Args:
        data: the file's first bytes, at least the whole header.
        file: where they come from; its size must be what the header says.

    Raises:
        CheckpointError: the header is malformed, or does not fit the file.

    >>> header = make_header([("a", "BF16", (2, 3), 12)])
    >>> parse_header(header, StoredFile("x.safetensors", len(header) + 12, ""))
    (TensorEntry(name='a', dtype='BF16', shape=(2, 3), start=104, stop=116),)
    """
    data_start = _LENGTH_NBYTES + _json_nbytes(data, file)
    if len(data) < data_start:
        raise ValueError(f"{len(data)} bytes given, the header has {data_start}")
    header = _parse_json(bytes(memoryview(data)[_LENGTH_NBYTES:data_start]), file)
    _check_metadata(header.pop("__metadata__", None), file)
    entries = [_parse_entry(name, fields, data_start, file) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_contiguous(entries, data_start, file)
    return tuple(entries)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the first bytes of a file: the length, and the JSON padded with spaces to a multiple of 8.

    Args:
        tensors: name, dtype, shape and size in bytes, in the order in which they are written.

    >>> make_header([("a", "F32", (), 4)])[8:].decode()
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}    '
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_NBYTES, "little") + text


def _json_nbytes(data: bytes | bytearray, file: StoredFile) -> int:
    if len(data) < _LENGTH_NBYTES:
        _refuse(file, f"{file.nbytes} bytes are too few for a safetensors file")
    nbytes = int.from_bytes(data[:_LENGTH_NBYTES], "little")
    if data.startswith(b"version https://git-lfs"):
        _refuse(file, "this is a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")
    if nbytes == 0:
        _refuse(file, "offset 0: the header says that it is 0 bytes long")
    if nbytes > file.nbytes - _LENGTH_NBYTES:
        _refuse(file, f"offset 0: the header says that it is {nbytes:,} bytes long; the file has {file.nbytes:,} bytes")
    if nbytes > MAX_HEADER_NBYTES:
        _refuse(file, f"offset 0: the header says that it is {nbytes:,} bytes long; {MAX_HEADER_NBYTES:,} are allowed")
    return nbytes


def _parse_json(data: bytes, file: StoredFile) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        _refuse(file, f"offset {_LENGTH_NBYTES + error.start}: the header is not UTF-8")
    try:
        header = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
        if "\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()
    except RecursionError:
        _refuse(file, "the header is nested too deeply")
    except json.JSONDecodeError as error:
        offset = _LENGTH_NBYTES + len(text[: error.pos].encode())
        _refuse(file, f"offset {offset}: the header is not JSON: {error.msg}")
    except ValueError as error:
        _refuse(file, f"the header is not as it should be: {error}")
    if not isinstance(header, dict):
        _refuse(file, f"the header is a JSON {type(header).__name__}, not an object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{_quote(name)} is there twice")
            seen.add(name)
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text:.50} is too large")
    return value


def _parse_int(text: str) -> int | float:
    """Return a whole number, but for what the safetensors library takes for another: `-0`, and what no float can be."""
    if len(text) > _MAX_DIGITS:
        _parse_float(text)
    return -0.0 if text == "-0" else int(text)


def _check_metadata(metadata: Any, file: StoredFile) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "__metadata__ in the header is not a mapping of strings to strings")


def _parse_entry(name: str, fields: Any, data_start: int, file: StoredFile) -> TensorEntry:
    """Check one tensor by itself: its fields, and that its shape and its byte range say the same."""
    try:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, IndexError):
        _refuse(file, f"tensor {_quote(name)}: the header must give dtype, shape and data_offsets")
    if len(fields) > 3 and is_deep(fields):
        _refuse(file, f"tensor {_quote(name)}: the header is nested too deeply")
    known = DTYPES.get(dtype) if type(dtype) is str else None
    if known is None:
        _refuse(
            file,
            f"tensor {_quote(name)}: dtype {_quote(dtype)} is unknown; known are {', '.join(DTYPES)}",
            "write the file with one of these",
        )
    if not _is_sizes(shape) or not _is_sizes(offsets):
        _refuse(file, f"tensor {_quote(name)}: shape and data_offsets must be lists of non-negative integers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"tensor {_quote(name)}: data_offsets {_quote(offsets)} are not [start, stop]")
    start, stop = offsets
    if stop > file.nbytes - data_start:
        where = f"data_offsets {_quote(offsets)} after byte {data_start:,} are past the end"
        _refuse(file, f"tensor {_quote(name)}: {where}; the file has {file.nbytes:,} bytes")
    if len(shape) > _MAX_RANK or prod(size for size in shape if size) > _MAX_ELEMENTS:
        _refuse(file, f"tensor {_quote(name)}: shape {_quote(shape)} is too large")
    num_bits = prod(shape) * known.num_bits
    if num_bits != (stop - start) * 8:
        _refuse(
            file,
            f"tensor {_quote(name)}: {dtype} {_quote(shape)} takes {num_bits / 8:,.16g} bytes,"
            f" data_offsets {_quote(offsets)} hold {stop - start:,}",
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _is_sizes(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and value >= 0 for value in values)


def _check_contiguous(entries: list[TensorEntry], data_start: int, file: StoredFile) -> None:
    expected, before = data_start, "the header"
    for entry in entries:
        if entry.start != expected:
            what = "overlaps" if entry.start < expected else "leaves a gap after"
            where = f"it starts at offset {entry.start:,}, not {expected:,}"
            _refuse(file, f"tensor {_quote(entry.name)} {what} {before}: {where}")
        expected, before = entry.stop, f"tensor {_quote(entry.name)}"
    if expected != file.nbytes:
        what = "is cut short" if file.nbytes < expected else "has bytes after the last tensor"
        _refuse(file, f"the file {what}: the header says {expected:,} bytes, the file has {file.nbytes:,}")


def _quote(value: object) -> str:
    """Show what a file says, on one line and not at any length."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse(file: StoredFile, what: str, next_step: str = _DOWNLOAD) -> NoReturn:
    raise CheckpointError(f"{file.url}: {what}; {next_step}")
