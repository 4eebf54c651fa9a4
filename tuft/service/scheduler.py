"""From an accepted operation to its settled future: one loop that asks the queue, and one pass of losses at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import structlog

from tuft.engine.base import Command, Engine, RunLoss
from tuft.errors import RunLost, TuftError
from tuft.records import Run
from tuft.service.futures import Futures, failure, outcome
from tuft.service.queue import Barrier, Operation, OperationQueue
from tuft.types import Failure, FutureResult

log = structlog.get_logger(__name__)

_SWEEP_INTERVAL_S = 1.0


class Scheduler:
    """Owns the queue. Lives on one event loop; nothing here blocks it."""

    def __init__(self, engine: Engine, futures: Futures, *, pass_tokens: int, seq_gap_timeout_s: float) -> None:
        self._engine = engine
        self._futures = futures
        self._pass_tokens = pass_tokens
        self._seq_gap_timeout_s = seq_gap_timeout_s
        self._queue = OperationQueue()
        self._future_of_seq: dict[tuple[str, int], str] = {}
        self._generation_of_run: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._pass_running = False
        self._tasks: set[asyncio.Task[None]] = set()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def open(self, run: Run, first_seq: int) -> None:
        """Accept operations of ``run`` from ``first_seq`` on."""
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

    def submit(self, run: Run, seq: int, work: RunLoss | Barrier) -> str:
        """Queue ``work`` as operation ``seq`` of ``run``; returns its future's id at once.

        A retry of (run, seq) gets the first call's future. A run that is not open, or a seq that was given up, gives a
        future that has failed already.
        """
        key = (run.run_id, seq)
        known = self._future_of_seq.get(key)
        if known is not None and self._futures.known(known):
            return known
        future_id = self._futures.create(run.tenant_id)
        self._future_of_seq[key] = future_id
        if not self._queue.has(run.run_id):
            self._futures.settle(future_id, failure(RunLost(f"run {run.run_id} is {run.status}: {_HOW_TO_GO_ON}")))
        elif not self._queue.accepts(run.run_id, seq):
            message = (
                f"seq_id: {seq} of run {run.run_id} had its turn: it was given up, or its result is no longer kept"
            )
            self._futures.settle(future_id, Failure(message, "user"))
        else:
            self._queue.put(Operation(run.run_id, run.tenant_id, seq, future_id, work), time.monotonic())
            self._wake.set()
        return future_id

    def start(self, tenant_id: str, work: Barrier) -> str:
        """Start ``work`` now, beside the lanes (samples); returns its future's id."""
        future_id = self._futures.create(tenant_id)

        async def settle() -> None:
            self._futures.settle(future_id, await outcome(work()))

        self._spawn(settle())
        return future_id

    async def ask(self, command: Command) -> Any:
        """The engine's reply to one command, after everything submitted before it. Raises what it ended with."""
        (reply,) = self._engine.submit([command])
        return await asyncio.wrap_future(reply)

    def knows(self, future_id: str) -> bool:
        """True while the future's result is pending or kept."""
        return self._futures.known(future_id)

    async def serve(self) -> None:
        """The loop; runs until cancelled."""
        sweep_at_s = time.monotonic()
        while True:
            self._dispatch()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP_INTERVAL_S):  # before 3.12, wait_for can swallow a cancellation
                    await self._wake.wait()
            self._wake.clear()
            if time.monotonic() - sweep_at_s >= _SWEEP_INTERVAL_S:
                sweep_at_s = time.monotonic()
                self._sweep()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False if ``timeout_s`` was not enough."""
        deadline = time.monotonic() + timeout_s
        while self._tasks or self._queue.num_ready:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    def _dispatch(self) -> None:
        losses = []
        for operation in self._queue.take(0 if self._pass_running else self._pass_tokens):
            if isinstance(operation.work, RunLoss):
                losses.append((operation, operation.work))
            else:
                self._spawn(self._run_barrier(operation, operation.work))
        if losses:
            self._pass_running = True
            self._spawn(self._run_pass(losses))

    async def _run_pass(self, operations: Sequence[tuple[Operation, RunLoss]]) -> None:
        live = []
        for operation, loss in operations:
            if self.is_live(operation.run_id):
                live.append((operation, loss))
            else:
                self._finish(operation, failure(lost(operation.run_id)))

        async def finish(operation: Operation, reply: Future[FutureResult]) -> None:
            self._finish(operation, await outcome(asyncio.wrap_future(reply)))

        try:
            replies = self._engine.submit([loss for _, loss in live])
            answered = zip(live, replies, strict=True)
            await asyncio.gather(*(finish(operation, reply) for (operation, _), reply in answered))
        finally:
            self._pass_running = False
            self._wake.set()

    async def _run_barrier(self, operation: Operation, barrier: Barrier) -> None:
        self._finish(operation, await outcome(barrier()))

    def _finish(self, operation: Operation, result: FutureResult | Failure) -> None:
        self._queue.finished(operation)
        self._settle(operation, result)
        self._wake.set()

    def _settle(self, operation: Operation, result: FutureResult | Failure) -> None:
        if isinstance(result, Failure):
            log.info("operation failed", run=operation.run_id, seq=operation.seq, error=result.message)
        self._futures.settle(operation.future_id, result)

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


_HOW_TO_GO_ON = (
    "continue from its last checkpoint with create_training_client_from_state_with_optimizer(path), "
    "or create a new training client"
)


def lost(run_id: str) -> RunLost:
    """The engine restarted (or the server did) while the run was live."""
    return RunLost(f"run {run_id} was lost when the engine restarted: load_state(path) revives it; or {_HOW_TO_GO_ON}")
