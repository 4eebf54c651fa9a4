"""The service floor put together, as the api floor sees it, and its housekeeping."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from tuft.config import Config
from tuft.engine.base import Engine
from tuft.errors import StorageError
from tuft.service.activity import Activity
from tuft.service.audit import Audit
from tuft.service.checkpoints import Checkpoints
from tuft.service.completions import Completions
from tuft.service.copies import Copies
from tuft.service.custom_losses import CustomLosses
from tuft.service.downloads import Downloads
from tuft.service.futures import Futures
from tuft.service.models import BaseModels
from tuft.service.operations import Operations
from tuft.service.projects import Projects
from tuft.service.provenance import Provenance
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.signing import Signer
from tuft.service.tenants import DEFAULT_TENANT, Tenants
from tuft.service.traces import Traces
from tuft.service.usage import Usage
from tuft.store.audit import AuditLog
from tuft.store.awaited import AwaitedSamples
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.custom_losses import CustomLossTable
from tuft.store.db import Database
from tuft.store.secret import load_secret
from tuft.store.sequences import Sequences
from tuft.store.sessions import SessionCatalog
from tuft.store.usage import UsageTable
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
        secret = load_secret(config.home)
        self.projects = Projects(config.projects)
        self.audit = Audit(AuditLog(database), limits.audit_retention_days)
        self.tenants = Tenants(catalog, self.audit, secret)
        self.usage = Usage(UsageTable(database), self.projects, limits.usage_retention_days)
        signer = Signer(secret)
        self.traces = Traces(signer)
        self.sessions = Sessions(
            SessionCatalog(database), self.projects, self.audit, self.traces, limits.session_timeout_s
        )
        self.futures = Futures(
            read_retention_s=limits.result_retention_s,
            unread_retention_s=limits.unread_retention_s,
            max_pending_per_tenant=limits.max_pending_per_tenant,
        )
        self.completions = Completions(self.futures, AwaitedSamples(database), limits.unread_retention_s)
        activity = Activity(self.traces, self.usage)
        self._scheduler = Scheduler(engine, self.futures, activity, limits.seq_gap_timeout_s)
        self.models = BaseModels(engine)
        self.checkpoints = Checkpoints(
            CheckpointCatalog(database), checkpoints_root(config.home), self.tenants, self.projects, self.audit
        )
        self.copies = Copies(catalog, self.sessions, self.checkpoints)
        self.downloads = Downloads(self.checkpoints, signer)
        parts = (catalog, engine, self._scheduler, self.models, self.sessions, self.checkpoints, limits)
        self.runs = Runs(*parts, self.projects)
        self.provenance = Provenance(Sequences(database))
        self.samplers = Samplers(*parts, self.provenance, self.completions, activity)
        self.custom_losses = CustomLosses(CustomLossTable(database), self._scheduler, self.sessions)
        self.operations = Operations(
            self._scheduler,
            self.models,
            self.runs,
            self.checkpoints,
            self.samplers,
            self.provenance,
            self.custom_losses,
        )
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
        num_samples = self.completions.start()
        num_swept = await self.checkpoints.sweep()
        if num_lost or num_samples or num_swept:
            log.info(
                "after an earlier server", runs_lost=num_lost, samples_lost=num_samples, half_written_deleted=num_swept
            )
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._scheduler.serve()), loop.create_task(self._sweep())]

    async def stop(self) -> None:
        """Let queued work end (at most ``server.drain_timeout_s``), answer every held poll, stop the loops."""
        if not await self._scheduler.drain(self.config.server.drain_timeout_s):
            log.warning("work was left unfinished", pending=self.futures.num_pending)
        self.futures.release_waiters()
        self.completions.release_polls()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.runs.sweep()
        self.completions.sweep()
        self.usage.flush()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            for sweep in (
                self.runs.sweep,
                self.samplers.sweep,
                self.completions.sweep,
                self.custom_losses.sweep,
                self.provenance.sweep,
                self.checkpoints.expire,
                self.sessions.sweep,
                self.usage.sweep,
                self.audit.sweep,
            ):
                try:
                    sweep()
                except StorageError as error:  # the next round may do better
                    log.error("housekeeping failed", error=str(error))


def open_tenants(config: Config, database: Database) -> Tenants:
    """The tenants alone, for a command beside a running server."""
    audit = Audit(AuditLog(database), config.limits.audit_retention_days)
    return Tenants(Catalog(database), audit, load_secret(config.home))


def checkpoints_root(home: Path) -> Path:
    return home / "checkpoints"
