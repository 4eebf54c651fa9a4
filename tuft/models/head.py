"""The unembedding head: log-probabilities of target tokens and their gradient, in chunks, never ``[T, V]`` at once.

It runs outside autograd: the gradient of a token's log-probability needs the softmax that its chunk has anyway.
In bf16 a logit near 20 is rounded by up to 0.06, so the two logits that a log-probability hangs on, the target's and
the largest, are computed again in float32 as dot products of their rows; and so are those of a row's likeliest tokens.

Shape letters: ``T`` packed rows, ``N`` rows of one chunk, ``A`` rows of a chunk with a gradient, ``D`` residual
channels, ``V`` vocabulary, ``M`` (row, target) pairs, ``K`` likeliest tokens of a row, ``r`` LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tuft.models.decoder import Decoder
from tuft.models.functions import base_product
from tuft.models.lora import LM_HEAD, Segment
from tuft.models.lora_linear import lora_backward
from tuft.models.ops import Pairs
from tuft.models.segments import lora_rows
from tuft.models.transfer import to_device
from tuft.types import Int64Array

MAX_CHUNK_ROWS = {"cpu": 128, "cuda": 512}
"""Rows of one chunk: enough to fill the product, few enough that their float32 logits stay small (25 MB at 128 rows and
a vocabulary of 49k)."""

_PAIRS_AT_ONCE = 4096
"""A dot product reads a row of the head: as many as fill 67 MB at 4096 channels."""

LossGradient = Callable[[int, int, Tensor], Tensor | None]
"""``(first, stop, logprobs_M)`` of the pairs ``first:stop``, all of one segment, to dloss/dlogprob, or None."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Pairs sorted by row: ``tokens_M[i]`` is a target of row ``rows_M[i]``; a row may have any number of them."""

    rows_M: Int64Array
    tokens_M: Int64Array


@dataclass(frozen=True, slots=True)
class Scores:
    """``logprobs_M`` float32; ``dhidden_TD`` if a loss gradient was asked for; ``top_*_TK``, best first, if any."""

    logprobs_M: Tensor
    dhidden_TD: Tensor | None
    top_tokens_TK: Tensor | None
    top_logprobs_TK: Tensor | None


def score(
    decoder: Decoder,
    x_TD: Tensor,
    segments: Sequence[Segment],
    targets: Targets,
    loss_gradient: LossGradient | None = None,
    num_top: int = 0,
) -> Scores:
    """Log-probabilities (temperature 1) of ``targets`` under the rows of ``x_TD``, the decoder's hidden states.

    With ``loss_gradient`` also dloss/dx, and the unembedding LoRA's gradients are added to the segments' buffers. It is
    called once for every piece of a segment, and pieces depend on the segment alone, not on its neighbours.
    """
    logprobs_M = torch.empty(len(targets.rows_M), dtype=torch.float32, device=x_TD.device)
    scores = Scores(
        logprobs_M,
        torch.zeros_like(x_TD) if loss_gradient is not None else None,
        torch.empty((len(x_TD), num_top), dtype=torch.int64, device=x_TD.device) if num_top else None,
        torch.empty((len(x_TD), num_top), device=x_TD.device) if num_top else None,
    )
    with torch.no_grad():
        for pieces in _chunks(len(x_TD), segments, MAX_CHUNK_ROWS[x_TD.device.type]):
            _score_chunk(decoder, x_TD, pieces, targets, loss_gradient, scores)
    return scores


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    stop: int
    segment: Segment | None


def _chunks(num_rows: int, segments: Sequence[Segment], max_rows: int) -> Iterator[list[_Piece]]:
    """Consecutive pieces of at most ``max_rows`` rows together."""
    chunk: list[_Piece] = []
    for piece in _pieces(num_rows, segments, max_rows):
        if chunk and piece.stop - chunk[0].start > max_rows:
            yield chunk
            chunk = []
        chunk.append(piece)
    if chunk:
        yield chunk


def _pieces(num_rows: int, segments: Sequence[Segment], max_rows: int) -> Iterator[_Piece]:
    """Every segment, and the rows between segments, cut every ``max_rows`` rows from its own start."""
    spans: list[_Piece] = []
    row = 0
    for segment in segments:
        spans += [_Piece(row, segment.start, None), _Piece(segment.start, segment.stop, segment)]
        row = segment.stop
    spans.append(_Piece(row, num_rows, None))
    for span in spans:
        for start in range(span.start, span.stop, max_rows):
            yield _Piece(start, min(start + max_rows, span.stop), span.segment)


def _score_chunk(
    decoder: Decoder,
    x_TD: Tensor,
    pieces: list[_Piece],
    targets: Targets,
    loss_gradient: LossGradient | None,
    scores: Scores,
) -> None:
    start, stop = pieces[0].start, pieces[-1].stop
    x_ND = x_TD[start:stop]
    segments = [replace(p.segment, start=p.start - start, stop=p.stop - start) for p in pieces if p.segment is not None]
    first, last = np.searchsorted(targets.rows_M, (start, stop))
    rows_M = to_device(targets.rows_M[first:last] - start, x_TD.device)
    tokens_M = to_device(targets.tokens_M[first:last], x_TD.device)

    logits_NV = decoder.logits(x_ND, segments)
    target_logits_M, exact = _exact_pairs(decoder, x_ND, segments, logits_NV, (rows_M, tokens_M))
    if scores.top_tokens_TK is not None and scores.top_logprobs_TK is not None:
        top = _likeliest(decoder, x_ND, segments, logits_NV, exact, scores.top_tokens_TK.shape[1])
        scores.top_tokens_TK[start:stop], scores.top_logprobs_TK[start:stop] = top
    sums_N2, kept_NV = decoder.ops.log_sum_exp(logits_NV, exact)
    logprobs_M = scores.logprobs_M[first:last]
    torch.sub(target_logits_M - sums_N2[rows_M, 0], sums_N2[rows_M, 1], out=logprobs_M)
    if scores.top_logprobs_TK is not None:
        scores.top_logprobs_TK[start:stop].sub_(sums_N2[:, :1]).sub_(sums_N2[:, 1:])
    if loss_gradient is None or scores.dhidden_TD is None:
        return
    dlogprobs_M = torch.zeros_like(logprobs_M)
    for piece in pieces:
        lo, hi = np.searchsorted(targets.rows_M, (piece.start, piece.stop))
        gradient_M = loss_gradient(int(lo), int(hi), scores.logprobs_M[lo:hi])
        if gradient_M is not None:
            dlogprobs_M[lo - first : hi - first] = gradient_M
    has_gradient_M = dlogprobs_M != 0
    gradients = _sorted_pairs(rows_M[has_gradient_M], tokens_M[has_gradient_M], dlogprobs_M[has_gradient_M])
    active_A = gradients.rows_M.unique_consecutive()
    if len(active_A):
        dlogits_AV = decoder.ops.logits_backward(kept_NV, sums_N2, exact, gradients, active_A).to(decoder.dtype)
        dx_AD = _backward(decoder, x_ND[active_A], segments, dlogits_AV, active_A)
        scores.dhidden_TD[start:stop].index_copy_(0, active_A, dx_AD)


def _exact_pairs(
    decoder: Decoder, x_ND: Tensor, segments: Sequence[Segment], logits_NV: Tensor, pairs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Pairs]:
    """The exact logits ``[M]`` of (rows, tokens), and as pairs these and, in bf16, the largest of each row."""
    rows_M, tokens_M = pairs
    if decoder.dtype == torch.float32:
        target_logits_M = logits_NV[rows_M, tokens_M]
        return target_logits_M, _sorted_pairs(rows_M, tokens_M, target_logits_M)
    rows = torch.cat([rows_M, torch.arange(len(x_ND), device=x_ND.device)])
    tokens = torch.cat([tokens_M, decoder.ops.argmax(logits_NV)])
    values = dot_products(decoder, x_ND.float(), segments, rows, tokens)
    return values[: len(rows_M)], _sorted_pairs(rows, tokens, values)


def _likeliest(
    decoder: Decoder, x_ND: Tensor, segments: Sequence[Segment], logits_NV: Tensor, exact: Pairs, num_top: int
) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, K]`` and their exact logits."""
    if decoder.dtype == torch.float32:
        values_NK, tokens_NK = logits_NV.topk(num_top, dim=-1)
        return tokens_NK, values_NK
    logits_NV = logits_NV.float()
    logits_NV[exact.rows_M, exact.tokens_M] = exact.values_M
    tokens_NK = logits_NV.topk(num_top, dim=-1).indices
    rows_M = torch.arange(len(x_ND), device=x_ND.device).repeat_interleave(num_top)
    values_M = dot_products(decoder, x_ND.float(), segments, rows_M, tokens_NK.flatten())
    values_NK, order_NK = values_M.view_as(tokens_NK).sort(dim=-1, descending=True, stable=True)
    return tokens_NK.gather(1, order_NK), values_NK


def _sorted_pairs(rows_M: Tensor, tokens_M: Tensor, values_M: Tensor) -> Pairs:
    order_M = tokens_M.argsort(stable=True)
    order_M = order_M[rows_M[order_M].argsort(stable=True)]
    return Pairs(rows_M[order_M], tokens_M[order_M], values_M[order_M])


def exact_logits(
    decoder: Decoder, x_ND: Tensor, segments: Sequence[Segment], rows_M: Tensor, tokens_M: Tensor
) -> Tensor:
    """Logits ``[N, V]`` in float32. Those of the pairs (``rows_M``, ``tokens_M``) and the largest of each row are
    exact; the others are as precise as the compute dtype."""
    logits_NV = decoder.logits(x_ND, segments).float()
    if decoder.dtype == torch.float32:
        return logits_NV
    x_ND = x_ND.float()
    all_N = torch.arange(len(x_ND), device=x_ND.device)
    for rows, tokens in ((all_N, decoder.ops.argmax(logits_NV)), (rows_M, tokens_M)):
        logits_NV[rows, tokens] = dot_products(decoder, x_ND, segments, rows, tokens)
    return logits_NV


def dot_products(
    decoder: Decoder, x_ND: Tensor, segments: Sequence[Segment], rows_M: Tensor, tokens_M: Tensor
) -> Tensor:
    """The exact logits ``[M]`` of the pairs, float32, from ``x_ND`` in float32."""
    pieces = zip(rows_M.split(_PAIRS_AT_ONCE), tokens_M.split(_PAIRS_AT_ONCE), strict=True)
    logits_M = torch.cat([torch.linalg.vecdot(x_ND[rows], decoder.head_VD[tokens].float()) for rows, tokens in pieces])
    for part in lora_rows(segments, LM_HEAD, torch.float32):
        h_Nr = base_product(x_ND[part.start : part.stop], part.group.A_RK) * part.scale
        mine = ((rows_M >= part.start) & (rows_M < part.stop)).nonzero()[:, 0]
        for some in mine.split(_PAIRS_AT_ONCE):
            logits_M[some] += torch.linalg.vecdot(h_Nr[rows_M[some] - part.start], part.group.Bs_Nr[0][tokens_M[some]])
    return logits_M


def softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, V]`` and the log of the sum of exponentials ``[N]``, which costs nothing beside them."""
    probs_NV = torch.softmax(logits_NV, dim=-1)
    # A row's largest probability is exp(max - lse), and never so small that its logarithm is imprecise.
    lse_N = logits_NV.amax(dim=-1) - probs_NV.amax(dim=-1).log()
    return probs_NV, lse_N


def _backward(
    decoder: Decoder, x_AD: Tensor, segments: Sequence[Segment], dlogits_AV: Tensor, active_A: Tensor
) -> Tensor:
    """dloss/dx of the rows ``active_A`` of the chunk; the unembedding LoRA's gradients are added to their buffers."""
    bounds = [(*torch.searchsorted(active_A, active_A.new_tensor([s.start, s.stop])).tolist(), s) for s in segments]
    active_segments = [replace(s, start=start, stop=stop) for start, stop, s in bounds if stop > start]
    rows = lora_rows(active_segments, LM_HEAD, decoder.dtype)
    dx_AD = base_product(dlogits_AV, decoder.head_VD.t())
    scaled = [(x_AD[p.start : p.stop] @ p.group.A_RK.t()).mul_(p.scale) for p in rows]
    lora_backward(dlogits_AV, x_AD, dx_AD, rows, scaled)
    return dx_AD
