"""Causal attention of packed sequences without ever writing a matrix of scores.

A *branch* is consecutive rows that see some earlier spans of rows, all of them, and their own up to themselves. Queries
are taken 64 at a time, keys as well; within such a tile queries are the lanes of vectors, so a softmax over keys is
elementwise. Probabilities and their gradients are rounded to the compute dtype before they are multiplied, everything
else is float32. Forward a (branch, head) is one thread's, backward a (tree, key-value head), a tree being the branches
that share rows (``attention_backward``). Keys come in order, so a row's bits depend on what it sees alone.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``i`` queries and
``j`` keys of a tile, ``c`` channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import arguments, array, as_double, inlined, is_bf16, item_bytes, kernel, line, turn
from tuft.models.kernels.products import ROWS, TILE, UNIT_BYTES, multiply, store_units
from tuft.models.kernels.tiles import (
    ROW_BYTES,
    VECTOR_BYTES,
    ZERO,
    owner,
    put_rows,
    query_columns,
    rows_at,
    tiles_of,
    transposed,
    up_to,
    zero,
)
from tuft.models.kernels.vectors import add, exp_of_negative, fma, hide_before, larger, load, mul, spread, store


def forward_work(at: int, d: int, size: int, num_tiles: int) -> tuple[int, ...]:
    """Where a thread's work lies: queries, stats, out, scores, probs, rows, copy, values, and the end of it."""
    queries = at
    stats = queries + d * size // 4 * ROW_BYTES
    out = stats + 3 * ROW_BYTES
    scores = out + (d + 3) // 4 * 4 * ROW_BYTES
    probs = scores + TILE * ROW_BYTES
    rows = probs + TILE * ROW_BYTES
    copy = rows + TILE * (d + 15) // 16 * 16 * 4
    values = copy + TILE * d * 4
    return queries, stats, out, scores, probs, rows, copy, values, values + num_tiles * (d + 3) // 4 * 4 * TILE * size


_forward_work = inlined(forward_work)


@inlined
def _softmax_tile(scores: int, num_keys: int, is_own: bool, scale: Any, stats: int, probs: int, dtype: Any) -> None:
    """Scores ``[j, TILE]`` to packed exponentials over the largest so far. ``stats``: that largest, the sum of all
    exponentials, and the factor by which what was summed before has to shrink, one row each."""
    for v in range(0, ROW_BYTES, VECTOR_BYTES):
        before = load(stats + v, np.float32)
        peak = before
        for j in range(num_keys):
            s = load(scores + j * ROW_BYTES + v, np.float32)
            if is_own:
                s = hide_before(s, j - v // UNIT_BYTES)
                store(scores + j * ROW_BYTES + v, s, np.float32)
            peak = larger(s, peak)
        scales, shift = spread(scale), mul(peak, spread(-scale))
        shrink = exp_of_negative(fma(before, scales, shift))
        mass = mul(load(stats + ROW_BYTES + v, np.float32), shrink)
        for j in range(0, num_keys, 2):
            even, odd = exp_of_negative(fma(load(scores + j * ROW_BYTES + v, np.float32), scales, shift)), spread(ZERO)
            if j + 1 < num_keys:
                odd = exp_of_negative(fma(load(scores + (j + 1) * ROW_BYTES + v, np.float32), scales, shift))
            mass = add(mass, add(even, odd))
            store_units(probs + j * item_bytes(dtype) // UNIT_BYTES * ROW_BYTES + v, even, odd, ROW_BYTES, dtype)
        store(stats + v, peak, np.float32)
        store(stats + ROW_BYTES + v, mass, np.float32)
        store(stats + 2 * ROW_BYTES + v, shrink, np.float32)


@inlined
def _shrink(sums: int, num_rows: int, factors: int) -> None:
    for v in range(0, ROW_BYTES, VECTOR_BYTES):
        factor = load(factors + v, np.float32)
        for row in range(num_rows):
            at = sums + row * ROW_BYTES + v
            store(at, mul(load(at, np.float32), factor), np.float32)


@inlined
def _attend_tile(
    keys_at: int, keys_bytes: int, tiles: Any, num_seen: int, d: int, scale: Any, work: Any, dtype: Any
) -> None:
    """Contexts times their mass, ``[d, TILE]``, and stats of the queries in ``work``."""
    size = item_bytes(dtype)
    queries, stats, out, scores, probs, _, copy, values, _ = work
    lanes = array(stats, TILE, np.float32)
    for lane in range(TILE):
        lanes[lane] = np.float32(-np.inf)
    zero(stats + ROW_BYTES, ROW_BYTES)
    num_channels = up_to(d, ROWS)
    for n in range(num_seen):
        num_keys = tiles[2 * n + 1]
        at, row_bytes = rows_at(keys_at + tiles[2 * n] * keys_bytes, keys_bytes, num_keys, d, copy, dtype)
        shape = (up_to(num_keys, ROWS), TILE, d * size // UNIT_BYTES)
        multiply(at, row_bytes, queries, ROW_BYTES, scores, ROW_BYTES, shape, True, dtype)
        _softmax_tile(scores, num_keys, n == num_seen - 1, scale, stats, probs, dtype)
        if n > 0:
            _shrink(out, d, stats + 2 * ROW_BYTES)
        shape = (num_channels, TILE, up_to(num_keys * size, UNIT_BYTES) // UNIT_BYTES)
        v_at = values + n * num_channels * TILE * size
        multiply(v_at, TILE * size, probs, ROW_BYTES, out, ROW_BYTES, shape, n == 0, dtype)


@inlined
def _forward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_branches, num_heads, num_kv_heads, d, scale = a[1], a[2], a[3], a[4], np.float32(as_double(a[5]))
    size = item_bytes(dtype)
    costs = array(a[7], num_branches + 1, np.int64)
    work = _forward_work(a[18] + turn()[0] * a[19], d, size, 0)
    queries, stats, out, _, _, rows, _, values, _ = work
    for item in range(num_branches * num_heads):
        if owner(costs, num_heads, item) != turn()[0]:
            continue
        table, head = line(a[6], item // num_heads, 4, np.int64), item % num_heads
        branch = (table[0], table[1], table[2], table[3])
        start, stop, first_tile, own_tile = branch
        tiles, kv_head = tiles_of(a[8], branch), head // (num_heads // num_kv_heads)
        for n in range(len(tiles) // 2):
            v_at = a[14] + tiles[2 * n] * a[15] + kv_head * d * size
            to = values + n * up_to(d, ROWS) * TILE * size
            transposed(v_at, a[15], tiles[2 * n + 1], d, to, rows, dtype)
        num_seen = own_tile - first_tile
        for first in range(start, stop, TILE):
            num_rows, num_seen = min(TILE, stop - first), num_seen + 1
            query_columns(a[10] + first * a[11] + head * d * size, a[11], num_rows, d, queries, dtype)
            _attend_tile(a[12] + kv_head * d * size, a[13], tiles, num_seen, d, scale, work, dtype)
            peak, mass = array(stats, TILE, np.float32), array(stats + ROW_BYTES, TILE, np.float32)
            for lane in range(TILE):
                mass[lane] = np.float32(1) / mass[lane]
            for row in range(num_rows):
                kept = line(a[17], (first + row) * num_heads + head, 2, np.float32)
                kept[0], kept[1] = peak[row] * scale, mass[row]
            out_at = a[16] + (first * num_heads + head) * d * size
            put_rows(out, rows, num_rows, d, out_at, num_heads * d * size, stats + ROW_BYTES, dtype)


@kernel
def forward(p: Any) -> None:
    """Contexts, and of every row and head the largest scaled score and 1 / mass."""
    if is_bf16(p):
        _forward(p, np.uint16)
    else:
        _forward(p, np.float32)
