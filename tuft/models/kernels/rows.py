"""Norms, rotation and SwiGLU, forward and backward: one thread a row, memory read and written once.

Everything between loading and storing is float32. A kernel's first argument is the size of an element of the compute
dtype, 2 or 4 bytes. Shape letters: ``T`` rows, ``D`` channels, ``I`` MLP channels, ``d``
channels of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import (
    arguments,
    array,
    as_double,
    exp,
    inlined,
    is_bf16,
    item_bytes,
    kernel,
    line,
    loaded,
    share,
    stored,
)


@inlined
def _add_rms_norm(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width, eps = a[1], a[2], np.float32(as_double(a[3]))
    weight, rstd = array(a[6], width, np.float32), array(a[9], num_rows, np.float32)
    first, stop = share(num_rows)
    for row in range(first, stop):
        update, out = line(a[5], row, width, dtype), line(a[7], row, width, np.float32)
        squares = np.float32(0)
        if a[4] == 0:
            for c in range(width):
                x = loaded(update[c])
                out[c] = x
                squares += x * x
        else:
            residual = line(a[4], row, width, np.float32)
            for c in range(width):
                x = residual[c] + loaded(update[c])
                out[c] = x
                squares += x * x
        rstd[row] = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        factor, normed = rstd[row], line(a[8], row, width, dtype)
        for c in range(width):
            normed[c] = stored(out[c] * factor * weight[c], dtype)


@inlined
def _add_rms_norm_backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width = a[1], a[2]
    rstd, weight = array(a[4], num_rows, np.float32), array(a[5], width, np.float32)
    first, stop = share(num_rows)
    for row in range(first, stop):
        residual, dnormed = line(a[3], row, width, np.float32), line(a[7], row, width, dtype)
        inner = np.float32(0)
        for c in range(width):
            inner += loaded(dnormed[c]) * weight[c] * residual[c]
        factor = rstd[row]
        inner *= factor * factor * factor / np.float32(width)
        dx, dupdate = line(a[8], row, width, np.float32), line(a[9], row, width, dtype)
        if a[6] == 0:
            for c in range(width):
                dx[c] = loaded(dnormed[c]) * weight[c] * factor - residual[c] * inner
        else:
            dresidual = line(a[6], row, width, np.float32)
            for c in range(width):
                dx[c] = loaded(dnormed[c]) * weight[c] * factor - residual[c] * inner + dresidual[c]
        if a[9] != a[8]:
            for c in range(width):
                dupdate[c] = stored(dx[c], dtype)


@inlined
def _head_rms_norm(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, num_heads, num_normed, d, eps = a[1], a[2], a[3], a[4], np.float32(as_double(a[5]))
    first, stop = share(num_rows)
    for row in range(first, stop):
        rstd = line(a[9], row, num_normed, np.float32)
        for head in range(num_heads):
            x, y = line(a[6], row * num_heads + head, d, dtype), line(a[8], row * num_heads + head, d, dtype)
            if head >= num_normed:
                for c in range(d):
                    y[c] = x[c]
                continue
            weight, squares = line(a[7], head, d, np.float32), np.float32(0)
            for c in range(d):
                squares += loaded(x[c]) * loaded(x[c])
            factor = np.float32(1) / np.sqrt(squares / np.float32(d) + eps)
            rstd[head] = factor
            for c in range(d):
                y[c] = stored(loaded(x[c]) * factor * weight[c], dtype)


@inlined
def _head_rms_norm_backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, num_heads, num_normed, d = a[1], a[2], a[3], a[4]
    first, stop = share(num_rows)
    for row in range(first, stop):
        rstd = line(a[6], row, num_normed, np.float32)
        for head in range(num_heads):
            item = row * num_heads + head
            x, dy, dx = line(a[5], item, d, dtype), line(a[8], item, d, dtype), line(a[9], item, d, dtype)
            if head >= num_normed:
                for c in range(d):
                    dx[c] = dy[c]
                continue
            weight, factor, inner = line(a[7], head, d, np.float32), rstd[head], np.float32(0)
            for c in range(d):
                inner += loaded(dy[c]) * weight[c] * loaded(x[c])
            inner *= factor * factor * factor / np.float32(d)
            for c in range(d):
                dx[c] = stored(loaded(dy[c]) * weight[c] * factor - loaded(x[c]) * inner, dtype)


@inlined
def _rotate(x_at: int, out_at: int, num_heads: int, cos: Any, sin: Any, sign: Any, dtype: Any) -> None:
    """``num_heads`` heads that follow each other."""
    half = len(sin)
    for head in range(num_heads):
        x1, x2 = line(x_at, 2 * head, half, dtype), line(x_at, 2 * head + 1, half, dtype)
        out1, out2 = line(out_at, 2 * head, half, dtype), line(out_at, 2 * head + 1, half, dtype)
        for c in range(half):
            first, second, s = loaded(x1[c]), loaded(x2[c]), sign * sin[c]
            out1[c] = stored(first * cos[c] - second * s, dtype)
            out2[c] = stored(second * cos[c] + first * s, dtype)


@inlined
def _copy(x_at: int, out_at: int, width: int, dtype: Any) -> None:
    x, out = array(x_at, width, dtype), array(out_at, width, dtype)
    for c in range(width):
        out[c] = x[c]


@inlined
def _rotary_heads(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, num_heads, num_kv_heads, d = a[1], a[2], a[3], a[4]
    head_bytes = d * item_bytes(dtype)
    num_rotated = num_heads + num_kv_heads
    first, stop = share(num_rows)
    for row in range(first, stop):
        cos, sin = line(a[6], row, d, np.float32), line(a[7], row, d // 2, np.float32)
        at = row * (num_rotated + num_kv_heads) * head_bytes
        _rotate(a[5] + at, a[8] + at, num_rotated, cos, sin, np.float32(1), dtype)
        at += num_rotated * head_bytes
        _copy(a[5] + at, a[8] + at, num_kv_heads * d, dtype)


@inlined
def _rotary_heads_backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, num_heads, num_kv_heads, d = a[1], a[2], a[3], a[4]
    size = item_bytes(dtype)
    first, stop = share(num_rows)
    for row in range(first, stop):
        cos, sin = line(a[5], row, d, np.float32), line(a[6], row, d // 2, np.float32)
        at = a[13] + row * (num_heads + 2 * num_kv_heads) * d * size
        _rotate(a[7] + row * a[8] * size, at, num_heads, cos, sin, np.float32(-1), dtype)
        at += num_heads * d * size
        _rotate(a[9] + row * a[10] * size, at, num_kv_heads, cos, sin, np.float32(-1), dtype)
        at += num_kv_heads * d * size
        _copy(a[11] + row * a[12] * size, at, num_kv_heads * d, dtype)


@inlined
def _swiglu(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width = a[1], a[2]
    first, stop = share(num_rows)
    for row in range(first, stop):
        gate, up = line(a[3], 2 * row, width, dtype), line(a[3], 2 * row + 1, width, dtype)
        out = line(a[4], row, width, dtype)
        for c in range(width):
            g = loaded(gate[c])
            out[c] = stored(g / (np.float32(1) + exp(-g)) * loaded(up[c]), dtype)


@inlined
def _swiglu_backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width = a[1], a[2]
    first, stop = share(num_rows)
    for row in range(first, stop):
        gate, up = line(a[3], 2 * row, width, dtype), line(a[3], 2 * row + 1, width, dtype)
        dout = line(a[4], row, width, dtype)
        dgate, dup = line(a[5], 2 * row, width, dtype), line(a[5], 2 * row + 1, width, dtype)
        for c in range(width):
            g, dy = loaded(gate[c]), loaded(dout[c])
            sigmoid = np.float32(1) / (np.float32(1) + exp(-g))
            slope = sigmoid * (np.float32(1) + g * (np.float32(1) - sigmoid))
            dgate[c] = stored(dy * loaded(up[c]) * slope, dtype)
            dup[c] = stored(dy * g * sigmoid, dtype)


@kernel
def add_rms_norm(p: Any) -> None:
    if is_bf16(p):
        _add_rms_norm(p, np.uint16)
    else:
        _add_rms_norm(p, np.float32)


@kernel
def add_rms_norm_backward(p: Any) -> None:
    if is_bf16(p):
        _add_rms_norm_backward(p, np.uint16)
    else:
        _add_rms_norm_backward(p, np.float32)


@kernel
def head_rms_norm(p: Any) -> None:
    if is_bf16(p):
        _head_rms_norm(p, np.uint16)
    else:
        _head_rms_norm(p, np.float32)


@kernel
def head_rms_norm_backward(p: Any) -> None:
    if is_bf16(p):
        _head_rms_norm_backward(p, np.uint16)
    else:
        _head_rms_norm_backward(p, np.float32)


@kernel
def rotary_heads(p: Any) -> None:
    if is_bf16(p):
        _rotary_heads(p, np.uint16)
    else:
        _rotary_heads(p, np.float32)


@kernel
def rotary_heads_backward(p: Any) -> None:
    if is_bf16(p):
        _rotary_heads_backward(p, np.uint16)
    else:
        _rotary_heads_backward(p, np.float32)


@kernel
def swiglu(p: Any) -> None:
    if is_bf16(p):
        _swiglu(p, np.uint16)
    else:
        _swiglu(p, np.float32)


@kernel
def swiglu_backward(p: Any) -> None:
    if is_bf16(p):
        _swiglu_backward(p, np.uint16)
    else:
        _swiglu_backward(p, np.float32)
