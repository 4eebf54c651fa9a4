"""Keys and values of the sequences being sampled, and attention over them.

Sequences that started together and share a prompt (the samples of one request) have the same length at every step, so
they live in one cache and are one batched product. The prompt they share is stored, and read, once.

Products are in float32 whatever the cache's dtype, and their shapes are padded to whole blocks: a matrix of a batched
product is then the same shape at the same alignment however many sequences there are, and gives the same bits.

Shape letters: ``S`` sequences of a cache, ``H`` query heads, ``G`` key-value heads, ``g`` query heads of one key-value
head, ``d`` channels of a head, ``L`` positions, ``T`` rows of a step, ``R`` rows of a shared product, ``m`` and ``n``
its inner and outer size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.architecture import DecoderConfig
from tuft.models.functions import MIN_ROWS
from tuft.models.packed import causal_attention

BLOCK_TOKENS = 16
"""Positions a cache grows by: 64 bytes of float32, one cache line."""


def _whole_blocks(length: int) -> int:
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


class KvCache:
    """``num_sequences`` sequences of equal ``length``, all layers.

    Memory is reserved for ``capacity`` positions; on a CPU the system commits it as it is written.
    Keys lie transposed, as the score product reads them.
    """

    def __init__(
        self, config: DecoderConfig, num_sequences: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, config.num_kv_heads, num_sequences)
        padded = _whole_blocks(capacity)
        self.keys = torch.empty(*shape, config.head_dim, padded, dtype=dtype, device=device)
        self.values = torch.empty(*shape, padded, config.head_dim, dtype=dtype, device=device)
        self.length = 0

    def extend(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` more positions; every layer then writes them."""
        end = self.length + num_tokens
        # the padding of the last block is multiplied by probability 0, which must not meet a stray NaN
        self.values[:, :, :, end : _whole_blocks(end)] = 0
        self.length = end

    def write(self, layer: int, k_SLGd: Tensor, v_SLGd: Tensor) -> None:
        """The last L positions of a layer, after ``extend(L)``."""
        start = self.length - k_SLGd.shape[1]
        self.keys[layer, :, :, :, start : self.length] = k_SLGd.permute(2, 0, 3, 1)
        self.values[layer, :, :, start : self.length] = v_SLGd.permute(2, 0, 1, 3)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the sequences that are not in ``rows``. Only what was written is copied."""
        written = _whole_blocks(self.length)
        keys, values = self.keys, self.values
        self.keys = keys.new_empty(*keys.shape[:2], len(rows), *keys.shape[3:])
        self.values = values.new_empty(*values.shape[:2], len(rows), *values.shape[3:])
        for new, old in enumerate(rows):
            self.keys[:, :, new, :, :written] = keys[:, :, old, :, :written]
            self.values[:, :, new, :written] = values[:, :, old, :written]


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """The next tokens of one prompt: L consecutive rows of the step, written to a cache of one sequence."""

    start: int
    stop: int
    cache: KvCache

    def attend(self, layer: int, q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> Tensor:
        cache = self.cache
        cache.write(layer, k_LGd[None], v_LGd[None])
        num_tokens = q_LHd.shape[0]
        before = cache.length - num_tokens
        if before == 0:  # exactly what the trainer computes
            return causal_attention(q_LHd, k_LGd, v_LGd, num_tokens)
        q_1HLd = q_LHd.transpose(0, 1)[None]
        keys_1GLd = cache.keys[layer, :, 0, :, : cache.length].transpose(1, 2)[None].contiguous()
        values_1GLd = cache.values[layer, :, 0, : cache.length][None]
        mask_LL = torch.ones(num_tokens, cache.length, dtype=torch.bool, device=q_LHd.device).tril(before)
        out_1HLd = F.scaled_dot_product_attention(q_1HLd, keys_1GLd, values_1GLd, attn_mask=mask_LL, enable_gqa=True)
        return out_1HLd[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class DecodeSpan:
    """One new token of each sequence of a cache: S consecutive rows of the step. ``prompt`` is what all of them follow,
    None where the cache holds the prompt itself."""

    start: int
    stop: int
    cache: KvCache
    prompt: KvCache | None

    def attend(self, layer: int, q_SHd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> Tensor:
        cache, prompt = self.cache, self.prompt
        cache.write(layer, k_SGd[:, None], v_SGd[:, None])
        num_sequences, num_heads, d = q_SHd.shape
        by_group = (k_SGd.shape[1], num_sequences, num_heads // k_SGd.shape[1], -1)  # G, S, g, whatever is last
        q_GSgd = q_SHd.view(num_sequences, by_group[0], by_group[2], d).transpose(0, 1)
        q_GSgd = q_GSgd.to(torch.float32, copy=True, memory_format=torch.contiguous_format).mul_(d**-0.5)
        own = _whole_blocks(cache.length)
        scores = torch.bmm(q_GSgd.flatten(0, 1), cache.keys[layer, ..., :own].float().flatten(0, 1))
        scores[..., cache.length :] = -torch.inf
        if prompt is not None:
            shared = _whole_blocks(prompt.length)
            shared_GSgL = _shared_product(q_GSgd, prompt.keys[layer, :, 0, :, :shared].float())
            shared_GSgL[..., prompt.length :] = -torch.inf
            scores = torch.cat([scores, shared_GSgL.flatten(0, 1)], dim=-1)
        probs = torch.softmax(scores, dim=-1)
        out = torch.bmm(probs[..., :own], cache.values[layer, :, :, :own].float().flatten(0, 1))
        if prompt is not None:
            probs_GSgL = probs[..., own:].view(by_group)
            out += _shared_product(probs_GSgL, prompt.values[layer, :, 0, :shared].float()).flatten(0, 1)
        return out.view(by_group).transpose(0, 1).reshape(num_sequences, num_heads, d).to(q_SHd.dtype)


def _shared_product(x_GSgm: Tensor, shared_Gmn: Tensor) -> Tensor:
    """Every sequence's rows times one matrix a key-value head. Padded: with few rows float32 products use other
    kernels, and a sequence's bits would depend on how many there are."""
    num_sequences, g = x_GSgm.shape[1:3]
    rows = num_sequences * g
    x_GRm = F.pad(x_GSgm.flatten(1, 2), (0, 0, 0, max(0, MIN_ROWS[torch.float32] - rows)))
    out_GRn = torch.bmm(x_GRm, shared_Gmn)
    return out_GRn[:, :rows].view(-1, num_sequences, g, out_GRn.shape[2])


class StepAttention:
    """``tuft.models.decoder.Attention`` over the spans of one step, which cover its rows."""

    def __init__(self, spans: Sequence[PromptSpan | DecodeSpan]) -> None:
        self._spans = spans

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        out_THd = torch.empty_like(q_THd)
        for span in self._spans:
            rows = slice(span.start, span.stop)
            out_THd[rows] = span.attend(layer, q_THd[rows], k_TGd[rows], v_TGd[rows])
        return out_THd
