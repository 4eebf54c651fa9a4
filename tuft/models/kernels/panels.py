"""Products of few rows of bf16 with weights that lie in panels of 32 columns, ``[N / 32, K / 2, 32, 2]``.

A thread reads its panels from one end to the other, as fast as memory gives them; up to eight rows cost no more than
one. An element is summed in the order of K, so its bits depend neither on other rows nor on threads.

Shape letters: ``B`` rows, ``K`` in_features, ``N`` out_features.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tuft.models.kernels.native import bf16_bits, inlined, turn
from tuft.models.kernels.products import UNIT_BYTES, multiply_add_units, spread_at, vector_at
from tuft.models.kernels.vectors import F32S, LANES

PANEL = 2 * LANES
"""Columns of a panel: two vectors, so that with ``MAX_ROWS`` rows 16 sums are under way."""

MAX_ROWS = 8
_F32_BYTES = 4


def _product_of(num_rows: int) -> Any:
    @intrinsic
    def product(
        context: Any,  # noqa: ARG001
        x_at: Any,
        x_bytes: Any,
        panel_at: Any,
        num_units: Any,
        bias_at: Any,
        y_at: Any,
        y_bytes: Any,
    ) -> Any:
        """``num_rows`` rows of bf16 times one panel, plus a bias if there is one, rounded to bf16."""

        def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
            x_at, x_bytes, panel_at, num_units, bias_at, y_at, y_bytes = args
            i64 = ir.IntType(64)
            zero = ir.Constant(F32S, [0.0] * LANES)
            vector_bytes = LANES * UNIT_BYTES
            xs = [b.add(x_at, b.mul(x_bytes, ir.Constant(i64, row))) for row in range(num_rows)]
            sums = [[cgutils.alloca_once_value(b, zero) for _ in range(2)] for _ in range(num_rows)]
            with cgutils.for_range(b, num_units) as loop:
                unit = b.mul(loop.index, ir.Constant(i64, UNIT_BYTES))
                column_at = b.add(panel_at, b.mul(loop.index, ir.Constant(i64, 2 * vector_bytes)))
                columns = [vector_at(b, b.add(column_at, ir.Constant(i64, v * vector_bytes))) for v in range(2)]
                for row in range(num_rows):
                    one = spread_at(b, b.add(xs[row], unit))
                    for v in range(2):
                        total = multiply_add_units(b, one, columns[v], b.load(sums[row][v]), types.uint16)
                        b.store(total, sums[row][v])
            halves = ir.VectorType(ir.IntType(16), LANES)
            has_bias = b.icmp_signed("!=", bias_at, ir.Constant(i64, 0))
            for v in range(2):
                bias = cgutils.alloca_once_value(b, zero)
                with b.if_then(has_bias):
                    at = b.add(bias_at, ir.Constant(i64, v * vector_bytes))
                    b.store(vector_at(b, at), bias)
                for row in range(num_rows):
                    value = b.fadd(b.load(sums[row][v]), b.load(bias))
                    at = b.add(y_at, b.mul(y_bytes, ir.Constant(i64, row)))
                    at = b.add(at, ir.Constant(i64, v * LANES * 2))
                    b.store(bf16_bits(b, value), b.inttoptr(at, halves.as_pointer()), align=2)
            return c.get_dummy_value()

        given = (x_at, x_bytes, panel_at, num_units, bias_at, y_at, y_bytes)
        return types.void(*given), generate

    return product


_product_1, _product_2, _product_4, _product_8 = (_product_of(rows) for rows in (1, 2, 4, MAX_ROWS))


@inlined
def multiply_panels(x_at: int, num_rows: int, K: int, weight_at: int, bias_at: int, y_at: int, N: int) -> None:
    """This thread's columns of ``y_BN = x_BK @ W.T + bias``; the bias is float32. Rows of x and y follow each other,
    and whole eights of them may be read and written."""
    thread, num_threads = turn()
    num_panels, num_units, x_bytes, y_bytes = N // PANEL, K // 2, K * 2, N * 2
    for panel in range(num_panels * thread // num_threads, num_panels * (thread + 1) // num_threads):
        panel_at = weight_at + panel * num_units * PANEL * UNIT_BYTES
        bias = 0 if bias_at == 0 else bias_at + panel * PANEL * _F32_BYTES
        for row in range(0, num_rows, MAX_ROWS):
            x, y = x_at + row * x_bytes, y_at + row * y_bytes + panel * PANEL * 2
            left = num_rows - row
            if left > 4:
                _product_8(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            elif left > 2:
                _product_4(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            elif left == 2:
                _product_2(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            else:
                _product_1(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
