"""The backward of ``attention``: probabilities are computed again from the statistics that the forward has kept.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``i`` queries and
``j`` keys of a tile, ``c`` channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import (
    arguments,
    array,
    as_double,
    inlined,
    is_bf16,
    item_bytes,
    kernel,
    line,
    loaded,
    stored,
    turn,
)
from tuft.models.kernels.products import ROWS, TILE, UNIT_BYTES, multiply, pack, store_units
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
from tuft.models.kernels.vectors import add, exp_of_negative, fma, hide_before, load, mul, spread, store


def backward_work(at: int, d: int, size: int, num_tiles: int, num_rows: int) -> tuple[int, ...]:
    """Where a thread's work lies: queries and douts as columns, both as rows, stats, scores, dprobs, probs, dscores,
    dscores packed, dqueries, rows, copies of keys and values, dkeys, dvalues, keys, and the end of it."""
    width = (d + TILE - 1) // TILE * TILE * 4
    queries = at
    douts = queries + d * size // 4 * ROW_BYTES
    query_rows = douts + d * size // 4 * ROW_BYTES
    dout_rows = query_rows + TILE * width
    stats = dout_rows + TILE * width
    scores = stats + 3 * ROW_BYTES
    dprobs = scores + TILE * ROW_BYTES
    probs = dprobs + TILE * ROW_BYTES
    dscores = probs + TILE * ROW_BYTES
    packed = dscores + TILE * ROW_BYTES
    dqueries = packed + TILE * ROW_BYTES
    rows = dqueries + (d + 3) // 4 * 4 * ROW_BYTES
    key_copy = rows + TILE * (d + 15) // 16 * 16 * 4
    value_copy = key_copy + TILE * d * 4
    dkeys = value_copy + TILE * d * 4
    dvalues = dkeys + (num_rows + 4) * width
    keys = dvalues + (num_rows + 4) * width
    end = keys + num_tiles * (d + 3) // 4 * 4 * TILE * size
    turned = queries, douts, query_rows, dout_rows
    return (
        *turned,
        stats,
        scores,
        dprobs,
        probs,
        dscores,
        packed,
        dqueries,
        rows,
        key_copy,
        value_copy,
        dkeys,
        dvalues,
        keys,
        end,
    )


_backward_work = inlined(backward_work)


@inlined
def _dscores_tile(num_keys: int, is_own: bool, scale: Any, stats: int, places: Any, dtype: Any) -> None:
    """Scores and dprobs ``[j, TILE]`` to probabilities and dscores in the compute dtype, and dscores packed; rows up to
    a multiple of ``ROWS`` are zero. ``stats``: minus the largest score, 1 / mass, and minus dout @ out."""
    scores, dprobs, probs, dscores, packed = places
    size = item_bytes(dtype)
    for v in range(0, ROW_BYTES, VECTOR_BYTES):
        to = v * size // UNIT_BYTES
        shift, inverse = load(stats + v, np.float32), load(stats + ROW_BYTES + v, np.float32)
        minus_delta, scales = load(stats + 2 * ROW_BYTES + v, np.float32), spread(scale)
        before = spread(ZERO)
        for j in range(up_to(num_keys, ROWS)):
            p, ds = spread(ZERO), spread(ZERO)
            if j < num_keys:
                s = load(scores + j * ROW_BYTES + v, np.float32)
                if is_own:
                    s = hide_before(s, j - v // UNIT_BYTES)
                p = mul(exp_of_negative(fma(s, scales, shift)), inverse)
                ds = mul(mul(p, scales), add(load(dprobs + j * ROW_BYTES + v, np.float32), minus_delta))
            store(probs + j * TILE * size + to, p, dtype)
            store(dscores + j * TILE * size + to, ds, dtype)
            if j % 2 == 1:
                store_units(packed + (j - 1) * size // UNIT_BYTES * ROW_BYTES + v, before, ds, ROW_BYTES, dtype)
            before = ds


@inlined
def _take_queries(a: Any, first: int, num_rows: int, head: int, work: Any, dtype: Any) -> None:
    """What the backward needs of a tile's queries and of their gradients."""
    num_heads, d, size = a[2], a[4], item_bytes(dtype)
    queries, douts, query_rows, dout_rows, stats = work[0], work[1], work[2], work[3], work[4]
    width = up_to(d, TILE) * UNIT_BYTES
    q_at, dout_at = a[10] + first * a[11] + head * d * size, a[20] + (first * num_heads + head) * d * size
    query_columns(q_at, a[11], num_rows, d, queries, dtype)
    query_columns(dout_at, num_heads * d * size, num_rows, d, douts, dtype)
    pack(q_at, a[11], num_rows, d, query_rows, width, dtype)
    pack(dout_at, num_heads * d * size, num_rows, d, dout_rows, width, dtype)
    zero(stats, 3 * ROW_BYTES)
    lanes = array(stats, 3 * TILE, np.float32)
    for row in range(num_rows):
        item = (first + row) * num_heads + head
        dout, out, kept = line(a[20], item, d, dtype), line(a[16], item, d, dtype), line(a[17], item, 2, np.float32)
        inner = np.float32(0)
        for c in range(d):
            inner += loaded(dout[c]) * loaded(out[c])
        lanes[row], lanes[TILE + row], lanes[2 * TILE + row] = -kept[0], kept[1], -inner


@inlined
def _backward_tile(
    a: Any, tiles: Any, num_seen: int, num_rows: int, tree_start: int, kv_head: int, work: Any, dtype: Any
) -> None:
    """dqueries ``[d, TILE]`` of the queries in ``work``; what they give to dkeys and dvalues is added there."""
    d, scale, size = a[4], np.float32(as_double(a[5])), item_bytes(dtype)
    queries, douts, query_rows, dout_rows, stats, scores, dprobs, probs, dscores, packed, dqueries = work[:11]
    _, key_copy, value_copy, dkeys, dvalues, keys, _ = work[11:]
    width, num_channels = up_to(d, TILE) * UNIT_BYTES, up_to(d, ROWS)
    num_units = up_to(num_rows * size, UNIT_BYTES) // UNIT_BYTES
    for n in range(num_seen):
        row, num_keys = tiles[2 * n], tiles[2 * n + 1]
        padded = up_to(num_keys, ROWS)
        k_at, k_bytes = rows_at(a[12] + row * a[13] + kv_head * d * size, a[13], num_keys, d, key_copy, dtype)
        v_at, v_bytes = rows_at(a[14] + row * a[15] + kv_head * d * size, a[15], num_keys, d, value_copy, dtype)
        shape = (padded, TILE, d * size // UNIT_BYTES)
        multiply(k_at, k_bytes, queries, ROW_BYTES, scores, ROW_BYTES, shape, True, dtype)
        multiply(v_at, v_bytes, douts, ROW_BYTES, dprobs, ROW_BYTES, shape, True, dtype)
        _dscores_tile(num_keys, n == num_seen - 1, scale, stats, (scores, dprobs, probs, dscores, packed), dtype)
        shape = (padded, width // UNIT_BYTES, num_units)
        to = (row - tree_start) * width
        multiply(probs, TILE * size, dout_rows, width, dvalues + to, width, shape, False, dtype)
        multiply(dscores, TILE * size, query_rows, width, dkeys + to, width, shape, False, dtype)
        shape = (num_channels, TILE, up_to(num_keys * size, UNIT_BYTES) // UNIT_BYTES)
        at = keys + n * num_channels * TILE * size
        multiply(at, TILE * size, packed, ROW_BYTES, dqueries, ROW_BYTES, shape, n == 0, dtype)


@inlined
def _backward_branch(a: Any, branch: Any, tree_start: int, kv_head: int, work: Any, dtype: Any) -> None:
    num_heads, num_kv_heads, d, size = a[2], a[3], a[4], item_bytes(dtype)
    start, stop, first_tile, own_tile = branch
    tiles, rows, keys, dqueries = tiles_of(a[8], branch), work[11], work[16], work[10]
    for n in range(len(tiles) // 2):
        k_at = a[12] + tiles[2 * n] * a[13] + kv_head * d * size
        transposed(k_at, a[13], tiles[2 * n + 1], d, keys + n * up_to(d, ROWS) * TILE * size, rows, dtype)
    group = num_heads // num_kv_heads
    for head in range(kv_head * group, kv_head * group + group):
        num_seen = own_tile - first_tile
        for first in range(start, stop, TILE):
            num_rows, num_seen = min(TILE, stop - first), num_seen + 1
            _take_queries(a, first, num_rows, head, work, dtype)
            _backward_tile(a, tiles, num_seen, num_rows, tree_start, kv_head, work, dtype)
            ones = array(work[4], TILE, np.float32)
            for lane in range(TILE):
                ones[lane] = np.float32(1)
            dq_at = a[21] + first * a[22] + head * d * size
            put_rows(dqueries, rows, num_rows, d, dq_at, a[22], work[4], dtype)


@inlined
def _backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_trees, num_kv_heads, d, size = a[1], a[3], a[4], item_bytes(dtype)
    costs = array(a[7], num_trees + 1, np.int64)
    width = up_to(d, TILE)
    for item in range(num_trees * num_kv_heads):
        if owner(costs, num_kv_heads, item) != turn()[0]:
            continue
        tree, kv_head = line(a[9], item // num_kv_heads, 4, np.int64), item % num_kv_heads
        tree_start, tree_stop = tree[2], tree[3]
        work = _backward_work(a[18] + turn()[0] * a[19], d, size, 0, tree_stop - tree_start)
        dkeys, dvalues = work[14], work[15]
        zero(dkeys, 2 * (tree_stop - tree_start + ROWS) * width * UNIT_BYTES)
        for number in range(tree[0], tree[1]):
            table = line(a[6], number, 4, np.int64)
            _backward_branch(a, (table[0], table[1], table[2], table[3]), tree_start, kv_head, work, dtype)
        for row in range(tree_stop - tree_start):
            at = (tree_start + row) * a[22] + kv_head * d * size
            dk, dv = array(a[23] + at, d, dtype), array(a[24] + at, d, dtype)
            dk_row, dv_row = line(dkeys, row, width, np.float32), line(dvalues, row, width, np.float32)
            for c in range(d):
                dk[c] = stored(dk_row[c], dtype)
                dv[c] = stored(dv_row[c], dtype)


@kernel
def backward(p: Any) -> None:
    """dqueries, dkeys and dvalues."""
    if is_bf16(p):
        _backward(p, np.uint16)
    else:
        _backward(p, np.float32)
