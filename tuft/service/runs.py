"""Training runs: how they begin, who owns them, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from secrets import randbits

from tuft.config import LimitsSection
from tuft.engine.base import CreateAdapter, DropAdapter, Engine, LoadAdapter
from tuft.errors import EngineDied, InvalidInput, NotFound, RunLost, TuftError, refusing
from tuft.footprint import check_adapter
from tuft.records import FutureKey, JournaledFuture, Run, RunStatus, Shared, Tenant, now
from tuft.service.calls import CreateRun, CreateRunFromCheckpoint, UnloadRun
from tuft.service.checkpoints import Checkpoints, require_same
from tuft.service.models import BaseModels
from tuft.service.projects import Projects
from tuft.service.queue import Operation
from tuft.service.quotas import Quotas
from tuft.service.residency import Residency
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.snapshots import Snapshots
from tuft.service.validation import check_lora, check_seq
from tuft.store.catalog import Catalog
from tuft.store.journal import Journal
from tuft.types import FutureResult, LoraSpec, Optimizer, RunCreated, RunUnloaded

_CREATION_SEQ = 0  # the SDK counts a run's operations from 1; its creation is the one before


class Runs:
    """Runs of all tenants; the live ones also in memory."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        scheduler: Scheduler,
        models: BaseModels,
        sessions: Sessions,
        checkpoints: Checkpoints,
        limits: LimitsSection,
        projects: Projects,
        journal: Journal,
        residency: Residency,
        snapshots: Snapshots,
        quotas: Quotas,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._scheduler = scheduler
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._limits = limits
        self._projects = projects
        self._journal = journal
        self._residency = residency
        self._snapshots = snapshots
        self._quotas = quotas
        self._open: dict[str, Run] = {}
        self._touched: dict[str, datetime] = {}
        residency.lose = self._lose
        scheduler.perform(CreateRun, self._create)

    async def create(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, str],
        optimizer: Optimizer = "adamw",
    ) -> str:
        """A new run with a fresh adapter; returns the future of its RunCreated.

        Raises InvalidInput, NotFound (session), QuotaExceeded, or what ``Futures.accept`` raises; a retry of (session,
        model_seq_id) gets the first call's future.
        """
        model = self._models.require(base_model)
        check_lora(spec, self._limits)
        check_adapter(spec, model)
        sent = CreateRun(base_model, spec, optimizer, user_metadata)
        seeded = replace(spec, seed=randbits(31)) if spec.seed is None else spec  # so that it can begin again
        return await self._begin(tenant, session_id, model_seq_id, model.name, seeded, optimizer, "create_model", sent)

    async def create_from_checkpoint(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        path: str,
        with_optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, str],
        access_token: str | None,
        optimizer: Optimizer | None = None,
    ) -> str:
        """A new run that begins with a checkpoint's weights, and with its optimizer and that one's state if
        ``with_optimizer``; else with a fresh ``optimizer``, AdamW unless it is given, whatever the checkpoint's was."""
        sent = CreateRunFromCheckpoint(path, with_optimizer, base_model, optimizer, user_metadata)
        readers = self._checkpoints.readers(tenant, access_token)
        checkpoint = self._checkpoints.loadable(readers, path)
        model = self._models.require(checkpoint.base_model if base_model is None else base_model)
        if model.name != self._models.require(checkpoint.base_model).name:
            raise InvalidInput("base_model", base_model, f"the checkpoint belongs to {checkpoint.base_model}")
        check_lora(checkpoint.spec, self._limits)
        check_adapter(checkpoint.spec, model)
        family = optimizer or (checkpoint.optimizer if with_optimizer else "adamw")
        if with_optimizer:
            require_same(checkpoint, family)
        name = "create_model_from_checkpoint"
        return await self._begin(
            tenant, session_id, model_seq_id, model.name, checkpoint.spec, family, name, sent, readers
        )

    # --- when their turn has come -------------------------------------------------------------------------------------

    async def _create(self, operation: Operation, _call: CreateRun) -> FutureResult:
        run = self.open_one(operation.run_id)
        with self.closing_if_it_fails(run):
            await self.place(run, CreateAdapter(run.run_id, run.base_model, run.spec, run.optimizer))
        return RunCreated(run.run_id)

    # --- finding and ending them --------------------------------------------------------------------------------------

    def open_one(self, run_id: str) -> Run:
        """A run that takes operations; raises RunLost if it has ended."""
        run = self._open.get(run_id)
        if run is None:
            raise RunLost(f"run {run_id} has ended")
        return run

    def get(self, tenant: Tenant, run_id: str) -> Run:
        """The tenant's run of that id; raises NotFound."""
        run = self._open.get(run_id)
        if run is None or not tenant.owns(run):
            run = self._catalog.run(tenant, run_id)
        if run is None:
            raise _unknown(run_id)
        return self._as_touched(run)

    def find(self, tenant: Tenant, run_id: str, accessible: bool) -> Run:
        """The tenant's run of that id, or if ``accessible`` one of a project it shares; raises NotFound."""
        run = self._catalog.run_within_reach(tenant, self._shared(tenant, accessible), run_id)
        if run is None:
            raise _unknown(run_id)
        return self._as_touched(run)

    def list(
        self, tenant: Tenant, limit: int, offset: int, accessible: bool = False, project_id: str | None = None
    ) -> tuple[list[Run], int]:
        """One page of what ``find`` finds, newest first, and the number of all; of one project, if that is given."""
        runs, total = self._catalog.runs(tenant, limit, offset, self._shared(tenant, accessible), project_id)
        return [self._as_touched(run) for run in runs], total

    def owner_names(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """Tenant id to name, of those who own ``runs``."""
        return self._catalog.tenant_names({run.tenant_id for run in runs})

    def owner(self, run: Run) -> Tenant:
        return Tenant(run.tenant_id, self._catalog.tenant_names([run.tenant_id])[run.tenant_id])

    def touch(self, run: Run) -> None:
        """Note a request; written to the catalog now and then."""
        self._touched[run.run_id] = now()

    async def unload(self, tenant: Tenant, run_id: str) -> str:
        """End a run: its adapter leaves the engine, its checkpoints stay. Returns the future of its RunUnloaded."""
        run = self.get(tenant, run_id)
        key = FutureKey("unload", run_id, 0)
        return await self._scheduler.errands.start(tenant, key, UnloadRun(run_id), lambda: self._unload(run))

    def resume(self, pending: Sequence[JournaledFuture], operations: Mapping[str, Sequence[Operation]]) -> int:
        """After a restart: open the runs that were open, with the ``operations`` that each had waiting, and end those
        that were to end (``pending``). Returns how many are open."""
        for run in self._catalog.open_runs():
            waiting = operations.get(run.run_id, ())
            next_seq, is_begun = self._journal.position(run.run_id)
            if not is_begun and not any(operation.seq == _CREATION_SEQ for operation in waiting):
                self._forget_unborn(run, next_seq)
                continue
            self._open[run.run_id] = run
            self._residency.open(run)
            self._scheduler.open(run, next_seq, waiting)
        num_open = len(self._open)
        for known in pending:
            ending = self._open.get(known.key.subject_id)
            work = partial(_unloaded, known.key.subject_id) if ending is None else partial(self._unload, ending)
            self._scheduler.errands.resume(known.future_id, work)
        return num_open

    def _forget_unborn(self, run: Run, next_seq: int) -> None:
        if next_seq > _CREATION_SEQ:
            self._catalog.set_run_status(run.run_id, "failed")
        else:  # it was never acknowledged: its client asks again
            self._catalog.delete_run(run.run_id)

    async def _unload(self, run: Run) -> FutureResult:
        present = self._open.get(run.run_id, run)
        self._close(present, "unloaded" if present.status in ("creating", "live") else present.status)
        return RunUnloaded(run.run_id)

    async def sweep(self) -> None:
        """Write what ``touch`` noted, and unload the runs whose session is over: no client can reach them any more."""
        if self._touched:
            touched = dict(self._touched)
            await asyncio.to_thread(self._catalog.touch_runs, touched)
            self._touched = {key: at for key, at in self._touched.items() if touched.get(key) != at}
        for run in list(self._open.values()):
            if self._sessions.is_over(run.session_id):
                self._close(run, "unloaded" if run.status == "live" else run.status)

    def _as_touched(self, run: Run) -> Run:
        return replace(run, last_request_at=self._touched.get(run.run_id, run.last_request_at))

    def _shared(self, tenant: Tenant, accessible: bool) -> Shared:
        return self._projects.shared_with(tenant) if accessible else {}

    async def _begin(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        optimizer: Optimizer,
        name: str,
        sent: CreateRun | CreateRunFromCheckpoint,
        readers: tuple[Tenant, ...] = (),
    ) -> str:
        """Register the run and journal its beginning."""
        self._sessions.require(tenant, session_id)
        check_seq(model_seq_id, "model_seq_id")
        run_id = f"{session_id}:train:{model_seq_id}"
        known = self._open.get(run_id) or self._catalog.run(tenant, run_id)
        run = known or self._register(tenant, run_id, session_id, model_seq_id, base_model, spec, optimizer, sent)

        def make() -> CreateRun | CreateRunFromCheckpoint:
            return replace(sent, readers=readers) if isinstance(sent, CreateRunFromCheckpoint) else sent

        try:
            return await self._scheduler.submit(tenant, run, _CREATION_SEQ, name, sent, make)
        except TuftError:
            if known is None:  # as if it had never been asked for
                self._close(run, "failed")
                self._catalog.delete_run(run_id)
            raise

    def _register(
        self,
        tenant: Tenant,
        run_id: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        optimizer: Optimizer,
        sent: CreateRun | CreateRunFromCheckpoint,
    ) -> Run:
        moment = now()
        run = Run(
            run_id=run_id,
            tenant_id=tenant.tenant_id,
            session_id=session_id,
            model_seq_id=model_seq_id,
            base_model=base_model,
            spec=spec,
            status="creating",
            created_at=moment,
            last_request_at=moment,
            user_metadata=dict(sent.user_metadata),
            optimizer=optimizer,
            key_number=tenant.key_number,
        )
        self._quotas.require_run(tenant, run, self._open.values(), self._models, self._residency.holds)
        self._catalog.add_run(run)
        self._open[run_id] = run
        self._residency.open(run)
        self._scheduler.open(run, _CREATION_SEQ)
        return run

    @contextmanager
    def closing_if_it_fails(self, run: Run) -> Iterator[None]:
        """A run that never began takes no more operations."""
        try:
            yield
        except EngineDied:
            raise
        except TuftError:
            if run.run_id in self._open:
                self._close(run, "failed")
            raise

    async def place(self, run: Run, command: CreateAdapter | LoadAdapter) -> None:
        """Put the run's adapter into the engine; from then on the run is live."""
        async with self._residency.room(run):
            generation = self._engine.generation
            await self._scheduler.replies.ask(command)
            if run.run_id not in self._open:  # unloaded meanwhile
                await self._scheduler.replies.ask(DropAdapter(run.run_id))
                raise RunLost(f"run {run.run_id} was unloaded before it could begin")
            self._residency.placed(run.run_id, generation)
        self._set_status(run, "live")

    def _lose(self, run: Run, reason: RunLost) -> None:
        """The run's state cannot be had any more."""
        self._set_status(run, "lost")
        self._scheduler.close(run.run_id, reason)
        self._open.pop(run.run_id, None)

    def _set_status(self, run: Run, status: RunStatus) -> None:
        if run.status != status:
            self._catalog.set_run_status(run.run_id, status)
        if run.run_id in self._open:
            self._open[run.run_id] = replace(run, status=status)

    def _close(self, run: Run, status: RunStatus) -> None:
        self._set_status(run, status)
        self._open.pop(run.run_id, None)
        self._scheduler.close(run.run_id, RunLost(f"run {run.run_id} is {status}"))
        self._residency.close(run.run_id)


async def _unloaded(run_id: str) -> FutureResult:
    return RunUnloaded(run_id)


def _unknown(run_id: str) -> NotFound:
    return refusing("run", run_id, NotFound(f"model_id: {run_id!r} is unknown"))
