"""Log-probabilities of a prompt's own tokens, by the trainer's head, at temperature 1.

Shape letters: ``P`` prompt tokens, ``L`` rows of one chunk of the prompt, ``D`` residual channels, ``K`` alternatives.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tuft.models.decoder import Decoder
from tuft.models.head import Targets, score
from tuft.models.lora import Adapter, Segment
from tuft.types import Float32Array, Int64Array

_EMPTY_LOGPROB = -99999.0


class PromptScores:
    """Fills up as chunks of the prompt are computed. Row 0 of every array is empty: nothing precedes the first."""

    def __init__(self, prompt_tokens: tuple[int, ...], num_alternatives: int) -> None:
        self._tokens_P: Int64Array = np.asarray(prompt_tokens, dtype=np.int64)
        self._num_alternatives = num_alternatives
        shape = (len(prompt_tokens), num_alternatives)
        self.logprobs_P: Float32Array = np.full(len(prompt_tokens), np.nan, dtype=np.float32)
        self.top_ids_PK: Int64Array = np.zeros(shape, dtype=np.int64)
        self.top_logprobs_PK: Float32Array = np.full(shape, _EMPTY_LOGPROB, dtype=np.float32)

    def add(self, decoder: Decoder, start: int, x_LD: Tensor, adapter: Adapter | None) -> None:
        """``x_LD``: hidden states of the prompt's rows from ``start`` on; a row scores the token after it."""
        stop = min(start + len(x_LD), len(self._tokens_P) - 1)
        x_LD = x_LD[: stop - start]
        if len(x_LD) == 0:
            return
        segments = [Segment(adapter, 0, len(x_LD))] if adapter is not None else []
        targets = Targets(np.arange(len(x_LD)), self._tokens_P[start + 1 : stop + 1])
        scores = score(decoder, x_LD, segments, targets, num_alternatives=self._num_alternatives)
        self.logprobs_P[start + 1 : stop + 1] = scores.logprobs_M.cpu().numpy()
        if scores.top_tokens_TK is not None and scores.top_logprobs_TK is not None:
            self.top_ids_PK[start + 1 : stop + 1] = scores.top_tokens_TK.cpu().numpy()
            self.top_logprobs_PK[start + 1 : stop + 1] = scores.top_logprobs_TK.cpu().numpy()
