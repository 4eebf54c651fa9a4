"""Training runs: how they begin, who owns them, how they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from tuft.config import LimitsSection
from tuft.engine.base import Command, CreateAdapter, DropAdapter, Engine, LoadAdapter
from tuft.errors import InvalidInput, NotFound, QuotaExceeded, RunLost, TuftError
from tuft.records import Run, RunStatus, Tenant, now
from tuft.service.checkpoints import Checkpoints
from tuft.service.models import BaseModels
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.validation import check_lora, check_seq
from tuft.store.catalog import Catalog
from tuft.types import AdapterState, FutureResult, LoraSpec, RunCreated, RunUnloaded, WeightsLoaded

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
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._scheduler = scheduler
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._limits = limits
        self._open: dict[str, Run] = {}
        self._touched: dict[str, datetime] = {}

    def create(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, str],
    ) -> str:
        """A new run with a fresh adapter; returns the future of its RunCreated.

        Raises InvalidInput, NotFound (session) or QuotaExceeded at once; a retry of (session, model_seq_id) gets the
        first call's future.
        """
        model = self._models.require(base_model)
        check_lora(spec, self._limits)
        run = self._register(tenant, session_id, model_seq_id, model.name, spec, user_metadata)

        async def begin() -> FutureResult:
            with self._closing_if_it_fails(run):
                await self._place(run, CreateAdapter(run.run_id, run.base_model, run.spec))
            return RunCreated(run.run_id)

        return self._scheduler.submit(run, _CREATION_SEQ, begin)

    def create_from_checkpoint(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        path: str,
        with_optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, str],
    ) -> str:
        """A new run that begins with a checkpoint's weights, and with its optimizer state if ``with_optimizer``."""
        checkpoint = self._checkpoints.get(tenant, path)
        model = self._models.require(checkpoint.base_model if base_model is None else base_model)
        if model.name != self._models.require(checkpoint.base_model).name:
            raise InvalidInput("base_model", base_model, f"the checkpoint belongs to {checkpoint.base_model}")
        check_lora(checkpoint.spec, self._limits)
        run = self._register(tenant, session_id, model_seq_id, model.name, checkpoint.spec, user_metadata)

        async def begin() -> FutureResult:
            with self._closing_if_it_fails(run):
                state = await self._read_state(tenant, path, with_optimizer)
                await self._place(run, LoadAdapter(run.run_id, run.base_model, state, trainable=True))
            return WeightsLoaded(path, run.run_id)

        return self._scheduler.submit(run, _CREATION_SEQ, begin)

    async def load(self, tenant: Tenant, run: Run, path: str, with_optimizer: bool) -> WeightsLoaded:
        """Replace a run's weights by a checkpoint's; its gradients are gone, its moments too unless loaded."""
        checkpoint = self._checkpoints.get(tenant, path)
        for name in ("rank", "train_attn", "train_mlp", "train_unembed"):
            ours, theirs = getattr(run.spec, name), getattr(checkpoint.spec, name)
            if ours != theirs:
                raise InvalidInput("path", path, f"its {name} is {theirs}, the run's is {ours}; they must be equal")
        if checkpoint.base_model != run.base_model:
            raise InvalidInput("path", path, f"it belongs to {checkpoint.base_model}, the run to {run.base_model}")
        state = replace(await self._read_state(tenant, path, with_optimizer), spec=run.spec)
        await self._place(run, LoadAdapter(run.run_id, run.base_model, state, trainable=True))
        return WeightsLoaded(path, run.run_id)

    async def _read_state(self, tenant: Tenant, path: str, with_optimizer: bool) -> AdapterState:
        checkpoint = self._checkpoints.get(tenant, path)
        if with_optimizer and not checkpoint.has_optimizer:
            raise InvalidInput("path", path, "it holds no optimizer state; save_state() makes checkpoints that do")
        return await self._checkpoints.read(checkpoint.directory, with_optimizer=with_optimizer)

    def get(self, tenant: Tenant, run_id: str) -> Run:
        """The tenant's run of that id; raises NotFound."""
        run = self._open.get(run_id)
        if run is None or run.tenant_id != tenant.tenant_id:
            run = self._catalog.run(tenant, run_id)
        if run is None:
            raise NotFound(f"model_id: {run_id!r} is unknown")
        return replace(run, last_request_at=self._touched.get(run_id, run.last_request_at))

    def list(self, tenant: Tenant, limit: int, offset: int) -> tuple[list[Run], int]:
        """One page, newest first, and the number of all."""
        return self._catalog.runs(tenant, limit, offset)

    def touch(self, run: Run) -> None:
        """Note a request; written to the catalog now and then."""
        self._touched[run.run_id] = now()

    def unload(self, tenant: Tenant, run_id: str) -> str:
        """End a run: its adapter leaves the engine, its checkpoints stay. Returns the future of its RunUnloaded."""
        run = self.get(tenant, run_id)

        async def end() -> FutureResult:
            await self._scheduler.ask(DropAdapter(run_id))
            return RunUnloaded(run_id)

        self._close(run, "unloaded" if run.status in ("creating", "live") else run.status)
        return self._scheduler.start(tenant.tenant_id, end)

    def sweep(self) -> None:
        """Write what ``touch`` noted, note which runs the engine's end has taken, and unload those whose session is
        over: no client can reach them any more."""
        if self._touched:
            touched, self._touched = self._touched, {}
            self._catalog.touch_runs(touched)
        for run in list(self._open.values()):
            if run.status == "live" and not self._scheduler.is_live(run.run_id):
                self._set_status(run, "lost")
            if self._sessions.is_over(run.session_id):
                self._close(run, "unloaded" if run.status == "live" else run.status)
                self._engine.submit([DropAdapter(run.run_id)])

    def _register(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, str],
    ) -> Run:
        self._sessions.require(tenant, session_id)
        check_seq(model_seq_id, "model_seq_id")
        run_id = f"{session_id}:train:{model_seq_id}"
        known = self._open.get(run_id) or self._catalog.run(tenant, run_id)
        if known is not None:
            return known
        loaded = [run for run in self._open.values() if run.tenant_id == tenant.tenant_id and not run.corrupted]
        if len(loaded) >= self._limits.max_runs_per_tenant:
            raise QuotaExceeded(
                f"{len(loaded)} runs of yours are loaded; limits.max_runs_per_tenant is "
                f"{self._limits.max_runs_per_tenant}: unload one first"
            )
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
            user_metadata=dict(user_metadata),
        )
        self._catalog.add_run(run)
        self._open[run_id] = run
        self._scheduler.open(run, _CREATION_SEQ)
        return run

    @contextmanager
    def _closing_if_it_fails(self, run: Run) -> Iterator[None]:
        """A run that never began takes no more operations."""
        try:
            yield
        except TuftError:
            if run.run_id in self._open:
                self._close(run, "failed")
            raise

    async def _place(self, run: Run, command: Command) -> None:
        """Put the run's adapter into the engine; from then on the run is live."""
        await self._scheduler.ask(command)
        if run.run_id not in self._open:  # unloaded meanwhile: the engine drops the adapter after this command
            raise RunLost(f"run {run.run_id} was unloaded before it could begin")
        self._scheduler.mark_live(run.run_id)
        self._set_status(run, "live")

    def _set_status(self, run: Run, status: RunStatus) -> None:
        if run.status != status:
            self._catalog.set_run_status(run.run_id, status)
        if run.run_id in self._open:
            self._open[run.run_id] = replace(run, status=status)

    def _close(self, run: Run, status: RunStatus) -> None:
        self._set_status(run, status)
        self._open.pop(run.run_id, None)
        self._scheduler.close(run.run_id, RunLost(f"run {run.run_id} is {status}"))
