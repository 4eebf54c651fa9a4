"""Vectors of 16 float32, for loops that the compiler does not vectorise by itself.

A vector is a value like a number: it is loaded from an address, lives in a register and is stored to an address. Where
the machine's registers are shorter, LLVM takes several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic

from tuft.models.kernels.native import bf16_bits, exactly

LANES = 16
_F32, _I32 = ir.FloatType(), ir.IntType(32)
F32S, I32S = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector_type = Vector()


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, F32S)


def _llvm(b: Any, name: str, args: Any) -> Any:
    signature = ir.FunctionType(F32S, [F32S] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, signature, f"llvm.{name}.v{LANES}f32"), args)


@intrinsic
def load(context: Any, address: Any, dtype: Any) -> Any:  # noqa: ARG001
    """16 elements of ``dtype`` from ``address`` on, which need not be aligned."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        if dtype.dtype == types.float32:
            return b.load(b.inttoptr(args[0], F32S.as_pointer()), align=4)
        halves = b.load(b.inttoptr(args[0], ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
        return b.bitcast(b.shl(b.zext(halves, I32S), ir.Constant(I32S, [16] * LANES)), F32S)

    return vector_type(address, dtype), generate


@intrinsic
def store(context: Any, address: Any, vector: Any, dtype: Any) -> Any:  # noqa: ARG001
    """The inverse of ``load``: rounded to nearest even, NaN stays NaN."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        if dtype.dtype == types.float32:
            b.store(args[1], b.inttoptr(args[0], F32S.as_pointer()), align=4)
            return c.get_dummy_value()

        halves = ir.VectorType(ir.IntType(16), LANES)
        out = bf16_bits(b, args[1])
        b.store(out, b.inttoptr(args[0], halves.as_pointer()), align=2)
        return c.get_dummy_value()

    return types.void(address, vector_type, dtype), generate


@intrinsic
def spread(context: Any, value: Any) -> Any:  # noqa: ARG001
    """The same number in all lanes."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        one = b.insert_element(ir.Constant(F32S, ir.Undefined), args[0], ir.Constant(_I32, 0))
        return b.shuffle_vector(one, one, ir.Constant(I32S, [0] * LANES))

    return vector_type(types.float32), generate


@intrinsic
def fma(context: Any, x: Any, y: Any, z: Any) -> Any:  # noqa: ARG001
    """x * y + z, rounded once."""
    return vector_type(vector_type, vector_type, vector_type), lambda c, b, s, args: _llvm(b, "fma", args)  # noqa: ARG005


@intrinsic
def add(context: Any, x: Any, y: Any) -> Any:  # noqa: ARG001
    return vector_type(vector_type, vector_type), lambda c, b, s, args: b.fadd(*args)  # noqa: ARG005


@intrinsic
def mul(context: Any, x: Any, y: Any) -> Any:  # noqa: ARG001
    return vector_type(vector_type, vector_type), lambda c, b, s, args: b.fmul(*args)  # noqa: ARG005


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:  # noqa: ARG001
    """Of each lane the larger; that of ``y`` where one is NaN."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return b.select(b.fcmp_ordered(">", *args), *args)

    return vector_type(vector_type, vector_type), generate


@intrinsic
def hide_before(context: Any, x: Any, lane: Any) -> Any:  # noqa: ARG001
    """-infinity in the lanes before ``lane``, which may lie outside."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        one = b.insert_element(ir.Constant(I32S, ir.Undefined), b.trunc(args[1], _I32), ir.Constant(_I32, 0))
        limit = b.shuffle_vector(one, one, ir.Constant(I32S, [0] * LANES))
        is_hidden = b.icmp_signed("<", ir.Constant(I32S, list(range(LANES))), limit)
        return b.select(is_hidden, ir.Constant(F32S, [float("-inf")] * LANES), args[0])

    return vector_type(vector_type, types.int64), generate


@intrinsic
def floor(context: Any, x: Any) -> Any:  # noqa: ARG001
    return vector_type(vector_type), lambda c, b, s, args: _llvm(b, "floor", args)  # noqa: ARG005


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:  # noqa: ARG001
    """2 to whole numbers between -126 and 127; anything where the exponent is NaN."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        whole = b.fptosi(args[0], I32S)
        bits = b.shl(b.add(whole, ir.Constant(I32S, [127] * LANES)), ir.Constant(I32S, [23] * LANES))
        return b.bitcast(bits, F32S)

    return vector_type(vector_type), generate


def _folded(b: Any, vector: Any, combine: Any) -> Any:
    """All lanes into one, by halves: always in this order."""
    width = LANES
    while width > 1:
        width //= 2
        indices = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        upper = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
        vector = combine(b.shuffle_vector(vector, vector, indices), b.shuffle_vector(vector, vector, upper))
    return b.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic
def total(context: Any, x: Any) -> Any:  # noqa: ARG001
    """The sum of all lanes."""
    return types.float32(vector_type), lambda c, b, s, args: _folded(b, args[0], b.fadd)  # noqa: ARG005


@intrinsic
def largest(context: Any, x: Any) -> Any:  # noqa: ARG001
    """The largest of all lanes."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return _folded(b, args[0], lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))

    return types.float32(vector_type), generate


@intrinsic
def zero_where_below(context: Any, value: Any, x: Any, limit: Any) -> Any:  # noqa: ARG001
    """``value``, but 0 in the lanes where ``x < limit``."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return b.select(b.fcmp_ordered("<", args[1], args[2]), ir.Constant(F32S, [0.0] * LANES), args[0])

    return vector_type(vector_type, vector_type, vector_type), generate


@exactly
def exp_of_negative(x: Any) -> Any:
    """As ``native.exp`` for numbers that are not above 0: the same steps, 16 at once."""
    f32 = np.float32
    lowest = spread(f32(-87.33654))
    capped = larger(lowest, x)
    n = floor(fma(capped, spread(f32(1.44269504088896341)), spread(f32(0.5))))
    r = fma(n, spread(f32(2.12194440e-4)), fma(n, spread(f32(-0.693359375)), capped))
    p = fma(spread(f32(1.9875691500e-4)), r, spread(f32(1.3981999507e-3)))
    p = fma(p, r, spread(f32(8.3334519073e-3)))
    p = fma(p, r, spread(f32(4.1665795894e-2)))
    p = fma(p, r, spread(f32(1.6666665459e-1)))
    p = fma(p, r, spread(f32(5.0000001201e-1)))
    p = add(fma(p, mul(r, r), r), spread(f32(1)))
    return zero_where_below(mul(p, power_of_two(n)), x, lowest)
