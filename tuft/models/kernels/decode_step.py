"""One step of decoding, all layers in one call: of few rows, which have each their own adapter.

Such a step is limited by reading weights once. Called operator by operator it waits mostly for the calls; here threads
meet between its stages and nothing else happens. Rounded where the operators round.

A thread has a share of each stage: of the columns of a product, of the heads, or of the rows. What one element gets is
computed in an order that depends on nothing but sizes, so a row's bits depend neither on others nor on threads. An
adapter's ``A x`` is computed beside the base product, and its ``B`` is added by whoever reads the result next.

Shape letters: ``B`` rows, ``D`` residual channels, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head,
``I`` MLP channels, ``K`` in_features, ``N`` out_features, ``r`` rank of an adapter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tuft.models.kernels.lora_segments import inner_product
from tuft.models.kernels.native import (
    arguments,
    array,
    as_double,
    exp,
    inlined,
    kernel,
    loaded,
    stored,
    turn,
    wait_for_all,
)
from tuft.models.kernels.paged_attention import (
    PAGE_TOKENS,
    add_context,
    scores_of_page,
    softmax,
    write_key,
    write_value,
)
from tuft.models.kernels.panels import PANEL, multiply_panels
from tuft.models.kernels.vectors import LANES, add, fma, load, spread, store

LAYER_ADDRESSES = 11
"""Of each layer: the weights of qkv, o, gate_up and down in panels, their float32 biases (0: none), the norms before
attention and MLP, and of the heads (0: none)."""

_QKV, _O, _GATE_UP, _DOWN, _NORM, _MLP_NORM, _HEAD_NORM = 0, 1, 2, 3, 8, 9, 10
_BIAS = 4  # behind the weight
_BF16_BYTES, _F32_BYTES = 2, 4


class _Sizes(NamedTuple):
    num_rows: int
    D: int
    H: int
    G: int
    d: int
    I: int
    eps: Any


class _Lora(NamedTuple):
    """``addresses``: of A and B of every group of linears and row (0: none), ``[groups, 2, B]``. ``h_at``: where the
    rows' ``scale * A x`` lie, float32 ``[B, 3 * max_rank]``."""

    exists: bool
    addresses: Any
    ranks: Any
    scales: Any
    max_rank: int
    h_at: int


class _Sequences(NamedTuple):
    """``lengths``: the new position included. ``table_at``: pages of each row; ``pool``: where pages lie."""

    lengths: Any
    table_at: int
    max_pages: int
    pool: int
    page_bytes: int
    cos_at: int
    sin_at: int


class _Work(NamedTuple):
    """Addresses. float32: residual ``[B, D]``, and this thread's query and scores. bf16: the rest, of whole eights of
    rows."""

    residual: int
    scores: int
    normed: int
    qkv: int
    context: int
    update: int
    gate_up: int
    inner: int


# --- adapters ---------------------------------------------------------------------------------------------------------


@inlined
def _project(x_at: int, K: int, group: int, num_linears: int, lora: Any) -> None:
    """This thread's elements of ``h`` of all rows, as they are in bf16."""
    num_rows = len(lora.ranks)
    thread, num_threads = turn()
    for row in range(num_rows):
        A = lora.addresses[(2 * group) * num_rows + row]
        if A == 0:
            continue
        width = num_linears * lora.max_rank
        h = array(lora.h_at + row * width * _F32_BYTES, width, np.float32)
        x = x_at + row * K * _BF16_BYTES
        for i in range((row + thread) % num_threads, num_linears * lora.ranks[row], num_threads):
            inner = loaded(stored(inner_product(x, A + i * K * _BF16_BYTES, K, np.uint16, 2), np.uint16))
            h[i] = loaded(stored(inner * lora.scales[row], np.uint16))


@inlined
def _add_lora(y_at: int, row: int, group: int, num_linears: int, linear: Any, columns: Any, lora: Any) -> None:
    """``y[columns] += B h`` of one row: ``columns`` of the linear are (first, stop), ``y_at`` is that of the first;
    ``linear`` is (its number, columns of those before it, its own)."""
    num_rows = len(lora.ranks)
    B = lora.addresses[(2 * group + 1) * num_rows + row]
    if B == 0:
        return
    number, before, width = linear
    first, stop = columns
    rank = lora.ranks[row]
    h = array(lora.h_at + (row * lora.max_rank * num_linears + number * rank) * _F32_BYTES, rank, np.float32)
    B += rank * before * _BF16_BYTES
    for n in range(first, stop, LANES):
        sums = spread(np.float32(0))
        for i in range(rank):
            sums = fma(spread(h[i]), load(B + (i * width + n) * _BF16_BYTES, np.uint16), sums)
        y = y_at + (n - first) * _BF16_BYTES
        store(y, add(load(y, np.uint16), sums), np.uint16)


@inlined
def _multiply(
    x_at: int, K: int, y_at: int, N: int, weights: Any, which: int, group: Any, sizes: Any, lora: Any
) -> None:
    """This thread's part of a linear, and of its adapters' first products; ``group`` is (its number, linears)."""
    multiply_panels(x_at, sizes.num_rows, K, weights[which], weights[which + _BIAS], y_at, N)
    if lora.exists:
        number, num_linears = group
        _project(x_at, K, number, num_linears, lora)


# --- rows -------------------------------------------------------------------------------------------------------------


@inlined
def _norm(residual_at: int, out_at: int, weight_at: int, D: int, eps: Any) -> None:
    """The RMS norm of one row."""
    residual, weight = array(residual_at, D, np.float32), array(weight_at, D, np.float32)
    out = array(out_at, D, np.uint16)
    squares = np.float32(0)
    for c in range(D):
        squares += residual[c] * residual[c]
    factor = np.float32(1) / np.sqrt(squares / np.float32(D) + eps)
    for c in range(D):
        out[c] = stored(residual[c] * factor * weight[c], np.uint16)


@inlined
def _begin(tokens: Any, embeddings: int, norm_at: int, sizes: Any, work: Any) -> None:
    """The residual stream begins with the tokens' embeddings."""
    D = sizes.D
    thread, num_threads = turn()
    for row in range(thread, sizes.num_rows, num_threads):
        residual_at = work.residual + row * D * _F32_BYTES
        given, residual = (
            array(embeddings + tokens[row] * D * _BF16_BYTES, D, np.uint16),
            array(residual_at, D, np.float32),
        )
        for c in range(D):
            residual[c] = loaded(given[c])
        _norm(residual_at, work.normed + row * D * _BF16_BYTES, norm_at, D, sizes.eps)


@inlined
def _add_update(group: int, norm_at: int, sizes: Any, lora: Any, work: Any) -> None:
    """``residual += update``, which is of the linear ``group``, and its norm."""
    D = sizes.D
    thread, num_threads = turn()
    for row in range(thread, sizes.num_rows, num_threads):
        residual_at, update_at = work.residual + row * D * _F32_BYTES, work.update + row * D * _BF16_BYTES
        if lora.exists:
            _add_lora(update_at, row, group, 1, (0, 0, D), (0, D), lora)
        residual, update = array(residual_at, D, np.float32), array(update_at, D, np.uint16)
        for c in range(D):
            residual[c] += loaded(update[c])
        _norm(residual_at, work.normed + row * D * _BF16_BYTES, norm_at, D, sizes.eps)


@inlined
def _swiglu(group: int, sizes: Any, lora: Any, work: Any) -> None:
    """``silu(gate) * up``, a panel's columns of a row at a time."""
    I = sizes.I
    thread, num_threads = turn()
    for item in range(thread, sizes.num_rows * (I // PANEL), num_threads):
        row, first = item // (I // PANEL), item % (I // PANEL) * PANEL
        gate_at = work.gate_up + (row * 2 * I + first) * _BF16_BYTES
        up_at = gate_at + I * _BF16_BYTES
        if lora.exists:
            _add_lora(gate_at, row, group, 2, (0, 0, I), (first, first + PANEL), lora)
            _add_lora(up_at, row, group, 2, (1, I, I), (first, first + PANEL), lora)
        gate, up = array(gate_at, PANEL, np.uint16), array(up_at, PANEL, np.uint16)
        out = array(work.inner + (row * I + first) * _BF16_BYTES, PANEL, np.uint16)
        for c in range(PANEL):
            g = loaded(gate[c])
            out[c] = stored(g / (np.float32(1) + exp(-g)) * loaded(up[c]), np.uint16)


# --- heads ------------------------------------------------------------------------------------------------------------


@inlined
def _norm_head(x: Any, weight_at: int, d: int, eps: Any) -> None:
    """In place."""
    weight, squares = array(weight_at, d, np.float32), np.float32(0)
    for c in range(d):
        squares += loaded(x[c]) * loaded(x[c])
    factor = np.float32(1) / np.sqrt(squares / np.float32(d) + eps)
    for c in range(d):
        x[c] = stored(loaded(x[c]) * factor * weight[c], np.uint16)


@inlined
def _rotate_head(x: Any, cos_at: int, sin_at: int, d: int) -> None:
    """In place."""
    half = d // 2
    cos, sin = array(cos_at, half, np.float32), array(sin_at, half, np.float32)
    for c in range(half):
        first, second = loaded(x[c]), loaded(x[half + c])
        x[c] = stored(first * cos[c] - second * sin[c], np.uint16)
        x[half + c] = stored(second * cos[c] + first * sin[c], np.uint16)


@inlined
def _place_heads(layer: int, norm_at: int, sizes: Any, sequences: Any, lora: Any, work: Any) -> None:
    """Queries and keys normed and rotated, keys and values written to their pages."""
    _, _, H, G, d, _, eps = sizes
    heads = H + 2 * G
    thread, num_threads = turn()
    for item in range(thread, sizes.num_rows * heads, num_threads):
        row, head = item // heads, item % heads
        x_at = work.qkv + item * d * _BF16_BYTES
        if lora.exists:
            linear, first = (0, 0, H * d), head * d
            if head >= H + G:
                linear, first = (2, (H + G) * d, G * d), (head - H - G) * d
            elif head >= H:
                linear, first = (1, H * d, G * d), (head - H) * d
            _add_lora(x_at, row, 4 * layer, 3, linear, (first, first + d), lora)
        x, position = array(x_at, d, np.uint16), sequences.lengths[row] - 1
        if head < H + G:
            if norm_at != 0:
                _norm_head(x, norm_at + head * d * _F32_BYTES, d, eps)
            sin_at = sequences.sin_at + position * (d // 2) * _F32_BYTES
            _rotate_head(x, sequences.cos_at + position * d * _F32_BYTES, sin_at, d)
        if head >= H:
            pages = array(sequences.table_at + row * sequences.max_pages * 8, sequences.max_pages, np.int64)
            block = sequences.pool + pages[position // PAGE_TOKENS] * sequences.page_bytes
            block += (layer * 2 * G + head - H) * PAGE_TOKENS * d * _BF16_BYTES
            if head < H + G:
                write_key(block, position % PAGE_TOKENS, x, d, np.uint16)
            else:
                write_value(block, position % PAGE_TOKENS, x, d, np.uint16)


@inlined
def _attend(layer: int, sizes: Any, sequences: Any, work: Any) -> None:
    """Every query head over the pages of its sequence."""
    _, _, H, G, d, _, _ = sizes
    block_bytes = PAGE_TOKENS * d * _BF16_BYTES
    scale = np.float32(1) / np.sqrt(np.float32(d))
    query, scores_at = array(work.scores, d, np.float32), work.scores + d * _F32_BYTES
    thread, num_threads = turn()
    for item in range(thread, sizes.num_rows * H, num_threads):
        row, head = item // H, item % H
        pages = array(sequences.table_at + row * sequences.max_pages * 8, sequences.max_pages, np.int64)
        keys = sequences.pool + (layer * 2 * G + head // (H // G)) * block_bytes
        values = keys + G * block_bytes
        given = array(work.qkv + (row * (H + 2 * G) + head) * d * _BF16_BYTES, d, np.uint16)
        for c in range(d):
            query[c] = loaded(given[c]) * scale
        length = sequences.lengths[row]
        num_pages = (length + PAGE_TOKENS - 1) // PAGE_TOKENS
        padded = num_pages * PAGE_TOKENS
        for n in range(num_pages):
            page = keys + pages[n] * sequences.page_bytes
            store(scores_at + n * LANES * _F32_BYTES, scores_of_page(query, 0, page, d, np.uint16, 2), np.float32)
        softmax(array(scores_at, padded, np.float32), scores_at, length, padded)
        out_at = work.context + item * d * _BF16_BYTES
        for c in range(0, d, LANES):
            sums = spread(np.float32(0))
            for n in range(num_pages):
                probs = array(scores_at + n * LANES * _F32_BYTES, PAGE_TOKENS, np.float32)
                page = values + pages[n] * sequences.page_bytes
                sums = add_context(probs, page + c * _BF16_BYTES, d, np.uint16, 2, sums)
            store(out_at + c * _BF16_BYTES, sums, np.uint16)


# --- the step ---------------------------------------------------------------------------------------------------------


@inlined
def _layer(layer: int, weights: Any, sizes: Any, sequences: Any, lora: Any, work: Any, meeting: Any) -> int:
    """One layer, from its normed input to ``update``, which is not added yet. ``meeting`` is (counter, target)."""
    _, D, H, G, d, I, _ = sizes
    counter, target = meeting
    number = 4 * layer
    _multiply(work.normed, D, work.qkv, (H + 2 * G) * d, weights, _QKV, (number, 3), sizes, lora)
    target = wait_for_all(counter, target)
    _place_heads(layer, weights[_HEAD_NORM], sizes, sequences, lora, work)
    target = wait_for_all(counter, target)
    _attend(layer, sizes, sequences, work)
    target = wait_for_all(counter, target)
    _multiply(work.context, H * d, work.update, D, weights, _O, (number + 1, 1), sizes, lora)
    target = wait_for_all(counter, target)
    _add_update(number + 1, weights[_MLP_NORM], sizes, lora, work)
    target = wait_for_all(counter, target)
    _multiply(work.normed, D, work.gate_up, 2 * I, weights, _GATE_UP, (number + 2, 2), sizes, lora)
    target = wait_for_all(counter, target)
    _swiglu(number + 2, sizes, lora, work)
    target = wait_for_all(counter, target)
    _multiply(work.inner, I, work.update, D, weights, _DOWN, (number + 3, 1), sizes, lora)
    return wait_for_all(counter, target)


@kernel
def decode_step(p: Any) -> None:
    """The final norm's output is left in ``normed``."""
    a = arguments(p)
    num_layers, num_rows = a[0], a[1]
    sizes = _Sizes(num_rows, a[2], a[3], a[4], a[5], a[6], np.float32(as_double(a[7])))
    layers, final_norm, embeddings = array(a[8], num_layers * LAYER_ADDRESSES, np.int64), a[9], a[10]
    tokens = array(a[11], num_rows, np.int64)
    sequences = _Sequences(array(a[12], num_rows, np.int64), a[13], a[14], a[15], a[16], a[17], a[18])
    ranks, scales = array(a[21], num_rows, np.int64), array(a[22], num_rows, np.float32)
    lora = _Lora(a[19] != 0, array(a[19], num_layers * 8 * num_rows, np.int64), ranks, scales, a[20], a[25])
    scores = a[26] + turn()[0] * (sizes.d + sequences.max_pages * PAGE_TOKENS) * _F32_BYTES
    work = _Work(a[24], scores, a[27], a[28], a[29], a[30], a[31], a[32])
    target = 0
    for layer in range(num_layers):
        weights = layers[layer * LAYER_ADDRESSES : (layer + 1) * LAYER_ADDRESSES]
        if layer == 0:
            _begin(tokens, embeddings, weights[_NORM], sizes, work)
        else:
            _add_update(4 * layer - 1, weights[_NORM], sizes, lora, work)
        target = wait_for_all(a[23], target)
        target = _layer(layer, weights, sizes, sequences, lora, work, (a[23], target))
    _add_update(4 * num_layers - 1, final_norm, sizes, lora, work)
