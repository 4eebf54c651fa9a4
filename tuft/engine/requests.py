"""Sample requests on their way: what is known of one command, and of each of its continuations.

Shape letters: ``D`` residual channels.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tuft.engine.base import Sample
from tuft.engine.kv_pages import num_pages_of
from tuft.engine.prefix_cache import CHUNK_TOKENS, Chunk
from tuft.engine.prompt_scores import PromptScores
from tuft.engine.sampling import Draw, StopRule, uniforms
from tuft.errors import EngineError, InvalidInput, TuftError, UserError
from tuft.models.architecture import DecoderConfig
from tuft.models.lora import Adapter
from tuft.models.paged_attention import PAGE_TOKENS
from tuft.types import SampledSequence, SampleResult, SampleSpec, StopReason, TokenLogprobs

_UNIFORMS_AHEAD = 64


@dataclass(slots=True, eq=False)
class Request:
    """One sample command. ``chunks``: those of its prompt that it holds, in order; ``num_reserved``: the pages that the
    rest of its prompt may still take; ``num_hit_tokens``: those of its prompt that it did not have to compute.
    ``new``: continuations that have no token yet."""

    key: Hashable
    command: Sample
    adapter: Adapter | None
    seed: int
    max_new: int
    stop: StopRule
    scores: PromptScores
    chunks: list[Chunk] = field(default_factory=list)
    num_reserved: int = 0
    num_hit_tokens: int = 0
    new: list[Continuation] = field(default_factory=list)
    num_started: int = 0
    is_over: bool = False
    sequences: dict[int, SampledSequence] = field(default_factory=dict)

    @property
    def tenant_id(self) -> str:
        return self.command.tenant_id

    @property
    def spec(self) -> SampleSpec:
        return self.command.spec

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.spec.prompt_tokens)

    @property
    def next_chunk(self) -> tuple[int, ...]:
        """The tokens of the prompt's next chunk; none at its end."""
        return self.spec.prompt_tokens[self.num_computed : self.num_computed + CHUNK_TOKENS]

    @property
    def num_computed(self) -> int:
        """Prompt tokens behind which the request can go on: whole chunks."""
        return min(len(self.chunks) * CHUNK_TOKENS, self.num_prompt_tokens)

    @property
    def last_x_1D(self) -> Tensor | None:
        """The hidden state that the first token of every continuation is drawn from, once the prompt is computed."""
        return self.chunks[-1].last_x_1D if self.num_computed == self.num_prompt_tokens else None

    @property
    def pages_per_continuation(self) -> int:
        """Pages behind the prompt's full ones. The last token drawn is never computed on."""
        if self.max_new == 1:
            return 0
        return num_pages_of(self.num_prompt_tokens + self.max_new - 1) - self.num_prompt_tokens // PAGE_TOKENS

    @property
    def prompt_pages(self) -> list[int]:
        """The prompt's pages, in order, the last of which may not be full."""
        return [page for chunk in self.chunks for page in chunk.pages]

    def result(self) -> SampleResult:
        sequences = tuple(self.sequences[index] for index in range(self.spec.num_samples))
        return self.scores.result(sequences, self.num_hit_tokens)

    def not_finite(self) -> TuftError:
        if self.command.adapter_id is None:
            return EngineError(f"base model {self.command.base_model!r}: its logits are not finite for this prompt")
        return UserError(
            f"adapter {self.command.adapter_id!r}: its logits are not finite (NaN or infinity), so its weights have "
            "diverged; sample from an earlier checkpoint, or train with a lower learning rate"
        )


@dataclass(slots=True, eq=False)
class Continuation:
    """One sequence being sampled behind its request's prompt. ``pages``: its own, behind the prompt's full ones;
    ``num_reserved``: those it may still take. ``likeliest``: of each token, a row of the likeliest, if they are wanted.
    """

    request: Request
    index: int
    num_reserved: int
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[TokenLogprobs] = field(default_factory=list)
    _uniforms: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions of the sequence so far, the last of which is not computed yet."""
        return self.request.num_prompt_tokens + len(self.tokens)

    @property
    def all_pages(self) -> list[int]:
        """The sequence's pages, in order of position."""
        return self.request.prompt_pages[: self.request.num_prompt_tokens // PAGE_TOKENS] + self.pages

    def next_draw(self) -> Draw:
        """How the token at position ``length`` is drawn."""
        if not self._uniforms:
            self._uniforms = uniforms(self.request.seed, self.index, self.length, _UNIFORMS_AHEAD)[::-1]
        spec, params = self.request.spec, self.request.spec.params
        return Draw(params.temperature, params.top_k, params.top_p, self._uniforms.pop(), spec.topk_logprobs)

    def take(self, token: int, logprob: float, likeliest: TokenLogprobs | None = None) -> StopReason | None:
        """Append a token; says why the sequence ends with it, if it does."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if likeliest is not None:
            self.likeliest.append(likeliest)
        if self.request.stop.is_reached(self.tokens):
            return "stop"
        return "length" if len(self.tokens) == self.request.max_new else None

    def sequence(self, stop_reason: StopReason) -> SampledSequence:
        topk = None
        if self.likeliest:
            ids_NK = np.concatenate([row.ids_LK for row in self.likeliest])
            topk = TokenLogprobs(ids_NK, np.concatenate([row.logprobs_LK for row in self.likeliest]))
        tokens_N, logprobs_N = np.asarray(self.tokens, dtype=np.int64), np.asarray(self.logprobs, dtype=np.float32)
        return SampledSequence(tokens_N, logprobs_N, stop_reason, topk)


def checked_length(spec: SampleSpec, config: DecoderConfig, kv_cache_tokens: int, token_bytes: int) -> int:
    """How many tokens a sample may have. ``token_bytes``: what keys and values of a token take of memory. Raises
    InvalidInput for a prompt or a count that cannot be computed."""
    num_prompt, max_tokens = len(spec.prompt_tokens), spec.params.max_tokens
    if spec.num_samples < 1:
        raise InvalidInput("num_samples", spec.num_samples, "must be at least 1")
    for name, count in (("topk_prompt_logprobs", spec.scoring.topk), ("topk_sample_logprobs", spec.topk_logprobs)):
        if not 0 <= count <= config.vocab_size:
            raise InvalidInput(name, count, f"must be 0 to {config.vocab_size}")
    limit = config.max_context_tokens
    if not 1 <= num_prompt <= limit:
        seen = f"{num_prompt} tokens with max_tokens {max_tokens}"
        raise InvalidInput("prompt", seen, f"must have 1 to {limit} tokens, the model's context")
    for index, token in enumerate(spec.prompt_tokens):
        if not 0 <= token < config.vocab_size:
            raise InvalidInput(f"prompt[{index}]", token, f"must be 0 to {config.vocab_size - 1}")
    room = max(1, limit - num_prompt)  # one token can always be drawn: it need not be computed on
    max_new = room if max_tokens is None else min(max_tokens, room)
    if num_prompt + max_new > kv_cache_tokens:
        raise InvalidInput(
            "sampling_params.max_tokens",
            max_tokens,
            f"{num_prompt} prompt tokens and up to {max_new} new ones must fit engine.kv_cache_tokens "
            f"{kv_cache_tokens}: they need {(num_prompt + max_new) * token_bytes:,} bytes of memory, and "
            f"{kv_cache_tokens * token_bytes:,} are there",
        )
    return max_new
