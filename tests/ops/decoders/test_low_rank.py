"""Low-rank updates: right, and the same bits by loops and by torch, however they are cut."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from raymerge.ops.decoders.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.decoders.low_rank import CHUNK, Factor, LowRankUpdate, Term

SHAPE = (37, 600)
"""Rows that are no multiple of four, and more columns than loops work on at once."""


@dataclass
class Case:
    """A decoder, the bytes of all of its pieces, and what is right."""

    decoder: Decoder
    pieces: list[torch.Tensor]
    shape: tuple[int, ...]
    expected: torch.Tensor


def draw(*shape: int, seed: int, dtype: str = "float32") -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(find_dtype(dtype))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def make_case(ranks: tuple[int, ...] = (3,), dtype: str = "float32", below: str = "bfloat16") -> Case:
    rows, columns = SHAPE
    base = draw(rows, columns, seed=0, dtype=below)
    pieces, terms, expected = [as_bytes(base)], [], base.double()
    for number, rank in enumerate(ranks):
        b = draw(rows, rank, seed=2 * number + 1, dtype=dtype)
        a = draw(rank, columns, seed=2 * number + 2, dtype=dtype)
        pieces += [as_bytes(b), as_bytes(a)]
        scale = 0.7 / (number + 1)
        terms.append(Term(rank, scale, Factor(dtype, (0, rank, 1)), Factor(dtype, (0, columns, 1))))
        expected = expected + scale * b.double() @ a.double()
    decoder = LowRankUpdate(Plain(below), rows, columns, tuple(terms))
    return Case(decoder, pieces, SHAPE, expected)


def make_turned(rank: int = 3) -> Case:
    """Return an update of a tensor of inputs x outputs, whose left factor is read rank by rank."""
    rows, columns = SHAPE
    base, a, b = draw(rows, columns, seed=0), draw(rank, rows, seed=1), draw(columns, rank, seed=2)
    term = Term(rank, 2.0, Factor("float32", (0, 1, rows), is_whole=False), Factor("float32", (0, 1, rank)))
    decoder = LowRankUpdate(Plain("float32"), rows, columns, (term,))
    pieces = [as_bytes(base), *map(as_bytes, a), as_bytes(b)]
    return Case(decoder, pieces, SHAPE, base.double() + 2 * (b.double() @ a.double()).T)


def make_stack(number: int = 3, rank: int = 2) -> Case:
    """Return updates of a stack of matrices, with the ranks of all of them in turn in one factor, as peft has them."""
    rows, columns = SHAPE
    base = draw(number, rows, columns, seed=0)
    a, b = draw(number * rank, columns, seed=1), draw(rows, rank * number, seed=2)
    left, right = Factor("float32", (1, rank * number, number)), Factor("float32", (rank * columns, columns, 1))
    decoder = LowRankUpdate(Plain("float32"), rows, columns, (Term(rank, 1.0, left, right),))
    of_a, of_b = a.double().view(number, rank, columns), b.double().view(rows, rank, number)
    expected = base.double() + torch.einsum("ore,erc->eoc", of_b, of_a)
    return Case(decoder, [as_bytes(base), as_bytes(b), as_bytes(a)], (number, *SHAPE), expected)


def make_mixed() -> Case:
    """Return an update whose factors have other dtypes, of more ranks than loops hold whole panels of."""
    case = make_case((3, 2100))
    assert isinstance(case.decoder, LowRankUpdate)
    (b, a), terms = case.pieces[1:3], list(case.decoder.terms)
    left, right = (x.view(torch.float32).view(n, 3) for x, n in ((b, SHAPE[0]), (a.view(-1), SHAPE[1])))
    case.expected -= terms[0].scale * left.double() @ a.view(torch.float32).view(3, -1).double()
    left, right = left.half(), right.bfloat16()  # columns x ranks from now on
    case.expected += terms[0].scale * left.double() @ right.double().T
    terms[0] = Term(3, terms[0].scale, Factor("float16", (0, 3, 1)), Factor("bfloat16", (0, 1, 3)))
    pieces = [case.pieces[0], as_bytes(left), as_bytes(right), *case.pieces[3:]]
    return Case(LowRankUpdate(case.decoder.below, *SHAPE, tuple(terms)), pieces, SHAPE, case.expected)


CASES = {
    "one": make_case(),
    "half precision": make_case((8,), "float16", "float32"),
    "bfloat16": make_case((5,), "bfloat16", "float16"),
    "double precision": make_case((5,), "float64"),
    "more than a chunk": make_case((130,)),
    "several": make_case((1, 64, 4)),
    "turned": make_turned(),
    "stack": make_stack(),
    "mixed": make_mixed(),
}


def decode(case: Case, start: int, stop: int) -> torch.Tensor:
    out = torch.empty(stop - start)
    return case.decoder.decode(Raw(case.pieces, 0, case.expected.numel()), start, stop, out)


def decode_stored(case: Case, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    out = np.empty(stop - start, np.float32)
    pieces = [piece.numpy().data for piece in case.pieces]
    case.decoder.decode_stored(pieces, (0, case.expected.numel()), start, stop, out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_values_are_right(name: str) -> None:
    case = CASES[name]
    values = decode(case, 0, case.expected.numel()).view(case.shape)
    assert (values.double() - case.expected).abs().max() < 3e-7 * case.expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_loops_and_torch_give_the_same_bits_wherever_they_are_cut(name: str) -> None:
    case = CASES[name]
    num_elements = case.expected.numel()
    whole = decode(case, 0, num_elements).numpy()
    assert decode_stored(case, 0, num_elements).tobytes() == whole.tobytes()
    for start, stop in ((0, 1), (599, 602), (1234, 1234 + 5 * 600), (num_elements - 700, num_elements)):
        assert decode(case, start, stop).numpy().tobytes() == whole[start:stop].tobytes()
        assert decode_stored(case, start, stop).tobytes() == whole[start:stop].tobytes()


def test_factors_may_begin_anywhere() -> None:
    case = CASES["several"]
    expected = decode_stored(case, 0, case.expected.numel())
    moved = [torch.cat([torch.zeros(3, dtype=torch.uint8), piece])[3:] for piece in case.pieces[1:]]
    other = Case(case.decoder, [case.pieces[0], *moved], case.shape, case.expected)
    assert decode_stored(other, 0, case.expected.numel()).tobytes() == expected.tobytes()


@pytest.mark.parametrize("ranks", [(130,), (1, 64, 4), (2, 3)])
def test_sums_are_taken_in_the_order_that_is_written_down(ranks: tuple[int, ...]) -> None:
    """Groups of four ranks, chunks of groups, and chunks: counted through all terms, each sum rounded."""
    case = make_case(ranks)
    base, *factors = case.pieces
    columns, rows = [], []
    assert isinstance(case.decoder, LowRankUpdate)
    for term, b, a in zip(case.decoder.terms, factors[::2], factors[1::2], strict=True):
        scaled = (b.view(torch.float32).view(-1, term.rank).double() * term.scale).float()
        columns += [column.numpy()[:, None] for column in scaled.T]
        rows += list(a.view(torch.float32).view(term.rank, -1).numpy())
    products = [column * row for column, row in zip(columns, rows, strict=True)]
    nothing = np.zeros_like(products[0])
    products += [nothing] * (-len(products) % 4)
    groups = [(w + x) + (y + z) for w, x, y, z in zip(*(products[k::4] for k in range(4)), strict=True)]
    chunks = [sum(groups[k : k + CHUNK // 4], nothing) for k in range(0, len(groups), CHUNK // 4)]
    expected = base.view(torch.bfloat16).float().numpy() + sum(chunks, nothing).ravel()
    assert decode(case, 0, len(expected)).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_does_not_spread_between_rows(value: float) -> None:
    case = make_case()
    b = case.pieces[1].view(torch.float32).clone()
    b[3] = value  # in row 1
    case.pieces[1] = as_bytes(b)
    values = decode(case, 0, 37 * 600).view(SHAPE)
    assert not values[1].isfinite().any()
    assert values[[0, *range(2, 37)]].isfinite().all()
    stored = torch.from_numpy(decode_stored(case, 0, 37 * 600)).view(SHAPE)
    assert torch.equal(stored.isfinite(), values.isfinite())


def test_an_update_of_an_update() -> None:
    first = make_case((4,))
    assert isinstance(first.decoder, LowRankUpdate)
    both = Case(
        LowRankUpdate(first.decoder, *SHAPE, first.decoder.terms),
        [*first.pieces, *first.pieces[1:]],
        SHAPE,
        2 * first.expected - first.pieces[0].view(torch.bfloat16).view(SHAPE).double(),
    )
    values = decode(both, 0, 37 * 600)
    assert (values.view(SHAPE).double() - both.expected).abs().max() < 3e-7 * both.expected.abs().max()
    assert decode_stored(both, 700, 1400).tobytes() == values.numpy()[700:1400].tobytes()


def test_the_loops_try_themselves() -> None:
    CASES["one"].decoder.compile_loops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_are_not_asked_for_take_no_memory(dtype: str) -> None:
    rows, columns, rank = 50_000, 8, 64
    term = Term(rank, 1.0, Factor(dtype, (0, rank, 1), is_whole=False), Factor(dtype, (0, columns, 1)))
    decoder = LowRankUpdate(Plain("float32"), rows, columns, (term,))
    parts = [torch.zeros(rows, columns), *(torch.ones(n, rank).to(find_dtype(dtype)) for n in (rows, columns))]
    pieces = [as_bytes(part).numpy().data for part in parts]
    out = np.empty(8 * columns, np.float32)
    decoder.compile_loops()
    tracemalloc.start()
    decoder.decode_stored(pieces, (0, rows * columns), 0, len(out), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.tolist() == [rank] * len(out)
    assert peak <= decoder.temporary_nbytes(len(out))
