"""From the hidden states of a step to its tokens: the unembedding, then one draw a continuation.

Shape letters: ``U`` hidden states, ``N`` draws (several from one hidden state where continuations begin), ``D``
residual channels, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tuft.engine.sampling import Draw, draw_tokens
from tuft.models.decoder import Decoder
from tuft.models.decoding import Draws, KernelRows, PackedAdapters
from tuft.models.head import dot_products, exact_logits
from tuft.models.lora import Adapter, Segment
from tuft.models.transfer import to_device

Drawn = tuple[list[int], list[float]]
"""Tokens and their logprobs."""


def segments_of(adapters: Sequence[Adapter | None]) -> list[Segment]:
    """Rows that have each an adapter; neighbours with the same are one segment."""
    segments: list[Segment] = []
    for row, adapter in enumerate(adapters):
        if segments and segments[-1].adapter is adapter and segments[-1].stop == row:
            segments[-1] = Segment(adapter, segments[-1].start, row + 1)
        elif adapter is not None:
            segments.append(Segment(adapter, row, row + 1))
    return segments


def draw(
    decoder: Decoder,
    packed: PackedAdapters,
    x_UD: Tensor,
    adapters: Sequence[Adapter | None],
    origins: Sequence[int],
    draws: Sequence[Draw],
) -> Drawn:
    """``adapters`` are those of the rows of ``x_UD``, ``origins`` the row that each draw is from. What one draw gets
    does not depend on the others."""
    by = _by_torch if decoder.ops.decode is None else _by_kernels
    return by(decoder, packed, x_UD, adapters, origins, draws)


def _by_kernels(
    decoder: Decoder,
    packed: PackedAdapters,
    x_UD: Tensor,
    adapters: Sequence[Adapter | None],
    origins: Sequence[int],
    draws: Sequence[Draw],
) -> Drawn:
    kernels = decoder.ops.decode
    assert kernels is not None
    lora = packed.tables(adapters)
    logits_UV = decoder.logits(x_UD, (), KernelRows(kernels, lora) if lora.max_rank else None)
    wanted = Draws(
        torch.tensor(origins),
        torch.tensor([one.temperature for one in draws], dtype=torch.float32),
        torch.tensor([one.uniform for one in draws], dtype=torch.float64),
        torch.tensor([min(one.top_k, len(decoder.head_VD)) for one in draws]),  # a client may send any number
        torch.tensor([one.top_p for one in draws], dtype=torch.float64),
    )
    lora = packed.tables([adapters[row] for row in origins])
    tokens_N, logprobs_N = kernels.draw(logits_UV, x_UD, decoder.head_VD, wanted, lora)
    return tokens_N.tolist(), logprobs_N.tolist()


def _by_torch(
    decoder: Decoder,
    packed: PackedAdapters,  # noqa: ARG001
    x_UD: Tensor,
    adapters: Sequence[Adapter | None],
    origins: Sequence[int],
    draws: Sequence[Draw],
) -> Drawn:
    segments = segments_of(adapters)
    origins_N = to_device(origins, x_UD.device)
    none = origins_N[:0]
    logits_NV = exact_logits(decoder, x_UD, segments, none, none)
    if list(origins) != list(range(len(x_UD))):
        logits_NV = logits_NV[origins_N]
    if decoder.dtype == torch.float32:
        return draw_tokens(logits_NV, draws)
    return draw_tokens(logits_NV, draws, partial(dot_products, decoder, x_UD.float(), segments, origins_N))
