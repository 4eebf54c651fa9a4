"""What is asked about a prompt, by the trainer's head: logprobs at temperature 1, and tokens drawn instead of its own.

A row is the hidden state of one token and says how likely another is behind it; the last row says nothing of the
prompt. Shape letters: ``P`` prompt tokens, ``L`` rows of one chunk of the prompt, ``D`` residual channels, ``M`` (row,
token) pairs, ``K`` tokens of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tuft.engine.drawing import draw_alternatives
from tuft.engine.sampling import alternative_uniforms
from tuft.models.decoder import Decoder
from tuft.models.head import Targets, score
from tuft.models.lora import Adapter, Segment
from tuft.models.transfer import to_device
from tuft.types import (
    EMPTY_LOGPROB,
    Float32Array,
    Int64Array,
    Matrix,
    SampledSequence,
    SampleResult,
    SampleSpec,
    TokenLogprobs,
)


class PromptScores:
    """Fills up as chunks of the prompt are computed. Those that end before ``first_row`` need not be."""

    def __init__(self, spec: SampleSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        num_prompt, asked = len(spec.prompt_tokens), spec.scoring
        self._num_rows = num_prompt - 1
        self._first_own = num_prompt
        if asked.logprobs or asked.topk:
            self._first_own = 0 if asked.last_n is None else self._num_rows - asked.last_n
        self._targets = _wanted(asked.targets)
        first_target = int(self._targets.rows_M[0]) if len(self._targets.rows_M) else num_prompt
        self.first_row = 0 if asked.num_alternatives else min(self._first_own, first_target)

        self._tokens_P: Int64Array = np.asarray(spec.prompt_tokens, dtype=np.int64)
        self._logprobs_P: Float32Array = np.full(num_prompt, np.nan, dtype=np.float32)
        self._topk = _empty(num_prompt, asked.topk)
        self._target_logprobs_M: Float32Array = np.zeros(len(self._targets.rows_M), dtype=np.float32)
        self._alternatives = _empty(self._num_rows, asked.num_alternatives)

    def add(self, decoder: Decoder, start: int, x_LD: Tensor, adapter: Adapter | None) -> None:
        """``x_LD``: hidden states of the prompt's rows from ``start`` on."""
        first, stop = max(start, self.first_row), min(start + len(x_LD), self._num_rows)
        if first >= stop:
            return
        x_LD = x_LD[first - start : stop - start]
        segments = [Segment(adapter, 0, len(x_LD))] if adapter is not None else []
        own = np.arange(max(first, self._first_own), stop)
        lo, hi = np.searchsorted(self._targets.rows_M, (first, stop))
        ids_LK = self._alternatives.ids_LK[first:stop]
        if ids_LK.size:
            ids_LK[:] = self._draw(decoder, first, x_LD, segments)

        rows_M = [own, self._targets.rows_M[lo:hi], np.arange(first, stop).repeat(ids_LK.shape[1])]
        tokens_M = [self._tokens_P[own + 1], self._targets.tokens_M[lo:hi], ids_LK.ravel()]
        order_M = np.concatenate(rows_M).argsort(kind="stable")
        pairs = Targets(np.concatenate(rows_M)[order_M] - first, np.concatenate(tokens_M)[order_M])
        scores = score(decoder, x_LD, segments, pairs, num_top=self._spec.scoring.topk if len(own) else 0)
        logprobs_M = np.empty(len(order_M), dtype=np.float32)
        logprobs_M[order_M] = scores.logprobs_M.cpu().numpy()

        self._logprobs_P[own + 1], self._target_logprobs_M[lo:hi], of_alternatives_M = np.split(
            logprobs_M, np.cumsum([len(own), hi - lo])
        )
        self._alternatives.logprobs_LK[first:stop] = of_alternatives_M.reshape(ids_LK.shape)
        if scores.top_tokens_TK is not None and scores.top_logprobs_TK is not None:
            self._topk.ids_LK[own + 1] = scores.top_tokens_TK.cpu().numpy()[own - first]
            self._topk.logprobs_LK[own + 1] = scores.top_logprobs_TK.cpu().numpy()[own - first]

    def result(self, sequences: tuple[SampledSequence, ...], cache_hit_tokens: int) -> SampleResult:
        """With what was asked about the prompt, and only that."""
        asked = self._spec.scoring
        return SampleResult(
            sequences,
            prompt_logprobs_P=self._logprobs_P if asked.logprobs else None,
            topk_prompt=self._topk if asked.topk else None,
            target_prompt_logprobs=None if asked.targets is None else self._of_targets(asked.targets),
            prompt_alternatives=self._alternatives if asked.num_alternatives else None,
            prompt_cache_hit_tokens=cache_hit_tokens,
        )

    def _draw(self, decoder: Decoder, first: int, x_LD: Tensor, segments: list[Segment]) -> Int64Array:
        """Alternatives to the tokens behind the rows ``x_LD``, the first of which is the prompt's row ``first``."""
        num_alternatives = self._spec.scoring.num_alternatives
        uniforms = alternative_uniforms(self._seed, first + 1, len(x_LD), num_alternatives)
        uniforms_LK = to_device(uniforms, x_LD.device, torch.float64)
        ids_LK: Int64Array = (
            draw_alternatives(decoder, x_LD, segments, self._spec.params.temperature, uniforms_LK).cpu().numpy()
        )
        return ids_LK

    def _of_targets(self, targets: Matrix) -> Matrix:
        values_M: Float32Array = np.zeros(len(targets.values_M), dtype=np.float32)
        values_M[targets.values_M >= 0] = self._target_logprobs_M
        return Matrix(values_M, targets.shape, targets.crow, targets.col)


def _wanted(targets: Matrix | None) -> Targets:
    if targets is None:
        return Targets(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    is_wanted_M = targets.values_M >= 0
    return Targets(targets.rows_M[is_wanted_M], targets.values_M[is_wanted_M])


def _empty(length: int, k: int) -> TokenLogprobs:
    logprobs_LK: Float32Array = np.full((length, k), EMPTY_LOGPROB, dtype=np.float32)
    return TokenLogprobs(np.zeros((length, k), dtype=np.int64), logprobs_LK)
