"""Attention over packed sequences: many sequences end to end in one batch, none sees another.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``B`` sequences of
one length, ``L`` that length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
            _causal(q, k, v, length)
            for q, k, v, (_, length) in zip(
                q_THd.split(sizes), k_TGd.split(sizes), v_TGd.split(sizes), self._groups, strict=True
            )
        ]
        out_THd = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        if self._order is not None:
            order_T, inverse_T = self._order
            out_THd = _TakeRows.apply(out_THd, inverse_T, order_T)
        return out_THd


def _causal(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    q_BHLd, k_BGLd, v_BGLd = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    out_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BGLd, v_BGLd, is_causal=True, enable_gqa=True)
    return out_BHLd.transpose(1, 2).flatten(0, 1)
