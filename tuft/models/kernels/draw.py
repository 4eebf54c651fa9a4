"""Drawing tokens from logits: the softmax of a row and the token at which it reaches a given share, one thread a row.

Where logits are rounded to bf16 the two that matter, the largest and that of the token drawn, are computed again in
float32 from the hidden state, as ``models.head`` does.

Shape letters: ``N`` draws, ``V`` vocabulary, ``D`` residual channels, ``r`` rank of the unembedding's adapter.
"""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np

from tuft.models.kernels.native import arguments, array, as_float32, inlined, kernel, loaded, turn
from tuft.models.kernels.vectors import (
    LANES,
    add,
    exp_of_negative,
    fma,
    larger,
    largest,
    load,
    spread,
    store,
    total,
    zero_where_below,
)

BLOCK_TOKENS = 128
"""The vocabulary is padded to whole blocks; a block's mass is summed in float32, blocks in float64."""

_F32_BYTES = 4


@inlined
def _widen(scores: Any, scores_at: int, logits_at: int, width: int, dtype: Any, size: int) -> int:
    """The logits as float32, -infinity beyond them; returns the index of the largest, or of a NaN if there is one."""
    padded = len(scores)
    whole = width // LANES * LANES
    for v in range(0, whole, LANES):
        store(scores_at + v * _F32_BYTES, load(logits_at + v * size, dtype), np.float32)
    tail = array(logits_at, width, dtype)
    for v in range(whole, width):
        scores[v] = loaded(tail[v])
    for v in range(width, padded):
        scores[v] = np.float32(-np.inf)
    return _argmax(scores, scores_at)


@inlined
def _argmax(scores: Any, scores_at: int) -> int:
    padded = len(scores)
    best_block, best = 0, np.float32(-np.inf)
    for start in range(0, padded, BLOCK_TOKENS):
        peak = load(scores_at + start * _F32_BYTES, np.float32)
        for v in range(start + LANES, start + BLOCK_TOKENS, LANES):
            peak = larger(peak, load(scores_at + v * _F32_BYTES, np.float32))
        here = largest(peak)
        if here > best:
            best, best_block = here, start
    token = best_block
    for v in range(best_block, best_block + BLOCK_TOKENS):
        if scores[v] == best:
            token = v
            break
    return token


@inlined
def _exact(token: int, x_at: int, head_at: int, d: int, lora: Any, n: int, dtype: Any, size: int) -> Any:
    """The logit of ``token`` in float32 from the hidden state in float32 at ``x_at``."""
    row = head_at + token * d * size
    sums = spread(np.float32(0))
    whole = d // LANES * LANES
    for c in range(0, whole, LANES):
        sums = fma(load(x_at + c * _F32_BYTES, np.float32), load(row + c * size, dtype), sums)
    logit = total(sums)
    x_D, head_D = array(x_at, d, np.float32), array(row, d, dtype)
    for c in range(whole, d):
        logit += x_D[c] * loaded(head_D[c])
    addresses_A, addresses_B, ranks, scales = lora
    if addresses_A[n] != 0:
        rank = ranks[n]
        A, B_r = array(addresses_A[n], rank * d, np.float32), array(addresses_B[n] + token * rank * 4, rank, np.float32)
        for i in range(rank):
            inner = np.float32(0)
            for c in range(d):
                inner += A[i * d + c] * x_D[c]
            logit += inner * scales[n] * B_r[i]
    return logit


@inlined
def _masses(scores_at: int, masses: Any, factor: Any, offset: Any) -> Any:
    """``exp(score * factor - offset)`` in place; each block's sum; returns the sum of all."""
    mass = np.float64(0)
    factors, offsets = spread(factor), spread(-offset)
    for block in range(len(masses)):
        sums = spread(np.float32(0))
        start = scores_at + block * BLOCK_TOKENS * _F32_BYTES
        for v in range(0, BLOCK_TOKENS, LANES):
            e = exp_of_negative(fma(load(start + v * _F32_BYTES, np.float32), factors, offsets))
            store(start + v * _F32_BYTES, e, np.float32)
            sums = add(sums, e)
        masses[block] = np.float64(total(sums))
        mass += masses[block]
    return mass


@inlined
def _token_at(probs: Any, masses: Any, target: Any) -> int:
    """The first token at which the accumulated mass exceeds ``target``; always one that has any."""
    num_blocks = len(masses)
    block, before = 0, np.float64(0)
    while block < num_blocks - 1 and before + masses[block] <= target:
        before += masses[block]
        block += 1
    while masses[block] == 0 and block > 0:  # rounding may have led past the last one
        block -= 1
    token = block * BLOCK_TOKENS
    for v in range(block * BLOCK_TOKENS, block * BLOCK_TOKENS + BLOCK_TOKENS):
        if probs[v] > 0:
            token = v
            before += np.float64(probs[v])
            if before > target:
                break
    return token


# --- top-k and top-p --------------------------------------------------------------------------------------------------
#
# Exponentials are not negative, so their bits as whole numbers are in their own order: the smallest that is kept is
# found bit by bit, without sorting. Of equals the first in the vocabulary are kept.


@inlined
def _count_from(bits: Any, limit: int) -> int:
    count = 0
    for v in range(len(bits)):
        count += 1 if bits[v] >= limit else 0
    return count


@inlined
def _mass_from(probs_at: int, num_blocks: int, limit: int) -> Any:
    least, mass = spread(as_float32(limit)), np.float64(0)
    for block in range(num_blocks):
        sums = spread(np.float32(0))
        start = probs_at + block * BLOCK_TOKENS * _F32_BYTES
        for v in range(0, BLOCK_TOKENS, LANES):
            e = load(start + v * _F32_BYTES, np.float32)
            sums = add(sums, zero_where_below(e, e, least))
        mass += np.float64(total(sums))
    return mass


@inlined
def _keep(probs: Any, bits: Any, least: int, num_equal: int) -> None:
    """Zero all below ``least``, and of those that equal it all but the first ``num_equal``."""
    for v in range(len(probs)):
        if bits[v] < least:
            probs[v] = np.float32(0)
        elif bits[v] == least:
            if num_equal <= 0:
                probs[v] = np.float32(0)
            num_equal -= 1


@inlined
def _keep_top_k(probs: Any, bits: Any, top_k: int, peak: int) -> None:
    least, beyond = 0, bits[peak] + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if _count_from(bits, middle) >= top_k:
            least = middle
        else:
            beyond = middle
    _keep(probs, bits, least, top_k - _count_from(bits, least + 1))


@inlined
def _keep_top_p(probs_at: int, probs: Any, bits: Any, wanted: Any, peak: int) -> None:
    """The fewest that have the mass ``wanted`` together."""
    num_blocks = len(probs) // BLOCK_TOKENS
    least, beyond = 0, bits[peak] + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if _mass_from(probs_at, num_blocks, middle) >= wanted:
            least = middle
        else:
            beyond = middle
    num_equal = 1
    if least > 0:
        above = _mass_from(probs_at, num_blocks, least + 1)
        num_equal = max(1, int(np.ceil((wanted - above) / np.float64(as_float32(least)))))
    _keep(probs, bits, least, num_equal)


@inlined
def _truncated_mass(scores_at: int, masses: Any, top_k: int, top_p: Any, mass: Any, peak: int) -> Any:
    """Leave only what top-k and then top-p keep; returns the mass of that, and each block's in ``masses``."""
    padded = len(masses) * BLOCK_TOKENS
    probs, bits = array(scores_at, padded, np.float32), array(scores_at, padded, np.int32)
    if top_k > 0:
        _keep_top_k(probs, bits, top_k, peak)
        mass = _mass_from(scores_at, len(masses), 0)
    if top_p < 1:
        _keep_top_p(scores_at, probs, bits, top_p * mass, peak)
    kept = np.float64(0)
    for block in range(len(masses)):
        masses[block] = _mass_from(scores_at + block * BLOCK_TOKENS * _F32_BYTES, 1, 0)
        kept += masses[block]
    return kept


# --- a draw -----------------------------------------------------------------------------------------------------------


@inlined
def _draw(p: Any, dtype: Any, size: int, is_rounded: bool) -> None:
    a = arguments(p)
    num_draws, width, d = a[0], a[1], a[2]
    rows_N = array(a[3], num_draws, np.int64)
    temperatures_N, uniforms_N = array(a[6], num_draws, np.float32), array(a[7], num_draws, np.float64)
    lora = (
        array(a[8], num_draws, np.int64),
        array(a[9], num_draws, np.int64),
        array(a[10], num_draws, np.int64),
        array(a[11], num_draws, np.float32),
    )
    top_ks_N, top_ps_N = array(a[17], num_draws, np.int64), array(a[18], num_draws, np.float64)
    tokens_N, logprobs_N = array(a[12], num_draws, np.int64), array(a[13], num_draws, np.float32)
    num_blocks = (width + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    padded = num_blocks * BLOCK_TOKENS
    thread, step = turn()
    masses_at = a[14] + thread * a[15]  # workspace: masses float64 [blocks], scores float32 [padded], x float32 [D]
    scores_at = masses_at + num_blocks * 8
    x_at = scores_at + padded * _F32_BYTES
    masses, scores = array(masses_at, num_blocks, np.float64), array(scores_at, padded, np.float32)
    x_D = array(x_at, d, np.float32)
    for n in range(thread, num_draws, step):
        given_D = array(a[5] + rows_N[n] * d * size, d, dtype)
        for c in range(d):
            x_D[c] = loaded(given_D[c])
        logits_at = a[4] + rows_N[n] * width * size
        peak = _widen(scores, scores_at, logits_at, width, dtype, size)
        offset = scores[peak]
        if is_rounded:
            scores[peak] = _exact(peak, x_at, a[16], d, lora, n, dtype, size)
            offset = max(offset, scores[peak])
        factor = np.float32(1)
        if temperatures_N[n] > 0:
            factor = np.float32(1) / temperatures_N[n]
        likeliest = _argmax(scores, scores_at)  # another than the peak if that is less than its rounded logit was
        token = likeliest
        peak_logit = scores[peak]
        offset *= factor
        mass = _masses(scores_at, masses, factor, offset)
        if temperatures_N[n] > 0:
            kept = mass
            if top_ks_N[n] > 0 or top_ps_N[n] < 1:
                kept = _truncated_mass(scores_at, masses, top_ks_N[n], top_ps_N[n], mass, likeliest)
            token = _token_at(scores, masses, uniforms_N[n] * kept)
        row = array(logits_at, width, dtype)
        logit = loaded(row[token])
        if token == peak:
            logit = peak_logit
        if is_rounded and token != peak:
            exact = _exact(token, x_at, a[16], d, lora, n, dtype, size)
            mass += exp(np.float64(exact * factor - offset)) - exp(np.float64(logit * factor - offset))
            logit = exact
        tokens_N[n] = token
        logprobs_N[n] = np.float32(np.float64(logit * factor) - np.float64(offset) - log(mass))


@kernel
def draw_bf16(p: Any) -> None:
    _draw(p, np.uint16, 2, True)


@kernel
def draw_float32(p: Any) -> None:
    _draw(p, np.float32, 4, False)
