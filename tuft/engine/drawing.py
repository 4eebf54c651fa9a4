"""From hidden states to tokens: the unembedding, then one draw a continuation, or several a row of a prompt.

Shape letters: ``U`` hidden states, ``N`` draws (several from one hidden state where continuations begin), ``L`` rows of
a prompt's chunk, ``K`` tokens of one draw or row, ``D`` residual channels, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tuft.engine.sampling import Draw, draw_tokens, inverse_cdf, likeliest
from tuft.models.decoder import Decoder
from tuft.models.decoding import Draws, KernelRows, PackedAdapters
from tuft.models.head import dot_products, exact_logits, softmax
from tuft.models.lora import Adapter, Segment
from tuft.models.transfer import to_device
from tuft.types import TokenLogprobs

_DRAWS_A_ROW = 64
"""So many at once: each reads a block of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """``likeliest[n]``, a single row, is there if the draw n asks for it."""

    tokens: list[int]
    logprobs: list[float]
    likeliest: dict[int, TokenLogprobs] = field(default_factory=dict)


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
    logits_UV, drawn = by(decoder, packed, x_UD, adapters, origins, draws)
    for n, (row, one) in enumerate(zip(origins, draws, strict=True)):
        if one.num_likeliest:
            x_1D, token, logprob = x_UD[row : row + 1], drawn.tokens[n], drawn.logprobs[n]
            drawn.likeliest[n] = _beside(decoder, x_1D, adapters[row], logits_UV[row], one, token, logprob)
    return drawn


def _beside(
    decoder: Decoder, x_1D: Tensor, adapter: Adapter | None, logits_V: Tensor, one: Draw, token: int, logprob: float
) -> TokenLogprobs:
    """The likeliest tokens by ``logits_V``, whose own logits are computed again where these are rounded.

    Their logprobs are of one distribution with that of ``token``, the one drawn: it says what all logits have too much.
    """
    candidates_K = likeliest(logits_V, one.num_likeliest)
    tokens_M = torch.cat([candidates_K, candidates_K.new_tensor([token])])
    if decoder.dtype == torch.float32:
        logits_M = logits_V[tokens_M]
    else:
        rows_M, segments = torch.zeros_like(tokens_M), segments_of([adapter])
        logits_M = dot_products(decoder, x_1D.float(), segments, rows_M, tokens_M)
    scaled_M = logits_M.double() / (one.temperature or 1.0)
    logprobs_K = scaled_M[:-1] - scaled_M[-1] + logprob
    logprobs_K[candidates_K == token] = logprob
    logprobs_K, order_K = logprobs_K.float().sort(descending=True, stable=True)
    return TokenLogprobs(candidates_K[order_K][None].cpu().numpy(), logprobs_K[None].cpu().numpy())


def _by_kernels(
    decoder: Decoder,
    packed: PackedAdapters,
    x_UD: Tensor,
    adapters: Sequence[Adapter | None],
    origins: Sequence[int],
    draws: Sequence[Draw],
) -> tuple[Tensor, Drawn]:
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
    return logits_UV, Drawn(tokens_N.tolist(), logprobs_N.tolist())


def _by_torch(
    decoder: Decoder,
    packed: PackedAdapters,  # noqa: ARG001
    x_UD: Tensor,
    adapters: Sequence[Adapter | None],
    origins: Sequence[int],
    draws: Sequence[Draw],
) -> tuple[Tensor, Drawn]:
    segments = segments_of(adapters)
    origins_N = to_device(origins, x_UD.device)
    none = origins_N[:0]
    logits_UV = exact_logits(decoder, x_UD, segments, none, none)
    logits_NV = logits_UV if list(origins) == list(range(len(x_UD))) else logits_UV[origins_N]
    if decoder.dtype == torch.float32:
        return logits_UV, Drawn(*draw_tokens(logits_NV, draws))
    exact = partial(dot_products, decoder, x_UD.float(), segments, origins_N)
    return logits_UV, Drawn(*draw_tokens(logits_NV, draws, exact))


def draw_alternatives(
    decoder: Decoder, x_LD: Tensor, segments: Sequence[Segment], temperature: float, uniforms_LK: Tensor
) -> Tensor:
    """Tokens ``[L, K]`` of the distribution behind each row, with replacement; the likeliest at temperature 0."""
    none = torch.empty(0, dtype=torch.int64, device=x_LD.device)
    logits_LV = exact_logits(decoder, x_LD, segments, none, none)
    if temperature == 0:
        return logits_LV.argmax(dim=-1, keepdim=True).expand(uniforms_LK.shape)
    probs_LV, _ = softmax(logits_LV / temperature)
    return torch.cat([inverse_cdf(probs_LV, some) for some in uniforms_LK.split(_DRAWS_A_ROW, dim=1)], dim=1)
