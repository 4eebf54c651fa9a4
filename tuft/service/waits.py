"""Where everything stands that waits: its place in line, why it waits, and about how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tuft.fairness import VirtualCounters
from tuft.records import FutureKey
from tuft.service.admission import SampleLine
from tuft.service.forecast import Arrivals, Bias, Demand, seconds_until
from tuft.service.passes import EnginePasses
from tuft.service.queue import OperationQueue

_REFRESH_S = 0.25
_REFRESH_SHARE = 50.0
_PORTION = 200
"""So many operations are looked at before the event loop goes round: one or two milliseconds."""
_LAST = 2**62


@dataclass(frozen=True, slots=True)
class Wait:
    """``position``: 1 is next; None for what is with the engine, or waits for something else than its turn. ``eta_s``:
    seconds until its result, about; None if nothing is known yet."""

    state: Literal["active", "paused_capacity"]
    reason: str
    position: int | None = None
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Of the server: operations and samples that wait, and those that the engine has."""

    num_operations_waiting: int
    num_samples_waiting: int
    num_passes_with_engine: int
    num_samples_with_engine: int
    num_tenants: int


@dataclass(frozen=True, slots=True)
class _Spot:
    """``cost_before``: of the tenant's own work before it; ``num_before``: so many operations."""

    kind: Literal["training", "sampling"]
    tenant_id: str
    state: str
    cost_before: float
    cost: float
    num_before: int
    awaited_seq: int | None = None
    num_expected: float = 0.0
    started_s: float | None = None


@dataclass(slots=True)
class _Picture:
    """Of one moment: what each tenant has waiting of a kind, its cost and its number."""

    spots: dict[tuple[str, int | str], _Spot] = field(default_factory=dict)
    waiting: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def add(
        self, key: tuple[str, int | str], kind: Literal["training", "sampling"], tenant_id: str, spot: _Spot
    ) -> None:
        self.spots[key] = spot
        cost, number = self.waiting.get((kind, tenant_id), (0.0, 0))
        self.waiting[kind, tenant_id] = cost + spot.cost, number + (spot.state != "running")


class Waits:
    """Asked about futures by their keys, after a ``look``. What it sees of the queue is a moment old: with much in it,
    looking takes time."""

    def __init__(
        self,
        queue: OperationQueue,
        passes: EnginePasses,
        line: SampleLine,
        counters: VirtualCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._passes = passes
        self._line = line
        self._counters = counters
        self._clock = clock
        self._picture = _Picture()
        self._fresh_until_s = -1.0
        self._looking: asyncio.Task[None] | None = None
        self._biases = {"training": Bias(), "sampling": Bias()}

    async def look(self) -> None:
        """Look at everything that waits, unless that was done a moment ago; all who ask meanwhile look together."""
        if self._clock() < self._fresh_until_s:
            return
        if self._looking is None:
            self._looking = asyncio.create_task(self._draw())
        await asyncio.shield(self._looking)

    def explain(self, key: FutureKey) -> Wait | None:
        """None for what neither the queue nor the line of samples knows: it needs no turn, or has just ended."""
        now_s = self._clock()
        spot = self._picture.spots.get((key.subject_id, key.seq))
        if spot is None:
            return None
        if spot.state == "early":
            return Wait("active", f"waits for seq_id {spot.awaited_seq} of its run, which has not come")
        eta_s = self._training_s(spot, now_s) if spot.kind == "training" else self._sampling_s(spot, now_s)
        if eta_s is not None:
            eta_s = self._biases[spot.kind].said(f"{key.subject_id}:{key.seq}", eta_s, now_s)
        when = "" if eta_s is None else f"; done in about {_told(eta_s)}"
        if spot.state == "running":
            return Wait("active", f"the engine has it{when}", None, eta_s)
        position, total = self._position(spot)
        if spot.state == "behind":
            return Wait("active", f"waits for what its run has before it{when}", position, eta_s)
        return Wait("paused_capacity", f"number {position} of {total} in line{when}", position, eta_s)

    def settled(self, key: FutureKey) -> None:
        """It has its result: how good was what was said?"""
        for bias in self._biases.values():
            bias.settled(f"{key.subject_id}:{key.seq}", self._clock())

    def load(self) -> Load:
        numbers = {"training": 0, "sampling": 0}
        for (kind, _), (_, number) in self._picture.waiting.items():
            numbers[kind] += number
        return Load(
            numbers["training"],
            numbers["sampling"],
            self._passes.num_with_engine,
            len(self._line.started),
            len({tenant_id for _, tenant_id in self._picture.waiting}),
        )

    def _training_s(self, spot: _Spot, now_s: float) -> float | None:
        rate = self._passes.rate.value
        if not rate:
            return None
        lead = self._passes.remaining_cost(now_s)
        if spot.state == "running":
            return lead / rate
        return self._until(spot, spot.cost_before + spot.cost, self._queue.arrivals, rate, lead, now_s)

    def _sampling_s(self, spot: _Spot, now_s: float) -> float | None:
        each_s = self._line.seconds_per_token.value
        rate = self._line.rate.value
        if each_s is None or not rate:
            return None
        own_s = each_s * spot.num_expected
        if spot.started_s is not None:
            return max(0.0, own_s - (now_s - spot.started_s))
        before = spot.cost_before + spot.cost / 2  # one that has just begun ends before it, or one that is nearly done
        return own_s + self._until(spot, before, self._line.arrivals, rate, 0.0, now_s)

    def _until(
        self, spot: _Spot, cost: float, arrivals: Arrivals, rate_per_s: float, lead_cost: float, now_s: float
    ) -> float:
        others = []
        for (kind, tenant_id), (waiting, _) in self._picture.waiting.items():
            if kind == spot.kind and tenant_id != spot.tenant_id:
                others.append(self._demand(tenant_id, waiting, arrivals.per_s(tenant_id, now_s)))
        return seconds_until(cost, self._demand(spot.tenant_id, cost, 0.0), others, rate_per_s, lead_cost)

    def _demand(self, tenant_id: str, waiting: float, arriving_per_s: float) -> Demand:
        return Demand(self._counters.weight(tenant_id), self._counters.level(tenant_id), waiting, arriving_per_s)

    def _position(self, spot: _Spot) -> tuple[int, int]:
        """Its place among all that wait, and how many those are: of each other tenant, those that the fair order puts
        before it."""
        level = self._counters.level(spot.tenant_id) + spot.cost_before / self._counters.weight(spot.tenant_id)
        before, total = spot.num_before, 0
        for (kind, tenant_id), (cost, number) in self._picture.waiting.items():
            if kind != spot.kind:
                continue
            total += number
            if tenant_id != spot.tenant_id and cost > 0:
                owed = max(0.0, level - self._counters.level(tenant_id)) * self._counters.weight(tenant_id)
                before += int(number * min(1.0, owed / cost))
        return before + 1, total

    async def _draw(self) -> None:
        began_s = time.perf_counter()
        picture = _Picture()
        try:
            await self._see_operations(picture)
            await self._see_samples(picture)
        finally:
            self._looking = None
        self._picture = picture
        self._fresh_until_s = self._clock() + max(_REFRESH_S, _REFRESH_SHARE * (time.perf_counter() - began_s))

    async def _see_operations(self, picture: _Picture) -> None:
        places = []
        for number, place in enumerate(self._queue.places(), 1):
            places.append(place)
            if number % _PORTION == 0:
                await asyncio.sleep(0)
        places.sort(key=lambda place: _LAST if place.arrival is None else place.arrival)
        before: dict[str, tuple[float, int]] = {}
        for number, place in enumerate(places, 1):
            operation = place.operation
            cost, num_before = before.get(operation.tenant_id, (0.0, 0))
            spot = _Spot("training", operation.tenant_id, place.state, cost, place.cost, num_before, place.awaited_seq)
            picture.add((operation.run_id, operation.seq), "training", operation.tenant_id, spot)
            if place.state != "running":
                before[operation.tenant_id] = cost + place.cost, num_before + 1
            if number % _PORTION == 0:
                await asyncio.sleep(0)

    async def _see_samples(self, picture: _Picture) -> None:
        def see(key: str, spot: _Spot) -> None:
            subject, _, seq = key.rpartition(":")
            picture.add((subject, int(seq)), "sampling", spot.tenant_id, spot)

        for one in self._line.started.values():
            see(
                one.sample_id,
                _Spot("sampling", one.tenant_id, "running", 0.0, 0.0, 0, None, one.num_expected, one.started_s),
            )
        for tenant_id, samples in tuple(self._line.all_waiting.items()):
            cost = 0.0
            for number, one in enumerate(tuple(samples)):
                see(
                    one.sample_id,
                    _Spot("sampling", tenant_id, "in line", cost, one.cost, number, None, one.num_expected),
                )
                cost += one.cost
                if number % _PORTION == _PORTION - 1:
                    await asyncio.sleep(0)


def _told(seconds: float) -> str:
    """As exactly as it is known."""
    if seconds < 1:
        return "a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
