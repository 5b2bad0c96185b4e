"""Rows that are put together for compiled loops, against what their decoder makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raymerge.ops.decoders.decoder import Raw
from raymerge.ops.decoders.rows import MEAN, PAD, ZERO, make_row_map
from raymerge.ops.registry import find_op
from raymerge.ops.stored import Stored
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.engine import fetch
from raymerge.pipeline.engine.fetch import Filled, fetch_windows
from raymerge.pipeline.engine.gathered import Gatherer
from raymerge.pipeline.engine.readiness import takes_loops
from raymerge.pipeline.plan.memory.projection import SEGMENT_ELEMENTS
from raymerge.pipeline.plan.memory.windows import Window
from raymerge.pipeline.plan.types import TensorMerge, Variant
from raymerge.pipeline.stores.open import open_stores

ROWS = 3000
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def store(path: Path, name: str, columns: int, dtype: str, seed: int) -> StoredTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, columns, generator=generator).to(getattr(torch, dtype))
    path.write_bytes(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    with open_stores() as stores:
        file = stores.at(str(path)).stat(str(path))
    return StoredTensor("m", name, DTYPES[dtype], (ROWS, columns), file, 0, file.nbytes)


def make_maps(kind: str) -> tuple[np.ndarray, np.ndarray, list[list[tuple[int, int]]]]:
    generator = np.random.default_rng(0)
    parts, rows = np.zeros(ROWS, np.int64), np.arange(ROWS)
    means: list[list[tuple[int, int]]] = []
    if kind == "appended":
        parts[2500:], rows[2500:] = 1, np.arange(100, 600)
    if kind in ("scattered", "everything"):
        rows = generator.permutation(ROWS)
        parts[generator.integers(0, ROWS, 300)] = 1
    if kind == "zeros":
        parts[100:130], rows[100:130] = ZERO, 0
    if kind in ("means", "everything"):
        for row in generator.integers(0, ROWS - 20, 15).tolist():
            parts[row], rows[row] = MEAN, len(means)
            means.append([(0, int(generator.integers(ROWS))), (1, int(generator.integers(ROWS)))])
    if kind == "everything":
        parts[50:60], rows[50:60] = ZERO, 0
        parts[-20:], rows[-20:] = PAD, 0
    return parts, rows, means


def read(stored: Stored, source: int) -> torch.Tensor:
    values = torch.frombuffer(bytearray(stored.view(source)), dtype=torch.uint8)
    return values.view(getattr(torch, stored.dtypes[source])).float()


@pytest.mark.parametrize("kind", ["same", "appended", "scattered", "zeros", "means", "everything"])
@pytest.mark.parametrize(("columns", "dtypes"), [(96, ("bfloat16", "bfloat16")), (101, ("bfloat16", "float32"))])
def test_values_are_those_of_the_decoder(kind: str, columns: int, dtypes: tuple[str, str], tmp_path: Path) -> None:
    stored = [store(tmp_path / str(k), "embed", columns, dtype, k) for k, dtype in enumerate(dtypes)]
    padding = np.arange(columns, dtype=np.float32).tobytes() if kind == "everything" else b""
    rows = make_row_map(*make_maps(kind))
    gathered = GatheredRows("m", "embed", DTYPES[dtypes[0]], (ROWS, columns), tuple(stored), rows, padding)
    kernel = find_op("linear").kernel({"weight": (1.0, 1.0), "normalize": False})
    merge = TensorMerge(
        "embed", (ROWS, columns), "F32", "F32", "linear", (gathered, stored[0]), (Variant((), kernel, 0),)
    )
    assert takes_loops(merge)
    whole = Window(merge, 0, merge.num_elements, range(1))
    part = Window(merge, 2**17, min(2**18, merge.num_elements), range(1))
    num_pieces = 0
    for window in (whole, part):
        with open_stores() as stores, stores.pool.lend(window.nbytes(), 1, keep=False) as buffers:
            filled: Filled
            for filled in fetch_windows(stores, [(window,)], buffers, lambda nbytes: None):
                raw = [torch.frombuffer(view, dtype=torch.uint8) for view in filled.views[0]]
                count = window.stop - window.start
                expected = gathered.decoder.decode(
                    Raw(raw, window.start, window.stop), window.start, window.stop, torch.empty(count)
                )
                other = stored[0].decoder.decode(
                    Raw([torch.frombuffer(filled.views[1][0], dtype=torch.uint8)], window.start, window.stop),
                    window.start, window.stop, torch.empty(count),
                )  # fmt: skip
                reached = window.start
                for piece in Gatherer().cut(filled):
                    assert piece.start == reached
                    at = slice(piece.start - window.start, piece.stop - window.start)
                    assert torch.equal(read(piece, 0), expected[at])
                    assert torch.equal(read(piece, 1), other[at])
                    reached = piece.stop
                    num_pieces += 1
                assert reached == window.stop
    is_one = kind == "same" or (kind == "appended" and dtypes[0] == dtypes[1] and columns == 96)
    assert num_pieces == (2 if is_one else 1 + -(-merge.num_elements // SEGMENT_ELEMENTS))


@pytest.mark.parametrize("kind", ["scattered", "zeros", "appended"])
@pytest.mark.parametrize("columns", [96, 101])
def test_rows_read_by_themselves_are_the_same(kind: str, columns: int, tmp_path: Path) -> None:
    stored = tuple(store(tmp_path / str(k), "embed", columns, "bfloat16", k) for k in range(2))
    usual = GatheredRows("m", "embed", "BF16", (ROWS, columns), stored, make_row_map(*make_maps(kind)))
    by_row = replace(usual, is_by_row=True)
    assert by_row.can_be_by_row
    kernel = find_op("linear").kernel({"weight": (1.0, 1.0), "normalize": False})
    variants = (Variant((), kernel, 0),)
    merge = TensorMerge("embed", (ROWS, columns), "F32", "F32", "linear", (by_row, usual), variants)
    windows = [Window(merge, start, min(start + 2**17, merge.num_elements), range(1)) for start in (0, 2**17)]
    num_read = num_wanted = 0

    def count(nbytes: int) -> None:
        nonlocal num_read
        num_read += nbytes

    with open_stores() as stores, stores.pool.lend(sum(w.nbytes() for w in windows), 1, keep=False) as buffers:
        filled: Filled
        for filled in fetch_windows(stores, [tuple(windows)], buffers, count):
            start, stop = filled.window.start, filled.window.stop
            one, other = (
                source.decoder.decode(
                    Raw([torch.frombuffer(view, dtype=torch.uint8) for view in views], start, stop),
                    start, stop, torch.empty(stop - start),
                )
                for source, views in zip((by_row, usual), filled.views, strict=True)
            )  # fmt: skip
            assert torch.equal(one, other)
            for piece in Gatherer().cut(filled):
                at = slice(piece.start - start, piece.stop - start)
                assert torch.equal(read(piece, 0), other[at])
                assert torch.equal(read(piece, 1), other[at])
            num_wanted += sum(len(view) for views in filled.views for view in views)
    assert num_read == num_wanted


@pytest.mark.parametrize(("kind", "dtypes"), [("means", ("bfloat16",) * 2), ("same", ("bfloat16", "float32"))])
def test_what_is_no_stored_row_is_not_read_as_one(kind: str, dtypes: tuple[str, str], tmp_path: Path) -> None:
    stored = tuple(store(tmp_path / str(k), "embed", 8, dtype, k) for k, dtype in enumerate(dtypes))
    assert not GatheredRows("m", "embed", "BF16", (ROWS, 8), stored, make_row_map(*make_maps(kind))).can_be_by_row


def test_rows_read_by_themselves_count_among_what_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path / "0", "embed", 128, "bfloat16", 0)
    rows = make_row_map(*make_maps("scattered")[:2], [])
    gathered = GatheredRows("m", "embed", "BF16", (ROWS, 128), (stored, stored), rows, is_by_row=True)
    kernel = find_op("linear").kernel({"weight": (1.0,), "normalize": False})
    variants = (Variant((), kernel, 0),)
    merge = TensorMerge("embed", (ROWS, 128), "F32", "F32", "linear", (gathered,), variants)
    block = 100 * 128
    windows = [Window(merge, start, start + block, range(1)) for start in range(0, merge.num_elements, block)]
    monkeypatch.setattr(fetch, "_AHEAD_NBYTES", 2 * windows[0].nbytes())
    begun = []

    def list_fetches() -> Iterator[tuple[Window]]:
        for window in windows:
            begun.append(window.start)
            yield (window,)

    with open_stores() as stores, stores.pool.lend(windows[0].nbytes(), 1, keep=False) as buffers:
        filled = fetch_windows(stores, list_fetches(), buffers, lambda nbytes: None)
        next(iter(filled))
        assert len(begun) < 5
        assert sum(1 for _ in filled) == len(windows) - 1 == len(begun) - 1


def test_bytes_of_rows_read_by_themselves_are_stated_for_each_place(tmp_path: Path) -> None:
    stored = store(tmp_path / "0", "embed", 8, "bfloat16", 0)
    rows = make_row_map(np.zeros(ROWS, np.int64), np.repeat(np.arange(ROWS // 3), 3), [])
    gathered = GatheredRows("m", "embed", "BF16", (ROWS, 8), (stored,), rows, is_by_row=True)
    assert gathered.nbytes == sum(each.nbytes for each in gathered.find_rows(0, ROWS * 8)) == stored.nbytes


def test_widths_are_read_once_each(tmp_path: Path) -> None:
    """A row that several rows of the output show is read once."""
    stored = store(tmp_path / "0", "embed", 8, "bfloat16", 0)
    rows = make_row_map(np.zeros(ROWS, np.int64), np.repeat(np.arange(ROWS // 3), 3), [])
    gathered = GatheredRows("m", "embed", "BF16", (ROWS, 8), (stored,), rows)
    assert gathered.nbytes == stored.nbytes // 3
    assert [(piece.start, piece.stop) for piece in gathered.ranges(0, ROWS * 8)] == [(0, gathered.nbytes)]
    assert gathered.max_nbytes(ROWS * 8) >= gathered.nbytes
