"""Products of small matrices that lie in the first-level cache, for kernels that fuse them with other work.

``multiply`` takes its operands as the vector instructions do: in units of 4 bytes along the inner dimension, one
float32 or a pair of bf16. ``A`` has its units of one row side by side; of ``B`` all columns of one unit are side by
side (``pack``); ``C`` is float32. bf16 products are exact and summed in float32.

Shape letters: ``M`` rows of A and C, ``N`` columns of B and C, ``S`` units of the inner dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tuft.models.kernels.native import HAS_BF16, BFloat, array, bf16_bits, inlined, item_bytes
from tuft.models.kernels.vectors import F32S, I32S, LANES, Vector, store

TILE = 64
"""Columns that are multiplied together: four vectors, so that with ``ROWS`` rows 16 sums are under way at once."""

ROWS = 4
UNIT_BYTES = 4

_I16S = ir.VectorType(ir.IntType(16), LANES)
_BF16S = ir.VectorType(BFloat(), 2 * LANES)


def vector_at(b: Any, address: Any, element: Any = F32S) -> Any:
    return b.load(b.inttoptr(address, element.as_pointer()), align=2 if element == _I16S else 4)


def _put(b: Any, vector: Any, address: Any) -> None:
    b.store(vector, b.inttoptr(address, vector.type.as_pointer()), align=4)


def spread_at(b: Any, address: Any) -> Any:
    unit = b.load(b.inttoptr(address, ir.FloatType().as_pointer()), align=2)
    one = b.insert_element(ir.Constant(F32S, ir.Undefined), unit, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(one, one, ir.Constant(I32S, [0] * LANES))


def _plus(b: Any, address: Any, offset: int) -> Any:
    return b.add(address, ir.Constant(ir.IntType(64), offset))


def multiply_add_units(b: Any, x: Any, y: Any, sums: Any, dtype: Any) -> Any:
    """``sums`` plus the products of the units of ``x`` and ``y``, both vectors of float32 as far as LLVM knows."""
    if dtype == types.float32:
        return _call(b, "llvm.fma.v16f32", x, y, sums)
    if HAS_BF16:
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", sums, b.bitcast(x, _BF16S), b.bitcast(y, _BF16S))
    halves = ir.Constant(I32S, [16] * LANES)
    for half in (lambda bits: b.shl(bits, halves), lambda bits: b.shl(b.lshr(bits, halves), halves)):
        sums = _call(b, "llvm.fma.v16f32", *(b.bitcast(half(b.bitcast(z, I32S)), F32S) for z in (x, y)), sums)
    return sums


def _call(b: Any, function: str, *operands: Any) -> Any:
    signature = ir.FunctionType(F32S, [operand.type for operand in operands])
    return b.call(cgutils.get_or_insert_function(b.module, signature, function), operands)


@intrinsic
def _multiply_rows(
    context: Any,  # noqa: ARG001
    a_at: Any,
    a_bytes: Any,
    b_at: Any,
    b_bytes: Any,
    c_at: Any,
    c_bytes: Any,
    num_units: Any,
    begins: Any,
    dtype: Any,
) -> Any:
    """``ROWS`` rows and ``TILE`` columns of ``multiply``."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        a_at, a_bytes, b_at, b_bytes, c_at, c_bytes, num_units, begins, _ = args
        zero, num_vectors = ir.Constant(F32S, [0.0] * LANES), TILE // LANES
        a_rows, places = [a_at], [c_at]
        for _ in range(1, ROWS):
            a_rows.append(b.add(a_rows[-1], a_bytes))
            places.append(b.add(places[-1], c_bytes))
        outs = [_plus(b, place, v * LANES * UNIT_BYTES) for place in places for v in range(num_vectors)]
        sums = [cgutils.alloca_once_value(b, b.select(begins, zero, vector_at(b, out))) for out in outs]
        with cgutils.for_range(b, num_units) as loop:
            step = b.add(b_at, b.mul(loop.index, b_bytes))
            columns = [vector_at(b, _plus(b, step, v * LANES * UNIT_BYTES)) for v in range(num_vectors)]
            for r, a_row in enumerate(a_rows):
                unit_at = b.add(a_row, b.mul(loop.index, ir.Constant(ir.IntType(64), UNIT_BYTES)))
                spread = spread_at(b, unit_at)
                for v, column in enumerate(columns):
                    total = sums[r * num_vectors + v]
                    b.store(multiply_add_units(b, spread, column, b.load(total), dtype.dtype), total)
        for total, out in zip(sums, outs, strict=True):
            _put(b, b.load(total), out)
        return c.get_dummy_value()

    given = (a_at, a_bytes, b_at, b_bytes, c_at, c_bytes, num_units, begins)
    return types.void(*given, dtype), generate


@inlined
def multiply(
    a_at: int, a_bytes: int, b_at: int, b_bytes: int, c_at: int, c_bytes: int, shape: Any, begins: bool, dtype: Any
) -> None:
    """C ``[M, N]`` = A B, or += if it does not begin. ``shape`` is (M, N, S), M a multiple of ``ROWS``, N of ``TILE``;
    ``*_bytes`` lie between a row of A or C and the next, or a unit of B and the next."""
    num_rows, num_columns, num_units = shape
    for column in range(0, num_columns * UNIT_BYTES, TILE * UNIT_BYTES):
        for row in range(0, num_rows, ROWS):
            _multiply_rows(
                a_at + row * a_bytes,
                a_bytes,
                b_at + column,
                b_bytes,
                c_at + row * c_bytes + column,
                c_bytes,
                num_units,
                begins,
                dtype,
            )


@intrinsic
def _transpose_block(context: Any, x_at: Any, x_bytes: Any, out_at: Any, out_bytes: Any) -> Any:  # noqa: ARG001
    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        x_at, x_bytes, out_at, out_bytes = args
        rows = []
        for _ in range(LANES):
            rows.append(vector_at(b, x_at))
            x_at = b.add(x_at, x_bytes)
        width = LANES // 2
        while width:  # exchange blocks of this width between rows that are as far apart
            for i in range(LANES):
                if not i & width:
                    low = [k + LANES - width if k & width else k for k in range(LANES)]
                    high = [k + LANES if k & width else k + width for k in range(LANES)]
                    pair = rows[i], rows[i + width]
                    rows[i] = b.shuffle_vector(*pair, ir.Constant(I32S, low))
                    rows[i + width] = b.shuffle_vector(*pair, ir.Constant(I32S, high))
            width //= 2
        for row in rows:
            _put(b, row, out_at)
            out_at = b.add(out_at, out_bytes)
        return c.get_dummy_value()

    return types.void(x_at, x_bytes, out_at, out_bytes), generate


@inlined
def transpose(x_at: int, x_bytes: int, num_rows: int, num_units: int, out_at: int, out_bytes: int) -> None:
    """``num_rows`` rows of ``num_units`` units to as many columns. Nothing else is read; what is written beyond them in
    whole blocks of 16 columns is zero."""
    whole_rows, whole_units = num_rows // LANES * LANES, num_units // LANES * LANES
    for row in range(0, whole_rows, LANES):
        for unit in range(0, whole_units, LANES):
            _transpose_block(
                x_at + row * x_bytes + unit * UNIT_BYTES,
                x_bytes,
                out_at + unit * out_bytes + row * UNIT_BYTES,
                out_bytes,
            )
    padded_rows = (num_rows + LANES - 1) // LANES * LANES
    for unit in range(num_units):
        out = array(out_at + unit * out_bytes, padded_rows, np.int32)
        for row in range(0 if unit >= whole_units else whole_rows, padded_rows):
            out[row] = array(x_at + row * x_bytes, num_units, np.int32)[unit] if row < num_rows else 0


@intrinsic
def load_units(context: Any, address: Any) -> Any:  # noqa: ARG001
    """16 units of one row."""
    return Vector()(address), lambda c, b, s, args: vector_at(b, args[0])  # noqa: ARG005


@intrinsic
def load_rows(context: Any, address: Any, row_bytes: Any, dtype: Any) -> Any:  # noqa: ARG001
    """16 columns of one unit of rows, packed: a float32 row, or a pair of bf16 rows."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        even_at, row_bytes, _ = args
        if dtype.dtype == types.float32:
            return vector_at(b, even_at)
        even, odd = (b.zext(vector_at(b, at, _I16S), I32S) for at in (even_at, b.add(even_at, row_bytes)))
        return b.bitcast(b.or_(even, b.shl(odd, ir.Constant(I32S, [16] * LANES))), F32S)

    return Vector()(address, row_bytes, dtype), generate


@intrinsic
def spread_unit(context: Any, address: Any) -> Any:  # noqa: ARG001
    """The unit at ``address`` in all lanes."""
    return Vector()(address), lambda c, b, s, args: spread_at(b, args[0])  # noqa: ARG005


@intrinsic
def multiply_add(context: Any, x: Any, y: Any, sums: Any, dtype: Any) -> Any:  # noqa: ARG001
    """``sums`` plus the products of units of ``dtype``."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        x, y, sums, _ = args
        return multiply_add_units(b, x, y, sums, dtype.dtype)

    return Vector()(x, y, sums, dtype), generate


@inlined
def pack(x_at: int, x_bytes: int, num_rows: int, width: int, out_at: int, out_bytes: int, dtype: Any) -> None:
    """The rows of a matrix as the inner dimension of B: one row a unit in float32, pairs of rows in bf16. A missing
    second row is zero."""
    size = item_bytes(dtype)
    per_unit, whole = UNIT_BYTES // size, width // LANES * LANES
    for row in range(0, num_rows, per_unit):
        at, to = x_at + row * x_bytes, out_at + row // per_unit * out_bytes
        is_whole = row + per_unit <= num_rows
        if is_whole:
            for c in range(0, whole, LANES):
                store(to + c * UNIT_BYTES, load_rows(at + c * size, x_bytes, dtype), np.float32)
        x, after = array(at, width, dtype), array(at + x_bytes, width, dtype)
        out = array(to, width * per_unit, dtype)
        for c in range(whole if is_whole else 0, width):
            out[c * per_unit] = x[c]
            if per_unit == 2:
                out[c * per_unit + 1] = after[c] if is_whole else dtype(0)


@intrinsic
def store_units(context: Any, address: Any, even: Any, odd: Any, out_bytes: Any, dtype: Any) -> Any:  # noqa: ARG001
    """Two rows of 16 columns, packed: bf16 as one row of pairs, float32 as two rows ``out_bytes`` apart."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        address, even, odd, out_bytes, _ = args
        if dtype.dtype == types.float32:
            _put(b, even, address)
            _put(b, odd, b.add(address, out_bytes))
        else:
            low, high = (b.zext(bf16_bits(b, x), I32S) for x in (even, odd))
            _put(b, b.or_(low, b.shl(high, ir.Constant(I32S, [16] * LANES))), address)
        return c.get_dummy_value()

    return types.void(address, Vector(), Vector(), out_bytes, dtype), generate
