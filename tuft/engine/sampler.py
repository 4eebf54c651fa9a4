"""The sampler: continuous batching of every tenant's sample requests on the trainer's own decoder.

A request waits until the pages that it may come to need can be reserved: the tenant who has the fewest rows is next,
and of its requests the first. Its prompt is computed once, in chunks, as far as it is not known already; each of its
continuations then decodes by itself. Each step is one pass over what the tenants have whose turn it is
(``engine.turns``): one token of every continuation and some chunks of prompts.

What a sequence gets does not depend on its neighbours: attention is its own, products are row by row, prompts are cut
at fixed places, and a seeded draw is a function of (seed, sample index, position).

Shape letters: ``T`` rows of a step, ``D`` residual channels, ``U`` rows whose next token is drawn.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import chain
from math import isfinite
from time import perf_counter

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tuft.engine.base import EngineSettings, Sample
from tuft.engine.decode_batch import DecodeBatch
from tuft.engine.drawing import Drawn, draw
from tuft.engine.failures import cancelled, engine_error
from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.engine.memory import sample_token_bytes
from tuft.engine.prefix_cache import CHUNK_TOKENS, Chunk, PrefixCache
from tuft.engine.prompt_scores import PromptScores
from tuft.engine.requests import Continuation, Request, checked_length
from tuft.engine.sample_steps import PromptPart, SampleSteps
from tuft.engine.sampling import StopRule, check_params
from tuft.engine.turns import Turns, rows_of
from tuft.errors import TuftError
from tuft.fairness import Costs
from tuft.models.decoder import Decoder
from tuft.models.decoding import PackedAdapters
from tuft.models.lora import Adapter
from tuft.models.paged_attention import PAGE_TOKENS
from tuft.types import SampledSequence, SampleResult

Outcome = tuple[Hashable, SampleResult | TuftError]

_COSTS = Costs()
_KEPT_FREE = 8
"""One page in so many, where there are several tenants."""


class Sampler:
    """Sample requests of all tenants on one decoder. ``add`` takes one in, ``step`` moves everything on by one pass."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, settings: EngineSettings) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._settings = settings
        self._ops = decoder.ops
        self._packed = PackedAdapters(decoder.config.linear_shapes(), decoder.dtype)
        self._waiting: deque[Request] = deque()  # some of their continuations have no place yet
        self._admitted: list[Request] = []  # first come, first here
        self._running: list[Continuation] = []  # they have their first token
        self._turns = Turns()
        self._batch: DecodeBatch | None = None  # those that take part, None after one joined or left
        self._taking_part: list[Continuation] = []  # in the batch
        self._outcomes: list[Outcome] = []

    @cached_property
    def _pages(self) -> KvPages:
        """Made when the first sample is wanted. One page more than the setting says: a prompt's last page is copied for
        those that go on in it."""
        num_pages = num_pages_of(self._settings.kv_cache_tokens) + 1
        return KvPages(self._decoder.config, num_pages, self._decoder.dtype, self._decoder.device)

    @cached_property
    def _cache(self) -> PrefixCache:
        return PrefixCache(self._pages)

    @cached_property
    def _steps(self) -> SampleSteps:
        return SampleSteps(self._decoder, self._pages, self._cache, self._packed)

    @property
    def active(self) -> bool:
        return bool(self._waiting or self._admitted)

    @property
    def adapters(self) -> set[Adapter]:
        """Those of all requests that are not over."""
        return {request.adapter for request in (*self._waiting, *self._admitted) if request.adapter is not None}

    def add(self, key: Hashable, command: Sample, adapter: Adapter | None) -> None:
        """Queue ``command``; ``step`` will give back its outcome under ``key``.

        ``adapter`` must not change any more. Raises InvalidInput if the command can never be honoured.
        """
        config, spec = self._decoder.config, command.spec
        check_params(spec.params)
        token_bytes = sample_token_bytes(config, self._decoder.dtype.itemsize)
        max_new = checked_length(spec, config, self._settings.kv_cache_tokens, token_bytes)
        seed = secrets.randbits(64) if spec.params.seed is None else spec.params.seed
        stop = StopRule(spec.params.stop, config.eos_token_ids, self._tokenizer, spec.prompt_tokens)
        if self._settings.packed_decode:
            self._decoder.pack()
        self._waiting.append(Request(key, command, adapter, seed, max_new, stop, PromptScores(spec, seed)))

    def step(self) -> list[Outcome]:
        """One pass: one token of every continuation and some chunks of prompts. Returns what ended."""
        if self._ops is not self._decoder.ops:  # its last digits may differ from those of what is known
            self._ops, self._batch = self._decoder.ops, None
            if self._settings.packed_decode:
                self._decoder.pack()
            self._cache.forget_all()
        self._admit()
        try:
            with torch.no_grad():
                self._advance()
        except Exception as error:  # noqa: BLE001 (what broke the pass broke it for all who shared it, and no one else)
            failure = engine_error(error, "sampling")
            for request in list(self._admitted):
                self._end(request, failure)
            self._cache.forget_all()
        return self._ended()

    def cancel(self, sample_id: str) -> list[Outcome]:
        """End the request of that id, if there is one, wherever it is. Its pages are free, and no one else notices."""
        for request in [*self._admitted, *self._waiting]:
            if request.command.sample_id == sample_id and not request.is_over:
                if request in self._admitted:
                    self._end(request, cancelled())
                else:
                    self._waiting.remove(request)
                    self._outcomes.append((request.key, cancelled()))
        return self._ended()

    def _ended(self) -> list[Outcome]:
        if not self.active:
            self._batch = None
            self._packed.forget_tables()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # --- who takes part -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places to the continuations that wait, strictly in order: all pages that one may need are reserved, so
        nothing that has started is ever put back. Each tenant may have as many rows as a step; if there are more, they
        take turns."""
        full: set[str] = set()
        while (request := self._next_waiting(full)) is not None:
            num_missing = request.spec.num_samples - request.num_started
            known = [] if request.num_started else self._known(request)
            free_rows = self._settings.max_decode_rows - self._num_rows(request.tenant_id)
            count = min(num_missing, free_rows, self._num_free_places(request, known))
            if count > 0:
                self._start(request, known, count)
            if count == num_missing:
                self._waiting.remove(request)
            elif count == free_rows:
                full.add(request.tenant_id)
            else:
                return

    def _next_waiting(self, full: set[str]) -> Request | None:
        """The first request of the tenant who has the fewest rows, over its weight."""
        first: dict[str, Request] = {}
        for request in self._waiting:
            if request.tenant_id not in full:
                first.setdefault(request.tenant_id, request)

        def order(request: Request) -> tuple[float, tuple[float, int]]:
            return self._num_rows(request.tenant_id) / request.command.weight, self._turns.order(request.tenant_id)

        return min(first.values(), key=order, default=None)

    def _num_rows(self, tenant_id: str) -> int:
        """Those that have a place."""
        running = sum(one.request.tenant_id == tenant_id for one in self._running)
        return running + sum(len(one.new) for one in self._admitted if one.tenant_id == tenant_id)

    def _known(self, request: Request) -> list[Chunk]:
        """The chunks that the prompt begins with and that need not be computed."""
        chunks: list[Chunk] = []
        prompt = request.spec.prompt_tokens
        while len(chunks) * CHUNK_TOKENS < len(prompt):
            start = len(chunks) * CHUNK_TOKENS
            chunk = self._found(request, chunks, prompt[start : start + CHUNK_TOKENS])
            if chunk is None:
                break
            chunks.append(chunk)
        return chunks

    def _found(self, request: Request, before: Sequence[Chunk], tokens: tuple[int, ...]) -> Chunk | None:
        """The chunk of ``tokens`` behind ``before``, if it is known and its rows are not needed: they are not kept."""
        if len(before) * CHUNK_TOKENS + len(tokens) > request.scores.first_row:
            return None
        return self._cache.known(request.command.cache_scope, request.adapter, before, tokens)

    def _num_free_places(self, request: Request, known: list[Chunk]) -> int:
        """For how many continuations of ``request`` there are pages. Where there are several tenants, some pages are
        for those who hold none yet."""
        started = list(chain(self._running, *(one.new for one in self._admitted)))
        room = self._cache.num_takeable - sum(one.num_reserved for one in started)
        room -= sum(one.num_reserved for one in self._admitted)
        if not request.num_started:
            held = sum(len(chunk.pages) for chunk in known if chunk.num_holders)
            room -= num_pages_of(request.num_prompt_tokens) - held
        each = max(1, request.pages_per_continuation)
        kept_free = 0
        if self._turns.has_several:
            kept_free = num_pages_of(self._settings.kv_cache_tokens) // _KEPT_FREE
        holds_none = all(one.tenant_id != request.tenant_id for one in self._admitted)
        count = max((room - kept_free) // each, min(1, room // each) if holds_none else 0)
        return count if request.pages_per_continuation else request.spec.num_samples if room >= 0 else 0

    def _start(self, request: Request, known: list[Chunk], count: int) -> None:
        if not request.num_started:
            self._admitted.append(request)
            request.num_reserved = num_pages_of(request.num_prompt_tokens)
            for chunk in known:
                self._hold(request, chunk)
        first = request.num_started
        each = request.pages_per_continuation
        request.new += [Continuation(request, index, each) for index in range(first, first + count)]
        request.num_started += count

    def _hold(self, request: Request, chunk: Chunk) -> None:
        self._cache.hold(chunk)
        request.chunks.append(chunk)
        request.num_reserved -= len(chunk.pages)
        request.num_hit_tokens += len(chunk.tokens)

    # --- one pass -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        began = perf_counter()
        tenants = self._turns.next({one.tenant_id: one.command.weight for one in self._admitted})
        running = rows_of(tenants, self._running, self._settings.max_decode_rows)
        parts = self._prompt_parts(tenants)
        if self._batch is None or running != self._taking_part:
            self._taking_part = running
            self._batch = DecodeBatch(running, self._pages, self._ops.decode, self._packed)
        continuations = self._batch.continuations
        sources = []
        if continuations or parts:
            x_TD = self._steps.hidden(self._batch, parts)
            self._take_prompts(parts, x_TD[len(continuations) :])
            sources.append(x_TD[: len(continuations)])
        adapters, origins = list(self._batch.adapters), list(range(len(continuations)))
        costs = [(one.request.tenant_id, _COSTS.decode) for one in continuations]
        costs += [(part.request.tenant_id, _COSTS.prefill * len(part.chunk.tokens)) for part in parts]
        num_new = 0
        for request in self._admitted:
            if request.new and request.last_x_1D is not None:
                if num_new and num_new + len(request.new) > self._settings.max_decode_rows:
                    continue
                num_new += len(request.new)
                costs += [(request.tenant_id, _COSTS.decode)] * len(request.new)
                sources.append(request.last_x_1D)
                origins += [len(adapters)] * len(request.new)
                adapters.append(request.adapter)
                continuations, request.new = continuations + request.new, []
        if continuations:
            x_UD = torch.cat(sources) if len(sources) > 1 else sources[0]
            draws = [one.next_draw() for one in continuations]
            self._take(continuations, draw(self._decoder, self._packed, x_UD, adapters, origins, draws))
        self._turns.end(costs, perf_counter() - began)

    def _prompt_parts(self, tenants: Sequence[str]) -> list[PromptPart]:
        """The next chunks of the tenants' prompts, of each those that came first: as many tokens as a pass may have,
        but only one chunk's while others wait for their next token. What is computed in this step is already known to
        those behind."""
        budget = CHUNK_TOKENS if self._running else max(CHUNK_TOKENS, self._settings.micro_batch_tokens)
        parts: list[PromptPart] = []
        place = {tenant_id: number for number, tenant_id in enumerate(tenants)}
        due = [request for request in self._admitted if request.tenant_id in place]
        for request in sorted(due, key=lambda one: place[one.tenant_id]):
            while tokens := request.next_chunk:
                chunk = self._found(request, request.chunks, tokens)
                if chunk is not None:
                    self._hold(request, chunk)
                    continue
                budget -= len(tokens)
                if budget < 0:
                    return parts
                start = request.num_computed
                chunk = self._cache.add(request.command.cache_scope, request.adapter, request.chunks, tokens)
                request.chunks.append(chunk)
                request.num_reserved -= len(chunk.pages)
                parts.append(PromptPart(request, chunk, start))
        return parts

    def _take_prompts(self, parts: list[PromptPart], x_LD: Tensor) -> None:
        row = 0
        for part in parts:
            x_PD = x_LD[row : row + len(part.chunk.tokens)]
            part.request.scores.add(self._decoder, part.start, x_PD, part.request.adapter)
            part.chunk.last_x_1D = x_PD[-1:].clone()
            row += len(part.chunk.tokens)

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _take(self, continuations: list[Continuation], drawn: Drawn) -> None:
        for n, (one, token, logprob) in enumerate(zip(continuations, drawn.tokens, drawn.logprobs, strict=True)):
            request = one.request
            if request.is_over:  # another of its continuations has just ended it with an error
                continue
            if not isfinite(logprob):
                self._end(request, request.not_finite())
                continue
            stop_reason = one.take(token, logprob, drawn.likeliest.get(n))
            if stop_reason is not None:
                self._finish(one, one.sequence(stop_reason))
            elif len(one.tokens) == 1:
                self._join(one)

    def _join(self, one: Continuation) -> None:
        """``one`` goes on: with a copy of the prompt's last page if there is room in it."""
        if one.request.num_prompt_tokens % PAGE_TOKENS:
            one.pages = self._cache.take(1)
            one.num_reserved -= 1
            self._pages.copy(one.request.prompt_pages[-1], one.pages[0])
        self._running.append(one)
        self._batch = None

    def _finish(self, one: Continuation, sequence: SampledSequence) -> None:
        request = one.request
        request.sequences[one.index] = sequence
        if len(one.tokens) > 1:
            self._leave([one])
        if len(request.sequences) == request.spec.num_samples:
            self._end(request, request.result())

    def _leave(self, leaving: list[Continuation]) -> None:
        for one in leaving:
            self._running.remove(one)
            self._cache.give_back(one.pages)
        self._batch = None

    def _end(self, request: Request, outcome: SampleResult | TuftError) -> None:
        request.is_over = True
        self._admitted.remove(request)
        self._leave([one for one in self._running if one.request is request])
        self._cache.let_go(request.chunks)
        if request in self._waiting:
            self._waiting.remove(request)
        self._outcomes.append((request.key, outcome))
