"""From an accepted operation to its settled future: ask the queue, and keep the engine's mailbox filled.

Two passes are with the engine at a time: one that it computes and one that waits there, so that it never waits for us.
No more than that is decided ahead, and the waiting one is topped up while it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from tuft.engine.base import Command, Engine, OptimStep, RunLoss
from tuft.errors import RunLost, TuftError
from tuft.records import Run
from tuft.service.activity import Activity
from tuft.service.futures import Futures, failure, outcome
from tuft.service.queue import Barrier, Operation, OperationQueue, Part, Work
from tuft.service.traces import Span
from tuft.types import Failure, FutureResult

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SWEEP_INTERVAL_S = 1.0
_MAX_PASSES = 2
_CANCELLED = Failure("cancelled: its client asked for that", "user")


@dataclass(slots=True)
class _Pass:
    """Parts of losses that are with the engine; over when all are answered."""

    num_rows: int = 0
    num_unanswered: int = 0


class Scheduler:
    """Owns the queue. Lives on one event loop; nothing here blocks it."""

    def __init__(self, engine: Engine, futures: Futures, activity: Activity, seq_gap_timeout_s: float) -> None:
        self._engine = engine
        self._futures = futures
        self._activity = activity
        self._seq_gap_timeout_s = seq_gap_timeout_s
        self._queue = OperationQueue()
        self._future_of_seq: dict[tuple[str, int], str] = {}
        self._spans: dict[str, Span] = {}  # of futures that are not settled yet
        self._generation_of_run: dict[str, int] = {}
        self._passes: list[_Pass] = []
        self._num_unanswered = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def open(self, run: Run, first_seq: int) -> None:
        """Accept operations of ``run`` from ``first_seq`` on. The engine is ready."""
        self._queue.pass_tokens = self._engine.pass_tokens
        self._queue.open(run.run_id, run.tenant_id, first_seq)

    def close(self, run_id: str, reason: TuftError) -> None:
        """Accept no more; what the run still had waiting fails with ``reason``."""
        for operation in self._queue.close(run_id):
            self._settle(operation, failure(reason))
        self._generation_of_run.pop(run_id, None)

    def mark_live(self, run_id: str) -> None:
        """The run's adapter is in the engine as it runs now."""
        self._generation_of_run[run_id] = self._engine.generation

    def is_live(self, run_id: str) -> bool:
        return self._generation_of_run.get(run_id) == self._engine.generation

    # --- operations ---------------------------------------------------------------------------------------------------

    def submit(self, run: Run, seq: int, name: str, work: Work) -> str:
        """Queue ``work``, which the trace calls ``name``, as operation ``seq`` of ``run``; returns its future's id at
        once.

        A retry of (run, seq) gets the first call's future. A run that is not open, or a seq that was given up, gives a
        future that has failed already.
        """
        key = (run.run_id, seq)
        known = self._future_of_seq.get(key)
        if known is not None and self._futures.known(known):
            return known
        future_id = self._futures.create(run.tenant_id)
        self._future_of_seq[key] = future_id
        self._spans[future_id] = self._activity.operation(run, seq, name, work)
        if not self._queue.has(run.run_id):
            self._settle_future(future_id, failure(RunLost(f"run {run.run_id} is {run.status}: {_HOW_TO_GO_ON}")))
        elif not self._queue.accepts(run.run_id, seq):
            message = (
                f"seq_id: {seq} of run {run.run_id} had its turn: it was given up, or its result is no longer kept"
            )
            self._settle_future(future_id, Failure(message, "user"))
        else:
            self._queue.put(Operation(run.run_id, run.tenant_id, seq, future_id, work), time.monotonic())
            self._dispatch()
        return future_id

    def start(
        self,
        tenant_id: str,
        work: Barrier,
        *,
        can_cancel: bool = False,
        on_end: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Start ``work`` now, beside the lanes; returns its future's id. ``on_end`` is told that id once the future is
        settled."""
        future_id = self._futures.create(tenant_id)

        async def run() -> FutureResult | Failure:
            return await outcome(work())

        def end(task: asyncio.Task[FutureResult | Failure]) -> None:
            self._settle_future(future_id, _CANCELLED if task.cancelled() else task.result())
            on_end(future_id)

        task = self._spawn(run())
        task.add_done_callback(end)
        if can_cancel:
            self._futures.let_cancel(future_id, task.cancel)
        return future_id

    def watch(self, future_id: str, span: Span) -> None:
        """Settle the span with the future."""
        self._spans[future_id] = span

    async def ask(self, command: Command) -> Any:
        """The engine's reply to one command, after everything submitted before it. Raises what it ended with."""
        (reply,) = self._engine.submit([command])
        return await asyncio.wrap_future(reply)

    def knows(self, future_id: str) -> bool:
        """True while the future's result is pending or kept."""
        return self._futures.known(future_id)

    async def serve(self) -> None:
        """Housekeeping; runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self._sweep()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False if ``timeout_s`` was not enough."""
        deadline = time.monotonic() + timeout_s
        while self._tasks or self._num_unanswered or self._queue.num_ready:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def _dispatch(self) -> None:
        """Start all that may start now."""
        self._passes = [waiting for waiting in self._passes if waiting.num_unanswered]
        while True:
            is_full = len(self._passes) == _MAX_PASSES
            filling = self._passes[-1] if is_full else _Pass()
            parts = self._queue.take(self._engine.pass_tokens - filling.num_rows)
            self._start(parts, filling)
            if filling.num_unanswered and not is_full:
                self._passes.append(filling)
            elif not parts:
                return

    def _start(self, parts: Sequence[Part], filling: _Pass) -> None:
        batch = []
        for part in parts:
            self._spans[part.operation.future_id].start()
            if not isinstance(part.work, RunLoss | OptimStep):
                self._spawn(self._run_barrier(part, part.work))
            elif not self.is_live(part.operation.run_id):
                self._end(part, failure(lost(part.operation.run_id)))
            else:
                batch.append((part, part.work))
        if not batch:
            return
        loop = asyncio.get_running_loop()
        replies = self._engine.submit([command for _, command in batch])
        for (part, _), reply in zip(batch, replies, strict=True):
            in_pass = filling if isinstance(part.work, RunLoss) else None
            if in_pass is not None:
                in_pass.num_rows += part.num_rows
                in_pass.num_unanswered += 1
            self._num_unanswered += 1
            reply.add_done_callback(partial(_on_loop, loop, self._answered, part, in_pass))

    def _answered(self, part: Part, in_pass: _Pass | None, reply: Future[Any]) -> None:
        self._num_unanswered -= 1
        if in_pass is not None:
            in_pass.num_unanswered -= 1
        error = reply.exception()
        self._end(part, failure(error) if isinstance(error, TuftError) else reply.result())
        self._dispatch()

    async def _run_barrier(self, part: Part, barrier: Barrier) -> None:
        self._end(part, await outcome(barrier()))
        self._dispatch()

    def _end(self, part: Part, result: FutureResult | Failure | None) -> None:
        """A part's result; its operation is settled by that of the last."""
        operation = part.operation
        self._queue.finished(part)
        if isinstance(result, Failure) and operation.error is None:
            operation.error = result
        if part.is_last:
            settled = operation.error or result
            assert settled is not None
            self._settle(operation, settled)

    def _settle(self, operation: Operation, result: FutureResult | Failure) -> None:
        if isinstance(result, Failure):
            log.info("operation failed", run=operation.run_id, seq=operation.seq, error=result.message)
        self._settle_future(operation.future_id, result)

    def _settle_future(self, future_id: str, result: FutureResult | Failure) -> None:
        self._futures.settle(future_id, result)
        span = self._spans.pop(future_id, None)
        if span is not None:
            self._activity.settled(span, result)

    def _sweep(self) -> None:
        for operation in self._queue.give_up_gaps(time.monotonic(), self._seq_gap_timeout_s):
            message = (
                f"operation {operation.seq} waited {self._seq_gap_timeout_s:g} s for an earlier seq_id of run "
                f"{operation.run_id} that never came"
            )
            self._settle(operation, Failure(message, "server"))
        self._futures.sweep()
        self._future_of_seq = {
            key: future_id for key, future_id in self._future_of_seq.items() if self._futures.known(future_id)
        }


def _on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Call back on ``loop``, from the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody waits any more
        loop.call_soon_threadsafe(callback, *args)


_HOW_TO_GO_ON = (
    "continue from its last checkpoint with create_training_client_from_state_with_optimizer(path), "
    "or create a new training client"
)


def lost(run_id: str) -> RunLost:
    """The engine restarted (or the server did) while the run was live."""
    return RunLost(f"run {run_id} was lost when the engine restarted: load_state(path) revives it; or {_HOW_TO_GO_ON}")
