"""The mathematics of sampling: seeded draws, temperature, top-k, top-p and stop conditions.

Every row is computed by itself: what is drawn for one row never depends on the other rows of the call.
Shape letters: ``N`` rows, ``M`` some of the rows, ``V`` vocabulary, ``B`` blocks of the vocabulary, ``b`` tokens of
a block, ``K`` candidates, or draws from one row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tuft.errors import InvalidInput
from tuft.models.head import softmax
from tuft.models.transfer import to_device
from tuft.types import SamplingParams

_UINT64 = 2**64 - 1
_FIRST_ALTERNATIVE = 2**32
"""The sample index of a prompt's first alternatives: those of samples are less."""
_BLOCK_TOKENS = 128
_FIRST_CANDIDATES = 1024
"""How many of the likeliest tokens are looked at first for top-p alone; all, only where these do not reach it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn. ``uniform`` lies in [0, 1) and decides alone which token is taken. ``num_likeliest``: how
    many of the likeliest tokens are to be told beside it."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float
    num_likeliest: int = 0

    @property
    def is_truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def uniforms(seed: int, sample_index: int, first_position: int, count: int) -> list[float]:
    """The numbers in [0, 1) that belong to (seed, sample index, position) from ``first_position`` on: Philox is
    counter-based, so there is no state that the order of work could change. A position is a block of four numbers, of
    which the first counts."""
    key = np.array([seed & _UINT64, sample_index], dtype=np.uint64)
    numbers = np.random.Generator(np.random.Philox(key=key, counter=first_position)).random(4 * count)
    taken: list[float] = numbers[::4].tolist()
    return taken


def alternative_uniforms(seed: int, first_position: int, count: int, num_alternatives: int) -> npt.NDArray[np.float64]:
    """``[count, K]``: what alternatives to the tokens from ``first_position`` on are drawn with; the first are the same
    however many there are."""
    indices = range(_FIRST_ALTERNATIVE, _FIRST_ALTERNATIVE + num_alternatives)
    return np.stack([uniforms(seed, index, first_position, count) for index in indices], axis=1)


def draw_tokens(
    logits_NV: Tensor, draws: Sequence[Draw], exact_logits: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[int], list[float]]:
    """One token a row and its logprob under the temperature-scaled distribution over the whole vocabulary.

    ``logits_NV`` is float32. ``exact_logits`` computes again the logits of the tokens drawn, one a row, where
    ``logits_NV`` are rounded. A row whose logits are not numbers gets some token and the logprob NaN.
    """
    temperatures_N = logits_NV.new_tensor([draw.temperature or 1.0 for draw in draws])
    scaled_NV = logits_NV / temperatures_N[:, None]
    probs_NV, lse_N = softmax(scaled_NV)
    tokens_N = _choose(scaled_NV, probs_NV, draws)
    chosen_N = scaled_NV.gather(1, tokens_N[:, None])[:, 0]
    if exact_logits is not None:
        rounded_N, chosen_N = chosen_N, exact_logits(tokens_N) / temperatures_N
        lse_N += torch.log1p(torch.exp(chosen_N - lse_N) - torch.exp(rounded_N - lse_N))
    return tokens_N.tolist(), (chosen_N - lse_N).tolist()


def _choose(scaled_NV: Tensor, probs_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    tokens_N = scaled_NV.argmax(dim=-1)
    plain = [n for n, draw in enumerate(draws) if draw.temperature > 0 and not draw.is_truncated]
    if plain:
        rows_M = to_device(plain, probs_NV.device)
        uniforms_M = to_device([draws[n].uniform for n in plain], probs_NV.device, torch.float64)
        tokens_N[rows_M] = inverse_cdf(probs_NV[rows_M], uniforms_M[:, None])[:, 0]
    for n, draw in enumerate(draws):
        if draw.temperature > 0 and draw.is_truncated:
            kept_1V = torch.where(_is_kept(probs_NV[n], draw.top_k, draw.top_p), probs_NV[n], 0.0)[None]
            tokens_N[n] = inverse_cdf(kept_1V, to_device([[draw.uniform]], probs_NV.device, torch.float64))[0, 0]
    return tokens_N


def _is_kept(probs_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens top-k and then top-p (of what top-k left) keep; of equals the first in the vocabulary."""
    vocab_size = probs_V.shape[0]
    probs_K = probs_V.topk(min(top_k if top_k > 0 else _FIRST_CANDIDATES, vocab_size)).values
    mass_K = probs_K.double().cumsum(0)
    if top_k <= 0 and float(mass_K[-1]) < top_p and len(probs_K) < vocab_size:
        probs_K = probs_V.sort(descending=True).values
        mass_K = probs_K.double().cumsum(0)
    num_kept = len(probs_K)
    if top_p < 1.0:
        total = float(mass_K[-1]) if top_k > 0 else 1.0
        num_kept = min(num_kept, 1 + int((mass_K < top_p * total).sum()))  # the token that crosses top_p is kept
    return _is_among(probs_V, probs_K[num_kept - 1], num_kept)


def likeliest(logits_V: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of the largest logits, in order of the vocabulary; of equals the first."""
    return _is_among(logits_V, logits_V.topk(count).values[-1], count).nonzero()[:, 0]


def _is_among(values_V: Tensor, least: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest, the last of which is ``least``; of equals the first."""
    is_among_V = values_V > least
    equal = (values_V == least).nonzero()[:, 0]
    is_among_V[equal[: count - int(is_among_V.sum())]] = True
    return is_among_V


def inverse_cdf(probs_MV: Tensor, uniforms_MK: Tensor) -> Tensor:
    """The first tokens ``[M, K]`` of each row at which the cumulative probability exceeds ``uniform * total``.

    In two levels, blocks and then the tokens of one block, so that only a fraction is ever accumulated in float64.
    """
    num_rows, width = probs_MV.shape
    padded_MV = torch.nn.functional.pad(probs_MV, (0, -width % _BLOCK_TOKENS))
    blocks_MBb = padded_MV.view(num_rows, -1, _BLOCK_TOKENS)
    mass_MB = blocks_MBb.sum(dim=-1).double().cumsum(dim=-1)
    total_M1 = mass_MB[:, -1:]
    target_MK = torch.minimum(uniforms_MK * total_M1, total_M1.nextafter(torch.zeros_like(total_M1)))
    block_MK = torch.searchsorted(mass_MB, target_MK.contiguous(), right=True)
    block_MK.clamp_(max=mass_MB.shape[1] - 1)  # beyond it only where a row has no mass, or NaN
    before_MK = torch.nn.functional.pad(mass_MB, (1, 0)).gather(1, block_MK)
    inside_MKb = blocks_MBb[torch.arange(num_rows, device=probs_MV.device)[:, None], block_MK]
    offset_MK = (inside_MKb.double().cumsum(dim=-1) <= (target_MK - before_MK)[..., None]).sum(dim=-1)
    # float32 block sums and float64 sums inside may differ in the last digit: stay on a token that has probability
    order_b = torch.arange(_BLOCK_TOKENS, device=probs_MV.device)
    last_MK = torch.where(inside_MKb > 0, order_b, 0).amax(dim=-1)
    return block_MK * _BLOCK_TOKENS + torch.minimum(offset_MK, last_MK)


def check_params(params: SamplingParams) -> None:
    """Raises InvalidInput that names the first field of ``params`` that cannot be honoured."""
    if not (isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidInput("sampling_params.temperature", params.temperature, "must be 0 (greedy) or more")
    if not (params.top_k == -1 or params.top_k >= 1):
        raise InvalidInput("sampling_params.top_k", params.top_k, "must be -1 (off) or at least 1")
    if not 0 < params.top_p <= 1:
        raise InvalidInput("sampling_params.top_p", params.top_p, "must be above 0 and at most 1")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidInput("sampling_params.max_tokens", params.max_tokens, "must be at least 1")
    if any(stop == "" for stop in params.stop or ()):
        raise InvalidInput("sampling_params.stop", params.stop, "strings must not be empty")


class StopRule:
    """When a sequence ends before its length does: at a token of a set, or once its text contains a string.

    Text is decoded with its special tokens, so ``<|im_end|>`` may be given as a string. Only a tail is decoded: a
    string of n bytes that ends with the last token spans at most n tokens.
    """

    def __init__(
        self,
        stop: tuple[str, ...] | tuple[int, ...] | None,
        eos_token_ids: Collection[int],
        tokenizer: Tokenizer,
        prompt_tokens: Sequence[int],
    ) -> None:
        wanted = eos_token_ids if stop is None else stop
        self._tokens = frozenset(item for item in wanted if isinstance(item, int))
        self._strings = tuple(item for item in wanted if isinstance(item, str))
        self._tokenizer = tokenizer
        self._before = list(prompt_tokens[-1:])
        longest = max((len(string.encode()) for string in self._strings), default=0)
        self._tail_tokens = longest + 4  # a UTF-8 character cut at the start of the tail spoils at most 4 tokens

    def is_reached(self, tokens: Sequence[int]) -> bool:
        """Whether ``tokens``, generated so far, are stopped by their last one."""
        if tokens[-1] in self._tokens:
            return True
        if not self._strings:
            return False
        tail = list(tokens[-self._tail_tokens :])
        # a token before the tail keeps its leading space, which some tokenizers drop from the first word they decode
        before = list(tokens[-self._tail_tokens - 1 : -self._tail_tokens]) or self._before
        skipped = len(self._tokenizer.decode(before, skip_special_tokens=False))
        text = self._tokenizer.decode(before + tail, skip_special_tokens=False)[skipped:]
        return any(string in text for string in self._strings)
