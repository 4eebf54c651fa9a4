"""Low-rank products of rows that have each their own adapter: the rows being decoded.

``y += B (scale * A x)`` of one row after the other, so the cost is near that of reading every adapter's matrices once.
Rounded where the trainer rounds: ``A x``, its scaled value and the sum are elements of the arrays' dtype, everything
between is float32.

Shape letters: ``K`` in_features, ``N`` out_features of one linear, ``r`` its LoRA rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import arguments, array, inlined, kernel, loaded, stored, turn
from tuft.models.kernels.vectors import LANES, add, fma, load, spread, store, total

_F32_BYTES = 4


@inlined
def _inner(x: int, A: int, K: int, dtype: Any, size: int) -> Any:
    """The product of ``x_K`` (float32) with one row of A."""
    first, second = spread(np.float32(0)), spread(np.float32(0))
    pairs = K // (2 * LANES) * (2 * LANES)
    for k in range(0, pairs, 2 * LANES):
        first = fma(load(x + k * _F32_BYTES, np.float32), load(A + k * size, dtype), first)
        other = k + LANES
        second = fma(load(x + other * _F32_BYTES, np.float32), load(A + other * size, dtype), second)
    out = total(add(first, second))
    x_K, A_K = array(x, K, np.float32), array(A, K, dtype)
    for k in range(pairs, K):
        out += x_K[k] * loaded(A_K[k])
    return out


@inlined
def _add_outer(y: int, h: Any, B_rN: int, N: int, dtype: Any, size: int) -> None:
    """``y_N += h_r @ B_rN``."""
    whole = N // LANES * LANES
    rank = len(h)
    for n in range(0, whole, LANES):
        sums = spread(np.float32(0))
        for i in range(rank):
            sums = fma(spread(h[i]), load(B_rN + (i * N + n) * size, dtype), sums)
        store(y + n * size, add(load(y + n * size, dtype), sums), dtype)
    y_N, B = array(y, N, dtype), array(B_rN, rank * N, dtype)
    for n in range(whole, N):
        one = np.float32(0)
        for i in range(rank):
            one += h[i] * loaded(B[i * N + n])
        y_N[n] = stored(loaded(y_N[n]) + one, dtype)


@inlined
def _add(p: Any, dtype: Any, size: int) -> None:
    a = arguments(p)
    num_rows, K, num_linears = a[0], a[1], a[2]
    sizes_N = array(a[3], num_linears, np.int64)
    addresses_A, addresses_B = array(a[4], num_rows, np.int64), array(a[5], num_rows, np.int64)
    ranks, scales = array(a[6], num_rows, np.int64), array(a[7], num_rows, np.float32)
    thread, step = turn()
    x_at = a[12] + thread * a[13] * _F32_BYTES  # workspace: x [K], h [R]
    x_K = array(x_at, K, np.float32)
    for row in range(thread, num_rows, step):
        if addresses_A[row] == 0:
            continue
        given = array(a[8] + row * a[9], K, dtype)
        for k in range(K):
            x_K[k] = loaded(given[k])
        rank = ranks[row]
        y, B = a[10] + row * a[11], addresses_B[row]
        for linear in range(num_linears):
            h_r = array(x_at + K * _F32_BYTES, rank, np.float32)
            for i in range(rank):
                inner = _inner(x_at, addresses_A[row] + (linear * rank + i) * K * size, K, dtype, size)
                h_r[i] = loaded(stored(loaded(stored(inner, dtype)) * scales[row], dtype))
            _add_outer(y, h_r, B, sizes_N[linear], dtype, size)
            y += sizes_N[linear] * size
            B += rank * sizes_N[linear] * size


@kernel
def add_bf16(p: Any) -> None:
    _add(p, np.uint16, 2)


@kernel
def add_float32(p: Any) -> None:
    _add(p, np.float32, 4)
