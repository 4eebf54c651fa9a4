"""Requests that are no operations of a run: samples, losses to be checked, runs to be unloaded. Each is done at once,
beside the runs' lanes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

from tuft.engine.base import Engine
from tuft.errors import EngineDied
from tuft.metering import NOTHING, Charge
from tuft.records import FutureKey, Tenant
from tuft.service.activity import Activity
from tuft.service.calls import Call
from tuft.service.futures import Futures
from tuft.service.settlements import Settlement, failure, outcome
from tuft.service.traces import Span
from tuft.types import Failure, FutureResult

MAX_DEATHS = 5
SUSPECT_DEATHS = 2
"""What this many engines have died with is tried alone from then on. If ``MAX_DEATHS`` have, it is the reason."""
_POLL_S = 0.02
_CANCELLED = Failure("cancelled: its client asked for that", "user")

Errand = Callable[[], Awaitable[FutureResult]]


class Errands:
    """Of all tenants. What an engine held when it died is done again by the next one. Within ``alone`` nothing else is
    with the engine."""

    def __init__(
        self,
        engine: Engine,
        futures: Futures,
        activity: Activity,
        alone: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self._alone = alone
        self._engine = engine
        self._futures = futures
        self._activity = activity
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looking: asyncio.Task[None] | None = None
        self.num_under_way = 0
        self._holds: set[str] = set()
        self._may_begin = asyncio.Event()
        self._may_begin.set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    async def start(
        self,
        tenant: Tenant,
        key: FutureKey,
        sent: Call,
        work: Errand,
        *,
        charge: Charge = NOTHING,
        span: Callable[[], Span] | None = None,
        can_cancel: bool = False,
        on_start: Callable[[str], None] = lambda _: None,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Journal ``sent``, then start ``work``, which does what it asks for, beside the lanes; returns its future's
        id. A retry of ``key`` gets the first call's. ``on_start`` and ``on_end`` are told that id, once the request is
        journaled and once the future is settled."""
        prepared = replace(self._futures.prepare(sent, lambda: (sent, 0)), charge=charge)
        future_id, is_new = await self._futures.accept(tenant, key, type(sent).__name__, prepared)
        if is_new:
            on_start(future_id)
            self.resume(future_id, work, span=span, can_cancel=can_cancel, on_end=on_end)
        return future_id

    def resume(
        self,
        future_id: str,
        work: Errand,
        *,
        span: Callable[[], Span] | None = None,
        can_cancel: bool = False,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start ``work`` for a future that is journaled already."""
        noted = None if span is None else span()
        if noted is not None:
            noted.start()

        def end(task: asyncio.Task[Settlement]) -> None:
            self._tasks.discard(task)
            result = _CANCELLED if task.cancelled() else task.result()
            self._futures.settle(future_id, result, {} if noted is None else self._activity.settled(noted, result))
            on_end(future_id)

        task = asyncio.get_running_loop().create_task(self._outlasting(work))
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(end)
        if can_cancel:
            self._futures.let_cancel(future_id, task.cancel)

    def hold(self, reason: str, *, is_held: bool) -> None:
        """Nothing begins while there is a reason."""
        (self._holds.add if is_held else self._holds.discard)(reason)
        if self._holds:
            self._may_begin.clear()
        else:
            self._may_begin.set()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Begins once nothing is with the engine; meanwhile nothing goes there."""
        self.hold("one", is_held=True)
        try:
            while self.num_under_way:  # noqa: ASYNC110 (many tell)
                await asyncio.sleep(_POLL_S)
            yield
        finally:
            self.hold("one", is_held=False)

    async def _outlasting(self, work: Errand) -> Settlement:
        """What ``work`` ends with, once the engine can compute; it is done again if the engine dies with it."""
        deaths: list[EngineDied] = []
        while len(deaths) < MAX_DEATHS:
            await self._until_ready()
            async with self._alone() if len(deaths) >= SUSPECT_DEATHS else nullcontext():
                self.num_under_way += 1
                try:
                    return await outcome(work())
                except EngineDied as error:
                    deaths.append(error)
                finally:
                    self.num_under_way -= 1
        return failure(deaths[-1])

    async def _until_ready(self) -> None:
        """One looks for all: after a restart thousands may wait."""
        while not self._engine.base_models or not self._may_begin.is_set():
            await self._may_begin.wait()
            if self._engine.base_models:
                continue
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            await asyncio.shield(self._looking)

    async def _look(self) -> None:
        while not self._engine.base_models:  # noqa: ASYNC110 (another thread tells)
            await asyncio.sleep(_POLL_S)
