"""Which samples the engine gets, and when: a pure decision, and the coroutines that wait for it.

The engine samples what it has; of one tenant's ten thousand requests all but a few wait here. It gets as many as it can
decode together and some more, so that it never waits for us, in the order of ``tuft.fairness``: the tenant who was
served least for its weight first, and of each tenant's requests the first. One whose rows are fewer than its share
never waits for those of others: the engine lets tenants take turns (``engine.turns``).

How long an answer will be is known at its end. Until then a tenant is charged for one as long as its others were, of
what it allows; the difference is charged once it is known.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tuft.fairness import Costs, VirtualCounters
from tuft.records import Tenant
from tuft.service.forecast import Arrivals, Rate
from tuft.types import SampleResult, SampleSpec

SAMPLING = "sampling"
_LOOK_AHEAD = 0.25
_NEWEST = 0.1
_NEWEST_TOKENS = 2000.0


@dataclass(slots=True, eq=False)
class WaitingSample:
    """A request from its arrival to its end. ``max_new``: tokens that each of its answers may have; ``started_s``: when
    the engine got it; ``cost``: what it was, or would be, charged."""

    tenant_id: str
    sample_id: str
    base_model: str
    num_prompt_tokens: int
    num_rows: int
    max_new: int
    cost: float = 0.0
    arrived_s: float = 0.0
    started_s: float | None = None
    num_expected: float = 0.0
    admitted: asyncio.Future[None] | None = None


@dataclass(slots=True)
class _Line:
    """A tenant's. ``used``: the share of ``max_new`` that its answers had lately."""

    waiting: deque[WaitingSample] = field(default_factory=deque)
    used: float = 1.0


class SampleLine:
    """Requests of all tenants. ``max_rows``: what the engine decodes together of one base model; ``max_tokens``: what
    it keeps of them. Times in seconds of any clock that only grows."""

    def __init__(self, counters: VirtualCounters, costs: Costs, max_rows: int, max_tokens: int) -> None:
        self._counters = counters
        self._costs = costs
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._lines: dict[str, _Line] = {}
        self.started: dict[str, WaitingSample] = {}
        self.rate = Rate()
        self.arrivals = Arrivals()
        self.seconds_per_token = Rate(half_life=_NEWEST_TOKENS)
        self._last_end_s = 0.0

    def put(self, sample: WaitingSample, now_s: float) -> None:
        sample.arrived_s = now_s
        line = self._lines.setdefault(sample.tenant_id, _Line())
        sample.num_expected = max(1.0, line.used * sample.max_new)
        sample.cost = self._cost(sample.num_prompt_tokens, sample.num_rows * sample.num_expected)
        line.waiting.append(sample)
        self.arrivals.note(sample.tenant_id, sample.cost, now_s)

    def take(self, now_s: float) -> list[WaitingSample]:
        """Those that the engine gets now, in this order."""
        taken: list[WaitingSample] = []
        while True:
            wanting = [tenant_id for tenant_id, line in self._lines.items() if line.waiting]
            self._counters.now_want(SAMPLING, wanting)
            wanting.sort(key=self._counters.order)
            tenant_id = next((one for one in wanting if self._has_room(self._lines[one].waiting[0])), None)
            if tenant_id is None:
                return taken
            sample = self._lines[tenant_id].waiting.popleft()
            if not self.started:
                self._last_end_s = now_s
            sample.started_s = now_s
            self.started[sample.sample_id] = sample
            self._counters.charge(tenant_id, sample.cost)
            taken.append(sample)

    def remove(self, sample: WaitingSample) -> None:
        """It is not wanted any more, whether it has started or not."""
        if self.started.pop(sample.sample_id, None) is None:
            self._lines[sample.tenant_id].waiting.remove(sample)

    def ended(self, sample: WaitingSample, result: SampleResult, now_s: float) -> None:
        """The engine has answered it."""
        del self.started[sample.sample_id]
        lengths = [len(sequence.tokens_N) for sequence in result.sequences]
        cost = self._cost(sample.num_prompt_tokens - result.prompt_cache_hit_tokens, sum(lengths))
        self._counters.charge(sample.tenant_id, cost - sample.cost)
        line = self._lines[sample.tenant_id]
        line.used += _NEWEST * (sum(lengths) / (sample.max_new * sample.num_rows) - line.used)
        assert sample.started_s is not None
        self.rate.observe(cost, now_s - self._last_end_s)
        self.seconds_per_token.observe(now_s - sample.started_s, max(lengths))
        self._last_end_s = now_s

    def weight(self, tenant_id: str) -> float:
        return self._counters.weight(tenant_id)

    @property
    def all_waiting(self) -> dict[str, deque[WaitingSample]]:
        """By tenant, in their order."""
        return {tenant_id: line.waiting for tenant_id, line in self._lines.items() if line.waiting}

    @property
    def tenants(self) -> list[str]:
        """Who has samples waiting or under way."""
        under_way = {sample.tenant_id for sample in self.started.values()}
        return [tenant_id for tenant_id, line in self._lines.items() if line.waiting or tenant_id in under_way]

    def _has_room(self, sample: WaitingSample) -> bool:
        here = [one for one in self.started.values() if one.base_model == sample.base_model]
        rows = Counter[str]()
        for one in here:
            rows[one.tenant_id] += one.num_rows
        num_tokens = sum(one.num_prompt_tokens + one.num_rows * one.max_new for one in here)
        if rows.total() < self._max_rows * (1 + _LOOK_AHEAD) and num_tokens < self._max_tokens * (1 + _LOOK_AHEAD):
            return True
        weights = {tenant_id: self._counters.weight(tenant_id) for tenant_id in {*rows, sample.tenant_id}}
        share = weights[sample.tenant_id] / sum(weights.values())
        return rows[sample.tenant_id] < max(1.0, self._max_rows * share)

    def _cost(self, num_prefilled: int, num_decoded: float) -> float:
        return num_prefilled * self._costs.prefill + num_decoded * self._costs.decode


class Admission:
    """``SampleLine`` on an event loop."""

    def __init__(self, line: SampleLine, clock: Callable[[], float] = time.monotonic) -> None:
        self.line = line
        self._clock = clock

    @asynccontextmanager
    async def place(
        self, tenant: Tenant, sample_id: str, base_model: str, spec: SampleSpec, max_new: int
    ) -> AsyncIterator[Callable[[SampleResult], None]]:
        """Entered when the engine may get the request; to be called with what comes of it."""
        rows = spec.num_samples
        sample = WaitingSample(tenant.tenant_id, sample_id, base_model, len(spec.prompt_tokens), rows, max_new)
        sample.admitted = asyncio.get_running_loop().create_future()
        self.line.put(sample, self._clock())
        self._admit()
        is_over = False

        def end(result: SampleResult) -> None:
            nonlocal is_over
            is_over = True
            self.line.ended(sample, result, self._clock())

        try:
            await sample.admitted
            yield end
        finally:
            if not is_over:
                self.line.remove(sample)
            self._admit()

    def _admit(self) -> None:
        for sample in self.line.take(self._clock()):
            if sample.admitted is not None and not sample.admitted.done():
                sample.admitted.set_result(None)
