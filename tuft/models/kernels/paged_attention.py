"""Attention of single new tokens over keys and values that lie in pages.

A page holds ``PAGE_TOKENS`` positions of one sequence, for every layer: keys ``[G, d, 16]`` (transposed, so that the
scores of 16 positions are one vector) and values ``[G, 16, d]``. What was never written in a page is zero.

Each row and key-value head is one thread's, positions in order, everything in float32.

Shape letters: ``B`` rows, ``H`` query heads, ``G`` key-value heads, ``g`` = H / G, ``d`` channels of a head, ``L``
positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tuft.models.kernels.native import arguments, array, as_double, inlined, kernel, loaded, stored, turn
from tuft.models.kernels.vectors import LANES, add, exp_of_negative, fma, larger, largest, load, spread, store, total

PAGE_TOKENS = LANES
_F32_BYTES = 4


@inlined
def scores_of_page(query: Any, first: int, keys: int, d: int, dtype: Any, size: int) -> Any:
    """The products of ``query[first : first + d]`` with the 16 keys of a page, two channels at a time."""
    even, odd = spread(np.float32(0)), spread(np.float32(0))
    block = PAGE_TOKENS * size
    for c in range(0, d, 2):
        even = fma(spread(query[first + c]), load(keys + c * block, dtype), even)
        odd = fma(spread(query[first + c + 1]), load(keys + (c + 1) * block, dtype), odd)
    return add(even, odd)


@inlined
def softmax(scores: Any, address: int, length: int, padded: int) -> None:
    """In place over ``scores[:length]``; the rest up to ``padded`` becomes 0."""
    for j in range(length, padded):
        scores[j] = np.float32(-np.inf)
    peak = load(address, np.float32)
    for j in range(LANES, padded, LANES):
        peak = larger(peak, load(address + j * _F32_BYTES, np.float32))
    minus_peak, one = spread(-largest(peak)), spread(np.float32(1))
    mass = spread(np.float32(0))
    for j in range(0, padded, LANES):
        e = exp_of_negative(fma(load(address + j * _F32_BYTES, np.float32), one, minus_peak))
        store(address + j * _F32_BYTES, e, np.float32)
        mass = add(mass, e)
    inverse = np.float32(1) / total(mass)
    for j in range(padded):
        scores[j] *= inverse


@inlined
def add_context(probs: Any, values: int, d: int, dtype: Any, size: int, so_far: Any) -> Any:
    """``so_far`` plus, for 16 channels, the sum over the positions of a page of probability times value."""
    even, odd = so_far, spread(np.float32(0))
    for j in range(0, PAGE_TOKENS, 2):
        even = fma(spread(probs[j]), load(values + j * d * size, dtype), even)
        odd = fma(spread(probs[j + 1]), load(values + (j + 1) * d * size, dtype), odd)
    return add(even, odd)


@inlined
def write_key(block: int, last: int, key: Any, d: int, dtype: Any) -> None:
    """The new position's key into its head's block of a page."""
    keys = array(block, PAGE_TOKENS * d, dtype)
    for c in range(d):
        keys[c * PAGE_TOKENS + last] = key[c]


@inlined
def write_value(block: int, last: int, value: Any, d: int, dtype: Any) -> None:
    values = array(block, PAGE_TOKENS * d, dtype)
    for c in range(d):
        values[last * d + c] = value[c]


@inlined
def _attend(p: Any, dtype: Any, size: int) -> None:
    a = arguments(p)
    num_rows, num_heads, num_kv_heads, d, max_pages = a[0], a[1], a[2], a[3], a[4]
    scale = np.float32(as_double(a[5]))
    lengths = array(a[7], num_rows, np.int64)
    g = num_heads // num_kv_heads
    block_bytes, pool, page_bytes = PAGE_TOKENS * d * size, a[16], a[17]
    thread, step = turn()
    query_at = a[8] + thread * (g * d + max_pages * PAGE_TOKENS) * _F32_BYTES
    query, scores_at = array(query_at, g * d, np.float32), query_at + g * d * _F32_BYTES
    for item in range(thread, num_rows * num_kv_heads, step):
        row, head = item // num_kv_heads, item % num_kv_heads
        length = lengths[row]
        num_pages = (length + PAGE_TOKENS - 1) // PAGE_TOKENS
        pages = array(a[6] + row * max_pages * 8, num_pages, np.int64)
        key = array(a[11] + row * a[12] + head * d * size, d, dtype)
        value = array(a[13] + row * a[14] + head * d * size, d, dtype)
        keys_at = head * block_bytes
        page, last = pool + pages[num_pages - 1] * page_bytes + keys_at, (length - 1) % PAGE_TOKENS
        write_key(page, last, key, d, dtype)
        write_value(page + num_kv_heads * block_bytes, last, value, d, dtype)
        given = array(a[9] + row * a[10] + head * g * d * size, g * d, dtype)
        for c in range(g * d):
            query[c] = loaded(given[c]) * scale
        for h in range(g):
            for n in range(num_pages):
                store(
                    scores_at + n * PAGE_TOKENS * _F32_BYTES,
                    scores_of_page(query, h * d, pool + pages[n] * page_bytes + keys_at, d, dtype, size),
                    np.float32,
                )
            padded = num_pages * PAGE_TOKENS
            softmax(array(scores_at, padded, np.float32), scores_at, length, padded)
            out_at = a[15] + ((row * num_heads + head * g + h) * d) * size
            values_at = (num_kv_heads + head) * block_bytes
            whole = d // LANES * LANES
            for c in range(0, whole, LANES):
                sums = spread(np.float32(0))
                for n in range(num_pages):
                    probs = array(scores_at + n * PAGE_TOKENS * _F32_BYTES, PAGE_TOKENS, np.float32)
                    sums = add_context(probs, pool + pages[n] * page_bytes + values_at + c * size, d, dtype, size, sums)
                store(out_at + c * size, sums, dtype)
            out = array(out_at, d, dtype)
            for c in range(whole, d):
                one = np.float32(0)
                for j in range(length):
                    value = array(pool + pages[j // PAGE_TOKENS] * page_bytes + values_at, PAGE_TOKENS * d, dtype)
                    prob = array(scores_at, padded, np.float32)
                    one += prob[j] * loaded(value[j % PAGE_TOKENS * d + c])
                out[c] = stored(one, dtype)


@kernel
def attend_bf16(p: Any) -> None:
    _attend(p, np.uint16, 2)


@kernel
def attend_float32(p: Any) -> None:
    _attend(p, np.float32, 4)
