"""Tiles of 64 queries or keys: what the forward and the backward of attention share (see ``attention``).

Shape letters: ``d`` channels of a head, ``c`` one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import array, inlined, item_bytes, line, stored, turn
from tuft.models.kernels.products import ROWS, TILE, UNIT_BYTES, pack, transpose
from tuft.models.kernels.vectors import LANES

ROW_BYTES = TILE * UNIT_BYTES
"""Of float32 scores, and of one unit of packed columns."""

VECTOR_BYTES = LANES * UNIT_BYTES
ZERO = np.float32(0)


@inlined
def up_to(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


@inlined
def zero(address: int, num_bytes: int) -> None:
    out = array(address, num_bytes // 4, np.int32)
    for c in range(num_bytes // 4):
        out[c] = 0


@inlined
def rows_at(x_at: int, x_bytes: int, num_rows: int, d: int, copy_at: int, dtype: Any) -> tuple[int, int]:
    """Address and distance of rows of which whole fours may be read: a copy where the last four are not complete."""
    if num_rows % ROWS == 0:
        return x_at, x_bytes
    size = item_bytes(dtype)
    for row in range(num_rows):
        x, out = array(x_at + row * x_bytes, d, dtype), array(copy_at + row * d * size, d, dtype)
        for c in range(d):
            out[c] = x[c]
    return copy_at, d * size


@inlined
def transposed(x_at: int, x_bytes: int, num_rows: int, d: int, out_at: int, between_at: int, dtype: Any) -> None:
    """A tile's rows as ``[d, TILE]`` in the compute dtype: A of products whose inner dimension the rows are."""
    num_units = up_to(num_rows * item_bytes(dtype), UNIT_BYTES) // UNIT_BYTES
    pack(x_at, x_bytes, num_rows, d, between_at, d * UNIT_BYTES, dtype)
    transpose(between_at, d * UNIT_BYTES, num_units, d, out_at, TILE * item_bytes(dtype))


@inlined
def query_columns(x_at: int, x_bytes: int, num_rows: int, d: int, out_at: int, dtype: Any) -> None:
    """A tile's rows as columns, packed along the channels; columns without a row are zero."""
    num_units = d * item_bytes(dtype) // UNIT_BYTES
    if num_rows < TILE:
        zero(out_at, num_units * ROW_BYTES)
    transpose(x_at, x_bytes, num_rows, num_units, out_at, ROW_BYTES)


@inlined
def owner(costs: Any, num_heads: int, item: int) -> Any:
    """Whose the item is, (number, head) counted through: every thread's lie in one piece of about equal cost."""
    number, head = item // num_heads, item % num_heads
    begun = costs[number] * num_heads + (costs[number + 1] - costs[number]) * head
    return begun * turn()[1] // (costs[len(costs) - 1] * num_heads)


@inlined
def tiles_of(tiles_at: int, branch: Any) -> Any:
    """Row and number of keys of all tiles that a branch sees, its own last."""
    start, stop, first, own = branch
    return array(tiles_at + first * 16, 2 * (own - first + (stop - start + TILE - 1) // TILE), np.int64)


@inlined
def put_rows(
    columns: int, rows: int, num_rows: int, d: int, out_at: int, out_bytes: int, factors: int, dtype: Any
) -> None:
    """Float32 ``[d, TILE]`` to rows in the compute dtype, times a factor a row; ``rows`` is room to turn them in."""
    width = up_to(d, LANES)
    transpose(columns, ROW_BYTES, d, TILE, rows, width * UNIT_BYTES)
    factor = array(factors, TILE, np.float32)
    for row in range(num_rows):
        x, out, f = line(rows, row, width, np.float32), array(out_at + row * out_bytes, d, dtype), factor[row]
        for c in range(d):
            out[c] = stored(x[c] * f, dtype)
