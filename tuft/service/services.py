"""The service floor put together, as the api floor sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from tuft.config import ALL_SCOPES, Config
from tuft.engine.base import Engine
from tuft.fairness import Costs, VirtualCounters
from tuft.machine import memory_bytes
from tuft.service.activity import Activity
from tuft.service.admission import Admission, SampleLine
from tuft.service.audit import Audit
from tuft.service.calls import ENCODING
from tuft.service.checkpoints import Checkpoints
from tuft.service.completions import Completions
from tuft.service.copies import Copies
from tuft.service.custom_losses import CustomLosses
from tuft.service.downloads import Downloads
from tuft.service.futures import Futures
from tuft.service.housekeeping import Housekeeping, keep_house
from tuft.service.loading import Loading
from tuft.service.models import BaseModels
from tuft.service.operations import Operations
from tuft.service.ownership import Ownership
from tuft.service.pace import Pace
from tuft.service.prices import Prices
from tuft.service.projects import Projects
from tuft.service.provenance import Provenance
from tuft.service.queue import OperationQueue
from tuft.service.quotas import Quotas
from tuft.service.recovery import Recovered, Recovery
from tuft.service.residency import Residency
from tuft.service.retention import Retention
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.signing import Signer
from tuft.service.snapshots import Snapshots
from tuft.service.tenants import DEFAULT_TENANT, SERVER, Tenants
from tuft.service.traces import Traces
from tuft.service.usage import Usage
from tuft.service.waits import Waits
from tuft.store.audit import AuditLog
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.custom_losses import CustomLossTable
from tuft.store.db import Database
from tuft.store.journal import Journal
from tuft.store.ownership import Owners
from tuft.store.paces import PaceTable
from tuft.store.quotas import QuotaTable
from tuft.store.secret import load_secret
from tuft.store.sequences import Sequences
from tuft.store.sessions import SessionCatalog
from tuft.store.spool import Spool
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import UsageTable
from tuft.types import BaseModelInfo

log = structlog.get_logger(__name__)

_SHARE_OF_MEMORY = 0.4


class Services:
    """One of each service, on one catalog and one engine."""

    def __init__(self, config: Config, database: Database, engine: Engine) -> None:
        self.config = config
        self._engine = engine
        self._catalog = Catalog(database)
        self._journal = Journal(database, Spool(config.home / "journal"))
        self.models = BaseModels(engine)
        signer = self._build_accounts(database)
        activity = self._build_scheduler(database)
        self.checkpoints = Checkpoints(
            CheckpointCatalog(database),
            checkpoints_root(config.home),
            config.storage,
            self.tenants,
            self.projects,
            self.audit,
        )
        self.copies = Copies(self._catalog, self.sessions, self.checkpoints)
        self.downloads = Downloads(self.checkpoints, signer)
        self._build_work(database, activity)
        self._recovery = Recovery(self._journal, self.futures, self.runs, self.samplers, self.custom_losses)
        self._tasks: list[asyncio.Task[None]] = []

    def _build_accounts(self, database: Database) -> Signer:
        """Who may do what, and what it costs them."""
        config, limits = self.config, self.config.limits
        secret = load_secret(config.home)
        self.audit = Audit(AuditLog(database), limits.audit_retention_days)
        self.ownership = Ownership(Owners(database), self.audit)
        self.projects = Projects(config.projects, self.ownership.told_of_project)
        self.tenants = Tenants(TenantCatalog(database), self.audit, secret)
        ledger = UsageTable(database)
        self._pace = Pace(PaceTable(database))
        self.prices = Prices(config.prices)
        self.quotas = Quotas(QuotaTable(database), ledger, self.prices, config)
        self.usage = Usage(ledger, self.projects, self.prices, self.quotas, self._pace, limits.usage_retention_days)
        signer = Signer(secret)
        self.traces = Traces(signer)
        self.sessions = Sessions(
            SessionCatalog(database),
            self.projects,
            self.audit,
            self.traces,
            limits.session_timeout_s,
            limits.max_sessions_per_tenant,
        )
        return signer

    def _build_scheduler(self, database: Database) -> Activity:
        """From an accepted request to its result, whatever dies in between."""
        config, limits, engine = self.config, self.config.limits, self._engine
        retention = Retention(self._journal, limits.result_retention_s, limits.unread_retention_s)
        self.futures = Futures(
            self._journal, ENCODING, self.quotas, retention, cache_bytes=config.journal.cached_result_bytes
        )
        self.completions = Completions(self.futures)
        self.provenance = Provenance(Sequences(database))
        activity = Activity(self.traces, self.usage, self._pace, self.models, self.ownership)
        costs = Costs(**config.fairness.model_dump(exclude={"weights"}))
        self._counters = VirtualCounters()
        queue = OperationQueue(counters=self._counters, costs=costs)
        self._scheduler = Scheduler(
            engine, self.futures, activity, limits.seq_gap_timeout_s, config.journal.held_request_bytes, queue
        )
        line = SampleLine(self._counters, costs, config.engine.max_decode_rows, config.engine.kv_cache_tokens)
        self._admission = Admission(line)
        self.waits = self.futures.waits = Waits(queue, self._scheduler.passes, line, self._counters)
        durable = (self._journal, self.futures, self._scheduler)
        self._snapshots = Snapshots(config.home / "snapshots", *durable, config.journal.snapshot_interval_s)
        self.residency = Residency(engine, *durable, self._snapshots, self.models, run_memory_bytes(config))
        self._scheduler.residence = self.residency
        return activity

    def _build_work(self, database: Database, activity: Activity) -> None:
        """What tenants ask for."""
        scheduler, limits = self._scheduler, self.config.limits
        parts = (self._catalog, self._engine, scheduler, self.models, self.sessions, self.checkpoints, limits)
        self.runs = Runs(*parts, self.projects, self._journal, self.residency, self._snapshots, self.quotas)
        Loading(scheduler, self.runs, self.checkpoints, self._snapshots, self.residency)
        self.samplers = Samplers(*parts, self.provenance, self.completions, activity, self.futures, self._admission)
        self.custom_losses = CustomLosses(
            CustomLossTable(database), scheduler, self.sessions, self.futures, limits.max_custom_losses
        )
        self.operations = Operations(
            scheduler, self.models, self.runs, self.checkpoints, self.samplers, self.provenance, self.custom_losses
        )

        self._housekeeping = Housekeeping(
            (
                self.runs.sweep,
                self.samplers.sweep,
                self.custom_losses.sweep,
                self.provenance.sweep,
                self.checkpoints.expire,
                self.sessions.sweep,
                self.usage.sweep,
                self.tenants.sweep,
                self.audit.sweep,
                self._forget,
            )
        )

    @property
    def base_models(self) -> Sequence[BaseModelInfo]:
        return self.models.all

    async def start(self) -> None:
        """Begin to work: accept the configured keys, note what an earlier server lost, start the loops."""
        for section in self.config.keys:
            self.tenants.accept(section.tenant, section.key.get_secret_value(), section.scopes)
        if self.config.api_key is not None:
            self.tenants.accept(DEFAULT_TENANT, self.config.api_key.get_secret_value(), ALL_SCOPES)
        for name, weight in self.config.fairness.weights.items():
            self._counters.set_weight(self.tenants.ensure(name, SERVER).tenant_id, weight)
        num_swept = await self.checkpoints.sweep()
        await asyncio.to_thread(self._journal.sweep_files)
        await asyncio.to_thread(self._snapshots.start)
        recovered = await self._recovery.recover()
        if recovered != Recovered(0, 0, 0) or num_swept:
            log.warning(
                "taken up from an earlier server",
                runs=recovered.num_runs,
                operations=recovered.num_operations,
                samples=recovered.num_samples,
                half_written_deleted=num_swept,
            )
        loop = asyncio.get_running_loop()
        loops = (
            self._scheduler.serve(),
            self.residency.serve(),
            self.checkpoints.verification.serve(),
            self.ownership.serve(),
        )
        self._tasks = [loop.create_task(work) for work in loops]
        self._housekeeping.start()

    async def stop(self) -> None:
        """Let queued work end (at most ``server.drain_timeout_s``), answer every held poll, stop the loops."""
        if not await self._scheduler.drain(self.config.server.drain_timeout_s):
            log.warning("work was left unfinished", pending=self.futures.num_pending)
        self.futures.release_waiters()
        self.completions.release_polls()
        await self._housekeeping.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.residency.stop(self.config.server.drain_timeout_s)
        for last in (self.runs.sweep, self.usage.flush, self.tenants.flush, self.ownership.look_into_all, self._forget):
            await keep_house(last)
        await asyncio.to_thread(self.futures.writing.close)

    async def _forget(self) -> None:
        self.completions.sweep()
        self.completions.forget(await self.futures.sweep())


def open_tenants(config: Config, database: Database) -> Tenants:
    """The tenants alone, for a command beside a running server."""
    audit = Audit(AuditLog(database), config.limits.audit_retention_days)
    return Tenants(TenantCatalog(database), audit, load_secret(config.home))


def checkpoints_root(home: Path) -> Path:
    return home / "checkpoints"


def run_memory_bytes(config: Config) -> int:
    """What the adapters and optimizers of training runs may take of memory."""
    if config.engine.run_memory_gib is not None:
        return int(config.engine.run_memory_gib * 2**30)
    limit = config.engine.memory_limit_gib
    return int(_SHARE_OF_MEMORY * (memory_bytes() if limit is None else limit * 2**30))
