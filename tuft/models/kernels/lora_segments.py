"""Low-rank products of rows in segments, forward and backward: each adapter's on its own rows, all in one call.

Three products, each in tiles that stay in registers. Rounded where torch's products would be: ``A x``, its scaled value
and the sum are elements of the arrays' dtype, everything between is float32. The order in which an element is summed
depends on nothing but the sizes of its own adapter, linear and segment.

Shape letters: ``T`` rows, ``t`` those of a block, ``K`` in_features, ``N`` out_features of one linear, ``L`` linears of
the group, ``r`` rank, ``R`` = L * r, ``S`` segments. Matrices lie as in an adapter's flat buffer: A ``[R, K]``, then
for each linear B transposed, ``[r, N]``. Steps from row to row are in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import arguments, array, inlined, item_bytes, kernel, loaded, stored, turn
from tuft.models.kernels.products import (
    ROWS,
    TILE,
    UNIT_BYTES,
    load_rows,
    load_units,
    multiply,
    multiply_add,
    pack,
    spread_unit,
)
from tuft.models.kernels.tiles import transposed, up_to
from tuft.models.kernels.vectors import LANES, add, fma, load, spread, store, total

BLOCK_ROWS = 16
BLOCK_COLUMNS = 256
_F32_BYTES = 4
_VECTOR_BYTES = LANES * UNIT_BYTES


@inlined
def _whole(K: int, size: int) -> int:
    """Elements of a row that fill whole vectors."""
    return K * size // _VECTOR_BYTES * (_VECTOR_BYTES // size)


# --- tiles ------------------------------------------------------------------------------------------------------------


@inlined
def _inner_4x4(
    x: int, x_step: int, A: int, A_step: int, K: int, w: Any, at: int, R: int, dtype: Any, size: int
) -> None:
    """``w[4, 4] = x[4, K] @ A[4, K].T`` over the whole vectors of K."""
    zero = spread(np.float32(0))
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    d0, d1, d2, d3 = zero, zero, zero, zero
    for k in range(0, _whole(K, size) * size, _VECTOR_BYTES):
        v0, v1 = load_units(A + k), load_units(A + A_step + k)
        v2, v3 = load_units(A + 2 * A_step + k), load_units(A + 3 * A_step + k)
        u = load_units(x + k)
        a0, a1 = multiply_add(u, v0, a0, dtype), multiply_add(u, v1, a1, dtype)
        a2, a3 = multiply_add(u, v2, a2, dtype), multiply_add(u, v3, a3, dtype)
        u = load_units(x + x_step + k)
        b0, b1 = multiply_add(u, v0, b0, dtype), multiply_add(u, v1, b1, dtype)
        b2, b3 = multiply_add(u, v2, b2, dtype), multiply_add(u, v3, b3, dtype)
        u = load_units(x + 2 * x_step + k)
        c0, c1 = multiply_add(u, v0, c0, dtype), multiply_add(u, v1, c1, dtype)
        c2, c3 = multiply_add(u, v2, c2, dtype), multiply_add(u, v3, c3, dtype)
        u = load_units(x + 3 * x_step + k)
        d0, d1 = multiply_add(u, v0, d0, dtype), multiply_add(u, v1, d1, dtype)
        d2, d3 = multiply_add(u, v2, d2, dtype), multiply_add(u, v3, d3, dtype)
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(a0), total(a1), total(a2), total(a3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(b0), total(b1), total(b2), total(b3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(c0), total(c1), total(c2), total(c3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(d0), total(d1), total(d2), total(d3)


@inlined
def inner_product(x: int, A: int, K: int, dtype: Any, size: int) -> Any:
    """As one element of ``_inner_4x4``."""
    sums = spread(np.float32(0))
    for k in range(0, _whole(K, size) * size, _VECTOR_BYTES):
        sums = multiply_add(load_units(x + k), load_units(A + k), sums, dtype)
    return total(sums)


@inlined
def _spread_element(at: int, dtype: Any) -> Any:
    return spread(loaded(array(at, 1, dtype)[0]))


@inlined
def _outer_4x2(h: int, h_step: int, rank: int, B: int, B_step: int, y: int, y_step: int, dtype: Any, size: int) -> None:
    """``y[4, 2 vectors] += h[4, r] @ B[r, 2 vectors]``."""
    zero = spread(np.float32(0))
    a0, a1, b0, b1 = zero, zero, zero, zero
    c0, c1, d0, d1 = zero, zero, zero, zero
    last = rank - 1
    for i in range(0, rank - rank % (UNIT_BYTES // size), UNIT_BYTES // size):
        v0 = load_rows(B + i * B_step, B_step, dtype)
        v1 = load_rows(B + i * B_step + LANES * size, B_step, dtype)
        u = spread_unit(h + i * size)
        a0, a1 = multiply_add(u, v0, a0, dtype), multiply_add(u, v1, a1, dtype)
        u = spread_unit(h + h_step + i * size)
        b0, b1 = multiply_add(u, v0, b0, dtype), multiply_add(u, v1, b1, dtype)
        u = spread_unit(h + 2 * h_step + i * size)
        c0, c1 = multiply_add(u, v0, c0, dtype), multiply_add(u, v1, c1, dtype)
        u = spread_unit(h + 3 * h_step + i * size)
        d0, d1 = multiply_add(u, v0, d0, dtype), multiply_add(u, v1, d1, dtype)
    if rank * size % UNIT_BYTES:
        v0, v1 = load(B + last * B_step, dtype), load(B + last * B_step + LANES * size, dtype)
        u = _spread_element(h + last * size, dtype)
        a0, a1 = fma(u, v0, a0), fma(u, v1, a1)
        u = _spread_element(h + h_step + last * size, dtype)
        b0, b1 = fma(u, v0, b0), fma(u, v1, b1)
        u = _spread_element(h + 2 * h_step + last * size, dtype)
        c0, c1 = fma(u, v0, c0), fma(u, v1, c1)
        u = _spread_element(h + 3 * h_step + last * size, dtype)
        d0, d1 = fma(u, v0, d0), fma(u, v1, d1)
    _add_pair(y, a0, a1, dtype, size)
    _add_pair(y + y_step, b0, b1, dtype, size)
    _add_pair(y + 2 * y_step, c0, c1, dtype, size)
    _add_pair(y + 3 * y_step, d0, d1, dtype, size)


@inlined
def _add_pair(y: int, first: Any, second: Any, dtype: Any, size: int) -> None:
    store(y, add(load(y, dtype), first), dtype)
    store(y + LANES * size, add(load(y + LANES * size, dtype), second), dtype)


# --- products of a block ----------------------------------------------------------------------------------------------


@inlined
def _inner(
    x: int, x_step: int, num_rows: int, A: int, rank: int, K: int, w: Any, at: int, R: int, dtype: Any, size: int
) -> None:
    """``w[t, at : at + r] = x[t, K] @ A[r, K].T``."""
    A_step = K * size
    for row in range(0, num_rows, 4):
        for i in range(0, rank, 4):
            if row + 4 <= num_rows and i + 4 <= rank:
                _inner_4x4(x + row * x_step, x_step, A + i * A_step, A_step, K, w, at + row * R + i, R, dtype, size)
            else:
                for one in range(row, min(row + 4, num_rows)):
                    for j in range(i, min(i + 4, rank)):
                        w[at + one * R + j] = inner_product(x + one * x_step, A + j * A_step, K, dtype, size)
    whole = _whole(K, size)
    for row in range(num_rows if whole < K else 0):
        x_K = array(x + row * x_step, K, dtype)
        for i in range(rank):
            A_K = array(A + i * A_step, K, dtype)
            rest = np.float32(0)
            for k in range(whole, K):
                rest += loaded(x_K[k]) * loaded(A_K[k])
            w[at + row * R + i] += rest


@inlined
def _outer_1x2(h: int, rank: int, B: int, B_step: int, y: int, dtype: Any, size: int) -> None:
    """As one row of ``_outer_4x2``."""
    first, second = spread(np.float32(0)), spread(np.float32(0))
    for i in range(0, rank - rank % (UNIT_BYTES // size), UNIT_BYTES // size):
        u = spread_unit(h + i * size)
        first = multiply_add(u, load_rows(B + i * B_step, B_step, dtype), first, dtype)
        second = multiply_add(u, load_rows(B + i * B_step + LANES * size, B_step, dtype), second, dtype)
    if rank * size % UNIT_BYTES:
        last = B + (rank - 1) * B_step
        u = _spread_element(h + (rank - 1) * size, dtype)
        first, second = fma(u, load(last, dtype), first), fma(u, load(last + LANES * size, dtype), second)
    _add_pair(y, first, second, dtype, size)


@inlined
def _add_outer(
    h: int, h_step: int, num_rows: int, B: int, rank: int, N: int, y: int, y_step: int, dtype: Any, size: int
) -> None:
    """``y[t, N] += h[t, r] @ B[r, N]``."""
    whole = N // (2 * LANES) * (2 * LANES)
    for row in range(0, num_rows, 4):
        for n in range(0, whole * size, 2 * LANES * size):
            if row + 4 <= num_rows:
                _outer_4x2(h + row * h_step, h_step, rank, B + n, N * size, y + row * y_step + n, y_step, dtype, size)
            else:
                for one in range(row, num_rows):
                    _outer_1x2(h + one * h_step, rank, B + n, N * size, y + one * y_step + n, dtype, size)
    B_rN = array(B, rank * N, dtype)
    for row in range(num_rows if whole < N else 0):
        y_N, h_r = array(y + row * y_step, N, dtype), array(h + row * h_step, rank, dtype)
        for n in range(whole, N):
            one_sum = np.float32(0)
            for i in range(rank):
                one_sum += loaded(h_r[i]) * loaded(B_rN[i * N + n])
            y_N[n] = stored(loaded(y_N[n]) + one_sum, dtype)


def gradient_work(at: int, num_ranks: int, size: int) -> tuple[int, ...]:
    """Where a thread's work lies: a tile of coefficients, turned, and room to turn it; a tile of rows, packed; the
    sums; and the end of it."""
    padded = (num_ranks + ROWS - 1) // ROWS * ROWS
    between = at + padded * TILE * size
    rows = between + TILE * num_ranks * UNIT_BYTES
    sums = rows + TILE * size // UNIT_BYTES * BLOCK_COLUMNS * UNIT_BYTES
    return at, between, rows, sums, sums + padded * BLOCK_COLUMNS * UNIT_BYTES


_gradient_work = inlined(gradient_work)


@inlined
def _add_gram(
    c: int, c_step: int, x: int, x_step: int, num_rows: int, g: int, g_step: int, shape: Any, work: int, dtype: Any
) -> None:
    """``g[r, N] += c[t, r].T @ x[t, N]``, ``g`` float32; ``N`` columns, at most ``BLOCK_COLUMNS``, of wider matrices.
    ``shape`` is (r, N)."""
    rank, width = shape
    size, row_bytes = item_bytes(dtype), BLOCK_COLUMNS * UNIT_BYTES
    turned, between, packed, sums, _ = _gradient_work(work, rank, size)
    for first in range(0, num_rows, TILE):
        count = min(TILE, num_rows - first)
        transposed(c + first * c_step, c_step, count, rank, turned, between, dtype)
        pack(x + first * x_step, x_step, count, width, packed, row_bytes, dtype)
        tile = (up_to(rank, ROWS), up_to(width, TILE), up_to(count * size, UNIT_BYTES) // UNIT_BYTES)
        multiply(turned, TILE * size, packed, row_bytes, sums, row_bytes, tile, first == 0, dtype)
    for i in range(rank):
        g_N, sums_N = array(g + i * g_step, width, np.float32), array(sums + i * row_bytes, width, np.float32)
        for n in range(width):
            g_N[n] += sums_N[n]


@inlined
def _scale(w: Any, num_rows: int, R: int, scale: Any, h: int, h_step: int, dtype: Any) -> None:
    """``w[t, R]``, rounded, scaled and rounded again, to ``h``."""
    for row in range(num_rows):
        h_R = array(h + row * h_step, R, dtype)
        for i in range(R):
            h_R[i] = stored(loaded(stored(w[row * R + i], dtype)) * scale, dtype)


# --- kernels ----------------------------------------------------------------------------------------------------------


@inlined
def _rows(p: Any, is_forward: bool, dtype: Any, size: int) -> None:
    """Forward: ``h = scale * x @ A.T``, ``y += h @ B``, for each block of rows. Backward, with dy in the place of x and
    dx in that of y: ``h = scale * dy @ B.T``, ``dx += h @ A``."""
    a = arguments(p)
    num_blocks, K, L = a[0], a[1], a[2]
    sizes_N, blocks = array(a[3], L, np.int64), array(a[4], 3 * num_blocks, np.int64)
    num_segments = a[5]
    addresses_A, addresses_B = array(a[6], num_segments, np.int64), array(a[7], num_segments, np.int64)
    ranks, scales = array(a[8], num_segments, np.int64), array(a[9], num_segments, np.float32)
    x_step, y_step, h_step = a[11], a[13], a[15]
    thread, step = turn()
    w = array(a[16] + thread * a[17], a[17] // _F32_BYTES, np.float32)
    for block in range(thread, num_blocks, step):
        segment, row, num_rows = blocks[3 * block], blocks[3 * block + 1], blocks[3 * block + 2]
        A, B, rank = addresses_A[segment], addresses_B[segment], ranks[segment]
        if A == 0:
            continue
        x, y, h = a[10] + row * x_step, a[12] + row * y_step, a[14] + row * h_step
        R = L * rank
        if is_forward:
            _inner(x, x_step, num_rows, A, R, K, w, 0, R, dtype, size)
        else:
            for linear in range(L):
                N = sizes_N[linear]
                _inner(x, x_step, num_rows, B, rank, N, w, linear * rank, R, dtype, size)
                x += N * size
                B += rank * N * size
        _scale(w, num_rows, R, scales[segment], h, h_step, dtype)
        if is_forward:
            for linear in range(L):
                N = sizes_N[linear]
                _add_outer(h + linear * rank * size, h_step, num_rows, B, rank, N, y, y_step, dtype, size)
                y += N * size
                B += rank * N * size
        else:
            _add_outer(h, h_step, num_rows, A, R, K, y, y_step, dtype, size)


@inlined
def _gradients(p: Any, dtype: Any, size: int) -> None:
    """``dA += dh.T @ x`` and ``dB += h.T @ dy``, for each segment and some columns of one of them."""
    a = arguments(p)
    num_segments, num_pieces, K, L = a[0], a[1], a[2], a[3]
    sizes_N, pieces = array(a[4], L, np.int64), array(a[5], 3 * num_pieces, np.int64)
    bounds, ranks = array(a[6], 2 * num_segments, np.int64), array(a[7], num_segments, np.int64)
    addresses_A, addresses_B = array(a[8], num_segments, np.int64), array(a[9], num_segments, np.int64)
    x_step, dy_step, h_step = a[11], a[13], a[16]
    thread, step = turn()
    work = a[17] + thread * a[18]
    for item in range(thread, num_segments * num_pieces, step):
        segment, piece = item // num_pieces, item % num_pieces
        linear, first, count = pieces[3 * piece], pieces[3 * piece + 1], pieces[3 * piece + 2]
        if addresses_A[segment] == 0:
            continue
        row, num_rows, rank = bounds[2 * segment], bounds[2 * segment + 1] - bounds[2 * segment], ranks[segment]
        h, dh = a[14] + row * h_step, a[15] + row * h_step
        if linear < 0:
            x, at = a[10] + row * x_step + first * size, addresses_A[segment] + first * _F32_BYTES
            _add_gram(dh, h_step, x, x_step, num_rows, at, K * _F32_BYTES, (L * rank, count), work, dtype)
        else:
            before = 0
            for other in range(linear):
                before += sizes_N[other]
            N = sizes_N[linear]
            dy, at = a[12] + row * dy_step + (before + first) * size, addresses_B[segment]
            at += (rank * before + first) * _F32_BYTES
            of_linear = h + linear * rank * size
            _add_gram(of_linear, h_step, dy, dy_step, num_rows, at, N * _F32_BYTES, (rank, count), work, dtype)


@kernel
def forward_bf16(p: Any) -> None:
    _rows(p, True, np.uint16, 2)


@kernel
def forward_float32(p: Any) -> None:
    _rows(p, True, np.float32, 4)


@kernel
def backward_bf16(p: Any) -> None:
    _rows(p, False, np.uint16, 2)


@kernel
def backward_float32(p: Any) -> None:
    _rows(p, False, np.float32, 4)


@kernel
def gradients_bf16(p: Any) -> None:
    _gradients(p, np.uint16, 2)


@kernel
def gradients_float32(p: Any) -> None:
    _gradients(p, np.float32, 4)
