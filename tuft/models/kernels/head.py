"""The softmax of a chunk's logits and its gradient, without writing either but for the gradient itself.

Some logits are known more exactly than their dtype holds: they come as pairs (row, token, float32 value), sorted by row
and then by token, the same pair several times in a row or not. One thread a row.

Shape letters: ``N`` rows of a chunk, ``A`` those with a gradient, ``V`` vocabulary, ``M`` pairs.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from tuft.models.kernels.native import (
    arguments,
    array,
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
from tuft.models.kernels.vectors import LANES, larger, largest, load, spread

_BLOCK = 1024
"""So many exponentials are summed in float32; their sums in float64."""


@inlined
def _pairs(a: Any, at: int) -> Any:
    """Four arguments from ``at`` on: how many pairs, their rows, tokens and values."""
    num_pairs = a[at]
    return (
        array(a[at + 1], num_pairs, np.int64),
        array(a[at + 2], num_pairs, np.int64),
        array(a[at + 3], num_pairs, np.float32),
    )


@inlined
def _first(sorted_M: Any, row: int) -> int:
    """Where the pairs of ``row``, or of those after it, begin."""
    low, high = 0, len(sorted_M)
    while low < high:
        middle = (low + high) // 2
        if sorted_M[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _largest(address: int, width: int, dtype: Any) -> Any:
    """NaN is skipped; -infinity if there is nothing else."""
    whole, size = width // LANES * LANES, item_bytes(dtype)
    peaks = spread(np.float32(-np.inf))
    for v in range(0, whole, LANES):
        peaks = larger(load(address + v * size, dtype), peaks)
    peak, rest = largest(peaks), array(address + whole * size, width - whole, dtype)
    for v in range(width - whole):
        peak = loaded(rest[v]) if loaded(rest[v]) > peak else peak
    return peak


@inlined
def _argmax(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width = a[1], a[2]
    tokens = array(a[4], num_rows, np.int64)
    first, stop = share(num_rows)
    for row in range(first, stop):
        logits = line(a[3], row, width, dtype)
        peak, token = _largest(a[3] + row * width * item_bytes(dtype), width, dtype), 0
        while token < width - 1 and loaded(logits[token]) != peak:
            token += 1
        tokens[row] = token


@inlined
def _log_sum_exp(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_rows, width = a[1], a[2]
    rows_M, tokens_M, values_M = _pairs(a, 4)
    first, stop = share(num_rows)
    for row in range(first, stop):
        logits = line(a[3], row, width, dtype)
        begin, end = _first(rows_M, row), _first(rows_M, row + 1)
        peak = _largest(a[3] + row * width * item_bytes(dtype), width, dtype)
        for i in range(begin, end):
            peak = max(peak, values_M[i])
        total = np.float64(0)
        for start in range(0, width, _BLOCK):
            block = array(a[3] + (row * width + start) * item_bytes(dtype), min(_BLOCK, width - start), dtype)
            mass = np.float32(0)
            for v in range(len(block)):
                mass += exp(loaded(block[v]) - peak)
            total += np.float64(mass)
        for i in range(begin, end):
            if i == begin or tokens_M[i] != tokens_M[i - 1]:
                total -= np.float64(exp(loaded(logits[tokens_M[i]]) - peak))
                total += np.float64(exp(values_M[i] - peak))
        sums = line(a[8], row, 2, np.float32)
        sums[0], sums[1] = peak, np.float32(log(total))


@inlined
def _logits_backward(p: Any, dtype: Any) -> None:
    a = arguments(p)
    num_active, width = a[1], a[2]
    active, exact, gradients = array(a[5], num_active, np.int64), _pairs(a, 6), _pairs(a, 10)
    first, stop = share(num_active)
    for place in range(first, stop):
        row = active[place]
        logits, dlogits = line(a[3], row, width, dtype), line(a[14], place, width, dtype)
        sums = line(a[4], row, 2, np.float32)
        peak, inverse = sums[0], exp(-sums[1])
        begin, end = _first(gradients[0], row), _first(gradients[0], row + 1)
        total = np.float32(0)
        for i in range(begin, end):
            total += gradients[2][i]
        for v in range(width):
            dlogits[v] = stored(-total * inverse * exp(loaded(logits[v]) - peak), dtype)
        for i in range(_first(exact[0], row), _first(exact[0], row + 1)):
            token = exact[1][i]
            dlogit = -total * inverse * exp(exact[2][i] - peak)
            while begin < end and gradients[1][begin] < token:
                begin += 1
            while begin < end and gradients[1][begin] == token:
                dlogit += gradients[2][begin]
                begin += 1
            if i == 0 or exact[0][i - 1] != row or exact[1][i - 1] != token:
                dlogits[token] = stored(dlogit, dtype)


@kernel
def argmax(p: Any) -> None:
    if is_bf16(p):
        _argmax(p, np.uint16)
    else:
        _argmax(p, np.float32)


@kernel
def log_sum_exp(p: Any) -> None:
    if is_bf16(p):
        _log_sum_exp(p, np.uint16)
    else:
        _log_sum_exp(p, np.float32)


@kernel
def logits_backward(p: Any) -> None:
    if is_bf16(p):
        _logits_backward(p, np.uint16)
    else:
        _logits_backward(p, np.float32)
