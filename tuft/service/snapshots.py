"""States of runs on the disk, so that a restart has little to do again.

A run that has changed is written down again after ``interval_s``. What has to be computed anew after a crash is what
the engine computed since then, of all runs together: at most ``interval_s`` of its time, and as much again as the
snapshots of other runs took that came first. Writing takes at most a tenth of the time: after a snapshot that took a
second, none begins for nine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex

import structlog

from tuft.engine.base import ExportAdapter
from tuft.errors import StorageError, TuftError
from tuft.records import Run, Snapshot
from tuft.service.futures import Futures
from tuft.service.scheduler import Scheduler
from tuft.store.journal import Journal, Snapshotted
from tuft.store.weights import delete_adapter, read_adapter, sweep, write_adapter
from tuft.types import AdapterState

log = structlog.get_logger(__name__)

_PAUSE_PER_TIME = 9.0
"""Of what a snapshot took: how long the next one waits."""


class Snapshots:
    """At most one a run; a newer one replaces it. ``root``: where they lie."""

    def __init__(self, root: Path, journal: Journal, futures: Futures, scheduler: Scheduler, interval_s: float) -> None:
        self._root = root
        self._journal = journal
        self._futures = futures
        self._scheduler = scheduler
        self._interval_s = interval_s
        self._changed_at_s: dict[str, float] = {}  # runs, and when they first changed since their snapshot
        self._next_at_s = 0.0
        self._locks: dict[str, asyncio.Lock] = {}

    def start(self) -> None:
        """Delete what an earlier server left behind."""
        sweep(self._root)
        self._journal.drop_ended_snapshots()
        named = self._journal.snapshot_directories()
        for path in self._root.glob("*/*"):
            directory = str(path.relative_to(self._root))
            if directory not in named:
                delete_adapter(self._root, directory)

    def changed(self, run_id: str) -> None:
        """The run is no longer as its snapshot has it."""
        self._changed_at_s.setdefault(run_id, time.monotonic())

    def is_current(self, run_id: str) -> bool:
        return run_id not in self._changed_at_s

    async def read(self, snapshot: Snapshot) -> AdapterState:
        """Raises StorageError if it is damaged."""
        return await asyncio.to_thread(
            read_adapter, self._root, snapshot.directory, with_optimizer=True, digest=snapshot.digest
        )

    async def take(self, run: Run) -> bool:
        """Write the run's present state down. False if it cannot be told now which operations that has seen.

        Raises StorageError, or what keeps the engine from giving it out.
        """
        seq = self._scheduler.started_seq(run.run_id)
        if seq is None:
            return False
        changed_at_s = self._changed_at_s.pop(run.run_id, None)
        try:
            state = await self._scheduler.replies.ask(ExportAdapter(run.run_id, with_optimizer=True))
            await self.write(run, seq, state)
        except TuftError:
            self._changed_at_s[run.run_id] = changed_at_s or time.monotonic()
            raise
        return True

    async def write(self, run: Run, seq: int, state: AdapterState) -> None:
        """``state`` is the run's after all operations up to ``seq``, whose results were given to the journal before:
        those stand there first. Raises StorageError."""
        directory = f"{run.run_id}/{seq}-{token_hex(4)}"
        written = await asyncio.to_thread(write_adapter, self._root, directory, state, run.base_model)
        note = Snapshotted(Snapshot(run.run_id, seq, directory, written.size_bytes, written.digest))
        async with self.holding(run.run_id):
            before = self._journal.snapshot(run.run_id)
            if before is not None and before.seq > seq:  # a load was faster
                await asyncio.to_thread(delete_adapter, self._root, directory)
                return
            try:
                await self._futures.writing.write(lambda: note)
            except StorageError:
                await asyncio.to_thread(delete_adapter, self._root, directory)
                raise
            if before is not None:
                await asyncio.to_thread(delete_adapter, self._root, before.directory)

    @asynccontextmanager
    async def holding(self, run_id: str) -> AsyncIterator[None]:
        """Meanwhile the run's snapshot stays the one it is, and the operations behind it stay in the journal."""
        lock = self._locks.setdefault(run_id, asyncio.Lock())
        async with lock:
            yield

    def due(self) -> str | None:
        """The run whose turn it is to be written down, if one's is."""
        now_s = time.monotonic()
        if now_s < self._next_at_s or not self._changed_at_s:
            return None
        run_id = min(self._changed_at_s, key=self._changed_at_s.__getitem__)
        return run_id if now_s - self._changed_at_s[run_id] >= self._interval_s else None

    def pause_after(self, began_s: float) -> None:
        """A snapshot that began then has just been taken."""
        now_s = time.monotonic()
        self._next_at_s = now_s + _PAUSE_PER_TIME * (now_s - began_s)

    def unchanged(self, run_id: str) -> None:
        """What the snapshot lacks is in the journal alone: the run is not in memory."""
        self._changed_at_s.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        """The run has ended."""
        self._locks.pop(run_id, None)
        self._changed_at_s.pop(run_id, None)
        directory = self._journal.drop_snapshot(run_id)
        if directory is not None:
            delete_adapter(self._root, directory)
