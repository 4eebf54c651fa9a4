"""Attention over blocks of rows: a block's queries see the keys of some earlier rows, and its own through a mask.

On a CPU as batched products, one matrix a block and key-value head: in bf16 a third of the time of torch's blockwise
kernel, forward and backward together, in float32 two thirds. Scores are computed in float32, as that kernel does; the
query heads of one key-value head are one matrix. On other devices by torch's own kernels.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``g`` = H / G,
``B`` blocks of one shape, ``L`` rows of a block, ``N`` keys that a block sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.branches import Rows, Span, put_rows, take_rows

_MAX_KEPT_KEYS = 512
"""Probabilities over more keys are computed again in the backward: they would need more memory than all the rest."""

_MIN_BF16_ROWS = 32
"""Blocks of fewer rows are computed in float32: for small bf16 products torch chooses a kernel by the size of the whole
batch, so a block would not be bit-equal beside others."""


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks of one shape. ``rows`` and ``keys``: the rows whose queries and keys these are, block by block,
    ``[B * L]`` and ``[B * N]``, or a span where they follow each other. ``key_spans``: the same keys, as spans of each
    block. ``mask_LL`` is added to the scores of a block's own rows, which are its last keys. ``is_causal``: it sees
    itself alone, up to the diagonal."""

    rows: Rows
    keys: Rows
    key_spans: tuple[tuple[Span, ...], ...]
    mask_LL: Tensor
    is_causal: bool

    @property
    def num_rows(self) -> int:
        return len(self.mask_LL)

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.key_spans[0])


class BlockAttention(torch.autograd.Function):
    """Contexts ``[T, H, d]``; every row is in one block. ``is_tree``: some keys belong to several blocks, and what
    these give to their gradients is summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, groups: Sequence[BlockGroup], is_tree: bool
    ) -> Tensor:
        out_THd = torch.empty_like(q_THd)
        kept = []
        for group in groups:
            q, k, v = _heads(group, q_THd, k_TGd, v_TGd)
            probs = _probs(q, k, group.mask_LL)
            put_rows(out_THd, group.rows, _by_row(torch.bmm(probs, v), k_TGd.shape[1], group.num_rows))
            kept.append(probs if group.num_keys <= _MAX_KEPT_KEYS else None)
        ctx.groups, ctx.is_tree = groups, is_tree
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, *kept)
        return out_THd

    @staticmethod
    def backward(ctx: Any, dout_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, *kept = ctx.saved_tensors
        num_kv_heads, head_dim = k_TGd.shape[1:]
        scale = head_dim**-0.5
        dq_THd = torch.empty_like(q_THd)
        if ctx.is_tree:
            dk_TGd, dv_TGd = (torch.zeros_like(x, dtype=torch.float32) for x in (k_TGd, v_TGd))
        else:
            dk_TGd, dv_TGd = torch.empty_like(k_TGd), torch.empty_like(v_TGd)
        for group, probs in zip(ctx.groups, kept, strict=True):
            q, k, v = _heads(group, q_THd, k_TGd, v_TGd)
            probs = _probs(q, k, group.mask_LL) if probs is None else probs
            dout = _by_kv_head(take_rows(dout_THd, group.rows), num_kv_heads, group.num_rows).to(q.dtype)
            dprobs = torch.bmm(dout, v.transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data.out(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
            dq = torch.bmm(dscores, k).mul_(scale)
            put_rows(dq_THd, group.rows, _by_row(dq, num_kv_heads, group.num_rows))
            dk = _by_row(torch.bmm(dscores.transpose(1, 2), q).mul_(scale), num_kv_heads, group.num_keys)
            dv = _by_row(torch.bmm(probs.transpose(1, 2), dout), num_kv_heads, group.num_keys)
            for total_TGd, part in ((dk_TGd, dk), (dv_TGd, dv)):
                if ctx.is_tree:
                    _add(total_TGd, group.key_spans, part)
                else:
                    put_rows(total_TGd, group.keys, part)
        return dq_THd, dk_TGd.to(k_TGd.dtype), dv_TGd.to(v_TGd.dtype), None, None


def kernel_attention(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, groups: Sequence[BlockGroup]) -> Tensor:
    """Contexts ``[T, H, d]`` by torch's attention kernels; every row is in one block."""
    out_THd = torch.empty_like(q_THd)
    for group in groups:
        num_blocks = len(group.key_spans)
        q_BHLd, k_BGNd, v_BGNd = (
            take_rows(x, rows).unflatten(0, (num_blocks, -1)).transpose(1, 2)
            for x, rows in ((q_THd, group.rows), (k_TGd, group.keys), (v_TGd, group.keys))
        )
        mask_LN = None
        if not group.is_causal:
            mask_LN = F.pad(group.mask_LL, (group.num_keys - group.num_rows, 0)).to(q_THd.dtype)
        out_BHLd = F.scaled_dot_product_attention(
            q_BHLd, k_BGNd, v_BGNd, mask_LN, is_causal=group.is_causal, enable_gqa=True
        )
        put_rows(out_THd, group.rows, out_BHLd.transpose(1, 2).flatten(0, 1))
    return out_THd


def _heads(group: BlockGroup, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B * G, g * L, d]``, keys and values ``[B * G, N, d]``."""
    num_kv_heads = k_TGd.shape[1]
    dtype = torch.float32 if group.num_rows < _MIN_BF16_ROWS else q_THd.dtype
    q = _by_kv_head(take_rows(q_THd, group.rows), num_kv_heads, group.num_rows).to(dtype)
    k, v = (_by_kv_head(take_rows(x, group.keys), num_kv_heads, group.num_keys).to(dtype) for x in (k_TGd, v_TGd))
    return q, k, v


def _probs(q: Tensor, k: Tensor, mask_LL: Tensor) -> Tensor:
    """``[B * G, g * L, N]`` in the dtype of ``q``."""
    length = len(mask_LL)
    scores = torch.bmm(q.float() * q.shape[-1] ** -0.5, k.float().transpose(1, 2))
    scores.unflatten(1, (-1, length))[..., -length:].add_(mask_LL)
    probs: Tensor = torch.ops.aten._softmax.out(scores, -1, False, out=scores).to(q.dtype)
    return probs


def _by_kv_head(x_THd: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """``[B * G, H / G * L, d]``: for each block and key-value head the rows of all its heads."""
    heads_BLGgd: Tensor = x_THd.unflatten(1, (num_kv_heads, -1)).unflatten(0, (-1, length))
    return heads_BLGgd.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _by_row(x: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """The inverse of ``_by_kv_head``."""
    heads_BGgLd: Tensor = x.unflatten(0, (-1, num_kv_heads)).unflatten(2, (-1, length))
    return heads_BGgLd.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _add(total: Tensor, key_spans: Sequence[Sequence[Span]], part: Tensor) -> None:
    place = 0
    for spans in key_spans:
        for start, stop in spans:
            total[start:stop] += part[place : place + stop - start]
            place += stop - start
