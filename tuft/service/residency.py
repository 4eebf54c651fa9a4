"""Which training runs the engine holds. The others are on the disk: a snapshot, and the operations since.

A run is brought in when an operation of it has its turn: after the engine or the server died, or because it had left to
make room. Snapshot and operations give its exact state, since the engine computes the same from the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace

import structlog

from tuft.engine.base import CreateAdapter, DropAdapter, Engine, LoadAdapter, OptimStep, RunLoss
from tuft.errors import Damaged, EngineDied, InvalidInput, RunLost, TuftError, UserError
from tuft.footprint import resident_bytes
from tuft.records import JournaledFuture, Run
from tuft.service.aside import Aside
from tuft.service.calls import CreateRun
from tuft.service.futures import Futures
from tuft.service.models import BaseModels
from tuft.service.queue import cut_loss
from tuft.service.scheduler import HOW_TO_GO_ON, Scheduler
from tuft.service.snapshots import Snapshots
from tuft.store.journal import REPLAYED, Journal

log = structlog.get_logger(__name__)

_PAUSE_S, _POLL_S = 0.5, 0.01
_MAX_REPLAYED_AT_ONCE = 8
"""Operations with the engine at a time while a run is computed anew."""
_SWEEP_INTERVAL_S = 0.25


class Residency:
    """Runs of all tenants. ``max_bytes`` bounds what those that the engine holds need together; the least used
    leave."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        futures: Futures,
        scheduler: Scheduler,
        snapshots: Snapshots,
        models: BaseModels,
        max_bytes: int,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._futures = futures
        self._scheduler = scheduler
        self._snapshots = snapshots
        self._models = models
        self._max_bytes = max_bytes
        self._runs: dict[str, Run] = {}  # those that are open
        self._generations: OrderedDict[str, int] = OrderedDict()  # run -> engine generation; least used first
        self._leaving: set[str] = set()
        self._coming: set[str] = set()  # there is room for them, and they are not in the engine yet
        self._making_room = asyncio.Lock()
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._aside = Aside()
        self.lose: Callable[[Run, RunLost], None]
        """Ends a run whose state cannot be had any more. Set when the floor is put together."""

    def open(self, run: Run) -> None:
        """The run may be brought in from now on."""
        self._runs[run.run_id] = run

    def close(self, run_id: str) -> None:
        """The run has ended: neither the engine nor the disk needs to hold it."""
        self._runs.pop(run_id, None)
        self._aside.forget(run_id)
        if run_id in self._bringing:
            self._engine.submit([DropAdapter(run_id)])
        self.discard(run_id)
        self._snapshots.forget(run_id)

    def placed(self, run_id: str, generation: int) -> None:
        """The run's adapter was put into the engine when it had that generation."""
        self._generations[run_id] = generation
        self._generations.move_to_end(run_id)
        self._aside.forget(run_id)

    def refusal(self, run_id: str) -> str | None:
        """Why the run cannot be brought in, if that will not change soon."""
        run = self._runs.get(run_id)
        if run is not None and self._models.all:
            try:
                self._models.require(run.base_model)
            except InvalidInput as error:
                return f"run {run_id} cannot compute here: {error}. It goes on when its base model is configured again"
        return self._aside.reason(run_id)

    def discard(self, run_id: str) -> None:
        """What the engine has of the run is not its state: it comes back from the disk."""
        if self._generations.pop(run_id, None) is not None:
            self._engine.submit([DropAdapter(run_id)])

    def is_resident(self, run_id: str) -> bool:
        if not self.holds(run_id) or run_id in self._leaving:
            return False
        self._generations.move_to_end(run_id)
        return True

    def changed(self, run_id: str) -> None:
        self._snapshots.changed(run_id)

    @property
    def num_resident(self) -> int:
        return sum(map(self.holds, self._generations))

    def bring(self, run_id: str) -> None:
        if run_id in self._runs and run_id not in self._bringing:
            self._bringing[run_id] = asyncio.get_running_loop().create_task(self._bring(run_id))

    @asynccontextmanager
    async def room(self, run: Run) -> AsyncIterator[None]:
        """Memory for ``run``, which is put into the engine meanwhile: the least used runs leave for it. One that
        computes stays until it has."""
        if self.holds(run.run_id):  # nor may it wait for others, which may wait for it
            yield
            return
        async with self._making_room:
            await self._make_room(run)
            self._coming.add(run.run_id)
        try:
            yield
        finally:
            self._coming.discard(run.run_id)

    async def serve(self) -> None:
        """Write snapshots when they are due; runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            run_id = self._snapshots.due()
            if run_id is None:
                continue
            if run_id not in self._runs or not self.holds(run_id):
                self._snapshots.unchanged(run_id)
                continue
            began_s = time.monotonic()
            try:
                await self._snapshots.take(self._runs[run_id])
            except TuftError as error:  # the journal has what the snapshot would have covered
                log.error("no snapshot", run=run_id, error=str(error))
            self._snapshots.pause_after(began_s)

    async def stop(self, timeout_s: float) -> None:
        """Write down what has changed, as far as time allows, so that the next server has little to do."""
        for task in self._bringing.values():
            task.cancel()
        deadline = time.monotonic() + timeout_s
        for run_id in list(self._generations):
            if time.monotonic() < deadline and self.is_resident(run_id) and not self._snapshots.is_current(run_id):
                try:
                    await self._snapshots.take(self._runs[run_id])
                except TuftError as error:
                    log.error("no snapshot", run=run_id, error=str(error))

    # --- in and out ---------------------------------------------------------------------------------------------------

    async def _bring(self, run_id: str) -> None:
        generation, was_ready = self._engine.generation, False
        try:
            async with self._turn:  # one after the other: each is ready soonest, and memory is counted
                while self._scheduler.is_running(run_id):  # noqa: ASYNC110 (what the last engine held is put back)
                    await asyncio.sleep(_POLL_S)
                run = self._runs.get(run_id)
                if run is not None and not self.holds(run_id):
                    async with self._scheduler.alone() if self._aside.is_suspect(run_id) else nullcontext():
                        generation, was_ready = self._engine.generation, bool(self._engine.base_models)
                        await self._place(run)
        except EngineDied:
            is_blamed = was_ready and self._engine.generation != generation and run_id in self._runs
            await asyncio.sleep(self._aside.died(run_id) if is_blamed else _PAUSE_S)
        except Damaged as error:
            text = f"run {run_id} cannot be brought back: {error}; {HOW_TO_GO_ON}"
            log.error("run lost", run=run_id, error=str(error))
            lost = self._runs.pop(run_id, None)
            if lost is not None:  # else it has ended, and its snapshot with it
                self.lose(lost, RunLost(text))
        except TuftError as error:  # the disk or the database may do better soon, or the next server has the model
            log.error("a run cannot be brought back yet", run=run_id, error=str(error))
            await asyncio.sleep(_PAUSE_S)
        finally:
            del self._bringing[run_id]
        self._scheduler.dispatch()

    async def _place(self, run: Run) -> None:
        async with self.room(run):
            generation = self._engine.generation
            async with self._snapshots.holding(run.run_id):
                await self._restore(run)
            if run.run_id in self._runs:
                self.placed(run.run_id, generation)
            else:  # ended meanwhile
                self._engine.submit([DropAdapter(run.run_id)])

    async def _make_room(self, run: Run) -> None:
        while True:
            others = [run_id for run_id in self._generations if self.holds(run_id)]
            if sum(map(self._bytes, {*others, *self._coming, run.run_id})) <= self._room(run):
                return
            if not others and not self._coming:
                return  # it needs more than there is, all by itself
            leaving = next((run_id for run_id in others if not self._scheduler.is_running(run_id)), None)
            if leaving is not None and not await self._leave(leaving):
                return  # the disk does not take it: rather too much memory than a run that is gone
            await asyncio.sleep(_POLL_S)

    def _room(self, run: Run) -> int:
        """Bytes that the engine's memory, and the setting, leave for all adapters together."""
        memory = self._models.require(run.base_model).memory
        return self._max_bytes if memory is None else min(self._max_bytes, memory.adapter_bytes)

    async def _restore(self, run: Run) -> None:
        """Raises TuftError."""
        began_s = time.monotonic()
        await self._futures.writing.flush()  # a result that was not journaled yet would not be computed again
        snapshot = await asyncio.to_thread(self._journal.snapshot, run.run_id)
        entries = await asyncio.to_thread(self._journal.of_run, run.run_id, -1 if snapshot is None else snapshot.seq)
        done = [entry for entry in entries if entry.outcome in ("ok", "spent")]
        if snapshot is not None:
            state = await self._snapshots.read(snapshot)
            state = replace(state, spec=run.spec, optimizer=run.optimizer)
            await self._scheduler.replies.ask(LoadAdapter(run.run_id, run.base_model, state, trainable=True))
        else:
            if not done or not isinstance(await self._futures.request(done[0].future_id), CreateRun):
                raise Damaged("neither a snapshot nor its beginning is on the disk")
            await self._scheduler.replies.ask(CreateAdapter(run.run_id, run.base_model, run.spec, run.optimizer))
        num_replayed = await self._replay(run, done)
        if num_replayed:
            elapsed_s = time.monotonic() - began_s
            log.warning("a run is back", run=run.run_id, operations=num_replayed, elapsed_s=round(elapsed_s, 2))

    async def _replay(self, run: Run, done: Sequence[JournaledFuture]) -> int:
        """Compute again what changed the run's state; returns how many operations that were."""
        num_replayed = 0
        replies: list[asyncio.Task[None]] = []
        try:
            for entry in done:
                parts = await self._parts(entry) if entry.name in REPLAYED else []
                num_replayed += bool(parts)
                replies += [asyncio.create_task(self._again(entry, part)) for part in parts]
                while len(replies) >= _MAX_REPLAYED_AT_ONCE:
                    await replies.pop(0)
            await asyncio.gather(*replies)
        finally:
            await asyncio.gather(*replies, return_exceptions=True)
        if num_replayed:
            self._snapshots.changed(run.run_id)
        return num_replayed

    async def _again(self, entry: JournaledFuture, part: RunLoss | OptimStep) -> None:
        try:
            await self._scheduler.replies.ask(part)
        except UserError as error:
            if entry.outcome != "spent":  # which fails as it did the first time
                raise Damaged(f"seq_id {entry.key.seq}, which was done once, now fails: {error}") from error

    async def _parts(self, entry: JournaledFuture) -> Sequence[RunLoss | OptimStep]:
        """What it did to the run's state, in the parts in which it was computed the first time."""
        work = await self._futures.request(entry.future_id)
        if isinstance(work, RunLoss) and work.backward:
            return [part for part, _ in cut_loss(work, f"again-{entry.future_id}", self._engine.pass_tokens)]
        return [work] if isinstance(work, OptimStep) else []

    async def _leave(self, run_id: str) -> bool:
        """Have a run leave the engine. False if it cannot be written down."""
        run = self._runs.get(run_id)
        self._leaving.add(run_id)  # nothing of it starts meanwhile
        try:
            if run is not None and self.holds(run_id) and not self._snapshots.is_current(run_id):
                await self._snapshots.take(run)
        except EngineDied:
            return True  # and so it has left
        except TuftError as error:
            log.error("a run cannot leave the engine", run=run_id, error=str(error))
            return False
        finally:
            self._leaving.discard(run_id)
        if not self._scheduler.is_running(run_id) and self._snapshots.is_current(run_id):
            self._generations.pop(run_id, None)
            self._engine.submit([DropAdapter(run_id)])
        return True

    def holds(self, run_id: str) -> bool:
        return self._generations.get(run_id) == self._engine.generation

    def _bytes(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        if run is None:
            return 0
        model = self._models.require(run.base_model)
        return resident_bytes(model.linear_shapes, run.spec, run.optimizer)
