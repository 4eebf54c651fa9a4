"""The service floor put together, as the api floor sees it, and its housekeeping."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from tuft.config import Config
from tuft.engine.base import Engine
from tuft.service.checkpoints import Checkpoints
from tuft.service.futures import Futures
from tuft.service.models import BaseModels
from tuft.service.operations import Operations
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.tenants import DEFAULT_TENANT, Tenants
from tuft.store.catalog import Catalog
from tuft.store.db import Database
from tuft.types import BaseModelInfo

log = structlog.get_logger(__name__)

_SWEEP_INTERVAL_S = 5.0


class Services:
    """One of each service, on one catalog and one engine."""

    def __init__(self, config: Config, database: Database, engine: Engine) -> None:
        limits = config.limits
        catalog = Catalog(database)
        self.config = config
        self._catalog = catalog
        self._engine = engine
        self.tenants = Tenants(catalog)
        self.sessions = Sessions(catalog, limits.session_timeout_s)
        self.futures = Futures(
            read_retention_s=limits.result_retention_s,
            unread_retention_s=limits.unread_retention_s,
            max_pending_per_tenant=limits.max_pending_per_tenant,
        )
        self._scheduler = Scheduler(engine, self.futures, limits.seq_gap_timeout_s)
        self.models = BaseModels(engine)
        self.checkpoints = Checkpoints(catalog, checkpoints_root(config.home))
        parts = (catalog, engine, self._scheduler, self.models, self.sessions, self.checkpoints, limits)
        self.runs = Runs(*parts)
        self.samplers = Samplers(*parts)
        self.operations = Operations(self._scheduler, self.models, self.runs, self.checkpoints, self.samplers)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def base_models(self) -> Sequence[BaseModelInfo]:
        return self.models.all

    async def start(self) -> None:
        """Begin to work: accept the configured keys, note what an earlier server lost, start the loops."""
        for section in self.config.keys:
            self.tenants.accept(section.tenant, section.key.get_secret_value())
        if self.config.api_key is not None:
            self.tenants.accept(DEFAULT_TENANT, self.config.api_key.get_secret_value())
        num_lost = self._catalog.lose_live_runs()
        num_swept = await self.checkpoints.sweep()
        if num_lost or num_swept:
            log.info("after an earlier server", runs_lost=num_lost, half_written_deleted=num_swept)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._scheduler.serve()), loop.create_task(self._sweep())]

    async def stop(self) -> None:
        """Let queued work end (at most ``server.drain_timeout_s``), answer every held poll, stop the loops."""
        if not await self._scheduler.drain(self.config.server.drain_timeout_s):
            log.warning("work was left unfinished", pending=self.futures.num_pending)
        self.futures.release_waiters()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.runs.sweep()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self.runs.sweep()
            self.samplers.sweep()
            self.checkpoints.expire()


def checkpoints_root(home: Path) -> Path:
    return home / "checkpoints"
