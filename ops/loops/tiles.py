"""Tiles of matrix products, of which compiled code keeps the sums in vector registers."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.low_rank import TILE_COLUMNS
from raymerge.ops.lazy import np

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1

TILE_ROWS = 4


def multiply_tile(
    left: Array1[np.float32], at: int, ranks: int, right: Array1[np.float32], begin: int, count: int,
    before: Array1[np.float32], origin: int, out: Array1[np.float32], place: int, step: int,
) -> None:  # fmt: skip
    """Write the products of four rows of left and 16 columns of right, each four of them added to each other first.

    Compiled, it is what `write_tile` writes: numba keeps such sums in memory.

    Args:
        left: rows x ranks.
        at: place of the first element in `left`.
        ranks: distance of neighbouring rows in `left`.
        right: ranks x `TILE_COLUMNS`, one after the other.
        begin: place of the first element in `right`.
        count: ranks to multiply; a multiple of four.
        before: tiles of sums, to which those of the products are added.
        origin: place of the first element of a tile there; negative where nothing is added.
        out: gets the sums.
        place: of the first sum in `out`.
        step: distance of neighbouring rows in `out`.
    """
    for row in range(TILE_ROWS):
        total = np.zeros(TILE_COLUMNS, np.float32)
        for k in range(0, count, 4):
            a = left[at + row * ranks + k : at + row * ranks + k + 4]
            x = right[begin + k * TILE_COLUMNS : begin + (k + 4) * TILE_COLUMNS].reshape(4, TILE_COLUMNS)
            total += (a[0] * x[0] + a[1] * x[1]) + (a[2] * x[2] + a[3] * x[3])
        if origin >= 0:
            total += before[origin + row * TILE_COLUMNS : origin + (row + 1) * TILE_COLUMNS]
        out[place + row * step : place + row * step + TILE_COLUMNS] = total


def write_tile(numba: Any) -> Any:
    """Return `multiply_tile` for numba's compiler, as LLVM's own instructions on vectors."""
    from llvmlite import ir
    from numba.core import cgutils, types

    vector = ir.VectorType(ir.FloatType(), TILE_COLUMNS)
    first_lane = ir.Constant(ir.VectorType(ir.IntType(32), TILE_COLUMNS), [0] * TILE_COLUMNS)
    nothing = ir.Constant(vector, ir.Undefined)
    zeros = ir.Constant(vector, [0.0] * TILE_COLUMNS)

    def number(value: int) -> Any:
        return ir.Constant(ir.IntType(64), value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def find(array: Any, *terms: Any) -> Any:
            return builder.gep(array, [reduce(builder.add, terms)])

        def find_vector(array: Any, *terms: Any) -> Any:
            return builder.bitcast(find(array, *terms), vector.as_pointer())

        def spread(array: Any, *terms: Any) -> Any:
            lane = builder.insert_element(nothing, builder.load(find(array, *terms)), ir.IntType(32)(0))
            return builder.shuffle_vector(lane, nothing, first_lane)

        values = [
            context.make_array(kind)(context, builder, value).data
            if isinstance(kind, types.Array)
            else context.cast(builder, value, kind, types.int64)
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        left, at, ranks, right, begin, count, before, origin, out, place, step = values
        rows = [builder.add(at, builder.mul(ranks, number(row))) for row in range(TILE_ROWS)]
        make_room: Any = cgutils.alloca_once
        totals = [make_room(builder, vector) for _ in rows]  # LLVM makes registers of them
        for total in totals:
            builder.store(zeros, total)
        with cgutils.for_range_slice(builder, number(0), count, number(4), intp=ir.IntType(64)) as (k, _):
            starts = [builder.mul(builder.add(k, number(n)), number(TILE_COLUMNS)) for n in range(4)]
            x = [builder.load(find_vector(right, begin, start), align=4) for start in starts]
            for row, total in zip(rows, totals, strict=True):
                each = [builder.fmul(spread(left, row, k, number(n)), x[n]) for n in range(4)]
                group = builder.fadd(builder.fadd(each[0], each[1]), builder.fadd(each[2], each[3]))
                builder.store(builder.fadd(builder.load(total), group), total)
        with builder.if_then(builder.icmp_signed(">=", origin, number(0))):
            for row, total in enumerate(totals):
                sums = builder.load(find_vector(before, origin, number(row * TILE_COLUMNS)), align=4)
                builder.store(builder.fadd(builder.load(total), sums), total)
        for row, total in enumerate(totals):
            builder.store(builder.load(total), find_vector(out, place, builder.mul(step, number(row))), align=4)
        return context.get_dummy_value()

    def declare(  # type: ignore[no-untyped-def]  # numba counts these parameters
        typing_context, left, at, ranks, right, begin, count, before, origin, out, place, step
    ):
        kinds = left, at, ranks, right, begin, count, before, origin, out, place, step
        return types.void(*kinds), generate

    return numba.extending.intrinsic(declare)


multiply_tile.write = write_tile  # type: ignore[attr-defined]
