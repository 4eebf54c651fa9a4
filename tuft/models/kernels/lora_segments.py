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

from tuft.models.kernels.native import arguments, array, inlined, kernel, loaded, stored, turn
from tuft.models.kernels.vectors import LANES, add, fma, load, spread, store, total

BLOCK_ROWS = 16
BLOCK_COLUMNS = 64
_F32_BYTES = 4


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
    for k in range(0, K // LANES * LANES * size, LANES * size):
        v0, v1 = load(A + k, dtype), load(A + A_step + k, dtype)
        v2, v3 = load(A + 2 * A_step + k, dtype), load(A + 3 * A_step + k, dtype)
        u = load(x + k, dtype)
        a0, a1, a2, a3 = fma(u, v0, a0), fma(u, v1, a1), fma(u, v2, a2), fma(u, v3, a3)
        u = load(x + x_step + k, dtype)
        b0, b1, b2, b3 = fma(u, v0, b0), fma(u, v1, b1), fma(u, v2, b2), fma(u, v3, b3)
        u = load(x + 2 * x_step + k, dtype)
        c0, c1, c2, c3 = fma(u, v0, c0), fma(u, v1, c1), fma(u, v2, c2), fma(u, v3, c3)
        u = load(x + 3 * x_step + k, dtype)
        d0, d1, d2, d3 = fma(u, v0, d0), fma(u, v1, d1), fma(u, v2, d2), fma(u, v3, d3)
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(a0), total(a1), total(a2), total(a3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(b0), total(b1), total(b2), total(b3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(c0), total(c1), total(c2), total(c3)
    at += R
    w[at], w[at + 1], w[at + 2], w[at + 3] = total(d0), total(d1), total(d2), total(d3)


@inlined
def _inner_1x1(x: int, A: int, K: int, dtype: Any, size: int) -> Any:
    """As one element of ``_inner_4x4``."""
    sums = spread(np.float32(0))
    for k in range(0, K // LANES * LANES * size, LANES * size):
        sums = fma(load(x + k, dtype), load(A + k, dtype), sums)
    return total(sums)


@inlined
def _outer_4x2(
    w: Any, at: int, R: int, rank: int, B: int, B_step: int, y: int, y_step: int, dtype: Any, size: int
) -> None:
    """``y[4, 2 vectors] += w[4, r] @ B[r, 2 vectors]``."""
    zero = spread(np.float32(0))
    a0, a1, b0, b1 = zero, zero, zero, zero
    c0, c1, d0, d1 = zero, zero, zero, zero
    for i in range(rank):
        v0, v1 = load(B + i * B_step, dtype), load(B + i * B_step + LANES * size, dtype)
        u = spread(w[at + i])
        a0, a1 = fma(u, v0, a0), fma(u, v1, a1)
        u = spread(w[at + R + i])
        b0, b1 = fma(u, v0, b0), fma(u, v1, b1)
        u = spread(w[at + 2 * R + i])
        c0, c1 = fma(u, v0, c0), fma(u, v1, c1)
        u = spread(w[at + 3 * R + i])
        d0, d1 = fma(u, v0, d0), fma(u, v1, d1)
    _add_pair(y, a0, a1, dtype, size)
    _add_pair(y + y_step, b0, b1, dtype, size)
    _add_pair(y + 2 * y_step, c0, c1, dtype, size)
    _add_pair(y + 3 * y_step, d0, d1, dtype, size)


@inlined
def _add_pair(y: int, first: Any, second: Any, dtype: Any, size: int) -> None:
    store(y, add(load(y, dtype), first), dtype)
    store(y + LANES * size, add(load(y + LANES * size, dtype), second), dtype)


@inlined
def _gram_4x2(
    c: int, c_step: int, x: int, x_step: int, num_rows: int, g: int, g_step: int, dtype: Any, size: int
) -> None:
    """``g[4, 2 vectors] += c[t, 4].T @ x[t, 2 vectors]``, ``g`` float32."""
    zero = spread(np.float32(0))
    a0, a1, b0, b1 = zero, zero, zero, zero
    c0, c1, d0, d1 = zero, zero, zero, zero
    for row in range(num_rows):
        v0, v1 = load(x + row * x_step, dtype), load(x + row * x_step + LANES * size, dtype)
        c_4 = array(c + row * c_step, 4, dtype)
        u = spread(loaded(c_4[0]))
        a0, a1 = fma(u, v0, a0), fma(u, v1, a1)
        u = spread(loaded(c_4[1]))
        b0, b1 = fma(u, v0, b0), fma(u, v1, b1)
        u = spread(loaded(c_4[2]))
        c0, c1 = fma(u, v0, c0), fma(u, v1, c1)
        u = spread(loaded(c_4[3]))
        d0, d1 = fma(u, v0, d0), fma(u, v1, d1)
    _add_pair(g, a0, a1, np.float32, _F32_BYTES)
    _add_pair(g + g_step, b0, b1, np.float32, _F32_BYTES)
    _add_pair(g + 2 * g_step, c0, c1, np.float32, _F32_BYTES)
    _add_pair(g + 3 * g_step, d0, d1, np.float32, _F32_BYTES)


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
                        w[at + one * R + j] = _inner_1x1(x + one * x_step, A + j * A_step, K, dtype, size)
    whole = K // LANES * LANES
    for row in range(num_rows if whole < K else 0):
        x_K = array(x + row * x_step, K, dtype)
        for i in range(rank):
            A_K = array(A + i * A_step, K, dtype)
            rest = np.float32(0)
            for k in range(whole, K):
                rest += loaded(x_K[k]) * loaded(A_K[k])
            w[at + row * R + i] += rest


@inlined
def _outer_1x2(w: Any, at: int, rank: int, B: int, B_step: int, y: int, dtype: Any, size: int) -> None:
    """As one row of ``_outer_4x2``."""
    first, second = spread(np.float32(0)), spread(np.float32(0))
    for i in range(rank):
        u = spread(w[at + i])
        first = fma(u, load(B + i * B_step, dtype), first)
        second = fma(u, load(B + i * B_step + LANES * size, dtype), second)
    _add_pair(y, first, second, dtype, size)


@inlined
def _add_outer(
    w: Any, at: int, R: int, num_rows: int, B: int, rank: int, N: int, y: int, y_step: int, dtype: Any, size: int
) -> None:
    """``y[t, N] += w[t, at : at + r] @ B[r, N]``."""
    whole = N // (2 * LANES) * (2 * LANES)
    for row in range(0, num_rows, 4):
        for n in range(0, whole * size, 2 * LANES * size):
            if row + 4 <= num_rows:
                _outer_4x2(w, at + row * R, R, rank, B + n, N * size, y + row * y_step + n, y_step, dtype, size)
            else:
                for one in range(row, num_rows):
                    _outer_1x2(w, at + one * R, rank, B + n, N * size, y + one * y_step + n, dtype, size)
    B_rN = array(B, rank * N, dtype)
    for row in range(num_rows if whole < N else 0):
        y_N = array(y + row * y_step, N, dtype)
        for n in range(whole, N):
            one_sum = np.float32(0)
            for i in range(rank):
                one_sum += w[at + row * R + i] * loaded(B_rN[i * N + n])
            y_N[n] = stored(loaded(y_N[n]) + one_sum, dtype)


@inlined
def _add_gram(
    c: int,
    c_step: int,
    x: int,
    x_step: int,
    num_rows: int,
    g: int,
    g_step: int,
    rank: int,
    N: int,
    dtype: Any,
    size: int,
) -> None:
    """``g[r, N] += c[t, r].T @ x[t, N]``, ``g`` float32; ``N`` columns of wider matrices."""
    whole, fours = N // (2 * LANES) * (2 * LANES), rank // 4 * 4
    for i in range(0, fours, 4):
        for n in range(0, whole, 2 * LANES):
            at = g + i * g_step + n * _F32_BYTES
            _gram_4x2(c + i * size, c_step, x + n * size, x_step, num_rows, at, g_step, dtype, size)
    for i in range(rank):
        g_N = array(g + i * g_step, N, np.float32)
        for n in range(whole if i < fours else 0, N):
            one_sum = np.float32(0)
            for row in range(num_rows):
                c_r, x_N = array(c + row * c_step, rank, dtype), array(x + row * x_step, N, dtype)
                one_sum += loaded(c_r[i]) * loaded(x_N[n])
            g_N[n] += one_sum


@inlined
def _scale(w: Any, num_rows: int, R: int, scale: Any, h: int, h_step: int, dtype: Any) -> None:
    """Round ``w[t, R]``, scale it, round it again, and keep it in ``h`` too."""
    for row in range(num_rows):
        h_R = array(h + row * h_step, R, dtype)
        for i in range(R):
            h_R[i] = stored(loaded(stored(w[row * R + i], dtype)) * scale, dtype)
            w[row * R + i] = loaded(h_R[i])


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
                _add_outer(w, linear * rank, R, num_rows, B, rank, N, y, y_step, dtype, size)
                y += N * size
                B += rank * N * size
        else:
            _add_outer(w, 0, R, num_rows, A, R, K, y, y_step, dtype, size)


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
    for item in range(thread, num_segments * num_pieces, step):
        segment, piece = item // num_pieces, item % num_pieces
        linear, first, count = pieces[3 * piece], pieces[3 * piece + 1], pieces[3 * piece + 2]
        if addresses_A[segment] == 0:
            continue
        row, num_rows, rank = bounds[2 * segment], bounds[2 * segment + 1] - bounds[2 * segment], ranks[segment]
        h, dh = a[14] + row * h_step, a[15] + row * h_step
        if linear < 0:
            x, at = a[10] + row * x_step + first * size, addresses_A[segment] + first * _F32_BYTES
            _add_gram(dh, h_step, x, x_step, num_rows, at, K * _F32_BYTES, L * rank, count, dtype, size)
        else:
            before = 0
            for other in range(linear):
                before += sizes_N[other]
            N = sizes_N[linear]
            dy, at = a[12] + row * dy_step + (before + first) * size, addresses_B[segment]
            at += (rank * before + first) * _F32_BYTES
            of_linear = h + linear * rank * size
            _add_gram(of_linear, h_step, dy, dy_step, num_rows, at, N * _F32_BYTES, rank, count, dtype, size)


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
