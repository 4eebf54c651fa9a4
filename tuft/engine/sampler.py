"""The sampler: continuous batching of every tenant's sample requests on the trainer's own decoder.

A request waits in a first-come queue until the cache has room for what it may grow to. Its prompt is computed once, in
chunks; its samples then decode together as a *cohort*. Each step is one pass over whatever there is: the next chunk of
some prompts and one token of every decoding sequence, sorted by adapter.

What a sequence gets does not depend on its neighbours: attention is per cohort, products are row by row, prompts are cut
at fixed places, and a seeded draw is a function of (seed, sample index, position).

Shape letters: ``T`` rows of a step, ``D`` residual channels, ``N`` sequences drawn from, ``V`` vocabulary, ``P`` prompt.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tuft.engine.base import EngineSettings, Sample
from tuft.engine.failures import engine_error
from tuft.engine.kv_cache import DecodeSpan, KvCache, PromptSpan, StepAttention
from tuft.engine.prompt_scores import PromptScores
from tuft.engine.sampling import Draw, StopRule, check_params, draw_tokens, uniform
from tuft.errors import EngineError, InvalidInput, TuftError, UserError
from tuft.models.decoder import Decoder
from tuft.models.lora import Adapter, Segment
from tuft.types import SampledSequence, SampleResult, StopReason

Outcome = tuple[Hashable, SampleResult | TuftError]


@dataclass(slots=True, eq=False)
class _Request:
    """One sample command on its way. ``first_logits_V`` is there once the prompt is computed."""

    key: Hashable
    command: Sample
    adapter: Adapter | None
    seed: int
    max_new: int
    stop: StopRule
    scores: PromptScores | None
    prompt_cache: KvCache | None = None
    num_computed: int = 0
    num_started: int = 0
    first_logits_V: Tensor | None = None
    sequences: dict[int, SampledSequence] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.command.prompt_tokens)

    @property
    def shares_prompt(self) -> bool:
        return self.command.num_samples > 1


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence being sampled."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Cohort:
    """Samples of one request that started together, hence of one length."""

    request: _Request
    rows: list[_Row]
    cache: KvCache

    @property
    def has_started(self) -> bool:
        return bool(self.rows[0].tokens)

    @property
    def position(self) -> int:
        """Of the token drawn last."""
        return self.request.num_prompt_tokens + len(self.rows[0].tokens) - 1
