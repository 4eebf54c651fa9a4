"""The sampler: continuous batching of every tenant's sample requests on the trainer's own decoder.

A request waits in a first-come queue until the cache has room for what it may grow to. Its prompt is computed once, in
chunks; its samples then decode together as a *cohort*. Each step is one pass over whatever there is: the next chunk of
some prompts and one token of every decoding sequence, sorted by adapter.

What a sequence gets does not depend on its neighbours: attention is per cohort, products are row by row, prompts are
cut at fixed places, and a seeded draw is a function of (seed, sample index, position).

Shape letters: ``T`` rows of a step, ``D`` residual channels, ``U`` rows whose next token is drawn,
``N`` draws (several of one row where samples begin), ``V`` vocabulary.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

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
from tuft.models.head import dot_products, exact_logits
from tuft.models.lora import Adapter, Segment
from tuft.types import SampledSequence, SampleResult, StopReason

Outcome = tuple[Hashable, SampleResult | TuftError]


@dataclass(slots=True, eq=False)
class _Request:
    """One sample command on its way. ``prompt_cache`` is there once it was admitted, ``last_x_1D`` (the hidden state
    that every sample's first token is drawn from) once its prompt is computed."""

    key: Hashable
    command: Sample
    adapter: Adapter | None
    seed: int
    max_new: int
    stop: StopRule
    scores: PromptScores | None
    prompt_cache: KvCache | None = None
    last_x_1D: Tensor | None = None
    num_started: int = 0
    sequences: dict[int, SampledSequence] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.command.prompt_tokens)

    @property
    def shares_prompt(self) -> bool:
        """Whether the prompt has a cache of its own; a single sample continues in the prompt's."""
        return self.command.num_samples > 1

    @property
    def tokens_per_sample(self) -> int:
        return self.max_new if self.shares_prompt else self.num_prompt_tokens + self.max_new


@dataclass(slots=True)
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


@dataclass(slots=True, eq=False)
class _Part:
    """What one step computes for one prompt or cohort: consecutive rows from ``start`` on."""

    owner: _Request | _Cohort
    adapter: Adapter | None
    tokens: list[int]
    positions: list[int]
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class Sampler:
    """Sample requests of all tenants on one decoder. ``add`` takes one in, ``step`` moves everything on by one pass."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, settings: EngineSettings) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._settings = settings
        self._chunk_tokens = max(64, settings.micro_batch_tokens // 4)  # short, since decoding waits for it
        self._waiting: deque[_Request] = deque()  # some of their samples have no place yet
        self._admitted: list[_Request] = []  # their prompt, at least, is in the cache; first come, first here
        self._cohorts: list[_Cohort] = []
        self._outcomes: list[Outcome] = []

    @property
    def active(self) -> bool:
        return bool(self._waiting or self._admitted)

    def add(self, key: Hashable, command: Sample, adapter: Adapter | None) -> None:
        """Queue ``command``; ``step`` will give back its outcome under ``key``.

        ``adapter`` must not change any more. Raises InvalidInput if the command can never be honoured.
        """
        config, params = self._decoder.config, command.params
        check_params(params)
        max_new = self._checked_length(command)
        scores = None
        if command.prompt_logprobs or command.topk_prompt_logprobs:
            scores = PromptScores(command.prompt_tokens, command.topk_prompt_logprobs)
        self._waiting.append(
            _Request(
                key,
                command,
                adapter,
                seed=secrets.randbits(64) if params.seed is None else params.seed,
                max_new=max_new,
                stop=StopRule(params.stop, config.eos_token_ids, self._tokenizer, command.prompt_tokens),
                scores=scores,
            )
        )

    def _checked_length(self, command: Sample) -> int:
        """How many tokens a sample may have. Raises InvalidInput for a prompt or a count that cannot be computed."""
        config, num_prompt, max_tokens = self._decoder.config, len(command.prompt_tokens), command.params.max_tokens
        if command.num_samples < 1:
            raise InvalidInput("num_samples", command.num_samples, "must be at least 1")
        if not 0 <= command.topk_prompt_logprobs <= config.vocab_size:
            raise InvalidInput(
                "topk_prompt_logprobs", command.topk_prompt_logprobs, f"must be 0 to {config.vocab_size}"
            )
        limit = config.max_context_tokens
        if not 1 <= num_prompt <= limit:
            seen = f"{num_prompt} tokens with max_tokens {max_tokens}"
            raise InvalidInput("prompt", seen, f"must have 1 to {limit} tokens, the model's context")
        for index, token in enumerate(command.prompt_tokens):
            if not 0 <= token < config.vocab_size:
                raise InvalidInput(f"prompt[{index}]", token, f"must be 0 to {config.vocab_size - 1}")
        room = max(1, limit - num_prompt)  # one token can always be drawn: it need not be computed on
        max_new = room if max_tokens is None else min(max_tokens, room)
        if num_prompt + max_new > self._settings.kv_cache_tokens:
            raise InvalidInput(
                "sampling_params.max_tokens",
                max_tokens,
                f"{num_prompt} prompt tokens and up to {max_new} new ones must fit engine.kv_cache_tokens "
                f"{self._settings.kv_cache_tokens}",
            )
        return max_new

    def step(self) -> list[Outcome]:
        """One pass: the next chunk of some prompts and one token of every sequence. Returns what ended."""
        self._admit()
        try:
            with torch.no_grad():
                self._advance()
        except Exception as error:  # noqa: BLE001 (what broke the pass broke it for all who shared it, and no one else)
            failure = engine_error(error, "sampling")
            for request in list(self._admitted):
                self._end(request, failure)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # --- who takes part -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places to the samples that wait, strictly in order: room is reserved for all a sample may grow to, so
        nothing that has started is ever put back."""
        while self._waiting:
            request = self._waiting[0]
            num_missing = request.command.num_samples - request.num_started
            count = min(num_missing, self._num_free_places(request))
            if count > 0:
                self._start(request, count)
            if count < num_missing:
                return
            self._waiting.popleft()

    def _num_free_places(self, request: _Request) -> int:
        """How many samples of ``request`` may start now."""
        reserved = sum(r.num_prompt_tokens for r in self._admitted if r.shares_prompt)
        reserved += sum(len(cohort.rows) * cohort.request.tokens_per_sample for cohort in self._cohorts)
        if request.shares_prompt and request.prompt_cache is None:
            reserved += request.num_prompt_tokens
        free_rows = self._settings.max_decode_rows - sum(len(cohort.rows) for cohort in self._cohorts)
        return min(free_rows, (self._settings.kv_cache_tokens - reserved) // request.tokens_per_sample)

    def _start(self, request: _Request, count: int) -> None:
        cache = self._new_cache(count, request.tokens_per_sample)
        if request.prompt_cache is None:
            shares = request.shares_prompt
            request.prompt_cache = self._new_cache(1, request.num_prompt_tokens) if shares else cache
            self._admitted.append(request)
        first = request.num_started
        self._cohorts.append(_Cohort(request, [_Row(index) for index in range(first, first + count)], cache))
        request.num_started += count

    def _new_cache(self, num_sequences: int, capacity: int) -> KvCache:
        decoder = self._decoder
        return KvCache(decoder.config, num_sequences, capacity, decoder.dtype, decoder.device)

    # --- one pass -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        parts = sorted([*self._decode_parts(), *self._prompt_parts()], key=lambda part: id(part.adapter))
        row = 0
        for part in parts:
            part.start, row = row, row + len(part.tokens)
        sources: list[tuple[_Cohort, Tensor]] = []
        if parts:
            x_TD = self._hidden(parts)
            for part in parts:
                if isinstance(part.owner, _Cohort):
                    sources.append((part.owner, x_TD[part.start : part.stop]))
                else:
                    self._take_prompt(part.owner, part, x_TD[part.start : part.stop])
        for cohort in self._cohorts:
            if not cohort.has_started and cohort.request.last_x_1D is not None:
                sources.append((cohort, cohort.request.last_x_1D))
        if sources:
            self._draw(sorted(sources, key=lambda source: id(source[0].request.adapter)))

    def _decode_parts(self) -> Iterator[_Part]:
        for cohort in self._cohorts:
            if cohort.has_started:
                num_rows = len(cohort.rows)
                position = cohort.request.num_prompt_tokens + len(cohort.rows[0].tokens) - 1
                tokens = [row.tokens[-1] for row in cohort.rows]
                yield _Part(cohort, cohort.request.adapter, tokens, [position] * num_rows)

    def _prompt_parts(self) -> Iterator[_Part]:
        """The next chunk of the prompts that came first, up to one chunk's tokens together. A prompt is always cut at
        the same places, so its bits do not depend on the load."""
        num_tokens = 0
        for request in self._admitted:
            if request.last_x_1D is None and request.prompt_cache is not None:
                start = request.prompt_cache.length
                tokens = list(request.command.prompt_tokens[start : start + self._chunk_tokens])
                num_tokens += len(tokens)
                if num_tokens > self._chunk_tokens:
                    return
                yield _Part(request, request.adapter, tokens, list(range(start, start + len(tokens))))

    def _hidden(self, parts: list[_Part]) -> Tensor:
        spans: list[PromptSpan | DecodeSpan] = []
        for part in parts:
            if isinstance(part.owner, _Cohort):
                request = part.owner.request
                part.owner.cache.extend(1)
                prompt = request.prompt_cache if request.shares_prompt else None
                spans.append(DecodeSpan(part.start, part.stop, part.owner.cache, prompt))
            elif part.owner.prompt_cache is not None:
                part.owner.prompt_cache.extend(len(part.tokens))
                spans.append(PromptSpan(part.start, part.stop, part.owner.prompt_cache))
        device = self._decoder.device
        tokens_T = torch.tensor([token for part in parts for token in part.tokens], device=device)
        positions_T = torch.tensor([position for part in parts for position in part.positions], device=device)
        segments = _segments([(part.adapter, len(part.tokens)) for part in parts])
        return self._decoder.hidden(tokens_T, positions_T, StepAttention(spans), segments)

    def _take_prompt(self, request: _Request, part: _Part, x_LD: Tensor) -> None:
        if request.scores is not None:
            request.scores.add(self._decoder, part.positions[0], x_LD, request.adapter)
        if part.positions[-1] == request.num_prompt_tokens - 1:
            request.last_x_1D = x_LD[-1:].clone()

    def _draw(self, sources: list[tuple[_Cohort, Tensor]]) -> None:
        """One token for every row of the cohorts, from the hidden states beside them: one a row, or one for all."""
        x_UD = torch.cat([x for _, x in sources])
        segments = _segments([(cohort.request.adapter, len(x)) for cohort, x in sources])
        draws: list[Draw] = []
        origins: list[int] = []  # the row of x_UD that each draw is from
        first = 0
        for cohort, x in sources:
            params, num_rows = cohort.request.command.params, len(cohort.rows)
            position = cohort.request.num_prompt_tokens + len(cohort.rows[0].tokens)
            for n, row in enumerate(cohort.rows):
                u = uniform(cohort.request.seed, row.index, position)
                draws.append(Draw(params.temperature, params.top_k, params.top_p, u))
                origins.append(first + (n if len(x) == num_rows else 0))
            first += len(x)
        tokens, logprobs = self._drawn(x_UD, segments, torch.tensor(origins, device=x_UD.device), draws)
        first = 0
        for cohort, _ in sources:
            last = first + len(cohort.rows)
            if cohort in self._cohorts:  # else another cohort has just ended the request with an error
                self._take_drawn(cohort, tokens[first:last], logprobs[first:last])
            first = last

    def _drawn(
        self, x_UD: Tensor, segments: list[Segment], origins_N: Tensor, draws: list[Draw]
    ) -> tuple[list[int], list[float]]:
        none = origins_N[:0]
        logits_NV = exact_logits(self._decoder, x_UD, segments, none, none)
        if len(draws) > len(x_UD):
            logits_NV = logits_NV[origins_N]
        if self._decoder.dtype == torch.float32:
            return draw_tokens(logits_NV, draws)
        return draw_tokens(logits_NV, draws, partial(dot_products, self._decoder, x_UD.float(), segments, origins_N))

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _take_drawn(self, cohort: _Cohort, tokens: list[int], logprobs: list[float]) -> None:
        request = cohort.request
        if not all(isfinite(logprob) for logprob in logprobs):
            self._end(request, _not_finite(request))
            return
        kept = []
        for n, row in enumerate(cohort.rows):
            row.tokens.append(tokens[n])
            row.logprobs.append(logprobs[n])
            is_stopped = request.stop.is_reached(row.tokens)
            if is_stopped or len(row.tokens) == request.max_new:
                request.sequences[row.index] = _sequence(row, "stop" if is_stopped else "length")
            else:
                kept.append(n)
        if len(request.sequences) == request.command.num_samples:
            self._end(request, _result(request))
        elif not kept:
            self._cohorts.remove(cohort)
        elif len(kept) < len(cohort.rows):
            cohort.rows = [cohort.rows[n] for n in kept]
            cohort.cache.keep(kept)

    def _end(self, request: _Request, outcome: SampleResult | TuftError) -> None:
        self._admitted.remove(request)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.request is not request]
        if self._waiting and self._waiting[0] is request:
            self._waiting.popleft()
        self._outcomes.append((request.key, outcome))


def _segments(adapters: list[tuple[Adapter | None, int]]) -> list[Segment]:
    """One segment for each run of rows with the same adapter, given as (adapter, number of rows)."""
    segments: list[Segment] = []
    row = 0
    for adapter, count in adapters:
        if segments and segments[-1].adapter is adapter and segments[-1].stop == row:
            segments[-1] = Segment(adapter, segments[-1].start, row + count)
        elif adapter is not None:
            segments.append(Segment(adapter, row, row + count))
        row += count
    return segments


def _sequence(row: _Row, stop_reason: StopReason) -> SampledSequence:
    return SampledSequence(
        np.asarray(row.tokens, dtype=np.int64), np.asarray(row.logprobs, dtype=np.float32), stop_reason
    )


def _result(request: _Request) -> SampleResult:
    command, scores = request.command, request.scores
    sequences = tuple(request.sequences[index] for index in range(command.num_samples))
    if scores is None:
        return SampleResult(sequences)
    has_top = command.topk_prompt_logprobs > 0
    return SampleResult(
        sequences,
        scores.logprobs_P if command.prompt_logprobs else None,
        scores.top_ids_PK if has_top else None,
        scores.top_logprobs_PK if has_top else None,
    )


def _not_finite(request: _Request) -> TuftError:
    if request.command.adapter_id is None:
        return EngineError(f"base model {request.command.base_model!r}: its logits are not finite for this prompt")
    return UserError(
        f"adapter {request.command.adapter_id!r}: its logits are not finite (NaN or infinity), so its weights have "
        "diverged; sample from an earlier checkpoint, or train with a lower learning rate"
    )
