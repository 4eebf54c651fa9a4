"""Attention over packed sequences: many sequences end to end in one batch, none sees another.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``B`` sequences of
one length, ``L`` that length, ``g`` = H / G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BATCHED_LENGTHS = range(16, 513)
"""Shorter: products too small to be bit-equal in batches of any size. Longer: score matrices that take much memory."""


class _TakeRows(torch.autograd.Function):
    """Rows in another order. The backward is the inverse order, where autograd's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(order_T, inverse_T)
        return x.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        _, inverse_T = ctx.saved_tensors
        return dout.index_select(0, inverse_T), None, None


class PackedAttention:
    """Causal attention within each of ``lengths`` consecutive sequences.

    Sequences are computed together only with others of exactly their length, never padded, so a sequence's result is
    bit-equal whatever stands beside it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        lengths_S = np.asarray(lengths, dtype=np.int64)
        starts_S = np.cumsum(lengths_S) - lengths_S
        by_length_S = np.argsort(lengths_S, kind="stable")
        distinct, counts = np.unique(lengths_S, return_counts=True)
        self._groups = [(int(count), int(length)) for length, count in zip(distinct, counts, strict=True)]
        self._order: tuple[Tensor, Tensor] | None = None
        if not np.array_equal(by_length_S, np.arange(len(lengths_S))):
            order_T = np.concatenate([np.arange(starts_S[s], starts_S[s] + lengths_S[s]) for s in by_length_S])
            self._order = (torch.as_tensor(order_T, device=device), torch.as_tensor(np.argsort(order_T), device=device))

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:  # noqa: ARG002
        """Rotated queries and keys in, contexts ``[T, H, d]`` out."""
        if self._order is not None:
            order_T, inverse_T = self._order
            q_THd, k_TGd, v_TGd = (_TakeRows.apply(x, order_T, inverse_T) for x in (q_THd, k_TGd, v_TGd))
        sizes = [count * length for count, length in self._groups]
        contexts = [
            causal_attention(q, k, v, length)
            for q, k, v, (_, length) in zip(
                q_THd.split(sizes), k_TGd.split(sizes), v_TGd.split(sizes), self._groups, strict=True
            )
        ]
        out_THd = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        if self._order is not None:
            order_T, inverse_T = self._order
            out_THd = _TakeRows.apply(out_THd, inverse_T, order_T)
        return out_THd


def causal_attention(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, length: int) -> Tensor:
    """Attention of sequences of one ``length``, end to end; ``[T, H, d]``."""
    if q_THd.dtype == torch.bfloat16 and q_THd.device.type == "cpu" and length in _BATCHED_LENGTHS:
        out_THd: Tensor = BatchedAttention.apply(q_THd, k_TGd, v_TGd, length)
        return out_THd
    q_BHLd, k_BGLd, v_BGLd = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
    out_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BGLd, v_BGLd, is_causal=True, enable_gqa=True)
    return out_BHLd.transpose(1, 2).flatten(0, 1)


class BatchedAttention(torch.autograd.Function):
    """Attention as batched products over whole score matrices, which are kept for the backward.

    On a CPU in bf16 a third of the time of torch's blockwise kernel, forward and backward together. Scores are computed
    in float32, as that kernel does; the query heads of one key-value head are one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, length: int) -> Tensor:
        num_kv_heads, head_dim = k_TGd.shape[1:]
        q, k, v = (_by_kv_head(x, num_kv_heads, length) for x in (q_THd, k_TGd, v_TGd))
        scores = torch.bmm(q.float().mul_(head_dim**-0.5), k.float().transpose(1, 2))
        scores.unflatten(1, (-1, length)).add_(torch.full((length, length), -torch.inf, device=q.device).triu_(1))
        probs = torch.ops.aten._softmax.out(scores, -1, False, out=scores).to(q.dtype)
        ctx.length = length
        ctx.save_for_backward(q, k, v, probs)
        return _by_row(torch.bmm(probs, v), num_kv_heads, length)

    @staticmethod
    def backward(ctx: Any, dout_THd: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, probs = ctx.saved_tensors
        num_kv_heads = v.shape[0] // (dout_THd.shape[0] // ctx.length)
        dout = _by_kv_head(dout_THd, num_kv_heads, ctx.length)
        dprobs = torch.bmm(dout, v.transpose(1, 2))
        dscores = torch.ops.aten._softmax_backward_data.out(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
        scale = q.shape[-1] ** -0.5
        dq = torch.bmm(dscores, k).mul_(scale)
        dk = torch.bmm(dscores.transpose(1, 2), q).mul_(scale)
        dv = torch.bmm(probs.transpose(1, 2), dout)
        dq_THd, dk_TGd, dv_TGd = (_by_row(x, num_kv_heads, ctx.length) for x in (dq, dk, dv))
        return dq_THd, dk_TGd, dv_TGd, None


def _by_kv_head(x_THd: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """``[B * G, H / G * L, d]``: for each sequence and key-value head the rows of all its heads."""
    heads_BLGgd: Tensor = x_THd.unflatten(1, (num_kv_heads, -1)).unflatten(0, (-1, length))
    return heads_BLGgd.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _by_row(x: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """The inverse of ``_by_kv_head``."""
    heads_BGgLd: Tensor = x.unflatten(0, (-1, num_kv_heads)).unflatten(2, (-1, length))
    return heads_BGgLd.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
