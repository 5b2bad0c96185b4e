from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.header import MAX_HEADER_NBYTES, TensorEntry, make_header, parse_header, read_header
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.local.storage import LocalStorage

ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWO = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}'


def make_file(text: str | bytes, num_data: int = 4) -> bytes:
    header = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_data)


def make_two(first: list[int], second: list[int]) -> bytes:
    """Return a file with two tensors of bytes at these offsets."""
    offsets = {"a": first, "b": second}
    entries = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in offsets.items()
    }
    return make_file(json.dumps(entries))


def parse(data: bytes) -> tuple[TensorEntry, ...]:
    return parse_header(data, StoredFile("dir/x.safetensors", len(data), ""))


def load_with_library(data: bytes) -> dict[str, dict[str, Any]]:
    return dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]


def library_accepts(data: bytes) -> bool:
    try:
        load_with_library(data)
    except safetensors.SafetensorError:
        return False
    return True


WELL_FORMED = {
    "one tensor": make_file("{" + ONE + "}"),
    "two tensors": make_file("{" + TWO + "}", 8),
    "spaces around": make_file("  {" + ONE + "}\n  "),
    "no tensors": make_file("{}", 0),
    "no tensors, with metadata": make_file('{"__metadata__":{"format":"pt"}}', 0),
    "empty metadata": make_file('{"__metadata__":{},' + ONE + "}"),
    "null metadata": make_file('{"__metadata__":null,' + ONE + "}"),
    "minus zero elsewhere": make_file('{"-0":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":-0}}'),
    "extra key": make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[1.5,null,{"y":true}]}}'),
    "scalar": make_file('{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'),
    "empty tensors": make_file(
        '{"c":{"dtype":"F64","shape":[2,0],"data_offsets":[4,4]},"e":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},'
        + ONE
        + "}"
    ),
    "half a byte each": make_file('{"a":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}}'),
    "odd names": make_file(
        '{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0000 \\ud83d\\ude00":'
        '{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}'
    ),
}

MALFORMED = {
    "empty file": (b"", "0 bytes are too few"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "7 bytes are too few"),
    "length 0": (make_file(""), "header says that it is 0 bytes long"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "9,223,372,036,854,775,808 bytes long; the file has 10 bytes"),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "length past the end": (struct.pack("<Q", 3) + b"{}", "3 bytes long; the file has 10 bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "invalid utf-8": (make_file(b'{"\xff":1}'), "offset 10: the header is not UTF-8"),
    "invalid json": (make_file("{" + ONE), "offset 61: the header is not JSON"),
    "nul padding": (make_file("{" + ONE + "}\0"), "offset 62"),
    "byte order mark": (make_file("\ufeff{" + ONE + "}"), "offset 8"),
    "array": (make_file("[]"), "a JSON list, not an object"),
    "null": (make_file("null"), "not an object"),
    "NaN": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}'), "NaN is not JSON"),
    "-Infinity": (make_file('{"a":-Infinity}'), "-Infinity is not JSON"),
    "1e999": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}'), "1e999 is too large"),
    "400 digits": (
        make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + "9" * 400 + "}}"),
        "too large",
    ),
    "5,000 digits": (make_file('{"a":' + "9" * 5000 + "}"), "too large"),
    "300 digits": (
        make_file('{"a":{"dtype":"F32","shape":[0],"data_offsets":[%s,%s]}}' % (("9" * 300,) * 2)),
        "past the end; the file has",
    ),
    "deep nesting": (make_file('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "nesting": (
        make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + "[" * 200 + "]" * 200 + "}}"),
        "nested too deeply",
    ),
    "lone surrogate": (make_file('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "surrogates"),
    "metadata of numbers": (make_file('{"__metadata__":{"a":1},' + ONE + "}"), "__metadata__"),
    "metadata list": (make_file('{"__metadata__":[],' + ONE + "}"), "__metadata__"),
    "metadata twice": (make_file('{"__metadata__":{},"__metadata__":{},' + ONE + "}"), "'__metadata__' is there twice"),
    "dtype twice": (
        make_file('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "'dtype' is there twice",
    ),
    "entry null": (make_file('{"a":null}'), "tensor 'a': the header must give"),
    "entry string": (make_file('{"a":"dtype"}'), "tensor 'a': the header must give"),
    "no dtype": (make_file('{"a":{"shape":[1],"data_offsets":[0,4]}}'), "must give dtype, shape"),
    "no shape": (make_file('{"a":{"dtype":"F32","data_offsets":[0,4]}}'), "must give dtype, shape"),
    "no offsets": (make_file('{"a":{"dtype":"F32","shape":[1]}}'), "must give dtype, shape"),
    "unknown dtype": (make_file('{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}', 16), "'F128' is unknown"),
    "dtype in lower case": (make_file('{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}'), "'f32' is unknown"),
    "dtype list": (make_file('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}'), "is unknown"),
    "shape number": (make_file('{"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}'), "non-negative integers"),
    "shape of floats": (make_file('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}'), "non-negative integers"),
    "shape of bools": (make_file('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}'), "non-negative integers"),
    "negative shape": (make_file('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'), "non-negative integers"),
    "minus zero": (make_file('{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}', 0), "non-negative integers"),
    "negative offset": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'), "non-negative integers"),
    "offset object": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":{"0":4}}}'), "non-negative integers"),
    "one offset": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}}'), "[4] are not [start, stop]"),
    "three offsets": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}'), "not [start, stop]"),
    "stop before start": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'), "not [start, stop]"),
    "wrong byte count": (
        make_file('{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,4]}}'),
        "BF16 [3] takes 6 bytes, data_offsets [0, 4] hold 4",
    ),
    "overflowing shape": (
        make_file('{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}'),
        "is too large",
    ),
    "part of a byte": (make_file('{"a":{"dtype":"F4","shape":[7],"data_offsets":[0,4]}}'), "takes 3.5 bytes"),
    "offsets past the end": (make_file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'), "past the end"),
    "hole at the start": (
        make_file('{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}'),
        "tensor 'a' leaves a gap after the header",
    ),
    "hole": (
        make_two([0, 1], [2, 4]),
        "tensor 'b' leaves a gap after tensor 'a'",
    ),
    "overlap": (
        make_two([0, 3], [2, 4]),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "same place": (
        make_two([0, 4], [0, 4]),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "cut short": (make_file("{" + TWO + "}", 7), "past the end; the file has"),
    "bytes at the end": (make_file("{" + ONE + "}", 5), "the header says 66 bytes, the file has 67"),
    "no tensors but bytes": (make_file("{}", 1), "has bytes after the last tensor"),
}

STRICTER = {
    "tensor twice": (make_file("{" + ONE + "," + ONE + "}"), "'a' is there twice"),
    "metadata key twice": (make_file('{"__metadata__":{"k":"1","k":"2"},' + ONE + "}"), "'k' is there twice"),
    "entry as array": (make_file('{"a":["F32",[1],[0,4]]}'), "must give dtype, shape"),
    "65 dimensions": (
        make_file('{"a":{"dtype":"F32","shape":[' + "1," * 64 + '1],"data_offsets":[0,4]}}'),
        "is too large",
    ),
    "empty, but too large": (
        make_file('{"a":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}}', 0),
        "is too large",
    ),
}


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_well_formed(data: bytes) -> None:
    parse(data)
    assert library_accepts(data)


@pytest.mark.parametrize(("data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    text = str(caught.value)
    assert text.startswith("dir/x.safetensors: ")
    assert message in text
    assert "; " in text
    assert len(text) < 800
    assert not library_accepts(data)


@pytest.mark.parametrize(("data", "message"), STRICTER.values(), ids=STRICTER)
def test_stricter_than_the_library(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(data)
    assert message in str(caught.value)
    assert library_accepts(data)


def test_offsets_are_those_of_the_file_and_in_their_order() -> None:
    data = make_file(
        '{"z":{"dtype":"BF16","shape":[2,2],"data_offsets":[4,12]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        12,
    )
    start = len(data) - 12
    assert parse(data) == (
        TensorEntry("a", "U8", (4,), start, start + 4),
        TensorEntry("z", "BF16", (2, 2), start + 4, start + 12),
    )


def test_header_over_the_limit() -> None:
    nbytes = MAX_HEADER_NBYTES + 1
    with pytest.raises(CheckpointError, match="100,000,001 bytes long; 100,000,000 are allowed"):
        parse_header(struct.pack("<Q", nbytes), StoredFile("x", 2 * nbytes, ""))


def test_less_than_the_header_given() -> None:
    data = make_file("{" + ONE + "}")
    with pytest.raises(ValueError, match="20 bytes given, the header has 62"):
        parse_header(data[:20], StoredFile("x", len(data), ""))


@pytest.mark.parametrize("num_tensors", [1, 300, 3000])
def test_read_header_reads_as_much_as_it_needs(tmp_path: Path, num_tensors: int) -> None:
    tensors = {f"model.layers.{i}.weight": torch.full((3,), i) for i in range(num_tensors)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    storage = LocalStorage()
    entries = read_header(storage, storage.stat(str(path)))
    storage.close()
    assert entries == parse(path.read_bytes())
    assert {entry.name for entry in entries} == set(tensors)


def test_read_header_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    storage = LocalStorage()
    with pytest.raises(CheckpointError, match="0 bytes are too few"):
        read_header(storage, storage.stat(str(tmp_path / "x.safetensors")))
    storage.close()


def test_we_read_what_the_library_writes() -> None:
    tensors = {
        "f32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "bf16": torch.arange(5, dtype=torch.bfloat16),
        "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "bool": torch.tensor(True),
        "i64": torch.arange(3),
        "empty": torch.zeros(4, 0),
    }
    data = safetensors.torch.save(tensors, {"format": "pt"})
    entries = parse(data)
    assert [entry.start for entry in entries[1:]] == [entry.stop for entry in entries[:-1]]
    assert entries[-1].stop == len(data)
    for entry in entries:
        tensor = tensors[entry.name]
        assert entry.shape == tuple(tensor.shape)
        assert f"torch.{DTYPES[entry.dtype].torch_name}" == str(tensor.dtype)
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        assert data[entry.start : entry.stop] == bytes(flat.tolist())


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(
        NAMES, st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8", "C64"]), st.lists(st.integers(0, 5), max_size=3))
    )
)
def test_the_library_reads_what_we_write(tensors: dict[str, tuple[str, list[int]]]) -> None:
    written = [
        (name, dtype, tuple(sizes), prod(sizes) * DTYPES[dtype].num_bits // 8)
        for name, (dtype, sizes) in tensors.items()
    ]
    header = make_header(written)
    assert len(header) % 8 == 0
    body = b"".join(bytes([position % 251]) * nbytes for position, (*_, nbytes) in enumerate(written))
    found = load_with_library(header + body)
    assert list(tensors) == [name for name, *_ in written]
    for position, (name, dtype, shape, nbytes) in enumerate(written):
        assert found[name]["dtype"] == dtype
        assert tuple(found[name]["shape"]) == shape
        assert bytes(found[name]["data"]) == bytes([position % 251]) * nbytes
    entries = parse(header + body)
    assert sorted((e.name, e.dtype, e.shape, e.stop - e.start) for e in entries) == sorted(written)
    assert [e.name for e in entries if e.stop > e.start] == [name for name, *_, nbytes in written if nbytes]


def test_make_header_says_pytorch_and_is_the_same_each_time(tmp_path: Path) -> None:
    header = make_header([("ä", "BF16", (1, 2), 4), ("a", "F32", (), 4)])
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(8))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("ä").dtype == torch.bfloat16
    assert header == make_header([("ä", "BF16", (1, 2), 4), ("a", "F32", (), 4)])
    assert "ä".encode() in header


SEED = make_file('{"__metadata__":{"format":"pt"},' + TWO + "}   ", 8)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "U8", "F4"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "b"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


def check_only_checkpoint_errors_escape(data: bytes) -> None:
    try:
        parse(data)
    except CheckpointError as error:
        str(error).encode()
    else:
        assert library_accepts(data)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(SEED)),
    st.integers(0, 4),
)
def test_mutated_bytes(changes: list[tuple[int, int]], stop: int, more: int) -> None:
    data = bytearray(SEED)
    for position, byte in changes:
        data[position] = byte
    check_only_checkpoint_errors_escape(bytes(data))
    check_only_checkpoint_errors_escape(bytes(data) + bytes(more))
    check_only_checkpoint_errors_escape(bytes(data[:stop]))


@settings(max_examples=300, deadline=None)
@given(JSON_VALUES, st.sampled_from([0, 4, 8]))
def test_any_json(value: Any, num_data: int) -> None:
    check_only_checkpoint_errors_escape(make_file(json.dumps(value), num_data))
    check_only_checkpoint_errors_escape(make_file(json.dumps({"a": value}), num_data))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    JSON_VALUES | st.lists(st.integers(-1, 9), max_size=3) | st.integers(0, 2**70).map(lambda size: [size, size]),
)
def test_any_field(field: str, value: Any) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], field: value}
    check_only_checkpoint_errors_escape(make_file(json.dumps({"a": entry})))
