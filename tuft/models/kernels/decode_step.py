"""One step of decoding, all layers in one call: of few rows, which have each their own adapter.

Such a step is limited by reading weights once. Called operator by operator it waits mostly for the calls; here threads
meet between its stages and nothing else happens. Rounded where the operators round.

A thread has a share of each stage: of the columns of a product, of the heads, or of the rows. What one element gets is
computed in an order that depends on nothing but sizes, so a row's bits depend neither on others nor on threads.

Weights lie in panels of 32 columns, ``[N / 32, units of K, 32]`` (``products``): a thread reads its panels from one end
to the other.

Shape letters: ``B`` rows, ``D`` residual channels, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head,
``I`` MLP channels, ``K`` in_features, ``N`` out_features, ``r`` rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tuft.models.kernels.lora_segments import inner_product
from tuft.models.kernels.native import (
    arguments,
    array,
    as_double,
    bf16_bits,
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
from tuft.models.kernels.products import UNIT_BYTES, multiply_add_units, spread_at, vector_at
from tuft.models.kernels.vectors import F32S, LANES, add, fma, load, spread, store

PANEL = 2 * LANES
"""Columns of a panel: two vectors, so that with ``MAX_ROWS`` rows 16 sums are under way."""

MAX_ROWS = 8
LAYER_ADDRESSES = 11
"""Of each layer: the weights of qkv, o, gate_up and down, their biases (0: none), the norms before attention and MLP,
and of the heads (0: none)."""

_F32_BYTES = 4


# --- base products ----------------------------------------------------------------------------------------------------


def _product_of(num_rows: int) -> Any:
    @intrinsic
    def product(
        context: Any,  # noqa: ARG001
        x_at: Any,
        x_bytes: Any,
        panel_at: Any,
        num_units: Any,
        bias_at: Any,
        y_at: Any,
        y_bytes: Any,
    ) -> Any:
        """``num_rows`` rows of bf16 times one panel, plus a bias if there is one, rounded to bf16."""

        def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
            x_at, x_bytes, panel_at, num_units, bias_at, y_at, y_bytes = args
            i64 = ir.IntType(64)
            zero = ir.Constant(F32S, [0.0] * LANES)
            vector_bytes = LANES * UNIT_BYTES
            xs = [b.add(x_at, b.mul(x_bytes, ir.Constant(i64, row))) for row in range(num_rows)]
            sums = [[cgutils.alloca_once_value(b, zero) for _ in range(2)] for _ in range(num_rows)]
            with cgutils.for_range(b, num_units) as loop:
                unit = b.mul(loop.index, ir.Constant(i64, UNIT_BYTES))
                column_at = b.add(panel_at, b.mul(loop.index, ir.Constant(i64, 2 * vector_bytes)))
                columns = [vector_at(b, b.add(column_at, ir.Constant(i64, v * vector_bytes))) for v in range(2)]
                for row in range(num_rows):
                    one = spread_at(b, b.add(xs[row], unit))
                    for v in range(2):
                        total = multiply_add_units(b, one, columns[v], b.load(sums[row][v]), types.uint16)
                        b.store(total, sums[row][v])
            halves = ir.VectorType(ir.IntType(16), LANES)
            has_bias = b.icmp_signed("!=", bias_at, ir.Constant(i64, 0))
            for v in range(2):
                bias = cgutils.alloca_once_value(b, zero)
                with b.if_then(has_bias):
                    at = b.add(bias_at, ir.Constant(i64, v * vector_bytes))
                    b.store(vector_at(b, at), bias)
                for row in range(num_rows):
                    value = b.fadd(b.load(sums[row][v]), b.load(bias))
                    at = b.add(y_at, b.mul(y_bytes, ir.Constant(i64, row)))
                    at = b.add(at, ir.Constant(i64, v * LANES * 2))
                    b.store(bf16_bits(b, value), b.inttoptr(at, halves.as_pointer()), align=2)
            return c.get_dummy_value()

        given = (x_at, x_bytes, panel_at, num_units, bias_at, y_at, y_bytes)
        return types.void(*given), generate

    return product


_product_1, _product_2, _product_4, _product_8 = (_product_of(rows) for rows in (1, 2, 4, MAX_ROWS))


@inlined
def _multiply(x_at: int, num_rows: int, K: int, weight_at: int, bias_at: int, y_at: int, N: int) -> None:
    """This thread's columns of ``y_BN = x_BK @ W.T + bias``; the bias is float32. Rows of x and y follow each other,
    and whole eights of them may be read and written."""
    thread, num_threads = turn()
    num_panels, num_units, x_bytes, y_bytes = N // PANEL, K // 2, K * 2, N * 2
    for panel in range(num_panels * thread // num_threads, num_panels * (thread + 1) // num_threads):
        panel_at = weight_at + panel * num_units * PANEL * UNIT_BYTES
        bias = 0 if bias_at == 0 else bias_at + panel * PANEL * _F32_BYTES
        for row in range(0, num_rows, MAX_ROWS):
            x, y = x_at + row * x_bytes, y_at + row * y_bytes + panel * PANEL * 2
            left = num_rows - row
            if left > 4:
                _product_8(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            elif left > 2:
                _product_4(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            elif left == 2:
                _product_2(x, x_bytes, panel_at, num_units, bias, y, y_bytes)
            else:
                _product_1(x, x_bytes, panel_at, num_units, bias, y, y_bytes)


# --- adapters ---------------------------------------------------------------------------------------------------------


@inlined
def _project(x_at: int, K: int, group: int, num_linears: int, lora: Any, h_at: int) -> None:
    """This thread's elements of ``h = scale * A x`` of all rows, float32, as they are in bf16."""
    addresses, ranks, scales, max_rank = lora
    num_rows = len(ranks)
    thread, num_threads = turn()
    for row in range(num_rows):
        A = addresses[(2 * group) * num_rows + row]
        if A == 0:
            continue
        h = array(h_at + row * num_linears * max_rank * _F32_BYTES, num_linears * max_rank, np.float32)
        x = x_at + row * K * 2
        for i in range((row + thread) % num_threads, num_linears * ranks[row], num_threads):
            inner = loaded(stored(inner_product(x, A + i * K * 2, K, np.uint16, 2), np.uint16))
            h[i] = loaded(stored(inner * scales[row], np.uint16))


@inlined
def _add_lora(
    y_at: int, row: int, group: int, linear: Any, num_linears: int, columns: Any, lora: Any, h_at: int
) -> None:
    """``y[columns] += B h`` of one row: ``columns`` of the linear are (first, stop), ``y_at`` is that of the first;
    ``linear`` is (its number, columns of those before it, its own)."""
    addresses, ranks, _, max_rank = lora
    num_rows = len(ranks)
    B = addresses[(2 * group + 1) * num_rows + row]
    if B == 0:
        return
    number, before, width = linear
    first, stop = columns
    rank = ranks[row]
    h = array(h_at + (row * max_rank * num_linears + number * rank) * _F32_BYTES, rank, np.float32)
    B += rank * before * 2
    for n in range(first, stop, LANES):
        sums = spread(np.float32(0))
        for i in range(rank):
            sums = fma(spread(h[i]), load(B + (i * width + n) * 2, np.uint16), sums)
        y = y_at + (n - first) * 2
        store(y, add(load(y, np.uint16), sums), np.uint16)


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
def _add_update(residual_at: int, update_at: int, D: int) -> None:
    residual, update = array(residual_at, D, np.float32), array(update_at, D, np.uint16)
    for c in range(D):
        residual[c] += loaded(update[c])


@inlined
def _widen(given_at: int, residual_at: int, D: int) -> None:
    given, residual = array(given_at, D, np.uint16), array(residual_at, D, np.float32)
    for c in range(D):
        residual[c] = loaded(given[c])


# --- heads ------------------------------------------------------------------------------------------------------------


@inlined
def _normed_head(x_at: int, weight_at: int, d: int, eps: Any) -> None:
    """In place."""
    x, weight = array(x_at, d, np.uint16), array(weight_at, d, np.float32)
    squares = np.float32(0)
    for c in range(d):
        squares += loaded(x[c]) * loaded(x[c])
    factor = np.float32(1) / np.sqrt(squares / np.float32(d) + eps)
    for c in range(d):
        x[c] = stored(loaded(x[c]) * factor * weight[c], np.uint16)


@inlined
def _rotate_head(x_at: int, cos_at: int, sin_at: int, d: int) -> None:
    """In place."""
    half = d // 2
    first, second = array(x_at, half, np.uint16), array(x_at + half * 2, half, np.uint16)
    cos, sin = array(cos_at, half, np.float32), array(sin_at, half, np.float32)
    for c in range(half):
        x1, x2 = loaded(first[c]), loaded(second[c])
        first[c] = stored(x1 * cos[c] - x2 * sin[c], np.uint16)
        second[c] = stored(x2 * cos[c] + x1 * sin[c], np.uint16)


@inlined
def _attend_head(
    query_at: int, out_at: int, length: int, pages: Any, pool: int, page_bytes: int, kv: Any, work_at: int
) -> None:
    """One query head over the pages of its sequence. ``kv`` is (head, key-value heads, channels); the workspace has
    the query and a score for every position, float32."""
    head, num_kv_heads, d = kv
    block_bytes = PAGE_TOKENS * d * 2
    query, given = array(work_at, d, np.float32), array(query_at, d, np.uint16)
    scale = np.float32(1) / np.sqrt(np.float32(d))
    for c in range(d):
        query[c] = loaded(given[c]) * scale
    num_pages = (length + PAGE_TOKENS - 1) // PAGE_TOKENS
    scores_at, padded = work_at + d * _F32_BYTES, num_pages * PAGE_TOKENS
    for n in range(num_pages):
        keys = pool + pages[n] * page_bytes + head * block_bytes
        store(scores_at + n * PAGE_TOKENS * _F32_BYTES, scores_of_page(query, 0, keys, d, np.uint16, 2), np.float32)
    softmax(array(scores_at, padded, np.float32), scores_at, length, padded)
    for c in range(0, d, LANES):
        sums = spread(np.float32(0))
        for n in range(num_pages):
            probs = array(scores_at + n * PAGE_TOKENS * _F32_BYTES, PAGE_TOKENS, np.float32)
            values = pool + pages[n] * page_bytes + (num_kv_heads + head) * block_bytes
            sums = add_context(probs, values + c * 2, d, np.uint16, 2, sums)
        store(out_at + c * 2, sums, np.uint16)


@inlined
def _swiglu(gate_at: int, up_at: int, out_at: int, width: int) -> None:
    gate, up, out = (
        array(gate_at, width, np.uint16),
        array(up_at, width, np.uint16),
        array(out_at, width, np.uint16),
    )
    for c in range(width):
        g = loaded(gate[c])
        out[c] = stored(g / (np.float32(1) + exp(-g)) * loaded(up[c]), np.uint16)


# --- the step ---------------------------------------------------------------------------------------------------------


@kernel
def decode_step(p: Any) -> None:
    a = arguments(p)
    num_layers, num_rows, D, H, G, d, I = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    eps = np.float32(as_double(a[7]))
    layers, final_norm, embeddings = array(a[8], num_layers * LAYER_ADDRESSES, np.int64), a[9], a[10]
    tokens, lengths = array(a[11], num_rows, np.int64), array(a[12], num_rows, np.int64)
    table_at, max_pages, pool, page_bytes, cos_at, sin_at = a[13], a[14], a[15], a[16], a[17], a[18]
    has_lora, max_rank = a[19] != 0, a[20]
    lora = (
        array(a[19], num_layers * 8 * num_rows, np.int64),
        array(a[21], num_rows, np.int64),
        array(a[22], num_rows, np.float32),
        max_rank,
    )
    # workspaces: counter; residual [B, D] and h [B, 3 r] float32; normed, qkv, context, update, gate_up, inner bf16
    counter, residual, h, normed, qkv = a[23], a[24], a[25], a[26], a[27]
    context, update, gate_up, inner, out = a[28], a[29], a[30], a[31], a[26]
    thread, num_threads = turn()
    work = a[25] + num_rows * 3 * max(max_rank, 1) * _F32_BYTES  # behind h: of each thread, query and scores
    work += thread * (d + max_pages * PAGE_TOKENS) * _F32_BYTES
    heads = H + 2 * G
    N = heads * d
    target = 0
    for layer in range(num_layers):
        of_layer = layers[layer * LAYER_ADDRESSES : (layer + 1) * LAYER_ADDRESSES]
        for row in range(thread, num_rows, num_threads):
            if layer == 0:
                _widen(embeddings + tokens[row] * D * 2, residual + row * D * 4, D)
            else:
                if has_lora:
                    _add_lora(update + row * D * 2, row, 4 * layer - 1, (0, 0, D), 1, (0, D), lora, h)
                _add_update(residual + row * D * 4, update + row * D * 2, D)
            _norm(residual + row * D * 4, normed + row * D * 2, of_layer[8], D, eps)
        target = wait_for_all(counter, target)

        _multiply(normed, num_rows, D, of_layer[0], of_layer[4], qkv, N)
        if has_lora:
            _project(normed, D, 4 * layer, 3, lora, h)
        target = wait_for_all(counter, target)

        for item in range(thread, num_rows * heads, num_threads):
            row, head = item // heads, item % heads
            x = qkv + (row * N + head * d) * 2
            if has_lora:
                linear, first = (0, 0, H * d), head * d
                if head >= H + G:
                    linear, first = (2, (H + G) * d, G * d), (head - H - G) * d
                elif head >= H:
                    linear, first = (1, H * d, G * d), (head - H) * d
                _add_lora(x, row, 4 * layer, linear, 3, (first, first + d), lora, h)
            position = lengths[row] - 1
            if head < H + G:
                if of_layer[10] != 0:
                    _normed_head(x, of_layer[10] + head * d * 4, d, eps)
                _rotate_head(x, cos_at + position * d * 4, sin_at + position * d * 2, d)
            if head >= H:
                pages = array(table_at + row * max_pages * 8, max_pages, np.int64)
                block = pool + pages[position // PAGE_TOKENS] * page_bytes
                block += (layer * 2 * G + head - H) * PAGE_TOKENS * d * 2
                if head < H + G:
                    write_key(block, position % PAGE_TOKENS, array(x, d, np.uint16), d, np.uint16)
                else:
                    write_value(block, position % PAGE_TOKENS, array(x, d, np.uint16), d, np.uint16)
        target = wait_for_all(counter, target)

        for item in range(thread, num_rows * H, num_threads):
            row, head = item // H, item % H
            pages = array(table_at + row * max_pages * 8, max_pages, np.int64)
            of_pool = pool + layer * 2 * G * PAGE_TOKENS * d * 2
            _attend_head(
                qkv + (row * N + head * d) * 2,
                context + (row * H + head) * d * 2,
                lengths[row],
                pages,
                of_pool,
                page_bytes,
                (head // (H // G), G, d),
                work,
            )
        target = wait_for_all(counter, target)

        _multiply(context, num_rows, H * d, of_layer[1], of_layer[5], update, D)
        if has_lora:
            _project(context, H * d, 4 * layer + 1, 1, lora, h)
        target = wait_for_all(counter, target)

        for row in range(thread, num_rows, num_threads):
            if has_lora:
                _add_lora(update + row * D * 2, row, 4 * layer + 1, (0, 0, D), 1, (0, D), lora, h)
            _add_update(residual + row * D * 4, update + row * D * 2, D)
            _norm(residual + row * D * 4, normed + row * D * 2, of_layer[9], D, eps)
        target = wait_for_all(counter, target)

        _multiply(normed, num_rows, D, of_layer[2], of_layer[6], gate_up, 2 * I)
        if has_lora:
            _project(normed, D, 4 * layer + 2, 2, lora, h)
        target = wait_for_all(counter, target)

        num_panels = I // PANEL
        for item in range(thread, num_rows * num_panels, num_threads):
            row, first = item // num_panels, item % num_panels * PANEL
            gate = gate_up + (row * 2 * I + first) * 2
            if has_lora:
                columns = (first, first + PANEL)
                _add_lora(gate, row, 4 * layer + 2, (0, 0, I), 2, columns, lora, h)
                _add_lora(gate + I * 2, row, 4 * layer + 2, (1, I, I), 2, columns, lora, h)
            _swiglu(gate, gate + I * 2, inner + (row * I + first) * 2, PANEL)
        target = wait_for_all(counter, target)

        _multiply(inner, num_rows, I, of_layer[3], of_layer[7], update, D)
        if has_lora:
            _project(inner, I, 4 * layer + 3, 1, lora, h)
        target = wait_for_all(counter, target)

    for row in range(thread, num_rows, num_threads):
        if has_lora:
            _add_lora(update + row * D * 2, row, 4 * num_layers - 1, (0, 0, D), 1, (0, D), lora, h)
        _add_update(residual + row * D * 4, update + row * D * 2, D)
        _norm(residual + row * D * 4, out + row * D * 2, final_norm, D, eps)
