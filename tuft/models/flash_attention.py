"""Attention along branches of packed rows by torch's flash kernels, which take sequences of any lengths end to end.

A branch sees its own rows causally and all of its prefix. These are two calls; each gives contexts and the logarithms
of its sums of exponentials (lse), from which those over all keys follow: out = sum(out_i * exp(lse_i - lse)). In the
backward each call gets contexts and lse over *all* keys, and gives exactly its keys' share of the gradients. So a
prefix is never copied for those who share it.

Shape letters: ``T`` packed rows, ``Q`` rows of queries, ``N`` rows of keys, ``S`` sequences, ``H`` query heads, ``G``
key-value heads, ``d`` channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tuft.models.branches import Branch, Rows, Span, rows_of, take_rows
from tuft.models.transfer import to_device

_HEAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which queries see which keys: sequences end to end. ``*_bounds``: where each begins, and the end, int32
    ``[S + 1]`` on the device; ``*_stops`` the same on the host. Causal sequences have as many keys as queries."""

    query_bounds: Tensor
    key_bounds: Tensor
    query_stops: tuple[int, ...]
    key_stops: tuple[int, ...]
    is_causal: bool

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]], is_causal: bool, device: torch.device) -> Sequences:
        """``lengths``: queries and keys of every sequence."""
        query_stops, key_stops = ((0, *accumulate(counts)) for counts in zip(*lengths, strict=True))
        query_bounds, key_bounds = (to_device(stops, device, torch.int32) for stops in (query_stops, key_stops))
        return cls(query_bounds, key_bounds, query_stops, key_stops, is_causal)

    @property
    def max_lengths(self) -> tuple[int, int]:
        return _longest(self.query_stops), _longest(self.key_stops)


@dataclass(frozen=True, slots=True)
class _Prefixed:
    """Rows of branches that have a prefix, and the rows of these prefixes; branches of one prefix are one sequence."""

    queries: Rows
    keys: Rows
    sequences: Sequences


def flash_takes(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """CUDA's flash kernels have no float32."""
    return (dtype == torch.bfloat16 or device.type == "cpu") and head_dim % _HEAD_MULTIPLE == 0


class FlashPackedAttention:
    """``decoder.Attention`` over ``branches``, which follow each other."""

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        lengths = [branch.stop - branch.start for branch in branches]
        self._own = Sequences.of([(length, length) for length in lengths], True, device)
        behind: list[tuple[int, int, tuple[Span, ...]]] = []
        for branch in branches:
            if branch.prefix and behind and behind[-1][1:] == (branch.start, branch.prefix):
                behind[-1] = (behind[-1][0], branch.stop, branch.prefix)
            elif branch.prefix:
                behind.append((branch.start, branch.stop, branch.prefix))
        self._prefixed: _Prefixed | None = None
        if behind:
            key_spans = [span for _, _, prefix in behind for span in prefix]
            num_keys = [sum(stop - start for start, stop in prefix) for _, _, prefix in behind]
            counts = [(stop - start, count) for (start, stop, _), count in zip(behind, num_keys, strict=True)]
            self._prefixed = _Prefixed(
                rows_of([(start, stop) for start, stop, _ in behind], device),
                rows_of(key_spans, device),
                Sequences.of(counts, False, device),
            )

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:  # noqa: ARG002
        out_THd: Tensor = _FlashAttention.apply(q_THd, k_TGd, v_TGd, self._own, self._prefixed)
        return out_THd


class _FlashAttention(torch.autograd.Function):
    """Contexts ``[T, H, d]``."""

    @staticmethod
    def forward(
        ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, own: Sequences, prefixed: _Prefixed | None
    ) -> Tensor:
        out_THd, lse_HT = _forward(q_THd, k_TGd, v_TGd, own)
        if prefixed is not None:
            rows, keys = prefixed.queries, prefixed.keys
            beyond_QHd, beyond_HQ = _forward(
                take_rows(q_THd, rows), take_rows(k_TGd, keys), take_rows(v_TGd, keys), prefixed.sequences
            )
            _merge(out_THd, lse_HT, rows, beyond_QHd, beyond_HQ)
        ctx.own, ctx.prefixed = own, prefixed
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, lse_HT)
        return out_THd

    @staticmethod
    def backward(ctx: Any, dout_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, out_THd, lse_HT = ctx.saved_tensors
        dout_THd = dout_THd.contiguous()
        dq_THd, dk_TGd, dv_TGd = _backward(dout_THd, (q_THd, k_TGd, v_TGd), out_THd, lse_HT, ctx.own)
        if ctx.prefixed is not None:
            rows, keys = ctx.prefixed.queries, ctx.prefixed.keys
            of_prefixed = _backward(
                take_rows(dout_THd, rows),
                (take_rows(q_THd, rows), take_rows(k_TGd, keys), take_rows(v_TGd, keys)),
                take_rows(out_THd, rows),
                take_rows(lse_HT.t(), rows).t().contiguous(),
                ctx.prefixed.sequences,
            )
            # in float32: a row of a prefix may have gradients from many sequences
            dq_THd, dk_TGd, dv_TGd = (
                _with_shares(x, places, share)
                for x, places, share in zip((dq_THd, dk_TGd, dv_TGd), (rows, keys, keys), of_prefixed, strict=True)
            )
        return dq_THd, dk_TGd, dv_TGd, None, None


def _merge(out_THd: Tensor, lse_HT: Tensor, rows: Rows, beyond_QHd: Tensor, beyond_HQ: Tensor) -> None:
    """Into contexts and lse of ``rows``, those over further keys."""
    places = slice(*rows) if isinstance(rows, tuple) else rows
    own_HQ = lse_HT[:, places]
    total_HQ = torch.logaddexp(own_HQ, beyond_HQ)
    merged_QHd = out_THd[places] * (own_HQ - total_HQ).exp().t().unsqueeze(-1)
    merged_QHd.addcmul_(beyond_QHd.to(merged_QHd.dtype), (beyond_HQ - total_HQ).exp().t().unsqueeze(-1))
    out_THd[places] = merged_QHd.to(out_THd.dtype)
    lse_HT[:, places] = total_HQ


def _with_shares(x_TNd: Tensor, rows: Rows, share: Tensor) -> Tensor:
    total = x_TNd.float()
    if isinstance(rows, tuple):
        total[slice(*rows)] += share
    else:
        total.index_put_((rows,), share.float(), accumulate=True)
    return total.to(x_TNd.dtype)


# --- torch's kernels: one call on CUDA, a call a sequence on a CPU ----------------------------------------------------


def _forward(q_QHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Contexts ``[Q, H, d]`` and lse ``[H, Q]``, float32."""
    if q_QHd.device.type != "cpu":
        bounds = sequences.query_bounds, sequences.key_bounds
        out_QHd, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
            q_QHd, k_NGd, v_NGd, *bounds, *sequences.max_lengths, 0.0, sequences.is_causal, return_debug_mask=False
        )
        return out_QHd, lse_HQ
    out_QHd = torch.empty_like(q_QHd, memory_format=torch.contiguous_format)
    lse_HQ = torch.empty(q_QHd.shape[1], q_QHd.shape[0])
    for queries, keys in _spans(sequences):
        q, k, v = _one_sequence(q_QHd[queries], k_NGd[keys], v_NGd[keys])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, sequences.is_causal)
        out_QHd[queries], lse_HQ[:, queries] = out[0].transpose(0, 1), lse[0]
    return out_QHd, lse_HQ


def flash_single_queries(q_BHd: Tensor, k_BLGd: Tensor, v_BLGd: Tensor, lengths_B: Tensor) -> Tensor:
    """Contexts ``[B, H, d]`` of one query a sequence over its first ``lengths_B`` keys. Not on a CPU."""
    num_rows, num_keys = k_BLGd.shape[:2]
    bounds = torch.arange(num_rows + 1, dtype=torch.int32, device=q_BHd.device)
    out_BHd: Tensor
    out_BHd, *_ = torch.ops.aten._flash_attention_forward(
        q_BHd,
        k_BLGd.flatten(0, 1),
        v_BLGd.flatten(0, 1),
        bounds,
        bounds * num_keys,
        1,
        num_keys,
        0.0,
        is_causal=False,
        return_debug_mask=False,
        seqused_k=lengths_B.to(torch.int32),
    )
    return out_BHd


def _backward(
    dout_QHd: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out_QHd: Tensor, lse_HQ: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, given contexts and lse over all keys that the queries see, in this call or another."""
    q_QHd, k_NGd, v_NGd = qkv
    if q_QHd.device.type != "cpu":
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_QHd.device), q_QHd.new_empty(0)
        bounds = sequences.query_bounds, sequences.key_bounds
        dq_QHd, dk_NGd, dv_NGd = torch.ops.aten._flash_attention_backward(
            dout_QHd,
            *qkv,
            out_QHd,
            lse_HQ,
            *bounds,
            *sequences.max_lengths,
            0.0,
            sequences.is_causal,
            *no_dropout,
        )
        return dq_QHd, dk_NGd, dv_NGd
    num_kv_heads = k_NGd.shape[1]
    dq_QHd, dk_NGd, dv_NGd = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv)
    for queries, keys in _spans(sequences):
        q, k, v = _one_sequence(q_QHd[queries], k_NGd[keys], v_NGd[keys])
        dout, out = (x[queries].transpose(0, 1)[None] for x in (dout_QHd, out_QHd))
        lse = lse_HQ[None, :, queries].transpose(1, 2).contiguous().transpose(1, 2)  # as the forward lays it out
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, sequences.is_causal
        )
        dq_QHd[queries] = dq[0].transpose(0, 1)
        for total_NGd, of_heads in ((dk_NGd, dk), (dv_NGd, dv)):  # query heads share a key-value head
            total_NGd[keys] = of_heads[0].unflatten(0, (num_kv_heads, -1)).sum(1).transpose(0, 1)
    return dq_QHd, dk_NGd, dv_NGd


def _one_sequence(q_QHd: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[1, H, Q or N, d]``, a key-value head for every query head."""
    heads_each = q_QHd.shape[1] // k_NGd.shape[1]
    k_NHd, v_NHd = (x.repeat_interleave(heads_each, dim=1) for x in (k_NGd, v_NGd))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QHd, k_NHd, v_NHd))
    return q, k, v


def _spans(sequences: Sequences) -> list[tuple[slice, slice]]:
    queries, keys = (pairwise(stops) for stops in (sequences.query_stops, sequences.key_stops))
    return [(slice(*q), slice(*k)) for q, k in zip(queries, keys, strict=True)]


def _longest(stops: Sequence[int]) -> int:
    return max(stop - start for start, stop in pairwise(stops))
