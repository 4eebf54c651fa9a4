"""From an accepted operation to its settled future: ask the queue, and keep the engine's mailbox filled.

``service.passes`` says what the engine gets and when. What it held when it died is done again by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

from tuft.engine.base import Command, Engine, OptimStep, RunLoss
from tuft.errors import Damaged, EngineDied, QuotaExceeded, RunLost, TuftError, UserError
from tuft.records import FutureKey, Run, Tenant
from tuft.service.activity import Activity
from tuft.service.calls import NEEDS_NO_ADAPTER, Call, Rejected
from tuft.service.errands import MAX_DEATHS, SUSPECT_DEATHS, Errands
from tuft.service.futures import Futures
from tuft.service.held import HeldRequests
from tuft.service.passes import MAX_PASSES, EnginePasses, Pass
from tuft.service.queue import MAX_LOSSES, Operation, OperationQueue, Part, Work, rows_of
from tuft.service.refusals import Refusals
from tuft.service.replies import Replies, Told
from tuft.service.settlements import Settlement, failure, outcome
from tuft.service.suspects import Suspects
from tuft.service.traces import Span
from tuft.types import Failure, FutureResult

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SWEEP_INTERVAL_S, _POLL_S = 0.25, 0.02
_IN_THREAD_TOKENS = 2048

Perform = Callable[[Operation, Any], Awaitable[FutureResult]]
"""Does a call that is the service's own work."""


class Residence(Protocol):
    """Who knows which runs the engine holds: ``service.residency``."""

    def is_resident(self, run_id: str) -> bool:
        """True if the run's adapter is in the engine as it runs now."""
        ...

    def bring(self, run_id: str) -> None:
        """Have it there soon."""
        ...

    def refusal(self, run_id: str) -> str | None:
        """Why the run cannot be brought in, if that will not change soon."""
        ...

    def changed(self, run_id: str) -> None:
        """An operation that changed the run's state has ended well."""
        ...


class Scheduler:
    """Owns the queue. Lives on one event loop; nothing here blocks it. ``held_bytes``: requests whose data are kept in
    memory while they wait; beyond that they wait on the disk."""

    def __init__(
        self,
        engine: Engine,
        futures: Futures,
        activity: Activity,
        seq_gap_timeout_s: float,
        held_bytes: int,
        queue: OperationQueue | None = None,
    ) -> None:
        self.replies = Replies(engine)
        self.errands = Errands(engine, futures, activity, self.alone)
        self._engine = engine
        self._futures = futures
        self._activity = activity
        self._seq_gap_timeout_s = seq_gap_timeout_s
        self._held = HeldRequests(held_bytes)
        self._queue = queue or OperationQueue()
        self.passes = EnginePasses(self._queue)
        self._spans: dict[str, Span] = {}  # of futures that are not settled yet
        self._num_unanswered = self._num_barriers = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loading: set[str] = set()
        self._performers: dict[type, Perform] = {}
        self._refusals = Refusals()
        self._is_held = False  # nothing may start
        self._holding = asyncio.Lock()
        self._suspects = Suspects(
            lambda one: _could_start(one, self.residence), lambda: self._num_with_engine + self.errands.num_under_way
        )
        self.residence: Residence
        """Set when the floor is put together: who brings runs in asks this scheduler in turn."""

    def open(self, run: Run, next_seq: int, pending: Sequence[Operation] = ()) -> None:
        """Accept operations of ``run`` from ``next_seq`` on; ``pending`` ones were accepted by an earlier server."""
        self._queue.open(run.run_id, run.tenant_id, next_seq, [one for one in pending if one.seq < next_seq])
        for operation in pending:
            self._spans[operation.future_id] = self._activity.operation(run, operation)
            if operation.seq >= next_seq:
                self._queue.put(operation, time.monotonic())

    def close(self, run_id: str, reason: TuftError) -> None:
        """Accept no more; what the run still had waiting fails with ``reason``."""
        for operation in self._queue.close(run_id):
            self._settle(operation, failure(reason))

    def perform(self, call: type[Call], by: Perform) -> None:
        """``by`` does what ``call`` asks for when its turn has come."""
        self._performers[call] = by

    def is_running(self, run_id: str) -> bool:
        return self._queue.is_running(run_id)

    def is_idle(self, run_id: str) -> bool:
        return self._queue.is_idle(run_id)

    def started_seq(self, run_id: str) -> int | None:
        """See ``OperationQueue.started_seq``."""
        return self._queue.started_seq(run_id)

    async def submit(
        self, tenant: Tenant, run: Run, seq: int, name: str, sent: Work, make: Callable[[], Work] | None = None
    ) -> str:
        """Queue an operation, which the trace calls ``name``, as number ``seq`` of ``run``; returns its future's id
        once it is journaled. ``make`` checks what was ``sent`` and returns what is to be done; an error that it raises
        fails the future, so that the seq is consumed.

        A retry of (run, seq) gets the first call's future. A run that is not open, or a seq that was given up, gives a
        future that has failed already. Raises what ``Futures.accept`` raises.
        """

        def prepare() -> tuple[Work, int]:
            try:
                work = sent if make is None else make()
            except UserError as error:  # others are ours, and may be over when the client tries again
                refused = failure(error)
                return Rejected(refused.message, refused.category, refused.refused), 0
            return work, rows_of(work, self._engine.pass_tokens) if isinstance(work, RunLoss) else 0

        is_large = isinstance(sent, RunLoss) and sent.num_tokens > _IN_THREAD_TOKENS
        prepared = await _maybe_in_thread(is_large, partial(self._futures.prepare, sent, prepare))
        prepared = replace(prepared, charge=self._activity.charge(run, prepared.request))
        try:
            future_id, is_new = await self._futures.accept(
                tenant, FutureKey("operation", run.run_id, seq), name, prepared
            )
        except QuotaExceeded as error:
            self._refusals.note(tenant, run, seq, error)
            self._queue.renew_gap(run.run_id, time.monotonic())
            raise
        self._refusals.forget(run.run_id, seq)
        if is_new:
            operation = Operation(
                run_id=run.run_id,
                tenant_id=run.tenant_id,
                seq=seq,
                future_id=future_id,
                work=prepared.request,
                num_rows=prepared.num_rows,
                num_tokens=prepared.charge.num_tokens,
                name=name,
                key_number=tenant.key_number,
            )
            self._spans[future_id] = self._activity.operation(run, operation)
            self._enqueue(run, operation, len(prepared.content))
        return future_id

    def dispatch(self) -> None:
        """Something that operations waited for is there: start all that may start now."""
        self._queue.pass_tokens = self._engine.pass_tokens
        self._queue.counters.credit = self._engine.pass_tokens + 1  # before a pass that waits, see service.passes
        self.errands.hold("suspects", is_held=self._suspects.first() is not None)
        while self._engine.base_models and not self._is_held:  # else it starts, and what waits keeps its place
            parts, in_pass = self.passes.next(self._may_start, time.monotonic())
            if not parts:
                return
            self._start(parts, in_pass)
            if len(parts) >= MAX_LOSSES:  # more may be there: once the event loop has gone round
                asyncio.get_running_loop().call_soon(self.dispatch)
                return

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Meanwhile nothing of anybody else is with the engine, so that it is clear what it dies of."""
        async with self._holding, self.errands.held():
            self._is_held = True
            try:
                while self._num_with_engine:  # noqa: ASYNC110 (many tell)
                    await asyncio.sleep(_POLL_S)
                yield
            finally:
                self._is_held = False

    async def serve(self) -> None:
        """Housekeeping; runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self._sweep()
            self.dispatch()  # the engine may have become ready
            await self._pass_over_refused()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False if ``timeout_s`` was not enough, or no engine is there."""
        deadline = time.monotonic() + timeout_s
        while self._tasks or self.errands.num_running or self._num_unanswered or self._queue.num_ready:
            if time.monotonic() >= deadline or not self._engine.base_models:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _enqueue(self, run: Run, operation: Operation, num_bytes: int) -> None:
        if not self._queue.has(run.run_id):
            self._settle(operation, failure(RunLost(f"run {run.run_id} is {run.status}: {HOW_TO_GO_ON}")))
            return
        if not self._queue.accepts(run.run_id, operation.seq):
            message = f"seq_id: {operation.seq} of run {run.run_id} had its turn: it was given up, or is long done"
            self._settle(operation, Failure(message, "user"))
            return
        if operation.is_loss and not self._held.hold(operation.future_id, num_bytes):
            operation.work = None
        self._queue.put(operation, time.monotonic())
        self.dispatch()

    def _may_start(self, operation: Operation) -> bool:
        if operation.work is None:
            self._load(operation)
            return False
        if _could_start(operation, self.residence):
            return self._suspects.may_start(operation)
        refusal = self.residence.refusal(operation.run_id)
        if refusal is None:
            self.residence.bring(operation.run_id)
        else:  # it has its turn as an error
            operation.work = Rejected(refusal, "server")
            asyncio.get_running_loop().call_soon(self.dispatch)
        return False

    @property
    def _num_with_engine(self) -> int:
        return self._num_unanswered + self._num_barriers

    def _load(self, operation: Operation) -> None:
        """Have its data in memory soon."""
        if operation.future_id in self._loading:
            return
        self._loading.add(operation.future_id)

        async def load() -> None:
            try:
                operation.work = await self._futures.request(operation.future_id)
            except Damaged as error:  # the disk lost it: its turn passes with an error
                operation.work = Rejected(error.told, "server")
            except TuftError as error:  # the disk may do better soon
                log.error("a request cannot be read yet", future=operation.future_id, error=str(error))
                await asyncio.sleep(_SWEEP_INTERVAL_S)
            finally:
                self._loading.discard(operation.future_id)
            self.dispatch()

        self._spawn(load())

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def _start(self, parts: Sequence[Part], filling: Pass | None) -> None:
        batch: list[tuple[Command, Told]] = []
        for part in parts:
            self._spans[part.operation.future_id].start()
            if isinstance(part.work, RunLoss | OptimStep):
                in_pass = filling if isinstance(part.work, RunLoss) else None
                batch.append((part.work, partial(self._answered, part, in_pass)))
            else:
                self._spawn(self._run_barrier(part, part.work))
        if batch:
            self._num_unanswered += len(batch)
            self.replies.send(batch)

    def _answered(self, part: Part, in_pass: Pass | None, reply: Future[Any]) -> None:
        self._num_unanswered -= 1
        self._suspects.answered(self._num_with_engine)
        if in_pass is not None:
            self.passes.answered(in_pass, time.monotonic())
        error = reply.exception()
        if isinstance(error, EngineDied):
            self._interrupted(part, error)
        else:
            self._end(part, failure(error) if isinstance(error, TuftError) else reply.result())
        self.dispatch()

    async def _run_barrier(self, part: Part, call: Call) -> None:
        self._num_barriers += 1
        try:
            result = await outcome(self._performers[type(call)](part.operation, call))
        except EngineDied as error:
            self._interrupted(part, error)
        else:
            self._end(part, result)
        finally:
            self._num_barriers -= 1
            self._suspects.answered(self._num_with_engine)
        self.dispatch()

    def _interrupted(self, part: Part, error: EngineDied) -> None:
        """The engine died with a part: another one does it all again, unless this operation seems to be the reason."""
        operation = part.operation
        operation.num_deaths += 1
        operation.error = None
        if self._queue.has(operation.run_id) and operation.num_deaths < MAX_DEATHS * _num_parts(operation):
            self._queue.interrupted(part)
            if operation.num_deaths >= SUSPECT_DEATHS * _num_parts(operation):
                self._suspects.add(operation)
        else:
            self._suspects.discard(operation)
            operation.error = failure(error)
            self._queue.finished(part)
            if self._futures.is_pending(operation.future_id):
                self._settle(operation, operation.error)

    def _end(self, part: Part, result: FutureResult | Failure | None) -> None:
        """A part's result; its operation is settled by that of the last."""
        operation = part.operation
        self._queue.finished(part)
        if isinstance(result, Failure) and operation.error is None:
            operation.error = replace(result, is_spent=isinstance(part.work, OptimStep))
        if part.is_last:
            settled = operation.error or result
            assert settled is not None
            self._settle(operation, settled)

    def _settle(self, operation: Operation, result: Settlement) -> None:
        self._held.release(operation.future_id)
        self._suspects.discard(operation)
        if isinstance(result, Failure):
            log.info("operation failed", run=operation.run_id, seq=operation.seq, error=result.message)
        elif isinstance(operation.work, OptimStep) or (isinstance(operation.work, RunLoss) and operation.work.backward):
            self.residence.changed(operation.run_id)
        span = self._spans.pop(operation.future_id)
        self._futures.settle(operation.future_id, result, self._activity.settled(span, result))

    async def _pass_over_refused(self) -> None:
        """What a quota refused, and its client gave up, has its turn as an error: the run goes on behind it."""
        for one in self._refusals.given_up():
            if self._queue.waits_for(one.run.run_id, one.seq):
                self._refusals.forget(one.run.run_id, one.seq)
                with contextlib.suppress(TuftError):  # refused again: later, then
                    await self.submit(one.tenant, one.run, one.seq, "rejected", Rejected(str(one.error), "user"))

    def _sweep(self) -> None:
        for operation in self._queue.give_up_gaps(time.monotonic(), self._seq_gap_timeout_s):
            message = _given_up(operation, self._seq_gap_timeout_s)
            self._settle(operation, Failure(message, "server"))


def _could_start(operation: Operation, residence: Residence) -> bool:
    work = operation.work
    return isinstance(work, NEEDS_NO_ADAPTER) or (work is not None and residence.is_resident(operation.run_id))


def _given_up(operation: Operation, timeout_s: float) -> str:
    return (
        f"operation {operation.seq} waited {timeout_s:g} s for an earlier seq_id of run {operation.run_id} "
        "that never came"
    )


def _num_parts(operation: Operation) -> int:
    """More than one part of it may be with an engine that dies."""
    return MAX_PASSES if operation.is_loss else 1


async def _maybe_in_thread(is_large: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if is_large else work()


HOW_TO_GO_ON = (
    "continue from its last checkpoint with create_training_client_from_state_with_optimizer(path), "
    "or create a new training client"
)
