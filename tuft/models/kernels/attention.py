"""Causal attention of packed sequences without ever writing a matrix of scores, forward and backward.

A *branch* is consecutive rows that see some earlier spans of rows, all of them, and their own up to themselves. Queries
are taken 64 at a time, keys as well; within such a tile queries are the lanes of vectors, so a softmax over keys is
elementwise. Probabilities and their gradients are rounded to the compute dtype before they are multiplied, everything
else is float32. Forward a (branch, head) is one thread's, backward a (tree, key-value head), a tree being the branches
that share rows. Keys come in order, so a row's bits depend on what it sees alone.

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
from tuft.models.kernels.products import ROWS, TILE, UNIT_BYTES, multiply, pack, store_units, transpose
from tuft.models.kernels.vectors import (
    LANES,
    add,
    exp_of_negative,
    fma,
    hide_before,
    larger,
    load,
    mul,
    spread,
    store,
)

ROW_BYTES = TILE * UNIT_BYTES
"""Of float32 scores, and of one unit of packed columns."""

VECTOR_BYTES = LANES * UNIT_BYTES
ZERO = np.float32(0)


@inlined
def _padded(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


@inlined
def _zero(address: int, num_bytes: int) -> None:
    out = array(address, num_bytes // 4, np.int32)
    for c in range(num_bytes // 4):
        out[c] = 0


@inlined
def _rows_at(x_at: int, x_bytes: int, num_rows: int, d: int, copy_at: int, dtype: Any) -> tuple[int, int]:
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
def _transposed(x_at: int, x_bytes: int, num_rows: int, d: int, out_at: int, between_at: int, dtype: Any) -> None:
    """A tile's rows as ``[d, TILE]`` in the compute dtype: A of products whose inner dimension the rows are."""
    num_units = _padded(num_rows * item_bytes(dtype), UNIT_BYTES) // UNIT_BYTES
    pack(x_at, x_bytes, num_rows, d, between_at, d * UNIT_BYTES, dtype)
    transpose(between_at, d * UNIT_BYTES, num_units, d, out_at, TILE * item_bytes(dtype))


@inlined
def _queries(x_at: int, x_bytes: int, num_rows: int, d: int, out_at: int, dtype: Any) -> None:
    """A tile's rows as columns, packed along the channels; columns without a row are zero."""
    num_units = d * item_bytes(dtype) // UNIT_BYTES
    if num_rows < TILE:
        _zero(out_at, num_units * ROW_BYTES)
    transpose(x_at, x_bytes, num_rows, num_units, out_at, ROW_BYTES)


@inlined
def _owner(costs: Any, num_heads: int, item: int) -> Any:
    """Whose the item is, (number, head) counted through: every thread's lie in one piece of about equal cost."""
    number, head = item // num_heads, item % num_heads
    begun = costs[number] * num_heads + (costs[number + 1] - costs[number]) * head
    return begun * turn()[1] // (costs[len(costs) - 1] * num_heads)


@inlined
def _tiles(tiles_at: int, branch: Any) -> Any:
    """Row and number of keys of all tiles that a branch sees, its own last."""
    start, stop, first, own = branch
    return array(tiles_at + first * 16, 2 * (own - first + (stop - start + TILE - 1) // TILE), np.int64)


# --- forward ----------------------------------------------------------------------------------------------------------


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
    _zero(stats + ROW_BYTES, ROW_BYTES)
    num_channels = _padded(d, ROWS)
    for n in range(num_seen):
        num_keys = tiles[2 * n + 1]
        at, row_bytes = _rows_at(keys_at + tiles[2 * n] * keys_bytes, keys_bytes, num_keys, d, copy, dtype)
        shape = (_padded(num_keys, ROWS), TILE, d * size // UNIT_BYTES)
        multiply(at, row_bytes, queries, ROW_BYTES, scores, ROW_BYTES, shape, True, dtype)
        _softmax_tile(scores, num_keys, n == num_seen - 1, scale, stats, probs, dtype)
        if n > 0:
            _shrink(out, d, stats + 2 * ROW_BYTES)
        shape = (num_channels, TILE, _padded(num_keys * size, UNIT_BYTES) // UNIT_BYTES)
        v_at = values + n * num_channels * TILE * size
        multiply(v_at, TILE * size, probs, ROW_BYTES, out, ROW_BYTES, shape, n == 0, dtype)


@inlined
def _put_rows(
    columns: int, rows: int, num_rows: int, d: int, out_at: int, out_bytes: int, factors: int, dtype: Any
) -> None:
    """Float32 ``[d, TILE]`` to rows in the compute dtype, times a factor a row; ``rows`` is room to turn them in."""
    width = _padded(d, LANES)
    transpose(columns, ROW_BYTES, d, TILE, rows, width * UNIT_BYTES)
    factor = array(factors, TILE, np.float32)
    for row in range(num_rows):
        x, out, f = line(rows, row, width, np.float32), array(out_at + row * out_bytes, d, dtype), factor[row]
        for c in range(d):
            out[c] = stored(x[c] * f, dtype)


@inlined
def _forward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_branches, num_heads, num_kv_heads, d, scale = a[1], a[2], a[3], a[4], np.float32(as_double(a[5]))
    size = item_bytes(dtype)
    costs = array(a[7], num_branches + 1, np.int64)
    work = _forward_work(a[18] + turn()[0] * a[19], d, size, 0)
    queries, stats, out, _, _, rows, _, values, _ = work
    for item in range(num_branches * num_heads):
        if _owner(costs, num_heads, item) != turn()[0]:
            continue
        table, head = line(a[6], item // num_heads, 4, np.int64), item % num_heads
        branch = (table[0], table[1], table[2], table[3])
        start, stop, first_tile, own_tile = branch
        tiles, kv_head = _tiles(a[8], branch), head // (num_heads // num_kv_heads)
        for n in range(len(tiles) // 2):
            v_at = a[14] + tiles[2 * n] * a[15] + kv_head * d * size
            to = values + n * _padded(d, ROWS) * TILE * size
            _transposed(v_at, a[15], tiles[2 * n + 1], d, to, rows, dtype)
        num_seen = own_tile - first_tile
        for first in range(start, stop, TILE):
            num_rows, num_seen = min(TILE, stop - first), num_seen + 1
            _queries(a[10] + first * a[11] + head * d * size, a[11], num_rows, d, queries, dtype)
            _attend_tile(a[12] + kv_head * d * size, a[13], tiles, num_seen, d, scale, work, dtype)
            peak, mass = array(stats, TILE, np.float32), array(stats + ROW_BYTES, TILE, np.float32)
            for lane in range(TILE):
                mass[lane] = np.float32(1) / mass[lane]
            for row in range(num_rows):
                kept = line(a[17], (first + row) * num_heads + head, 2, np.float32)
                kept[0], kept[1] = peak[row] * scale, mass[row]
            out_at = a[16] + (first * num_heads + head) * d * size
            _put_rows(out, rows, num_rows, d, out_at, num_heads * d * size, stats + ROW_BYTES, dtype)


# --- backward ---------------------------------------------------------------------------------------------------------


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
        for j in range(_padded(num_keys, ROWS)):
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
    width = _padded(d, TILE) * UNIT_BYTES
    q_at, dout_at = a[10] + first * a[11] + head * d * size, a[20] + (first * num_heads + head) * d * size
    _queries(q_at, a[11], num_rows, d, queries, dtype)
    _queries(dout_at, num_heads * d * size, num_rows, d, douts, dtype)
    pack(q_at, a[11], num_rows, d, query_rows, width, dtype)
    pack(dout_at, num_heads * d * size, num_rows, d, dout_rows, width, dtype)
    _zero(stats, 3 * ROW_BYTES)
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
    width, num_channels = _padded(d, TILE) * UNIT_BYTES, _padded(d, ROWS)
    num_units = _padded(num_rows * size, UNIT_BYTES) // UNIT_BYTES
    for n in range(num_seen):
        row, num_keys = tiles[2 * n], tiles[2 * n + 1]
        padded = _padded(num_keys, ROWS)
        k_at, k_bytes = _rows_at(a[12] + row * a[13] + kv_head * d * size, a[13], num_keys, d, key_copy, dtype)
        v_at, v_bytes = _rows_at(a[14] + row * a[15] + kv_head * d * size, a[15], num_keys, d, value_copy, dtype)
        shape = (padded, TILE, d * size // UNIT_BYTES)
        multiply(k_at, k_bytes, queries, ROW_BYTES, scores, ROW_BYTES, shape, True, dtype)
        multiply(v_at, v_bytes, douts, ROW_BYTES, dprobs, ROW_BYTES, shape, True, dtype)
        _dscores_tile(num_keys, n == num_seen - 1, scale, stats, (scores, dprobs, probs, dscores, packed), dtype)
        shape = (padded, width // UNIT_BYTES, num_units)
        to = (row - tree_start) * width
        multiply(probs, TILE * size, dout_rows, width, dvalues + to, width, shape, False, dtype)
        multiply(dscores, TILE * size, query_rows, width, dkeys + to, width, shape, False, dtype)
        shape = (num_channels, TILE, _padded(num_keys * size, UNIT_BYTES) // UNIT_BYTES)
        at = keys + n * num_channels * TILE * size
        multiply(at, TILE * size, packed, ROW_BYTES, dqueries, ROW_BYTES, shape, n == 0, dtype)


@inlined
def _backward_branch(a: Any, branch: Any, tree_start: int, kv_head: int, work: Any, dtype: Any) -> None:
    num_heads, num_kv_heads, d, size = a[2], a[3], a[4], item_bytes(dtype)
    start, stop, first_tile, own_tile = branch
    tiles, rows, keys, dqueries = _tiles(a[8], branch), work[11], work[16], work[10]
    for n in range(len(tiles) // 2):
        k_at = a[12] + tiles[2 * n] * a[13] + kv_head * d * size
        _transposed(k_at, a[13], tiles[2 * n + 1], d, keys + n * _padded(d, ROWS) * TILE * size, rows, dtype)
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
            _put_rows(dqueries, rows, num_rows, d, dq_at, a[22], work[4], dtype)


@inlined
def _backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_trees, num_kv_heads, d, size = a[1], a[3], a[4], item_bytes(dtype)
    costs = array(a[7], num_trees + 1, np.int64)
    width = _padded(d, TILE)
    for item in range(num_trees * num_kv_heads):
        if _owner(costs, num_kv_heads, item) != turn()[0]:
            continue
        tree, kv_head = line(a[9], item // num_kv_heads, 4, np.int64), item % num_kv_heads
        tree_start, tree_stop = tree[2], tree[3]
        work = _backward_work(a[18] + turn()[0] * a[19], d, size, 0, tree_stop - tree_start)
        dkeys, dvalues = work[14], work[15]
        _zero(dkeys, 2 * (tree_stop - tree_start + ROWS) * width * UNIT_BYTES)
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
def forward(p: Any) -> None:
    """Contexts, and of every row and head the largest scaled score and 1 / mass."""
    if is_bf16(p):
        _forward(p, np.uint16)
    else:
        _forward(p, np.float32)


@kernel
def backward(p: Any) -> None:
    """dqueries, dkeys and dvalues."""
    if is_bf16(p):
        _backward(p, np.uint16)
    else:
        _backward(p, np.float32)
